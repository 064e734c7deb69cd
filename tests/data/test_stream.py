"""Rows of a stream by number: what is held, what a look beside it may see, and where reading goes on."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset, load_dataset

from spice_trainer.data.stream import StreamRows, StreamState, is_stream
from tests.support.streams import CountedStream, StatefulStream, tiny_stream
from tests.support.trainers import tiny_rows

STEP = 10


def train(rows: StreamRows, epoch: int, steps: range) -> list[Any]:
    """Reads steps as a run does, and gives back what they read."""
    read = []
    for step in steps:
        numbers = rows.numbers(epoch, step * STEP, STEP)
        read += rows.__getitems__(numbers)
        rows.finish(epoch, numbers.stop, keep=min(numbers, default=None))
    return read


def saved(rows: StreamRows, epoch: int) -> StreamState:
    return StreamState.parse(json.loads(json.dumps(asdict(rows.state(epoch)))))


def from_file(folder: Path) -> IterableDataset:
    lines = "".join(json.dumps(row | {"text": "w3"}) + "\n" for row in tiny_rows())
    (folder / "rows.jsonl").write_text(lines)
    stream = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", streaming=True)
    return stream.map(lambda row: row | {"length": len(row["input_ids"])}).filter(lambda row: row["length"] > 4)


KINDS: dict[str, Callable[[Path], Any]] = {
    "from a file": from_file,
    "from a generator": lambda folder: IterableDataset.from_generator(tiny_rows),
    "in shards": lambda folder: tiny_stream(num_shards=4),
    "behind a buffer": lambda folder: tiny_stream(buffer_size=12),
    "in a format": lambda folder: tiny_stream().with_format("torch"),
    "skipping": lambda folder: tiny_stream().skip(3).take(48),
    "torch's": lambda folder: CountedStream(),
    "torch's, with a state": lambda folder: StatefulStream(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reading_goes_on_where_it_stood(kind: str, tmp_path: Path) -> None:
    """In both passes, from a state that was JSON; rows and numbers are those of one reading without a break."""
    assert is_stream(KINDS[kind](tmp_path))
    for epoch in (0, 1):
        whole = StreamRows(KINDS[kind](tmp_path))
        if epoch:
            train(whole, 0, range(7))
        train(whole, epoch, range(3))
        state = saved(whole, epoch)
        rest = [repr(row) for row in train(whole, epoch, range(3, 7))]
        assert rest
        rows = StreamRows(KINDS[kind](tmp_path))
        rows.numbers(0, 0, 18)
        rows.resume(state, epoch=epoch, is_within=True)
        assert rows.held == list(range(state.trained - STEP, state.trained))
        assert saved(rows, epoch) == state
        assert [repr(row) for row in train(rows, epoch, range(3, 7))] == rest
        assert len(rows) == len(whole)


def test_rows_are_counted_on_through_passes() -> None:
    rows = StreamRows(CountedStream(tiny_rows(25)))
    assert [rows.numbers(0, start, 10) for start in (0, 10, 20, 30)] == [
        range(10), range(10, 20), range(20, 25), range(30, 25)
    ]  # fmt: skip
    assert rows.numbers(1, 0, 10) == range(25, 35)
    # The second pass begins with the second row, as the stream's `set_epoch` says.
    assert rows[25] == tiny_rows(25)[1]
    # What was read before stands.
    assert rows.numbers(0, 20, 10) == range(20, 25)


def test_rows_that_were_trained_on_are_let_go() -> None:
    rows = StreamRows(CountedStream())
    train(rows, 0, range(3))
    assert rows.held == list(range(20, 30)) and 19 not in rows
    with pytest.raises(IndexError, match="Row 19 of the stream is not held, only those from 20 on"):
        rows[19]
    rows.finish(0, rows.numbers(0, 30, 10).stop, keep=None)
    # Nothing was picked, so the rows of the step before may still be needed.
    assert rows.held == list(range(20, 40))


def test_who_takes_a_row_apart_leaves_it_as_it_is() -> None:
    rows = StreamRows(CountedStream())
    rows.numbers(0, 0, 1)
    rows[0]["input_ids"].clear()
    assert rows[0] == tiny_rows()[0]


def test_others_may_iterate_a_stream_of_datasets_meanwhile() -> None:
    stream = tiny_stream()
    rows, alone = StreamRows(stream), StreamRows(tiny_stream())
    for step in range(5):
        train(rows, 0, range(step, step + 1))
        train(alone, 0, range(step, step + 1))
        next(iter(stream))
        assert rows.read_anew([0]) == [next(iter(tiny_stream()))]
    assert saved(rows, 0) == saved(alone, 0)
    assert stream.epoch == 0 and len(list(stream)) == 55


class Large(list[Any]):
    """Rows, or a tokenizer, that must not be held twice."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")


def test_what_a_stream_reads_from_is_not_copied() -> None:
    rows = Large(tiny_rows())
    source = IterableDataset.from_generator(lambda rows: iter(rows[0]), gen_kwargs={"rows": (rows,)})
    mapped = source.map(lambda row, large: row, fn_kwargs={"large": rows}).shuffle(buffer_size=3)
    stream = StreamRows(mapped.filter(lambda row: True))
    train(stream, 0, range(2))
    state = saved(stream, 0)
    assert state.mark is not None and state.mark.state is not None


def test_a_copy_shows_what_is_held() -> None:
    rows = StreamRows(tiny_stream())
    rows.numbers(0, 0, 10)
    copied = pickle.loads(pickle.dumps(rows))
    assert copied.held == rows.held and copied[3] == rows[3]


def test_rows_with_images_are_compared_by_what_is_written() -> None:
    def stream(first: int) -> CountedStream:
        return CountedStream([{"image": object(), "number": first + number} for number in range(30)])

    states = []
    for first in (0, 0, 1):
        rows = StreamRows(stream(first))
        train(rows, 0, range(2))
        states.append(saved(rows, 0).digest)
    assert states[0] == states[1] != states[2]


def test_a_state_that_is_no_json_is_not_used() -> None:
    class Odd(StatefulStream):
        def state_dict(self) -> Any:
            return {1: super().state_dict()}

    rows = StreamRows(Odd())
    train(rows, 0, range(2))
    state = saved(rows, 0)
    assert state.mark is not None and state.mark.state is None
    again = StreamRows(Odd())
    again.resume(state, epoch=0, is_within=True)
    assert train(again, 0, range(2, 6)) == train(rows, 0, range(2, 6))
