"""One run writes to a folder at a time, and a run that died holds nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from spice_trainer.recording.records import RecordWriter


def hold(folder: Path) -> int:
    """A process that begins a run there, and waits to be killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        records = RecordWriter(folder)
        records.start()
        records.write_costs({"step": 0})
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    os.close(reader), os.close(writer)
    return pid


def refuse_locks(*args: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "a file system without"])
def test_a_second_run_is_refused_while_the_first_one_lives(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    pid = hold(tmp_path)
    try:
        second = RecordWriter(tmp_path)
        said = rf"Another run \(process {pid} on {socket.gethostname()}, since 2.*\) writes to {tmp_path}.*Choose ano"
        for begin in (second.start, lambda: second.resume(tmp_path / "copy")):
            with pytest.raises(RuntimeError, match=said):
                begin()
        assert json.loads((tmp_path / "costs.jsonl").read_text()) == {"step": 0}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    second.start()
    second.close()
    assert (tmp_path / "costs.1.jsonl").exists()


@pytest.mark.parametrize("locks", [True, False])
def test_one_process_after_itself(locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    first, second = RecordWriter(tmp_path), RecordWriter(tmp_path)
    first.start()
    if locks:
        with pytest.raises(RuntimeError, match=f"Another run .this very process {os.getpid()} on"):
            second.start()
    first.close()
    second.start()
    second.discard()
    first.start()
    first.close()


def test_a_forked_worker_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A loader's worker outlives a killed run by some seconds."""
    first = RecordWriter(tmp_path)
    first.start()
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        first.close()
        second = RecordWriter(tmp_path)
        second.start()
        second.close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("content", ["", "[1]", '{"pid": "x"}', '{"pid": -1, "host": 3}', "[" * 100_000, "\x1b[31m"])
def test_what_stands_in_the_file_is_only_said(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    (tmp_path / ".lock").write_text(content)
    writer = RecordWriter(tmp_path)
    writer.start()
    writer.close()


def test_a_lock_that_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="it is a link, which is not followed"):
        RecordWriter(tmp_path).start()
    assert (tmp_path / "victim").read_text() == "mine"
