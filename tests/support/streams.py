"""Streams of the tiny rows: torch's, which count what is read of them, and those of `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import IterableDataset

from tests.support.trainers import tiny_dataset, tiny_rows


class CountedStream(torch.utils.data.IterableDataset[Any]):
    """Rows one after another, rotated by the epoch; `reads` holds what each iteration read of them."""

    def __init__(self, rows: Sequence[Any] | None = None, *, num_passes: int = 1) -> None:
        self.rows = list(tiny_rows() if rows is None else rows)
        self.num_passes = num_passes
        self.epoch = 0
        self.reads: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        number = len(self.reads)
        self.reads.append(0)
        rows = self.rows[self.epoch :] + self.rows[: self.epoch]
        for _ in range(self.num_passes):
            for row in rows:
                self.reads[number] += 1
                yield row


class StatefulStream(CountedStream):
    """A stream that knows where it stands, as torchdata's do."""

    def __init__(self, rows: Sequence[Any] | None = None) -> None:
        super().__init__(rows)
        self.position = 0
        self.start = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]

    def __iter__(self) -> Iterator[Any]:
        self.position, self.start = self.start, 0
        number = len(self.reads)
        self.reads.append(0)
        rows = self.rows[self.epoch :] + self.rows[: self.epoch]
        while self.position < len(rows):
            self.position += 1
            self.reads[number] += 1
            yield rows[self.position - 1]


def tiny_stream(num_rows: int = 55, *, num_shards: int = 2, buffer_size: int = 0) -> IterableDataset:
    """[`tiny_dataset`] as `load_dataset(..., streaming=True)` gives it, perhaps behind a shuffle buffer."""
    stream = tiny_dataset(num_rows).to_iterable_dataset(num_shards=num_shards)
    return stream.shuffle(seed=3, buffer_size=buffer_size) if buffer_size else stream
