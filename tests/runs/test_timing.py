"""The weights that score a step's pools are those of its beginning; evaluating and predicting never score."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader
from torch import nn
from transformers import Trainer, TrainerCallback

from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.sampling.run import SelectionRun
from spice_trainer.trainer import hooks
from tests.support.trainers import (
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    trainable_weights,
    trained_indices,
)

CLOCK_KEYS = {"spice/seconds_scoring", "spice/seconds_selecting", "spice/overhead"}


def fingerprint(model: nn.Module) -> str:
    """A hash of the weights that train."""
    digest = hashlib.sha256()
    for weight in trainable_weights(model).values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


class Diary(TrainerCallback):
    """What happened in which order, with the weights of that moment: (event, step, fingerprint)."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int, str]] = []

    def write(self, event: str, step: int, model: nn.Module) -> None:
        self.entries.append((event, step, fingerprint(model)))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.write("weights", state.global_step, model)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.write("begin", state.global_step, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # The update is done: these are the weights of the next step.
        self.write("weights", state.global_step, model)

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.write("log", state.global_step, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.write("save", state.global_step, model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.write("evaluate", state.global_step, model)


def watch_scoring(monkeypatch: pytest.MonkeyPatch, diary: Diary) -> None:
    """Notes every scoring micro-batch, under the step it is for."""
    compute, score_step = SampleGradients.compute, SelectionRun._score_step
    step = -1

    def noted_step(self: SelectionRun, epoch: int, step_in_epoch: int) -> Any:
        nonlocal step
        step = self.global_step
        return score_step(self, epoch, step_in_epoch)

    def noted_compute(self: SampleGradients, *args: Any, **kwargs: Any) -> Any:
        diary.write("score", step, self.model)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(SelectionRun, "_score_step", noted_step)
    monkeypatch.setattr(SampleGradients, "compute", noted_compute)


def check_timing(diary: Diary, num_steps: int) -> None:
    """Every step scores at its own weights, after everything of the step before and before it begins."""
    weights = {step: mark for event, step, mark in diary.entries if event == "weights"}
    assert len(set(weights.values())) == num_steps + 1, "weights did not change in every step, so nothing is tested"
    for step in range(num_steps):
        scored = [place for place, entry in enumerate(diary.entries) if entry[0] == "score" and entry[1] == step]
        assert scored, f"step {step} was not scored"
        assert {diary.entries[place][2] for place in scored} == {weights[step]}, f"step {step} scored at other weights"
        begin = diary.entries.index(("begin", step, weights[step]))
        between = [entry[0] for entry in diary.entries[scored[0] : begin]]
        assert set(between) == {"score"}, f"scoring of step {step} was not the last thing before it: {between}"
        previous = [place for place, entry in enumerate(diary.entries) if entry[0] == "begin" and entry[1] < step]
        assert all(place < scored[0] for place in previous)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_scored_at_the_weights_of_the_step(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, accumulation: int) -> None:
    diary = Diary()
    trainer = make_trainer(
        tmp_path,
        spice={"scoring_tokens_per_batch": 64},
        eval_dataset=tiny_dataset(6, seed=1),
        callbacks=[diary],
        lora_dropout=0.3,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=3,
    )
    watch_scoring(monkeypatch, diary)
    trainer.train()
    assert trainer.state.global_step == 12
    assert {"log", "save", "evaluate"} <= {entry[0] for entry in diary.entries}
    check_timing(diary, 12)


class ScoresAhead(TrainerCallback):
    """Scores the next step's pools before the update."""

    trainer: Trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.trainer._spice.sampler.run
        position, run.position = run.position, replace(run.position)
        run.position.finish_step()
        run._score_step(run.position.epoch, run.position.step_in_epoch)
        run.position = position


def test_what_is_scored_too_early_is_noticed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proof that the check above can fail."""
    diary, ahead = Diary(), ScoresAhead()
    trainer = ahead.trainer = make_trainer(tmp_path, spice={}, callbacks=[diary, ahead], max_steps=3)
    watch_scoring(monkeypatch, diary)
    trainer.train()
    with pytest.raises(AssertionError, match="step 1 scored at other weights"):
        check_timing(diary, 3)


def test_a_prepared_loader_would_score_too_early(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for the unprepared loader: accelerate's fetches ahead, which is refused."""
    trainer = make_trainer(tmp_path, spice={})
    build = hooks.build_dataloader
    monkeypatch.setattr(hooks, "build_dataloader", lambda *args, **kwargs: prepare_data_loader(build(*args, **kwargs)))
    with pytest.raises(RuntimeError, match="asked for before the Trainer had finished step 0"):
        trainer.train()


def test_preparing_the_loader_changes_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator gives it back as it is."""
    make_trainer(tmp_path / "plain", spice={}).train()
    trainer = make_trainer(tmp_path / "prepared", spice={})
    build = hooks.build_dataloader
    monkeypatch.setattr(
        hooks, "build_dataloader", lambda *args, **kwargs: trainer.accelerator.prepare(build(*args, **kwargs))
    )
    trainer.train()
    assert trained_indices(tmp_path / "prepared") == trained_indices(tmp_path / "plain")


class Interrupter(TrainerCallback):
    """Evaluates and predicts by hand between steps."""

    trainer: Trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not where the Trainer is about to log: any log call, this one too, clears its intent to.
        rows = tiny_dataset(5, seed=2)
        if state.global_step == 3:
            self.trainer.evaluate(rows, metric_key_prefix="eval_by_hand")
        if state.global_step == 5:
            self.trainer.predict(rows)


def test_evaluating_and_predicting_never_score(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without dropout: evaluating draws from the random state in the stock Trainer too (each data loader its seed).
    plain = make_trainer(tmp_path / "plain", spice={}, num_train_epochs=2, logging_steps=2)
    plain.train()

    diary, interrupter = Diary(), Interrupter()
    trainer = make_trainer(
        tmp_path / "evaluated",
        spice={},
        eval_dataset=tiny_dataset(6, seed=1),
        callbacks=[diary, interrupter],
        num_train_epochs=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        eval_on_start=True,
    )
    interrupter.trainer = trainer
    watch_scoring(monkeypatch, diary)
    trainer.evaluate()
    trainer.predict(tiny_dataset(5, seed=2))
    assert [entry[0] for entry in diary.entries if entry[0] == "score"] == []
    trainer.train()
    check_timing(diary, 12)
    num_scored = len([entry for entry in diary.entries if entry[0] == "score"])
    trainer.evaluate()
    assert len([entry for entry in diary.entries if entry[0] == "score"]) == num_scored

    for name in ("selections", "pools", "trained"):
        assert read_records(tmp_path / "evaluated", name) == read_records(tmp_path / "plain", name)
    assert same_weights(trainable_weights(trainer.model), trainable_weights(plain.model))
    assert training_logs(trainer) == training_logs(plain)


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    """SPICE's part of every log row that has one, without clock readings; it must be the training rows alone."""
    rows = [row for row in trainer.state.log_history if any(key.startswith("spice/") for key in row)]
    assert rows == [row for row in trainer.state.log_history if "loss" in row]
    return [
        {key: value for key, value in row.items() if key.startswith("spice/") and key not in CLOCK_KEYS}
        for row in rows
    ]
