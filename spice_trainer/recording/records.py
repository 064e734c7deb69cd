"""Record files: what was picked and why, as JSON lines under `<output_dir>/spice/`.

    selections.jsonl   one line a pick          pools.jsonl   one line a pool
    trained.jsonl      one line a step          costs.jsonl   one line a step: seconds and tokens
    transfer.jsonl     one line a pool that a proxy and the target both scored
    ledger.json        what the run cost, at its end

All open with `datasets.load_dataset("json")`; what the strategy does not compute is null. The first three hold no
clock readings, so a resumed run's are the uninterrupted run's byte for byte. Every step's lines are flushed before the
step trains. A checkpoint keeps its own copy of them, so that resuming does not depend on what became of the output
directory.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from spice_trainer.selection.results import Pick, StepSelection
from spice_trainer.utils.logging import logger

RECORDS_FOLDER = "spice"
RECORD_FILES = ("selections.jsonl", "pools.jsonl", "trained.jsonl", "costs.jsonl", "transfer.jsonl")
LEDGER_FILE = "ledger.json"
_ALL_FILES = (*RECORD_FILES, LEDGER_FILE)


@dataclass(frozen=True, kw_only=True)
class SelectedRow(Pick):
    """A line of `selections.jsonl`, and of a subset's manifest: a pick, with the updates before it and its epoch."""

    step: int
    epoch: int


class RecordWriter:
    """Appends a run's records; keeps a copy of them in every checkpoint, and goes on behind that copy on resume.

    The directory is made when the first record is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._files: dict[str, FileIO] = {}
        self._is_new = False

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be copied or pickled; they are opened anew when something is written.
        return vars(self) | {"_files": {}}

    def start(self) -> None:
        """Begins a new run. Records of an earlier run in the same place are renamed, not overwritten."""
        self.close()
        self._check_writable()
        self._is_new = True
        earlier = [name for name in _ALL_FILES if (self.directory / name).exists()]
        if not earlier:
            return
        number = 1
        while any((self.directory / _numbered(name, number)).exists() for name in _ALL_FILES):
            number += 1
        for name in earlier:
            (self.directory / name).rename(self.directory / _numbered(name, number))
        logger.info(
            "SPICE: the records of an earlier run in %s were renamed to %s and so on.",
            self.directory,
            _numbered(earlier[0], number),
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copies the records as they are now to a checkpoint's folder for them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in RECORD_FILES:
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, folder / name)
            else:
                # The folder may be that of an earlier checkpoint of the same number.
                (folder / name).unlink(missing_ok=True)

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Goes on behind a checkpoint's copy of the records, from [`RecordWriter.save`].

        Lines written after the checkpoint are cut off: the resumed run writes them anew. Where other records lie in
        the way, those of another run or of none, they are renamed and the copy takes their place.
        """
        self.close()
        self._check_writable()
        self._is_new = False
        if not Path(folder).is_dir():
            self.start()
            self._is_new = False
            logger.warning(
                "SPICE: the checkpoint's copy of the records, %s, is missing, so those of the resumed run begin here.",
                folder,
            )
            return
        copies = {name: path for name in RECORD_FILES if (path := Path(folder) / name).exists()}
        if all(_begins_with(self.directory / name, path) for name, path in copies.items()):
            for name in RECORD_FILES:
                if name in copies:
                    os.truncate(self.directory / name, copies[name].stat().st_size)
                else:
                    # Begun after the checkpoint: the resumed run writes it anew.
                    (self.directory / name).unlink(missing_ok=True)
            return
        self.start()
        self._is_new = False
        for name, path in copies.items():
            # Whole or not at all, also when this process is killed.
            partial = self.directory / f".{name}.partial"
            shutil.copyfile(path, partial)
            partial.replace(self.directory / name)

    def discard(self) -> None:
        """Removes what was written since [`RecordWriter.start`]: an attempt that the trainer gives up and repeats."""
        self.close()
        if self._is_new:
            for name in _ALL_FILES:
                (self.directory / name).unlink(missing_ok=True)

    def _check_writable(self) -> None:
        """Raises an `OSError`, before anything is trained, if no record could be written."""
        with self._explained():
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.write(b"{}\n")

    def write_selection(self, selection: StepSelection) -> None:
        """Appends one step's picks, pools and trained rows, and flushes them."""
        where = {"step": selection.step, "epoch": selection.epoch}
        self._write("selections.jsonl", ({**where, **vars(pick)} for pool in selection.pools for pick in pool.picks))
        self._write("pools.jsonl", _pool_lines(selection, where))
        self._write("trained.jsonl", [{**where, "indices": selection.indices}])
        if selection.transfers:
            lines = [{**where, **asdict(transfer), "overlap": transfer.overlap} for transfer in selection.transfers]
            self._write("transfer.jsonl", lines)

    def write_costs(self, costs: Mapping[str, Any]) -> None:
        """Appends one step's seconds and tokens, and flushes them."""
        self._write("costs.jsonl", [costs])

    def write_ledger(self, ledger: Mapping[str, Any]) -> None:
        """Writes what the run cost so far, over what an earlier part of it wrote."""
        text = json.dumps(ledger, indent=1, allow_nan=False) + "\n"
        with self._explained():
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = self.directory / f".{LEDGER_FILE}.partial"
            partial.write_text(text)
            partial.replace(self.directory / LEDGER_FILE)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        with self._explained():
            if name not in self._files:
                self.directory.mkdir(parents=True, exist_ok=True)
                # Without a buffer, whose rest would raise again where the file is closed.
                self._files[name] = (self.directory / name).open("ab", buffering=0)
            rest = text.encode()
            while rest:
                rest = rest[self._files[name].write(rest) :]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says of an error of the file system what could not be written, and that the run can go on from before."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"SPICE cannot write its records to {self.directory} ({error.strerror or error}). Free space there, "
                "make it writable, or choose another output_dir; then go on from the last checkpoint, whose copy of "
                "the records is complete.",
            ) from error


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
        }


def _numbered(name: str, number: int) -> str:
    stem, suffix = name.split(".")
    return f"{stem}.{number}.{suffix}"


def _begins_with(path: Path, copy: Path) -> bool:
    """Whether a file is there and holds a copy's bytes, then anything."""
    if not path.exists():
        return False
    with path.open("rb") as file, copy.open("rb") as start:
        while block := start.read(2**20):
            if file.read(len(block)) != block:
                return False
    return True
