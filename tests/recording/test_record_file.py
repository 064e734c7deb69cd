"""Record files and their segments: linear bytes, checkpoints that stand alone, files that vanish or do not fit."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spice_trainer.recording import record_file, records
from spice_trainer.recording.record_file import SEALED_BYTES
from spice_trainer.recording.records import RecordWriter

LINE = {"step": 0, "text": "x" * 1000}
NUM_BYTES = len(json.dumps(LINE)) + 1
NUM_LINES = SEALED_BYTES // NUM_BYTES + 1


def write_and_save(writer: RecordWriter, output_dir: Path, checkpoints: range, num_lines: int = NUM_LINES) -> None:
    for number in checkpoints:
        for _ in range(num_lines):
            writer.write_costs(LINE)
        writer.save(output_dir / f"checkpoint-{number}")


def started(output_dir: Path) -> RecordWriter:
    writer = RecordWriter(output_dir / "spice")
    writer.start()
    return writer


def disk_usage(folder: Path) -> int:
    """Bytes that its files take, each inode once."""
    found = (path.lstat() for path in folder.rglob("*") if path.is_file())
    return sum({(item.st_dev, item.st_ino): item.st_blocks * 512 for item in found}.values())


@pytest.mark.parametrize(
    "num_lines", [NUM_LINES, 40], ids=["segments are sealed at once", "after several checkpoints"]
)
def test_bytes_are_linear_in_the_steps(num_lines: int, tmp_path: Path) -> None:
    writer, sizes = started(tmp_path), []
    for checkpoints in (range(16), range(16, 32)):
        write_and_save(writer, tmp_path, checkpoints, num_lines)
        sizes.append(disk_usage(tmp_path))
    writer.close()
    assert sizes[1] < 2.1 * sizes[0]
    # The visible file, the segments, and less than a segment's rest in each checkpoint.
    recorded = 32 * num_lines * NUM_BYTES
    assert sizes[1] < 2 * recorded + 32 * SEALED_BYTES / 2 + 32 * 4096
    assert (num_lines < NUM_LINES) or sizes[1] < 2.3 * recorded


def test_a_checkpoint_stands_alone(tmp_path: Path) -> None:
    """Copied elsewhere, all else removed, it gives the records up to it; an earlier one removed takes nothing."""
    writer = started(tmp_path / "run")
    write_and_save(writer, tmp_path / "run", range(3))
    shutil.rmtree(tmp_path / "run" / "checkpoint-0")
    write_and_save(writer, tmp_path / "run", range(3, 5))
    writer.close()
    whole = (tmp_path / "run" / "spice" / "costs.jsonl").read_bytes()
    shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run")
    resumed = RecordWriter(tmp_path / "other" / "spice")
    resumed.resume(tmp_path / "moved")
    write_and_save(resumed, tmp_path / "other", range(4, 5))
    resumed.close()
    assert (tmp_path / "other" / "spice" / "costs.jsonl").read_bytes() == whole
    linked = [path.lstat().st_nlink for path in (tmp_path / "other" / "checkpoint-4").glob("costs.*")]
    assert sorted(linked) == [1, 2, 2, 2, 2] and disk_usage(tmp_path / "other") < 2.3 * len(whole)


@pytest.mark.parametrize("cause", ["no links", "removed", "another file"])
def test_what_cannot_be_linked_is_copied(cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    writer = started(tmp_path)
    write_and_save(writer, tmp_path, range(2))
    if cause == "no links":
        monkeypatch.setattr(os, "link", refuse)
    elif cause == "removed":
        shutil.rmtree(tmp_path / "checkpoint-1")
    else:
        for path in (tmp_path / "checkpoint-1").glob("costs.*"):
            size = path.stat().st_size
            path.unlink()
            path.write_bytes(b"x" * size)
    write_and_save(writer, tmp_path, range(2, 3))
    writer.close()
    resumed = RecordWriter(tmp_path / "elsewhere")
    resumed.resume(tmp_path / "checkpoint-2")
    resumed.close()
    whole = (tmp_path / "spice" / "costs.jsonl").read_bytes()
    assert (tmp_path / "elsewhere" / "costs.jsonl").read_bytes() == whole and len(whole) == 3 * NUM_LINES * NUM_BYTES


def test_a_checkpoint_written_anew_leaves_those_it_was_linked_to(tmp_path: Path) -> None:
    """A run resumed from checkpoint 1 writes over checkpoint 2, whose files checkpoint 3 shares."""
    writer = started(tmp_path)
    write_and_save(writer, tmp_path, range(1, 4))
    writer.close()
    before = {path: path.read_bytes() for number in (1, 3) for path in (tmp_path / f"checkpoint-{number}").iterdir()}
    writer.resume(tmp_path / "checkpoint-1")
    writer.write_costs({"step": "other"})
    writer.save(tmp_path / "checkpoint-2")
    writer.close()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "linked", "no run.json", "folder"])
def test_a_damaged_copy_is_a_warning(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = started(tmp_path)
    write_and_save(writer, tmp_path, range(2))
    writer.close()
    copy = tmp_path / "checkpoint-1"
    first = copy / "costs.000000000000.jsonl"
    content = first.read_bytes()
    first.unlink()
    if damage in ("cut", "changed"):
        first.write_bytes(content[:-1] if damage == "cut" else b"y" + content[1:])
    elif damage == "linked":
        (tmp_path / "secret").write_bytes(content)
        first.symlink_to(tmp_path / "secret")
    elif damage == "no run.json":
        first.write_bytes(content)
        (copy / "run.json").write_text('{"files": {"costs.jsonl": {"bytes": true}}}')
    elif damage == "folder":
        first.write_bytes(content)
        copy.rename(tmp_path / "real")
        copy.symlink_to(tmp_path / "real")
    resumed = RecordWriter(tmp_path / "elsewhere")
    resumed.resume(copy)
    resumed.write_costs({"step": 9})
    resumed.close()
    assert "is missing or damaged" in caplog.text and "those of the resumed run begin here" in caplog.text
    assert (tmp_path / "elsewhere" / "costs.jsonl").read_text() == '{"step": 9}\n'
    if damage not in ("no run.json", "folder"):
        # The run's own folder still has them.
        writer.resume(copy)
        assert (writer.directory / "costs.jsonl").stat().st_size == 2 * NUM_LINES * NUM_BYTES
        write_and_save(writer, tmp_path, range(2, 3))
        writer.close()
        resumed.resume(tmp_path / "checkpoint-2")
        resumed.close()
        assert (resumed.directory / "costs.jsonl").stat().st_size == 3 * NUM_LINES * NUM_BYTES


def test_records_of_another_run_are_no_beginning(tmp_path: Path) -> None:
    """Two runs of the same seed begin alike: the second one's lines are kept when the first one is resumed."""
    first = started(tmp_path)
    write_and_save(first, tmp_path, range(1), 1)
    first.close()
    second = started(tmp_path)
    for _ in range(3):
        second.write_costs(LINE)
    second.close()
    first.resume(tmp_path / "checkpoint-0")
    first.close()
    assert [(tmp_path / f"spice/costs{number}.jsonl").stat().st_size for number in ("", ".1", ".2")] == [
        NUM_BYTES, NUM_BYTES, 3 * NUM_BYTES,
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b'{"step": 0}\n{"step": "mine"}\n{"step": 2}\n'])
def test_a_file_that_is_changed_in_place_is_told(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer, path = started(tmp_path), tmp_path / "spice" / "costs.jsonl"
    for step in range(6):
        if step == 3:
            path.write_bytes(content)
        assert ("was changed by another program" in caplog.text) == (step > 3)
        writer.write_costs({"step": step})
    writer.close()
    assert caplog.text.count("look at a copy instead") == 1
    assert path.read_bytes() == content + b'{"step": 3}\n{"step": 4}\n{"step": 5}\n'


@pytest.mark.parametrize("sealed", [False, True])
def test_bytes_that_are_written_over_are_told_and_cost_one_file_alone(
    sealed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The length is the same, so only the checksum tells; the other files are resumed whole."""
    writer, path = started(tmp_path), tmp_path / "spice" / "costs.jsonl"
    write_and_save(writer, tmp_path, range(1), NUM_LINES if sealed else 3)
    for _ in range(3):
        writer._write("trained.jsonl", [LINE])
    with path.open("r+b") as file:
        file.seek(-NUM_BYTES, os.SEEK_END)
        file.write(b"XXXXX")
    assert "was changed" not in caplog.text
    writer.write_costs(LINE)
    if sealed:
        with path.open("r+b") as file:
            file.seek(-NUM_BYTES, os.SEEK_END)
            file.write(b"XXXXX")
    for number in (1, 2):
        writer.save(tmp_path / f"checkpoint-{number}")
        writer.write_costs(LINE)
    writer.close()
    assert caplog.text.count(f"{path} was changed by another program") == 1
    run_id = json.loads((tmp_path / "spice" / "run.json").read_text())["run_id"]
    content = path.read_bytes()
    for folder in (tmp_path / "spice", tmp_path / "elsewhere"):
        resumed = RecordWriter(folder)
        resumed.resume(tmp_path / "checkpoint-2")
        resumed.write_costs({"step": 9})
        resumed.save(tmp_path / "again")
        resumed.close()
        assert (folder / "costs.jsonl").read_text() == '{"step": 9}\n'
        assert (folder / "trained.jsonl").stat().st_size == 3 * NUM_BYTES
        assert json.loads((folder / "run.json").read_text())["run_id"] == run_id
        whole = RecordWriter(tmp_path / f"whole of {folder.name}")
        whole.resume(tmp_path / "again")
        whole.close()
        assert (whole.directory / "costs.jsonl").read_text() == '{"step": 9}\n'
    assert caplog.text.count("costs.jsonl is damaged") == 2 and "the others are complete" in caplog.text
    assert (tmp_path / "spice" / "costs.1.jsonl").read_bytes() == content
    assert not (tmp_path / "spice" / "trained.1.jsonl").exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_in_the_folders_place_is_named(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer, folder = started(tmp_path), tmp_path / "spice"
    (tmp_path / "other").mkdir()
    for step in range(6):
        if step == 2:
            shutil.rmtree(folder)
            folder.symlink_to(tmp_path / "other") if kind == "link" else folder.write_text("mine")
        if step == 4:
            folder.unlink()
        writer.write_costs({"step": step})
        if step == 3:
            assert "written there again" not in caplog.text
            assert f"it is {'a link' if kind == 'link' else 'no folder'}" in caplog.text
    assert "is written there again, complete" in caplog.text
    writer.close()
    assert [json.loads(line)["step"] for line in (folder / "costs.jsonl").read_text().splitlines()] == list(range(6))
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("what", ["the folder", "a file", "replaced"])
def test_files_that_vanish_are_written_again(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = started(tmp_path)
    expected = b""
    for step in range(6):
        if step == 3 and what == "the folder":
            shutil.rmtree(tmp_path / "spice")
        elif step == 3:
            (tmp_path / "spice" / "costs.jsonl").unlink()
        if step == 3 and what == "replaced":
            (tmp_path / "spice" / "costs.jsonl").write_text("mine")
        writer.write_costs({"step": step})
        expected += f'{{"step": {step}}}\n'.encode()
        assert (tmp_path / "spice" / "costs.jsonl").read_bytes() == expected
    writer.close()
    assert caplog.text.count("while this run writes it, and is written there again, complete") == 1
    if what == "replaced":
        assert (tmp_path / "spice" / "costs.1.jsonl").read_text() == "mine"
    assert json.loads((tmp_path / "spice" / "run.json").read_text())["run_id"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_no_run_that_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What could not be written waits: nothing is missing once there is space, nor in a checkpoint."""
    writer = started(tmp_path)
    with full_disk(25):
        for step in range(5):
            writer.write_costs({"step": step})
        assert (tmp_path / "spice" / "costs.jsonl").stat().st_size == 25
        writer.save(tmp_path / "failed")
    assert not (tmp_path / "failed").exists()
    assert len([text for text in caplog.messages if "failed (File too large); the run goes on" in text]) == 1
    writer.save(tmp_path / "copy")
    writer.write_costs({"step": 5})
    writer.close()
    for name, count in (("spice/costs.jsonl", 6), ("copy/costs.000000000000.jsonl", 5)):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(count)), name


def test_records_that_never_fit_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_UNWRITTEN_BYTES", 30)
    writer = started(tmp_path)
    with full_disk(20):
        for step in range(50):
            writer.write_costs({"step": step})
        writer.close()
    assert "costs.jsonl lacks its last 40 bytes" in caplog.text


def test_records_that_are_the_result_must_be_written(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, is_result=True)
    writer.start()
    with full_disk(20), pytest.raises(OSError, match=r"cannot write its records to .* \(File too large\). Free space"):
        for step in range(5):
            writer.write_costs({"step": step})
    writer.close()
    assert len((tmp_path / "costs.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["link", "fifo", "hard link", "folder's link"])
def test_nothing_outside_the_folder_is_touched(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text('{"step": 0}\n{"step": 1}\n')
    writer = started(tmp_path / "run")
    writer.write_costs({"step": 0})
    writer.save(tmp_path / "copy")
    writer.close()
    path = tmp_path / "run" / "spice" / "costs.jsonl"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "link":
        path.symlink_to(victim)
    else:
        shutil.move(tmp_path / "run" / "spice", tmp_path / "outside")
        (tmp_path / "run" / "spice").symlink_to(tmp_path / "outside")
        for begin in (writer.start, lambda: writer.resume(tmp_path / "copy")):
            with pytest.raises(OSError, match="it is a link, which is not followed"):
                begin()
        return
    writer.resume(tmp_path / "copy")
    writer.write_costs({"step": 2})
    writer.close()
    assert victim.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert path.read_text() == '{"step": 0}\n{"step": 2}\n' and path.lstat().st_nlink == 1


def test_blocks_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "_BLOCK", 7)
    test_a_checkpoint_stands_alone(tmp_path)
