"""Record files: what was picked and why, as JSON lines under `<output_dir>/spice/`.

    selections.jsonl   one line a pick          pools.jsonl   one line a pool
    trained.jsonl      one line a step          costs.jsonl   one line a step: seconds and tokens
    transfer.jsonl     one line a pool that a proxy and the target both scored
    ledger.json        what the run cost, at its end
    run.json           which run they belong to; resumed, it is the same one

All open with `datasets.load_dataset("json")`; what the strategy does not compute is null. The first three hold no
clock readings, so a resumed run's are the uninterrupted run's byte for byte. A step's lines are written when it has
trained. A checkpoint holds all records up to it, so that resuming does not depend on what became of the output
directory. Nothing that happens to the files while a run trains ends it: it warns once, and goes on as far as it can.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spice_trainer.recording.lock import RunLock
from spice_trainer.recording.record_file import RecordFile, read_segments
from spice_trainer.selection.results import Pick, StepSelection
from spice_trainer.utils.files import make_folder, read_regular, replace_file
from spice_trainer.utils.logging import logger, printable
from spice_trainer.utils.saved import parse_json, saved_whole_number

RECORDS_FOLDER = "spice"
RECORD_FILES = ("selections.jsonl", "pools.jsonl", "trained.jsonl", "costs.jsonl", "transfer.jsonl")
LEDGER_FILE = "ledger.json"
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
MAX_UNWRITTEN_BYTES = 2**26
_ALL_FILES = (*RECORD_FILES, LEDGER_FILE, RUN_FILE)


@dataclass(frozen=True, kw_only=True)
class SelectedRow(Pick):
    """A line of `selections.jsonl`, and of a subset's manifest: a pick, with the updates before it and its epoch."""

    step: int
    epoch: int


class RecordWriter:
    """Appends a run's records; gives every checkpoint those so far, and goes on behind them on resume.

    One run writes to a directory at a time. Once it has begun, a record that cannot be written is a warning, unless
    `is_result` says that the records are what the run is for. `validation` describes the rows that picks aim at.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        is_result: bool = False,
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.latest_copy: Path | None = None
        """Where the latest checkpoint's records are, to which the next one links."""
        self._is_result = is_result
        self._validation = {} if validation is None else {"validation": dict(validation)}
        self._lock = RunLock(self.directory / LOCK_FILE)
        self._files: dict[str, RecordFile] = {}
        self._run_id = ""
        self._is_new = False
        self._warned: set[str] = set()

    def start(self) -> None:
        """Begins a new run. Records of an earlier run in the same place are renamed, not overwritten."""
        self._open()
        self._move_aside(_ALL_FILES)
        self._begin(uuid.uuid4().hex, is_new=True)

    def save(self, folder: str | os.PathLike[str]) -> str | None:
        """Gives a checkpoint's folder for them all records so far.

        Returns a checksum that tells them from those of any other checkpoint, or `None` if they could not be written.
        """
        folder, checksum = Path(folder), None
        with self._going_on(f"writing the records to the checkpoint, {folder},"):
            try:
                # It may be that of an earlier checkpoint of the same number, whose files others link to.
                _remove(folder)
                make_folder(folder)
                for file in self._files.values():
                    if not file.save(folder, self.latest_copy):
                        self._warn_of_altered(file)
                files = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in self._files.items()}
                about = {"run_id": self._run_id, **self._validation, "files": files}
                text = json.dumps(about, indent=1) + "\n"
                replace_file(folder / RUN_FILE, text)
            except OSError:
                _remove(folder)
                raise
            self.latest_copy, checksum = folder, hashlib.sha256(text.encode()).hexdigest()
        return checksum

    def resume(self, folder: str | os.PathLike[str], checksum: str | None = None) -> None:
        """Goes on behind a checkpoint's records, from [`RecordWriter.save`]; with its `checksum` no others are taken.

        Lines written after the checkpoint are cut off: the resumed run writes them anew. Where other records lie in
        the way, those of another run or of none, they are renamed and the checkpoint's take their place.
        """
        folder = Path(folder)
        self._open()
        damaged: dict[str, ValueError] = {}
        try:
            run_id, files = _read_run_file(folder, checksum)
            with self._explained():
                known = _run_id_of(self.directory)
                is_own = known == run_id or (known is None and bool(files))
                damaged = self._take_up(folder, files, is_own=is_own)
        except ValueError as error:
            run_id, files, damaged = uuid.uuid4().hex, {}, {"": error}
        if damaged and not self._files:
            self._move_aside(_ALL_FILES)
            self._begin(uuid.uuid4().hex, is_new=False)
            logger.warning(
                "SPICE: the checkpoint's copy of the records, %s, is missing or damaged (%s), so those of the resumed "
                "run begin here.",
                folder,
                next(iter(damaged.values())),
            )
            return
        for name, why in damaged.items():
            logger.warning(
                "SPICE: of the checkpoint's copy of the records, %s, %s is damaged (%s), so that file of the resumed "
                "run begins here; the others are complete.",
                folder,
                name,
                why,
            )
        for file in self._files.values():
            file.find_sealed(folder)
        self.latest_copy = folder
        self._begin(run_id, is_new=False)

    def discard(self) -> None:
        """Removes what was written since [`RecordWriter.start`]: an attempt that the trainer gives up and repeats."""
        self._close_files()
        if self._is_new:
            for name in _ALL_FILES:
                (self.directory / name).unlink(missing_ok=True)
        self._lock.release()

    def write_selection(self, selection: StepSelection) -> None:
        """Appends one step's picks, pools and trained rows."""
        where = {"step": selection.step, "epoch": selection.epoch}
        self._write("selections.jsonl", ({**where, **vars(pick)} for pool in selection.pools for pick in pool.picks))
        self._write("pools.jsonl", _pool_lines(selection, where))
        self._write("trained.jsonl", [{**where, "indices": selection.indices}])
        if selection.transfers:
            lines = [{**where, **asdict(transfer), "overlap": transfer.overlap} for transfer in selection.transfers]
            self._write("transfer.jsonl", lines)

    def write_costs(self, costs: Mapping[str, Any]) -> None:
        """Appends one step's seconds and tokens."""
        self._write("costs.jsonl", [costs])

    def write_ledger(self, ledger: Mapping[str, Any]) -> None:
        """Writes what the run cost so far, over what an earlier part of it wrote."""
        make_folder(self.directory)
        replace_file(self.directory / LEDGER_FILE, json.dumps(ledger, indent=1, allow_nan=False) + "\n")

    def close(self) -> None:
        """Closes the files, after a last look at what is missing."""
        try:
            for name, file in self._files.items():
                self._write(name, ())
                if file.unwritten:
                    self._warn(f"{file.path} lacks its last {len(file.unwritten):,} bytes")
        finally:
            self._close_files()
            self._lock.release()

    def _open(self) -> None:
        """Raises an error, before training, if another run writes here or no record could be written."""
        self._close_files()
        self._warned, self.latest_copy = set(), None
        with self._explained():
            make_folder(self.directory)
            self._lock.acquire()
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.write(b"{}\n")

    def _begin(self, run_id: str, *, is_new: bool) -> None:
        self._run_id, self._is_new = run_id, is_new
        with self._explained():
            replace_file(self.directory / RUN_FILE, json.dumps({"run_id": run_id} | self._validation) + "\n")

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def _move_aside(self, names: Iterable[str]) -> None:
        """Renames what lies in the way, whatever it is."""
        earlier = [name for name in names if os.path.lexists(self.directory / name)]
        if not earlier:
            return
        number = 1
        while any(os.path.lexists(self.directory / _numbered(name, number)) for name in _ALL_FILES):
            number += 1
        for name in earlier:
            (self.directory / name).rename(self.directory / _numbered(name, number))
        logger.info(
            "SPICE: the records of an earlier run in %s were renamed to %s and so on.",
            self.directory,
            _numbered(earlier[0], number),
        )

    def _take_up(self, folder: Path, files: Mapping[str, tuple[int, str]], *, is_own: bool) -> dict[str, ValueError]:
        """Opens records at a checkpoint's lengths: the directory's own, or where these are others, the checkpoint's.

        Returns what is wrong with those that are damaged in both places; they are not opened.
        """
        for name, (size, sha256) in files.items() if is_own else ():
            file = RecordFile.reopen(self.directory / name, size, sha256)
            if file is not None:
                self._files[name] = file
        is_own = is_own and (bool(self._files) or not files)
        self._move_aside([name for name in files if name not in self._files] if is_own else _ALL_FILES)
        damaged = {}
        for name, (size, sha256) in files.items():
            if name in self._files:
                self._files[name].cut(size)
                continue
            try:
                replace_file(self.directory / name, read_segments(folder, name, size, sha256))
            except ValueError as error:
                damaged[name] = error
                continue
            file = RecordFile.reopen(self.directory / name, size, sha256)
            if file is None:
                raise OSError(errno.EIO, f"{name} was changed while it was written")
            self._files[name] = file
        for name in RECORD_FILES:
            if is_own and name not in files:
                # Begun after the checkpoint: the resumed run writes it anew.
                (self.directory / name).unlink(missing_ok=True)
        return damaged

    def _write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        with self._going_on(f"writing {self.directory / name}"):
            content = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()
            file = self._files.get(name)
            if file is None:
                make_folder(self.directory)
                self._move_aside([name])
                file = self._files[name] = RecordFile.create(self.directory / name)
            if len(file.unwritten) <= MAX_UNWRITTEN_BYTES:
                file.append(content)
            else:
                file.flush()
            if not file.is_in_place():
                self._put_back(file)
            elif file.is_altered():
                self._warn_of_altered(file)

    def _warn_of_altered(self, file: RecordFile) -> None:
        self._warn(
            f"{file.path} was changed by another program while this run writes it. What it took away is lost, and "
            "checkpoints cannot hold this file's records from here on: look at a copy instead",
            kind=f"altered {file.path.name}",
        )

    def _put_back(self, file: RecordFile) -> None:
        """Somebody deleted a file in mid-run, its folder perhaps, or put another in its place."""
        # Fails where something else is in the folder's place.
        make_folder(self.directory)
        is_taken = os.path.lexists(file.path)
        if is_taken:
            self._move_aside([file.path.name])
        file.put_back()
        self._warn(
            f"{file.path} was {'replaced' if is_taken else 'deleted'} while this run writes it, and is written there "
            "again, complete",
            kind=f"taken {is_taken}",
        )
        if not os.path.lexists(self._lock.path):
            self._lock.acquire()
            self._begin(self._run_id, is_new=self._is_new)

    @contextmanager
    def _going_on(self, doing: str) -> Iterator[None]:
        """Makes an error a warning, once: training goes on, and what is missing is tried again at the next step."""
        if self._is_result:
            with self._explained():
                yield
            return
        try:
            yield
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            self._warn(f"{doing} failed ({reason}); the run goes on, and it is tried again", kind=f"{reason}")

    def _warn(self, text: str, kind: str = "") -> None:
        if not kind or kind not in self._warned:
            self._warned.add(kind)
            logger.warning("SPICE: %s.", text)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says of an error of the file system what could not be written, and that the run can go on from before."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                printable(
                    f"SPICE cannot write its records to {self.directory} ({error.strerror or error}). Free space "
                    "there, make it writable, or choose another output_dir; then go on from the last checkpoint, "
                    "whose copy of the records is complete."
                ),
            ) from error


def _read_run_file(folder: Path, checksum: str | None) -> tuple[str, dict[str, tuple[int, str]]]:
    """The run that a checkpoint's records belong to, and the length and checksum of each file."""
    try:
        if folder.is_symlink():
            raise ValueError("the folder is a link, which is not followed")
        content = read_regular(folder / RUN_FILE)
        if checksum not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError("it belongs to another checkpoint")
        saved = parse_json(content)
        if not isinstance(saved["run_id"], str):
            raise TypeError("its run_id is no text")
        files = {
            name: (saved_whole_number(saved["files"][name]["bytes"]), str(saved["files"][name]["sha256"]))
            for name in RECORD_FILES
            if name in saved["files"]
        }
        return saved["run_id"], files
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _run_id_of(directory: Path) -> str | None:
    """The run that a directory's records belong to, if that is known."""
    try:
        return str(parse_json(read_regular(directory / RUN_FILE))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _pool_lines(selection: StepSelection, where: Mapping[str, int]) -> Iterable[dict[str, Any]]:
    for position, pool in enumerate(selection.pools):
        yield {
            **where,
            "pool": position,
            "candidates": pool.candidates,
            "num_selected": len(pool.picks),
            "gain_first": pool.picks[0].gain if pool.picks else None,
            "gain_last": pool.picks[-1].gain if pool.picks else None,
            "information": pool.information,
            "information_top_norm": pool.information_top_norm,
            "overlap_top_norm": pool.overlap_top_norm,
            "changed_by_conflict": pool.changed_by_conflict,
            "tokens_pool": pool.tokens_pool,
            "tokens_selected": pool.tokens_selected,
            "alpha": pool.alpha,
            "nonfinite": pool.nonfinite,
            "zero": pool.zero,
            "out_of_memory": pool.out_of_memory,
            "filtered": pool.filtered,
            "stopped_early": pool.selection.stopped_early,
            **pool.selection.facts,
        }


def _numbered(name: str, number: int) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.{number}.{suffix}"
