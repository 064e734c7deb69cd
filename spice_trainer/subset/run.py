"""A selection with no target training, step by step, that can be interrupted and continued.

    <output_dir>/spice/              the records, as in a training run
    <output_dir>/selection-<step>/   the latest state: the selector's adapter and optimizer, position, sums

A state is written in full beside the earlier one and only then takes its place, so one whole state is always there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from spice_trainer.distributed import Processes
from spice_trainer.recording.checkpoint import RECORDS_COPY, describe_schedule, load_state, save_state
from spice_trainer.recording.metrics import RunTotals
from spice_trainer.recording.records import RECORDS_FOLDER, RecordWriter, SelectedRow
from spice_trainer.recording.summary import print_summary
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.scoring.once import STORE_FOLDER
from spice_trainer.selection.results import StepSelection
from spice_trainer.subset.manifest import MANIFEST_FILE, SubsetManifest
from spice_trainer.subset.model import without_fingerprint
from spice_trainer.utils.files import read_regular
from spice_trainer.utils.logging import logger, printable, warning_of_failure
from spice_trainer.utils.saved import reading_saved

_STATE_FOLDER = re.compile(r"selection-(\d+)")
# Besides every `save_steps`: what an interruption may lose, unless a single step takes longer.
SAVE_SECONDS = 60.0
# What a step of a run that trains nothing cannot take.
_UNTIMED = ("seconds_checking", "seconds_training")


@dataclass
class SubsetRun:
    """Selects step by step, keeps records and states; process 0 writes them."""

    sampler: SpiceSampler
    output_dir: Path
    processes: Processes
    identity: dict[str, Any]
    """What a continued selection must have in common with the one that was interrupted, as JSON values."""
    model: dict[str, Any]
    """The selector as it was before it learned anything."""
    save_steps: int
    overwrite: bool

    def __post_init__(self) -> None:
        self.totals = RunTotals()
        self._records = (
            RecordWriter(
                self.output_dir / RECORDS_FOLDER,
                is_result=True,
                validation=self.sampler.scorer.describe_validation(),
            )
            if self.processes.is_main
            else None
        )

    def is_done(self) -> bool:
        """Whether `output_dir` holds the result of this very selection. Refuses to replace another one."""
        if self.overwrite or not (self.output_dir / MANIFEST_FILE).exists():
            return False
        found = SubsetManifest.load(self.output_dir)
        theirs = vars(found) | {"model": without_fingerprint(found.model)}
        ours = {"config": self.sampler.config.to_dict()} | {
            key: self.identity.get(key)
            for key in ("dataset_fingerprint", "validation_fingerprint", "samples_per_step", "seed", "model")
        }
        differing = [key for key, value in ours.items() if theirs[key] != value]
        if differing:
            raise FileExistsError(
                printable(
                    f"{self.output_dir} holds a subset of another selection (other {', '.join(differing)}), which "
                    "stays as it is. Choose another output_dir, or pass overwrite=True to replace it."
                )
            )
        logger.info(
            "SPICE: %s holds the finished subset of this selection already; nothing is selected anew.", self.output_dir
        )
        return True

    def run(self) -> None:
        """Selects until the last step, from the latest state if there is one."""
        self.sampler.selector.scorer.keep_in(self.output_dir / RECORDS_FOLDER)
        first = self._resume()
        steps = range(first, self.sampler.schedule.steps_per_epoch)
        is_hidden, saved = not self.processes.is_main, time.monotonic()
        try:
            for step in tqdm(steps, desc="Selecting", initial=first, total=first + len(steps), disable=is_hidden):
                started = time.monotonic()
                self.sampler.run.select_step()
                self._record(self.sampler.run.finish_step())
                now = time.monotonic()
                # Another such step would make it more than that.
                is_due = now - saved + (now - started) > SAVE_SECONDS
                if (step + 1) % self.save_steps == 0 or is_due:
                    self._save(step + 1)
                    saved = time.monotonic()
        finally:
            self.sampler.close()
            if self._records is not None:
                self._records.close()

    def finish(self) -> None:
        """Prints the summary, and removes the states of a selection whose result has been written."""
        if not self.processes.is_main:
            return
        with warning_of_failure("printing the summary"):
            print_summary(self.totals, os.fspath(self.output_dir / RECORDS_FOLDER), trains=False)
        for _, folder in self._states():
            shutil.rmtree(folder)
        # Scores of all rows, if there are any, have served.
        shutil.rmtree(self.output_dir / RECORDS_FOLDER / STORE_FOLDER, ignore_errors=True)

    def manifest(self) -> SubsetManifest:
        """All picks from the records, in the order of picking, and what they came from. On process 0."""
        text = read_regular(self.output_dir / RECORDS_FOLDER / "selections.jsonl").decode()
        return SubsetManifest(
            rows=tuple(SelectedRow(**json.loads(line)) for line in text.splitlines()),
            num_rows=self.sampler.schedule.num_rows,
            dataset_fingerprint=self.identity["dataset_fingerprint"],
            model=self.model,
            config=self.sampler.config.to_dict(),
            samples_per_step=self.identity["samples_per_step"],
            seed=self.identity["seed"],
            validation_fingerprint=self.identity.get("validation_fingerprint"),
        )

    def _record(self, selection: StepSelection) -> None:
        self.totals.add_selection(selection)
        if self._records is not None:
            self._records.write_selection(selection)
            self._records.write_costs(
                {
                    "step": selection.step,
                    "epoch": selection.epoch,
                    # Nothing is trained here, and nothing compared.
                    **{name: seconds for name, seconds in selection.times.to_dict().items() if name not in _UNTIMED},
                    "tokens_scored": sum(pool.num_tokens_pool for pool in selection.pools),
                }
            )

    def _states(self) -> list[tuple[int, Path]]:
        """States that are there, the latest first."""
        found = [
            (int(match[1]), path)
            for path in self.output_dir.glob("selection-*")
            if (match := _STATE_FOLDER.fullmatch(path.name))
        ]
        return sorted(found, reverse=True)

    def _save(self, step: int) -> None:
        if self._records is None:
            return
        started = time.perf_counter()
        earlier = self._states()
        partial = self.output_dir / f".selection-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._records.save(partial / RECORDS_COPY)
        save_state(
            partial,
            {
                "position": self.sampler.run.position.state_dict(),
                "schedule": describe_schedule(self.sampler.schedule),
                "config": self.sampler.config.to_dict(),
                "identity": self.identity,
                "model": self.model,
                "sampler": self.sampler.run.state_dict(),
                "totals": self.totals.state_dict(),
            },
            self.sampler.run.tensors(),
        )
        partial.rename(self.output_dir / f"selection-{step}")
        self._records.latest_copy = self.output_dir / f"selection-{step}" / RECORDS_COPY
        for _, folder in earlier:
            shutil.rmtree(folder)
        logger.debug("SPICE: the state after %d steps was written in %.1f s.", step, time.perf_counter() - started)

    def _resume(self) -> int:
        """Loads the latest state, and returns how many steps it holds."""
        states = self.processes.broadcast(self._states())
        if self.overwrite and self.processes.is_main:
            for _, folder in states:
                shutil.rmtree(folder)
        if self.overwrite or not states:
            with self.processes.failing_together("opening the records"):
                if self._records is not None:
                    self._records.start()
            return 0
        step, folder = states[0]
        state, tensors = load_state(
            folder, schedule=describe_schedule(self.sampler.schedule), config=self.sampler.config.to_dict()
        )
        with reading_saved(folder):
            differing = self._differing(state["identity"])
        if differing:
            raise ValueError(
                printable(
                    f"{self.output_dir} holds an unfinished selection of another kind: {'; '.join(differing)}. "
                    "Continue it with the same model, dataset and settings, choose another output_dir, or pass "
                    "overwrite=True to begin anew."
                )
            )
        with reading_saved(folder):
            self.sampler.run.resume(state["position"])
            self.sampler.run.load_state_dict(state["sampler"], tensors)
            self.totals.load_state_dict(state["totals"])
            self.model = dict(state["model"])
        with self.processes.failing_together("opening the records"):
            if self._records is not None:
                self._records.resume(folder / RECORDS_COPY)
        logger.info("SPICE: continuing the selection in %s after step %d.", self.output_dir, step)
        return step

    def _differing(self, identity: dict[str, Any]) -> list[str]:
        return [
            f"{name} was {value!r} and is {self.identity.get(name)!r}"
            for name, value in identity.items()
            if self.identity.get(name) != value
        ]
