"""What others do to a run while it trains: it goes on as if they had not, or says what they did. Nothing is silent."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed

from tests.support.models import tiny_lora_model
from tests.support.trainers import (
    collate,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

pytestmark = pytest.mark.oldest

EPOCHS = 2


class Disturbs(TrainerCallback):
    """Does something once, when the second step has ended."""

    trainer: Any

    def __init__(self, act: Callable[..., Any]) -> None:
        self.act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not vars(self).get("is_done"):
            self.is_done = True
            self.act(self.trainer, **kwargs | {"args": args, "state": state, "control": control})


def run(output_dir: Path, act: Callable[..., Any] | None = None, *, is_last: bool = False, **options: Any) -> Any:
    """A run of two epochs, disturbed before SPICE hears of the step's end, or behind it."""
    trainer = make_trainer(output_dir, spice=options.pop("spice", {}), num_train_epochs=EPOCHS, **options)
    if act is not None:
        callback = Disturbs(act)
        callback.trainer = trainer
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(len(callbacks) if is_last else 0, callback)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("plain")
    return run(folder), folder


def _raising(rows: list[Any]) -> Any:
    raise ValueError("the loader has its own")


def evaluate(trainer: Any, **_: Any) -> None:
    trainer.evaluate(tiny_dataset(5, seed=3))
    trainer.predict(tiny_dataset(3, seed=4))


def save_beside(trainer: Any, **_: Any) -> None:
    trainer.save_model(f"{trainer.args.output_dir}/mine/checkpoint-2")


def replace_dataset(trainer: Any, **_: Any) -> None:
    trainer.train_dataset = tiny_dataset(seed=9)


def replace_collator(trainer: Any, **_: Any) -> None:
    trainer.data_collator = _raising


def ask_for_a_batch(trainer: Any, args: Any, **_: Any) -> None:
    trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, args.device)


def train_another(trainer: Any, **_: Any) -> None:
    make_trainer(f"{trainer.args.output_dir}/other", spice={}).train()


def fork(trainer: Any, **_: Any) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def end_the_step_again(trainer: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
    trainer.callback_handler.on_step_end(args, state, control)


def seed(trainer: Any, **_: Any) -> None:
    set_seed(123)


def batch_size(trainer: Any, args: Any, **_: Any) -> None:
    args.per_device_train_batch_size = 8


def evaluation_mode(trainer: Any, model: Any, **_: Any) -> None:
    model.eval()


@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize(
    "act",
    [
        evaluate, save_beside, replace_dataset, replace_collator, ask_for_a_batch, train_another, fork,
        end_the_step_again, seed, batch_size, evaluation_mode,
    ],
)  # fmt: skip
def test_what_changes_nothing(act: Any, is_last: bool, plain: tuple[Any, Path], tmp_path: Path) -> None:
    trainer = run(tmp_path, act, is_last=is_last)
    assert trained_indices(tmp_path) == trained_indices(plain[1])
    assert same_weights(trainable_weights(trainer.model), trainable_weights(plain[0].model))


def step_on(trainer: Any, state: Any, **_: Any) -> None:
    state.global_step += 2


def step_back(trainer: Any, state: Any, **_: Any) -> None:
    state.global_step -= 1


def settings(trainer: Any, **_: Any) -> None:
    trainer._spice.sampler.config.conflict_penalty = 50.0


def reverse(trainer: Any, **_: Any) -> None:
    trainer.train_dataset.reverse()


def grow(trainer: Any, **_: Any) -> None:
    trainer.train_dataset.extend(tiny_rows(3, seed=5))


@pytest.mark.parametrize(
    ("act", "num_steps", "said"),
    [
        (step_on, 10, r"a callback changed `state\.global_step` from 2 to 4, the number that the records go on with"),
        (step_back, 12, r"a callback changed `state\.global_step` from 2 to 1"),
        (
            settings,
            12,
            r"settings were changed in mid-run: conflict_penalty was 0\.1 and is 50\.0\. Picks from st",
        ),
        (reverse, 12, r"row 0 of the training dataset is another than when the run began.*Fix: leave it as it is"),
        (grow, 12, r"dataset \(list\) has 58 rows now, and had 55 when the run began: those .* are no candidates"),
    ],
)
def test_what_is_told_once(
    act: Any, num_steps: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, act, train_dataset=tiny_rows())
    assert len(re.findall(said, caplog.text)) == 1
    assert len(trained_indices(tmp_path)) == num_steps


@pytest.mark.parametrize("act", [step_on, step_back])
def test_a_number_that_was_changed_is_resumed(act: Any, tmp_path: Path) -> None:
    """As many steps as the Trainer counts from there; SPICE's position is the Trainer's."""
    saving = {"save_strategy": "steps", "save_steps": 3 if act is step_back else 5}
    whole = run(tmp_path, act, **saving)
    step = saving["save_steps"]
    resumed = make_trainer(tmp_path / "resumed", spice={}, num_train_epochs=EPOCHS)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
    assert resumed.state.global_step == whole.state.global_step
    assert trained_indices(tmp_path / "resumed") == trained_indices(tmp_path)
    steps = [line["step"] for line in read_records(tmp_path, "trained")]
    assert steps[:4] == ([0, 1, 4, 5] if act is step_on else [0, 1, 1, 2])


def put_another_model(trainer: Any, **_: Any) -> None:
    trainer.model = tiny_lora_model(seed=5)


def train_again(trainer: Any, **_: Any) -> None:
    trainer.train()


def train_another_here(trainer: Any, **_: Any) -> None:
    make_trainer(trainer.args.output_dir, spice={}).train()


def drop_labels(trainer: Any, **_: Any) -> None:
    for row in trainer.train_dataset:
        row.pop("labels", None)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (put_another_model, r"The trainer's model is another PeftModel.*a callback that sets `trainer\.model`"),
        (train_again, r"`train\(\)` was called while this trainer trains.*Fix: train with another trainer"),
        (train_another_here, r"Another run \(this very process \d+"),
        (drop_labels, r"The data collator \(collate\) failed on row \d+ .*KeyError: 'labels'"),
    ],
)
def test_what_would_make_the_result_wrong_ends_the_run(act: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises((RuntimeError, ValueError), match=said):
        run(tmp_path, act, train_dataset=tiny_rows(), data_collator=collate)


# Checkpoints put together of two


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs alike but for their pools, each with checkpoints; the second epoch replays the first."""
    folders = [tmp_path_factory.mktemp(f"run{number}") for number in (1, 2)]
    for number, folder in enumerate(folders):
        spice = {"selection_epochs": 1, "pool_seed": number}
        run(folder, spice=spice, save_strategy="steps", save_steps=7, train_dataset=tiny_dataset())
    return folders


def _short(path: Path, other: Path) -> None:
    save_file({name: values[:3].clone() for name, values in load_file(path).items()}, path)


def _of_the_other(path: Path, other: Path) -> None:
    shutil.copy(other, path)


@pytest.mark.parametrize("change", [_short, _of_the_other])
def test_tensors_that_were_not_written_with_the_state_are_refused(
    change: Any, two_runs: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(two_runs[0] / "checkpoint-7", tmp_path / "checkpoint-7")
    name = "checkpoint-7/spice/state.safetensors"
    change(tmp_path / name, two_runs[1] / name)
    trainer = make_trainer(tmp_path, spice={"selection_epochs": 1, "pool_seed": 0}, num_train_epochs=EPOCHS)
    with pytest.raises(ValueError, match=r"state\.safetensors is not the one that was written with state\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_records_of_another_run_in_a_checkpoint_are_not_taken(
    two_runs: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_runs[0] / "checkpoint-7", tmp_path / "checkpoint-7")
    shutil.rmtree(tmp_path / "checkpoint-7/spice/records")
    shutil.copytree(two_runs[1] / "checkpoint-7/spice/records", tmp_path / "checkpoint-7/spice/records")
    trainer = make_trainer(tmp_path, spice={"selection_epochs": 1, "pool_seed": 0}, num_train_epochs=EPOCHS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert "missing or damaged (it belongs to another checkpoint)" in caplog.text
    assert trained_indices(tmp_path) == trained_indices(two_runs[0])[7:]


def test_weights_that_a_callback_breaks_are_named_at_the_next_step(tmp_path: Path) -> None:
    def spoil(trainer: Any, model: Any, **_: Any) -> None:
        with torch.no_grad():
            next(weight for weight in model.parameters() if weight.requires_grad).fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"no candidate of step 2 has a finite gradient, since weights of"):
        run(tmp_path, spoil)
