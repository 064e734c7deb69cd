"""What the callback's clock counts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from spice_trainer.recording.records import RecordWriter
from tests.support.trainers import make_trainer, read_records


def test_writing_records_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, spice={}, max_steps=3)
    write, seconds = RecordWriter.write_selection, 0.0

    def write_slowly(self: RecordWriter, *args: Any) -> None:
        nonlocal seconds
        seconds += 100.0
        write(self, *args)

    monkeypatch.setattr(RecordWriter, "write_selection", write_slowly)
    # The clock stands but for the records.
    monkeypatch.setattr(time, "perf_counter", lambda: seconds)
    trainer.train()
    assert seconds == 300.0
    assert [line["seconds_training"] for line in read_records(tmp_path, "costs")] == [0.0] * 3
