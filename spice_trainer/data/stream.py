"""Rows of a stream by their number: a window that moves on with the run.

    stream ─ pass: set_epoch(e), iter() ─ one row after another, each read once ─ window ─ scorer, loader

Rows are counted from 0 on through all passes. What is not trained yet is held, and the rows of the last steps that
were: a step without picks borrows a row of theirs, and they show on resume whether the stream stands where it stood.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from spice_trainer.data.json_values import canonical_line
from spice_trainer.data.rows import READING, copy_row
from spice_trainer.utils.logging import logger
from spice_trainer.utils.saved import saved_whole_number


def is_stream(dataset: Any) -> bool:
    """Whether torch's loader iterates it; `datasets` makes its own streams known to torch."""
    return isinstance(dataset, IterableDataset)


@dataclass
class StreamPass:
    """One time through a stream: the number of its first row and, once it has ended, that after its last."""

    first: int
    stop: int | None = None


@dataclass(frozen=True)
class StreamMark:
    """Where reading can go on: before row `row` of a pass that began with row `first`.

    By the stream's own `state`, if it has one; else past the rows before.
    """

    epoch: int
    first: int
    row: int
    state: Any = None


@dataclass(frozen=True)
class StreamState:
    """Where a run goes on that has read a stream: with its next row, in pass `epoch` or one that is not begun.

    From the `mark` on the rows before `trained` are read again, and have the `digest` that they had.
    """

    epoch: int
    first: int
    next_first: int
    trained: int
    mark: StreamMark | None
    digest: str | None

    @classmethod
    def parse(cls, saved: Mapping[str, Any]) -> StreamState:
        """Reads what was saved as JSON; raises a `TypeError` or `KeyError` for values that never were."""
        numbers = {name: saved_whole_number(saved[name]) for name in ("epoch", "first", "next_first", "trained")}
        mark = saved["mark"]
        if mark is not None:
            places = {name: saved_whole_number(mark[name]) for name in ("epoch", "first", "row")}
            mark = StreamMark(**places, state=mark["state"])
        return cls(**numbers, mark=mark, digest=saved["digest"])


class StreamRows:
    """The rows of a stream that are held, by their running number; its length is the number of rows read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._source, self._has_state = _own_stream(dataset)
        self._rows: dict[int, Any] = {}
        self._passes: dict[int, StreamPass] = {}
        self._marks: list[StreamMark] = []
        self._iterator: Iterator[Any] = iter(())
        self._num_read = 0
        self.restart()

    def __getstate__(self) -> dict[str, Any]:
        # A copy shows what is held.
        return vars(self) | {"_iterator": iter(()), "_source": None, "dataset": None}

    def __len__(self) -> int:
        return self._num_read

    def __getitem__(self, index: int) -> Any:
        if index not in self._rows:
            raise IndexError(
                f"Row {index} of the stream is not held, only those from {min(self._rows, default=0)} on."
            )
        # The scorer's collator, and the trainer's, may take apart what they are given.
        return copy_row(self._rows[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]

    def __contains__(self, index: object) -> bool:
        return index in self._rows

    @property
    def held(self) -> list[int]:
        """The numbers of the rows that are held."""
        return list(self._rows)

    def read_anew(self, indices: Sequence[int]) -> list[Any]:
        """Rows of another iteration of the user's own stream, which leaves this one's as it is."""
        rows = list(islice(self.dataset, max(indices) + 1))
        if max(indices) >= len(rows):
            raise ValueError(
                f"The training dataset ({type(self.dataset).__name__}) gave {len(self)} rows or more, and "
                f"{len(rows)} when it was iterated once more. Likely cause: a stream that can be read only once, such "
                "as a generator. SPICE looks at its first rows before training. Fix: let `__iter__` begin anew."
            )
        return [rows[index] for index in indices]

    # Reading on

    def restart(self, epoch: int = 0, first: int = 0) -> None:
        """Begins with a pass."""
        self._rows, self._passes, self._marks, self._trained = {}, {}, [], (epoch, first)
        self._begin(StreamMark(epoch, first, first))

    def numbers(self, epoch: int, start: int, count: int) -> range:
        """The running numbers of rows of a pass from its row `start` on; fewer than `count` where it ends."""
        if epoch not in self._passes:
            first = self._next_first()
            # What was read ahead of a pass that was left early.
            self._rows = {index: row for index, row in self._rows.items() if index < first}
            self._marks = [mark for mark in self._marks if mark.row < first]
            self._begin(StreamMark(epoch, first, first))
        found = self._passes[epoch]
        begin, end = found.first + start, found.first + start + count
        if epoch == max(self._passes):
            if begin == self._num_read > self._marks[-1].row:
                self._marks.append(StreamMark(epoch, found.first, begin, self._state()))
            self._read_until(end)
        return range(begin, min(end, self._num_read if found.stop is None else found.stop))

    def finish(self, epoch: int, stop: int, *, keep: int | None) -> None:
        """Says that the rows before `stop` were trained on or left; those of the step of row `keep` stay held."""
        self._trained = epoch, stop
        while keep is not None and len(self._marks) > 1 and self._marks[1].row <= keep:
            self._marks.pop(0)
        for index in [index for index in self._rows if index < self._marks[0].row]:
            del self._rows[index]

    def _begin(self, mark: StreamMark) -> None:
        """Begins a pass, and goes past its rows before the mark that the stream's own state does not pass."""
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(mark.epoch)
        self._passes = {epoch: found for epoch, found in self._passes.items() if epoch == mark.epoch - 1}
        self._passes[mark.epoch] = StreamPass(mark.first)
        self._marks.append(mark)
        self._iterator, self._num_read = iter(self._source), mark.row
        if iter(self._source) is self._iterator:
            raise ValueError(
                f"The training dataset ({type(self.dataset).__name__}) is a stream that can be read only once: each "
                "iteration of it goes on where the one before stopped. SPICE looks at its first rows before training, "
                "which would be lost. Fix: let `__iter__` begin anew, as a generator function does."
            )

    def _read_until(self, stop: int) -> None:
        ended = object()
        found = self._passes[max(self._passes)]
        while self._num_read < stop and found.stop is None:
            try:
                row = next(self._iterator, ended)
            except Exception as error:
                error.add_note(
                    f"{READING} row {self._num_read} of the training dataset ({type(self.dataset).__name__}), counted "
                    "from 0. Fix: correct what it reads there, or leave the row out."
                )
                raise
            if row is ended:
                found.stop = self._num_read
                return
            self._rows[self._num_read] = row
            self._num_read += 1

    def _next_first(self) -> int:
        stop = self._passes[max(self._passes)].stop
        return self._trained[1] if stop is None else stop

    # Resuming

    def state(self, epoch: int) -> StreamState:
        """Where a run goes on whose next step is in a pass."""
        trained_epoch, trained = self._trained
        known = self._passes.get(epoch)
        mark = next((mark for mark in self._marks if mark.epoch == trained_epoch), None)
        return StreamState(
            epoch=epoch,
            first=self._next_first() if known is None else known.first,
            next_first=self._next_first(),
            trained=trained,
            mark=mark,
            digest=None if mark is None else self.digest(range(mark.row, trained)),
        )

    def resume(self, state: StreamState, *, epoch: int, is_within: bool) -> None:
        """Goes on where a run stood: within a pass, or at the beginning of one."""
        mark = state.mark
        if not is_within or mark is None:
            self.restart(epoch, state.first if epoch == state.epoch else state.next_first)
            return
        if mark.state is not None and self._has_state:
            self._source.load_state_dict(copy.deepcopy(mark.state))
            if self._go_to(mark, state.trained) == state.digest:
                return
            # The rows in a shuffle buffer, for one, are not in the state.
            logger.info("SPICE: the stream's own state does not lead to where the checkpoint stands.")
            # One of `datasets` would begin there again each time.
            self._source, _ = _own_stream(self.dataset)
        num_past = mark.row - mark.first
        if num_past:
            logger.info("SPICE: reading past %s rows of the stream.", f"{num_past:,}")
        if self._go_to(mark, state.trained, num_past=num_past) != state.digest:
            logger.warning(
                "SPICE: the stream gives other rows than those before the checkpoint, so the run goes on with other "
                "rows than it would have. Likely cause: it was replaced, or draws its order anew each time. Fix: one "
                "that gives the same rows again after `set_epoch`, or ignore_data_skip=True."
            )

    def _go_to(self, mark: StreamMark, trained: int, *, num_past: int = 0) -> str:
        """Reads the rows from a mark to where training stood; their digest."""
        self._rows, self._passes, self._marks, self._trained = {}, {}, [], (mark.epoch, trained)
        self._begin(mark)
        for _ in islice(self._iterator, num_past):
            pass
        self._read_until(trained)
        return self.digest(range(mark.row, trained))

    def digest(self, indices: Iterable[int]) -> str:
        """A hash of the content of rows, as far as it can be written."""
        return hashlib.sha256(b"".join(_line(self._rows.get(index)) for index in indices)).hexdigest()

    def _state(self) -> Any:
        """The stream's own state, as JSON values; `None` where it has none that could be kept so."""
        if not self._has_state:
            return None
        try:
            state = self._source.state_dict()
            kept = json.loads(json.dumps(state, allow_nan=False))
            self._has_state = bool(kept == state)
        except Exception as error:
            logger.debug("SPICE: the stream's state is not used: %s", error)
            self._has_state = False
        return kept if self._has_state else None


_IS_PART = "_init_state_dict"


def _own_stream(dataset: Any) -> tuple[Any, bool]:
    """A stream that nobody else iterates, where that can be had, and whether its state can be read and set.

    One of `datasets` keeps its state in the object, so that a look at it from elsewhere would alter it; others may
    have a part in their user's code and are taken as they are.
    """
    has_state = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
    if not any(cls.__module__.partition(".")[0] == "datasets" for cls in type(dataset).__mro__):
        return dataset, has_state
    # What its parts read from, their functions and arguments may hold all rows in memory, or a tokenizer.
    shared: dict[int, Any] = {}
    parts = [dataset._ex_iterable] if hasattr(dataset, "_ex_iterable") else []
    for part in parts:
        for name, value in vars(part).items():
            inner = [item for item in (value if isinstance(value, list) else [value]) if hasattr(item, _IS_PART)]
            parts += inner
            if not inner and not name.startswith("_"):
                shared[id(value)] = value
    try:
        return copy.deepcopy(dataset, shared), has_state
    except Exception as error:
        logger.debug("SPICE: the stream cannot be copied: %s", error)
        return dataset, False


def _line(row: Any) -> bytes:
    """A row as bytes that are the same for the same values; of images and the like the kind alone."""
    try:
        return canonical_line(row, "a row")
    except TypeError:
        items = sorted(row.items()) if isinstance(row, Mapping) else ()
        return type(row).__name__.encode() + b"".join(f"{key}:".encode() + _line(value) for key, value in items)
