"""The output directory: in the way, full, with the records of another run, or somewhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.bad_input.scene import STARTING, TRAINING, BadInput, Scene

HAS_FULL_DEVICE = Path("/dev/full").exists()


def _in_the_way(name: str) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train()
        path = scene.folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        return train

    return prepare


class FillDisk(TrainerCallback):
    """From the second step on there is no space left for a record."""

    def __init__(self, trainer: Any, name: str) -> None:
        self.trainer, self.name = trainer, name

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer._spice.callback._records.close()
            path = Path(args.output_dir) / "spice" / self.name
            path.unlink()
            path.symlink_to("/dev/full")


def _full(scene: Scene) -> Callable[[], Any]:
    train = scene.train()
    scene.trainer.add_callback(FillDisk(scene.trainer, "pools.jsonl"))
    return train


ROWS = (
    BadInput(
        "file_in_the_way",
        "an output directory where SPICE's folder cannot be made",
        STARTING,
        FileExistsError,
        ("SPICE cannot write its records to", "run/spice", "make it writable, or choose another output_dir"),
        _in_the_way("spice"),
    ),
    BadInput(
        "full_disk",
        "a disk that is full in the middle of a run",
        TRAINING,
        OSError,
        ("SPICE cannot write its records to", "(No space left on device)", "go on from the last checkpoint"),
        _full,
        skip=not HAS_FULL_DEVICE,
    ),
)
