"""Record files: what was picked and why, as JSON lines under `<output_dir>/spice/`.

    selections.jsonl   one line a pick          pools.jsonl   one line a pool
    trained.jsonl      one line a step          costs.jsonl   one line a step: seconds and tokens
    transfer.jsonl     one line a pool that a proxy and the target both scored
    ledger.json        what the run cost, at its end

All open with `datasets.load_dataset("json")`. The first three hold no clock readings, so a resumed run's are the
uninterrupted run's byte for byte. Every step's lines are flushed before the step trains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from spice_trainer.logs import logger
from spice_trainer.step_selection import StepSelection

RECORD_FILES = ("selections.jsonl", "pools.jsonl", "trained.jsonl", "costs.jsonl", "transfer.jsonl")
LEDGER_FILE = "ledger.json"


class RecordWriter:
    """Appends a run's records, and rewinds them to a checkpoint on resume.

    Args:
        directory (`str` or `os.PathLike`): Where the files go. Made when the first record is written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._files: dict[str, IO[bytes]] = {}

    def start(self) -> None:
        """Begins a new run. Records of an earlier run in the same place are moved aside, not overwritten."""
        self.close()
        if not any((self.directory / name).exists() for name in RECORD_FILES):
            return
        number = 1
        while (aside := self.directory.with_name(f"{self.directory.name}-previous-{number}")).exists():
            number += 1
        self.directory.rename(aside)
        logger.info("SPICE: the records of an earlier run in %s were moved to %s.", self.directory, aside)

    def resume(self, positions: Mapping[str, int], source: str | os.PathLike[str]) -> None:
        """Goes on behind the records a checkpoint knows of.

        Lines written after the checkpoint are cut off: the resumed run writes them anew. If the run goes on in another
        output directory, the lines up to the checkpoint are copied there first.

        Args:
            positions (`Mapping[str, int]`): Bytes of each file at the checkpoint, from [`RecordWriter.positions`].
            source (`str` or `os.PathLike`): Directory of the records that the checkpoint's run wrote.
        """
        self.close()
        source = Path(source)
        if source.resolve() != self.directory.resolve():
            self.start()
        missing = [name for name, size in positions.items() if size > 0 and not _holds(source / name, size)]
        if missing:
            logger.warning(
                "SPICE: %s in %s lack the lines written before this checkpoint, so the records of the resumed run "
                "begin here. Keep the `spice` folder beside the checkpoints to have them whole.",
                ", ".join(missing),
                source,
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, size in positions.items():
            target = self.directory / name
            if name in missing:
                continue
            if source.resolve() != self.directory.resolve():
                if size > 0:
                    with (source / name).open("rb") as old, target.open("wb") as new:
                        new.write(old.read(size))
            elif target.exists():
                os.truncate(target, size)

    def positions(self) -> dict[str, int]:
        """Bytes written of each file so far."""
        return {
            name: self._files[name].tell() if name in self._files else _size(self.directory / name)
            for name in RECORD_FILES
        }

    def write_selection(self, selection: StepSelection) -> None:
        """Appends one step's picks, pools and trained rows, and flushes them."""
        where = {"step": selection.step, "epoch": selection.epoch}
        self._write("selections.jsonl", _pick_lines(selection, where))
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
        self.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(ledger, indent=1, allow_nan=False) + "\n"
        (self.directory / LEDGER_FILE).write_text(text)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _write(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        if name not in self._files:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._files[name] = (self.directory / name).open("ab")
        file = self._files[name]
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        file.write(text.encode())
        file.flush()


def _pick_lines(selection: StepSelection, where: Mapping[str, int]) -> Iterable[dict[str, Any]]:
    for position, pool in enumerate(selection.pools):
        picks = pool.selection
        for order, index in enumerate(pool.indices):
            yield {
                **where,
                "pool": position,
                "order": order,
                "index": index,
                "gain": picks.gains[order],
                "conflict": picks.conflicts[order],
                "score": picks.scores[order],
                "gradient_norm": pool.gradient_norms[order],
                "label_tokens": pool.label_tokens[order],
            }


def _pool_lines(selection: StepSelection, where: Mapping[str, int]) -> Iterable[dict[str, Any]]:
    for position, pool in enumerate(selection.pools):
        picks = pool.selection
        yield {
            **where,
            "pool": position,
            "candidates": pool.candidates,
            "num_selected": len(picks.indices),
            "gain_first": picks.gains[0] if picks.gains else None,
            "gain_last": picks.gains[-1] if picks.gains else None,
            "information": picks.information,
            "information_top_norm": pool.information_top_norm,
            "overlap_top_norm": pool.overlap_top_norm,
            "changed_by_conflict": pool.changed_by_conflict,
            "tokens_pool": pool.tokens_pool,
            "tokens_selected": pool.tokens_selected,
            "alpha": pool.alpha,
            "nonfinite": pool.nonfinite,
            "zero": pool.zero,
            "stopped_early": picks.stopped_early,
        }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _holds(path: Path, size: int) -> bool:
    return _size(path) >= size
