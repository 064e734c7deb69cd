"""The output directory: in the way, full, with the records of another run, or somewhere else."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from spice_trainer.recording.record_file import RecordFile
from spice_trainer.recording.records import RecordWriter
from tests.bad_input.scene import STARTING, TRAINING, BadInput, Scene


def _in_the_way(name: str) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train()
        path = scene.folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        return train

    return prepare


class OnSecondStep(TrainerCallback):
    """Does something to the run's folder before the second step."""

    def __init__(self, change: Callable[[Any, Path], Any]) -> None:
        self.change = change

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.change(state, Path(args.output_dir) / "spice")


def _in_mid_run(change: Callable[[Scene, Path], Any]) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train()
        scene.trainer.add_callback(OnSecondStep(lambda state, folder: change(scene, folder)))
        return train

    return prepare


def _fill_disk(scene: Scene, folder: Path) -> None:
    """For one step."""
    flush = RecordFile.flush

    def fail(file: RecordFile) -> None:
        scene.patch.setattr(RecordFile, "flush", flush)
        raise OSError(errno.ENOSPC, "No space left on device")

    scene.patch.setattr(RecordFile, "flush", fail)


def _another_run(scene: Scene) -> Callable[[], Any]:
    train = scene.train()
    RecordWriter(scene.folder / "run" / "spice").start()
    return train


ROWS = (
    BadInput(
        "file_in_the_way",
        "an output directory where SPICE's folder cannot be made",
        STARTING,
        NotADirectoryError,
        ("SPICE cannot write its records to", "run/spice", "make it writable, or choose another output_dir"),
        _in_the_way("spice"),
    ),
    BadInput(
        "full_disk",
        "a disk that is full in the middle of a run",
        TRAINING,
        None,
        (".jsonl failed (No space left on device); the run goes on, and it is tried again",),
        _in_mid_run(_fill_disk),
    ),
    BadInput(
        "records_deleted",
        "the records deleted in the middle of a run",
        TRAINING,
        None,
        ("was deleted while this run writes it, and is written there again, complete",),
        _in_mid_run(lambda scene, folder: shutil.rmtree(folder)),
    ),
    BadInput(
        "another_run",
        "the output directory of a run that is still going on",
        STARTING,
        RuntimeError,
        ("Another run (this very process", "two would mix their records and checkpoints", "Choose another output_dir"),
        _another_run,
    ),
)
