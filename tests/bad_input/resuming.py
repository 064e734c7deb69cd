"""Resuming: from nothing, from another run's checkpoint, from one that is damaged or was edited."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.scene import STARTING, TRAINING, BadInput, Scene
from tests.support.trainers import tiny_dataset, tiny_rows

CHECKPOINT = "checkpoint-4"
REPLAY = {"selection_epochs": 1}


def _resume(change: Callable[[Path], Any] | None = None, **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    """Resumes a copy of a finished run with other options, or after its checkpoint was changed."""

    def prepare(scene: Scene) -> Callable[[], Any]:
        checkpoint = scene.finished() / CHECKPOINT
        if change is not None:
            change(checkpoint)
        built = {name: value() if callable(value) else value for name, value in options.items()}
        return scene.train(built.pop("settings", None), resume=str(checkpoint), **built)

    return prepare


def _state(**values: Any) -> Callable[[Path], None]:
    """Sets values of the state; `None` leaves one out."""

    def change(checkpoint: Path) -> None:
        path = checkpoint / "spice" / "state.json"
        state = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))

    return change


def _write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def _edited() -> list[dict[str, Any]]:
    rows = tiny_rows()
    rows[9] = rows[9] | {"labels": rows[9]["input_ids"]}
    return rows


def _without_spice(scene: Scene) -> Callable[[], Any]:
    return scene.train(resume=str(scene.finished(name="without") / CHECKPOINT))


def _replayed_rows(scene: Scene) -> Callable[[], Any]:
    checkpoint = scene.finished(REPLAY, name="replayed", num_train_epochs=2) / "checkpoint-8"
    path = checkpoint / "spice" / "state.safetensors"
    save_file({name: torch.full_like(value, 9999) for name, value in load_file(path).items()}, path)
    state = json.loads((path.parent / "state.json").read_text())
    state["tensors_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "state.json").write_text(json.dumps(state))
    return scene.train(REPLAY, resume=str(checkpoint), num_train_epochs=2)


def _latest(change: Callable[[Path], Any]) -> Callable[[Scene], Callable[[], Any]]:
    """Resumes the latest checkpoint of a copy of a finished run, in its own folder."""

    def prepare(scene: Scene) -> Callable[[], Any]:
        earlier = scene.finished()
        change(earlier)
        earlier.rename(scene.folder / "run")
        return scene.train(resume=True)

    return prepare


def _cut_all(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()


ROWS = (
    BadInput(
        "no_such_checkpoint",
        "`resume_from_checkpoint` of no folder",
        STARTING,
        ValueError,
        ("Can't find a valid checkpoint at",),
        lambda scene: scene.train(resume=str(scene.folder / "nowhere")),
    ),
    BadInput(
        "no_checkpoint",
        "`resume_from_checkpoint=True` without a checkpoint",
        STARTING,
        ValueError,
        ("No valid checkpoint found in output directory",),
        lambda scene: scene.train(resume=True),
    ),
    BadInput(
        "cut_checkpoints",
        "the same where no checkpoint was written whole",
        STARTING,
        ValueError,
        ("No checkpoint in", "is complete", "Start the run anew"),
        _latest(_cut_all),
    ),
    BadInput(
        "cut_checkpoint",
        "the same where the latest one was not written whole",
        TRAINING,
        None,
        ("checkpoint-6 in", "is not complete", "The run continues from checkpoint-4"),
        _latest(lambda folder: (folder / "checkpoint-6" / "trainer_state.json").unlink()),
    ),
    BadInput(
        "named_cut_checkpoint",
        "`resume_from_checkpoint` of one that was not written whole",
        STARTING,
        ValueError,
        ("checkpoint-4 is not complete", "its writing was interrupted", "checkpoint-6', the latest complete one"),
        _resume(lambda checkpoint: (checkpoint / "trainer_state.json").unlink()),
    ),
    BadInput(
        "run_without_spice",
        "a checkpoint of a run without SPICE",
        STARTING,
        ValueError,
        ("has no spice/state.json: it was written by a run without SPICE", "Detach SPICE to continue that run"),
        _without_spice,
    ),
    BadInput(
        "other_rows",
        "a checkpoint of another dataset of the same length",
        STARTING,
        ValueError,
        ("belongs to another selection schedule: dataset_fingerprint was", "Resume with the dataset"),
        _resume(train_dataset=lambda: tiny_dataset(seed=5)),
    ),
    BadInput(
        "other_length",
        "a checkpoint of a shorter or longer dataset",
        STARTING,
        ValueError,
        ("another selection schedule: num_rows was 55 and is 54",),
        _resume(train_dataset=lambda: tiny_dataset(54)),
    ),
    BadInput(
        "edited_row",
        "a row edited between the runs",
        STARTING,
        ValueError,
        ("dataset_fingerprint was", "The epoch's pools would not be the ones"),
        _resume(train_dataset=_edited),
    ),
    BadInput(
        "other_pool_size",
        "another `pool_size`",
        STARTING,
        ValueError,
        ("steps_per_epoch was 6 and is 5; pool_size was 10 and is 11",),
        _resume(settings={"pool_size": 11}),
    ),
    BadInput("other_seed", "another seed", STARTING, ValueError, ("pool_seed was 42 and is 7",), _resume(data_seed=7)),
    BadInput(
        "other_batch",
        "another number of samples a step",
        STARTING,
        ValueError,
        ("samples_per_step was 4 and is 2",),
        _resume(per_device_train_batch_size=2),
    ),
    BadInput(
        "other_setting",
        "another setting that moves no pool",
        TRAINING,
        None,
        ("settings changed since the checkpoint", "conflict_penalty was 0.1 and is 0.7", "use the new ones"),
        _resume(settings={"conflict_penalty": 0.7}),
    ),
    BadInput(
        "other_version",
        "a checkpoint of another version",
        STARTING,
        ValueError,
        ("is of format version 99, this version of spice_trainer reads 3", "Resume with the version that wrote it"),
        _resume(_state(format_version=99)),
    ),
    BadInput(
        "state_of_another_step",
        "a state of another step, put into the checkpoint",
        STARTING,
        ValueError,
        ("is put together of two", "after 3 steps", "trainer_state.json after 4", "Resume from a checkpoint that"),
        _resume(_state(position={"epoch": 0, "step_in_epoch": 3, "steps_trained": 3})),
    ),
    BadInput(
        "impossible_position",
        "a state of a step that no epoch has",
        STARTING,
        ValueError,
        ("has other values than this version writes", "outside epochs of 6 steps", "damaged, or was edited"),
        _resume(_state(position={"epoch": 0, "step_in_epoch": 6, "steps_trained": 4})),
    ),
    BadInput(
        "cut_state",
        "a state that was cut off",
        STARTING,
        ValueError,
        ("cannot be read", "the checkpoint is damaged", "Resume from an earlier checkpoint"),
        _resume(_write("spice/state.json", b'{"format_version": 3, "sch')),
    ),
    BadInput(
        "no_tensors",
        "a state whose tensors are gone",
        STARTING,
        ValueError,
        ("cannot be read", "state.safetensors", "damaged"),
        _resume(lambda checkpoint: (checkpoint / "spice" / "state.safetensors").unlink()),
    ),
    BadInput(
        "pickled_tensors",
        "a pickle in the place of the tensors (it is not loaded)",
        STARTING,
        ValueError,
        ("cannot be read", "damaged"),
        _resume(lambda checkpoint: torch.save({"picks_of_epoch": 1}, checkpoint / "spice" / "state.safetensors")),
    ),
    BadInput(
        "state_of_another_kind",
        "a state that is no object",
        STARTING,
        ValueError,
        ("has other values than this version writes", "Resume from another checkpoint"),
        _resume(_write("spice/state.json", b"[1, 2]")),
    ),
    BadInput(
        "missing_value",
        "a state that lacks a value",
        STARTING,
        ValueError,
        ("has other values than this version writes (KeyError: 'sampler')",),
        _resume(_state(sampler=None)),
    ),
    BadInput(
        "text_for_number",
        "a state with text in the place of numbers",
        STARTING,
        ValueError,
        ("has other values than this version writes (TypeError: 'many' is no number)",),
        _resume(_state(totals={"num_steps": "many"})),
    ),
    BadInput(
        "replayed_rows",
        "a state that replays rows the dataset has not",
        STARTING,
        ValueError,
        ("(IndexError: a replayed pick is none of the 55 rows)",),
        _replayed_rows,
    ),
    BadInput(
        "no_record_copy",
        "a checkpoint without its copy of the records",
        TRAINING,
        None,
        ("the checkpoint's copy of the records", "is missing or damaged", "so those of the resumed run begin here"),
        _resume(lambda checkpoint: shutil.rmtree(checkpoint / "spice" / "records")),
    ),
)
