"""Some rows of a dataset, read once for every look at it before a run.

A dataset may read or decode each row when it is asked for. So the checks share these rows, and each check gets copies:
a collator may take apart what it is given.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from spice_trainer.data.json_values import canonical_line
from spice_trainer.data.rows import CandidateRow, DataCollator, collate_row, copy_row, fetch_rows, spread_positions
from spice_trainer.data.stream import StreamRows
from spice_trainer.utils.random import preserved_random_state

SAMPLE_ROWS = 18
"""Rows that are looked at before a run starts."""

_READ_AGAIN = 4


@dataclass(frozen=True, eq=False)
class RowSample:
    """At most `SAMPLE_ROWS` rows spread over a dataset, as they were read; `device` is whose random state is kept."""

    dataset: Any
    indices: tuple[int, ...]
    rows: tuple[Any, ...]
    device: torch.device

    @classmethod
    def read(cls, dataset: Any, *, device: torch.device) -> RowSample:
        """Reads the rows, as the Trainer's loader would, without touching any random state."""
        indices = spread_positions(len(dataset), SAMPLE_ROWS)
        with preserved_random_state(device):
            return cls(dataset, tuple(indices), tuple(fetch_rows(dataset, indices)), device)

    def collate(self, collate: DataCollator) -> list[CandidateRow]:
        """Each row collated alone."""
        with preserved_random_state(self.device):
            return [
                collate_row(index, copied, collate)
                for index, copied in zip(self.indices, self.copies(self.indices), strict=True)
            ]

    def copies(self, indices: Sequence[int]) -> list[Any]:
        """Rows by their number in the dataset, for a collator to do with as it likes."""
        return [copy_row(self.rows[self.indices.index(index)]) for index in indices]

    def read_again(self, indices: Sequence[int]) -> list[Any]:
        """Reads some rows anew, from other random states: from the same ones, random rows are drawn alike."""
        with preserved_random_state(self.device):
            torch.rand(())
            random.random()
            np.random.random()
            if isinstance(self.dataset, StreamRows):
                return self.dataset.read_anew(indices)
            return list(map(copy_row, fetch_rows(self.dataset, indices)))

    @cached_property
    def digests(self) -> tuple[str | None, ...]:
        """A hash of each row's values, the same everywhere; `None` for values that JSON does not know."""
        return tuple(map(_digest, self.rows))

    def comes_out_the_same(self, places: Sequence[int]) -> bool:
        """Whether some of the rows, a few of those at `places`, are the same when they are read once more."""
        places = places[:: -(-len(places) // _READ_AGAIN)]
        again = self.read_again([self.indices[place] for place in places])
        return [self.digests[place] for place in places] == list(map(_digest, again))

    def find_changed(self) -> int | None:
        """The number of a row that is another by now, of a few that are read once more; `None` if none can be told."""
        if isinstance(self.dataset, StreamRows) or len(self.dataset) <= self.indices[-1]:
            return None
        known = [place for place, digest in enumerate(self.digests) if digest is not None]
        some = known[:: -(-len(known) // _READ_AGAIN)] if known else []
        try:
            again = map(_digest, self.read_again([self.indices[place] for place in some]))
            return next((self.indices[p] for p, now in zip(some, again, strict=True) if now != self.digests[p]), None)
        except Exception:
            # A look, at rows that are perhaps not asked for any more.
            return None


def _digest(row: Any) -> str | None:
    try:
        return hashlib.sha256(canonical_line(row, "a row")).hexdigest()
    except TypeError:
        return None
