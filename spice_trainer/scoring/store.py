"""What scoring found out about every row of a dataset, on disk: written once, read a pool at a time.

    features.f16   (rows, F)   a row divided by its largest magnitude: 2 bytes a kept number
    hidden.f32     (rows, H)   numbers.f64   norms, lengths, losses       hashes.i64   of the rows' tokens
    store.json     what it is of, and how many rows are done

The files are mapped into memory; an interrupted writing goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.utils.files import make_folder, open_regular, read_regular, replace_file

_NUMBERS = ("norms", "lengths", "losses", "losses_alone", "out_of_memory")
_STATE = "store.json"


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What scoring found out about n rows, by row; what the rule does not need is `None`. On the CPU."""

    features: Float[Tensor, "n F"] | None = None
    norms: Float64[Tensor, " n"] | None = None
    lengths: Float64[Tensor, " n"] | None = None
    losses: Float64[Tensor, " n"] | None = None
    losses_alone: Float64[Tensor, " n"] | None = None
    out_of_memory: Bool[Tensor, " n"] | None = None
    hidden: Float[Tensor, "n H"] | None = None


class ScoreStore:
    """The rows' scores in a folder of process 0's; `identity` tells what they are of."""

    def __init__(self, folder: Path, num_rows: int, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.num_rows = num_rows
        self._identity = dict(identity)
        self.num_done = 0
        self._widths: dict[str, int] = {}
        self._maps: dict[str, np.ndarray[Any, Any]] = {}

    def open(self) -> bool:
        """Opens what was written before; whether there is anything of this identity."""
        try:
            state = json.loads(read_regular(self.folder / _STATE))
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(state, dict) or state.get("identity") != self._identity:
            return False
        done, widths = state.get("num_done"), state.get("widths")
        if not isinstance(done, int) or not 0 <= done <= self.num_rows or not isinstance(widths, dict):
            return False
        try:
            self._map({str(name): int(width) for name, width in widths.items()}, is_new=False)
        except (OSError, ValueError, TypeError):
            return False
        self.num_done = done
        return True

    @property
    def is_complete(self) -> bool:
        """Whether every row is there."""
        return self.num_done == self.num_rows

    def append(self, rows: ScoredRows, hashes: Sequence[int]) -> None:
        """Writes the next rows, and then that they are done."""
        start = self.num_done
        stop = start + len(hashes)
        if not self._maps:
            self._create(rows)
        if rows.features is not None:
            largest = rows.features.abs().amax(dim=1, keepdim=True)
            scaled = rows.features / torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
            self._maps["features"][start:stop] = scaled.half().numpy()
        if rows.hidden is not None:
            self._maps["hidden"][start:stop] = rows.hidden.numpy()
        for column, name in enumerate(_NUMBERS):
            values = getattr(rows, name)
            self._maps["numbers"][start:stop, column] = np.nan if values is None else values.double().numpy()
        self._maps["hashes"][start:stop, 0] = hashes
        for mapped in self._maps.values():
            mapped.flush()  # type: ignore[attr-defined]
        self.num_done = stop
        self._write_state()

    def read(self, indices: Sequence[int]) -> tuple[ScoredRows, list[int]]:
        """The scores of some rows, and their hashes."""
        numbers = {
            name: torch.from_numpy(self._maps["numbers"][list(indices), column].copy())
            for column, name in enumerate(_NUMBERS)
        }
        features, hidden = (self._read(name, indices) for name in ("features", "hidden"))
        hashes: list[int] = self._maps["hashes"][list(indices), 0].tolist()
        out_of_memory = numbers.pop("out_of_memory") == 1.0
        return ScoredRows(features=features, hidden=hidden, out_of_memory=out_of_memory, **numbers), hashes

    def _read(self, name: str, indices: Sequence[int]) -> Float[Tensor, "n F"] | None:
        if name not in self._maps:
            return None
        return torch.from_numpy(self._maps[name][list(indices)].astype(np.float32))

    def _create(self, rows: ScoredRows) -> None:
        widths = {"numbers": len(_NUMBERS), "hashes": 1}
        for name in ("features", "hidden"):
            values = getattr(rows, name)
            if values is not None:
                widths[name] = values.shape[1]
        make_folder(self.folder)
        needed = sum(_SIZES[name] * width for name, width in widths.items()) * self.num_rows
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"Scores of {self.num_rows:,} rows take {needed / 1e9:.1f} GB, and {os.fspath(self.folder)!r} has "
                f"{free / 1e9:.1f} GB left. Fix: lower sketch_dim (2 bytes a row for each number), or free space."
            )
        self._map(widths, is_new=True)

    def _map(self, widths: Mapping[str, int], *, is_new: bool) -> None:
        self._widths = dict(widths)
        for name, width in widths.items():
            path = self.folder / f"{name}.{_SUFFIXES[name]}"
            if is_new and path.is_symlink():
                path.unlink()
            size = self.num_rows * width * _SIZES[name]
            with open(open_regular(path, os.O_RDWR | (os.O_CREAT if is_new else 0)), "r+b") as file:
                if is_new:
                    file.truncate(size)
                elif os.fstat(file.fileno()).st_size != size:
                    raise OSError(f"{os.fspath(path)!r} is not of {size:,} bytes")
                self._maps[name] = np.memmap(file, dtype=_TYPES[name], mode="r+", shape=(self.num_rows, width))

    def _write_state(self) -> None:
        state = {"identity": self._identity, "num_done": self.num_done, "widths": self._widths}
        replace_file(self.folder / _STATE, json.dumps(state))


_TYPES = {"features": np.float16, "hidden": np.float32, "numbers": np.float64, "hashes": np.int64}
_SUFFIXES = {"features": "f16", "hidden": "f32", "numbers": "f64", "hashes": "i64"}
_SIZES = {name: np.dtype(kind).itemsize for name, kind in _TYPES.items()}
