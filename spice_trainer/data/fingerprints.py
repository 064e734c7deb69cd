"""Fingerprints of the content of datasets, for manifests and checkpoints.

A fingerprint answers "is this still the same?" on another machine and years later, so it reads values alone: no file
names, cache locations, transform histories or object identities.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spice_trainer.data.checks import check_is_rows
from spice_trainer.data.json_values import canonical_line
from spice_trainer.data.rows import fetch_rows, spread_positions
from spice_trainer.data.sample import RowSample
from spice_trainer.data.stream import StreamRows
from spice_trainer.utils.random import preserved_random_state

MAX_ROWS = 2_000
"""Rows of a dataset that its fingerprint reads, at most."""

MAX_STORED_ROWS = 256
"""The same where rows hold images or audio, which are large."""

_ROWS_PER_READ = 100


def fingerprint_dataset(dataset: Any, *, max_rows: int = MAX_ROWS) -> str:
    """Fingerprint of the content of a dataset's rows.

    The same rows give the same fingerprint on every machine, under every version of Python and `datasets`, whether
    they are a `datasets.Dataset` or a list of dicts, and wherever they are cached; `Dataset._fingerprint` does not.
    Hashed are the number of rows, the sorted column names, and the rows as JSON with sorted keys. Of a
    `datasets.Dataset` the stored columns count: `set_format` and `set_transform` are put aside. A field that is null
    counts as absent, since Arrow fills the fields that a nested dict lacks with nulls.

    **A dataset of more than `max_rows` rows is hashed by its length and `max_rows` evenly spread rows**, the first and
    the last among them: a change of another row is then not seen.

    Args:
        dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`): The rows.
        max_rows (`int`, *optional*, defaults to `2000`): Number of rows to read, at most. At least 1.

    Returns:
        `str`: SHA-256 as 64 hexadecimal digits.

    Raises:
        TypeError: If this is not a dataset of known length whose rows are dicts of JSON-like values.
    """
    if max_rows < 1:
        raise ValueError(f"fingerprint_dataset: max_rows={max_rows} is below 1. Fix: read at least one row.")
    check_is_rows(dataset)
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)
    num_rows = len(dataset)
    positions = spread_positions(num_rows, max_rows)
    names: set[str] = set(getattr(dataset, "column_names", None) or ())
    lines = hashlib.sha256()
    for start in range(0, len(positions), _ROWS_PER_READ):
        batch = positions[start : start + _ROWS_PER_READ]
        for position, row in zip(batch, fetch_rows(dataset, batch), strict=True):
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"Row {position} of the dataset is a {type(row).__name__}, not a dict of columns. Fix: give rows "
                    'such as {"messages": [...]} or {"input_ids": [...], "labels": [...]}.'
                )
            names.update(str(name) for name in row)
            lines.update(canonical_line(row, f"row {position} of the dataset"))
    header = {"kind": "dataset", "num_rows": num_rows, "columns": sorted(names)}
    return hashlib.sha256(canonical_line(header, "the column names") + lines.digest()).hexdigest()


def fingerprint_rows(sample: RowSample, earlier: Sequence[str | None] | None = None) -> str | None:
    """Fingerprint of training rows, whatever kind of dataset they come from, without touching any random state.

    A `datasets.Dataset` is read as [`fingerprint_dataset`] does, with images and audio as they are stored. Any other,
    which may make each row as it is asked for, counts by its number of rows and those of the sample. `None` where rows
    are not made of JSON-like values, or change from one reading to the next: from that of `earlier`, the digests of
    another sample of the same dataset, if there was one.
    """
    dataset = sample.dataset
    if hasattr(dataset, "with_format"):
        is_decoded = any(map(_is_decoded, (getattr(dataset, "features", None) or {}).values()))
        rows, maximum = (_StoredRows(dataset), MAX_STORED_ROWS) if is_decoded else (dataset, MAX_ROWS)
        with preserved_random_state(sample.device):
            try:
                return fingerprint_dataset(rows, max_rows=maximum)
            except TypeError:
                return None
    if None in sample.digests:
        return None
    pairs = zip(sample.digests, earlier or [None] * len(sample.digests), strict=False)
    other = [place for place, (found, before) in enumerate(pairs) if found != before]
    # Also where none differs: rows that are drawn at random are drawn alike from the same state. A stream would have
    # to be begun anew for that, which takes long where it fills a shuffle buffer.
    places = other or ([] if earlier and isinstance(dataset, StreamRows) else range(len(sample.rows)))
    if places and not sample.comes_out_the_same(places):
        return None
    header = {"kind": "rows", "num_rows": len(dataset), "rows": sample.digests}
    return hashlib.sha256(canonical_line(header, "the rows")).hexdigest()


def fingerprint_sets(sets: Mapping[str, Any], num_rows: int) -> str | None:
    """Fingerprint of the first rows of named validation sets, without touching a random state.

    `None` where rows are not made of JSON-like values, or change from one reading to the next.
    """
    lines: list[Any] = []
    for name, dataset in sets.items():
        is_decoded = any(map(_is_decoded, (getattr(dataset, "features", None) or {}).values()))
        rows = _StoredRows(dataset) if is_decoded else dataset
        positions = range(min(num_rows, len(rows)))
        sample = RowSample(rows, tuple(positions), _read(rows, positions), torch.device("cpu"))
        if None in sample.digests or not sample.comes_out_the_same(positions):
            return None
        lines.append([name, *sample.digests])
    return hashlib.sha256(canonical_line({"kind": "validation sets", "sets": lines}, "the sets")).hexdigest()


def _read(rows: Any, positions: range) -> tuple[Any, ...]:
    with preserved_random_state(torch.device("cpu")):
        return tuple(fetch_rows(rows, positions))


class _StoredRows:
    """A `datasets.Dataset` whose images, audio and the like stay the bytes, or the file's name, that are stored."""

    def __init__(self, dataset: Any) -> None:
        self._tables = dataset.with_format("arrow")
        self.column_names = dataset.column_names

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [_without_folders(row) for row in self._tables[indices].to_pylist()]


def _is_decoded(feature: Any) -> bool:
    """Whether reading a value of this kind decodes it, as for `Image`, `Audio` and lists of them."""
    if isinstance(feature, Mapping | list | tuple):
        return any(map(_is_decoded, feature.values() if isinstance(feature, Mapping) else feature))
    return bool(getattr(feature, "decode", False)) or _is_decoded(getattr(feature, "feature", ()))


def _without_folders(value: Any) -> Any:
    """Files lie elsewhere on another machine; their names stay."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"bytes", "path"} and isinstance(value["path"], str):
        return {**value, "path": os.path.basename(value["path"])}
    return {key: _without_folders(item) for key, item in value.items()}
