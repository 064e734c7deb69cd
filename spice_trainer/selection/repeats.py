"""How often a row may be picked: copies of a row, by the hash of its tokens, count as the same.

Without a limit the few rows that a rule likes are trained on in every epoch, and learned by heart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor


class RepeatLimit:
    """Counts the picks of each row, and tells which rows of a step's pools may be picked once more.

    A row may be picked 1 + `max_repeats` times. Of more copies in a step than that the first ones may be picked,
    whatever pools they are in, so that pools can be decided apart from each other.
    """

    def __init__(self, max_repeats: int) -> None:
        self._most = 1 + max_repeats
        self._counts: dict[int, int] = {}
        self._granted: dict[int, bool] = {}
        self._seen: dict[int, int] = {}

    def begin_step(self) -> None:
        """Forgets what was granted in the step before."""
        self._granted, self._seen = {}, {}

    def allow(self, rows: Sequence[int], token_hashes: Sequence[str | None]) -> Bool[Tensor, " N"]:
        """Which rows of a pool may be picked; asked again in a step it says the same."""
        for row, token_hash in zip(rows, token_hashes, strict=True):
            if row not in self._granted:
                key = _key(row, token_hash)
                used = self._counts.get(key, 0) + self._seen.get(key, 0)
                self._granted[row] = used < self._most
                self._seen[key] = self._seen.get(key, 0) + 1
        return torch.tensor([self._granted[row] for row in rows], dtype=torch.bool)

    def count(self, picks: Iterable[tuple[int, str | None]]) -> None:
        """Takes the rows of a step that has trained, and their hashes."""
        for row, token_hash in picks:
            key = _key(row, token_hash)
            self._counts[key] = self._counts.get(key, 0) + 1

    def tensors(self) -> dict[str, Tensor]:
        """The counts, for a checkpoint."""
        keys = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.int32, count=len(self._counts))
        return {"rows": torch.from_numpy(keys), "counts": torch.from_numpy(counts)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores [`RepeatLimit.tensors`]; raises a ValueError for a checkpoint without them."""
        if not {"rows", "counts"} <= tensors.keys() or tensors["rows"].shape != tensors["counts"].shape:
            raise ValueError(
                "The checkpoint does not say how often rows were picked: its run had no max_repeats. Fix: resume "
                "without max_repeats, or begin a new run."
            )
        self._counts = dict(zip(tensors["rows"].tolist(), tensors["counts"].tolist(), strict=True))


def _key(row: int, token_hash: str | None) -> int:
    """A row's hash as a signed number; its own number, from the other end, where there is no hash."""
    return -1 - row if token_hash is None else int(token_hash, 16) - 2**63
