"""Metrics in the training log: which keys, in which rows, averaged over which steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.support.trainers import make_trainer, read_records, tiny_dataset, trained_indices

pytestmark = pytest.mark.oldest

PICK_KEYS = {
    "spice/information", "spice/gain_first", "spice/gain_last", "spice/conflict", "spice/conflict_rate",
    "spice/num_selected", "spice/num_candidates", "spice/overlap_top_norm", "spice/changed_by_conflict",
    "spice/tokens_ratio", "spice/trained_samples",
}  # fmt: skip
CLOCK_KEYS = {"spice/seconds_scoring", "spice/seconds_selecting", "spice/overhead"}


class Reporter(TrainerCallback):
    """Gets what every reporting integration gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def _spice_keys(row: dict[str, float]) -> set[str]:
    return {key for key in row if key.startswith("spice/")}


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _expected(directory: Path, steps: range) -> dict[str, float]:
    """The window's averages, computed anew from the record files."""
    records = {
        name: [line for line in read_records(directory, name) if line["step"] in steps]
        for name in ("selections", "pools", "trained", "costs")
    }

    def mean_of_steps(name: str, value: Any) -> float:
        return _mean(_mean(value(line) for line in records[name] if line["step"] == step) for step in steps)

    def sum_of_steps(name: str, value: Any) -> float:
        return _mean(sum(value(line) for line in records[name] if line["step"] == step) for step in steps)

    def overhead(line: dict[str, float]) -> float:
        selecting = line["seconds_scoring"] + line["seconds_selecting"]
        return selecting / (selecting + line["seconds_training"])

    same = ("information", "gain_first", "gain_last", "overlap_top_norm", "changed_by_conflict")
    return {
        **{f"spice/{key}": mean_of_steps("pools", lambda line, key=key: line[key]) for key in same},
        "spice/tokens_ratio": mean_of_steps("pools", lambda line: line["tokens_selected"] / line["tokens_pool"]),
        "spice/conflict": mean_of_steps("selections", lambda line: line["conflict"]),
        "spice/conflict_rate": mean_of_steps("selections", lambda line: line["conflict"] > 0),
        "spice/num_selected": sum_of_steps("pools", lambda line: line["num_selected"]),
        "spice/num_candidates": sum_of_steps("pools", lambda line: len(line["candidates"])),
        "spice/trained_samples": sum_of_steps("trained", lambda line: len(line["indices"])),
        "spice/seconds_scoring": mean_of_steps("costs", lambda line: line["seconds_scoring"]),
        "spice/seconds_selecting": mean_of_steps("costs", lambda line: line["seconds_selecting"]),
        "spice/overhead": mean_of_steps("costs", overhead),
    }


@pytest.mark.parametrize("settings", [{}, {"stop_ratio": 0.85, "pools_per_step": 2}], ids=["fixed", "adaptive"])
def test_metrics_join_the_training_log_and_average_its_window(settings: dict[str, Any], tmp_path: Path) -> None:
    arguments = {"logging_steps": 2, "per_device_train_batch_size": 8, "num_train_epochs": 2}
    arguments |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": tiny_dataset(4)}
    reporter = Reporter()
    trainer = make_trainer(tmp_path / "spice", spice=settings, callbacks=[reporter], **arguments)
    trainer.train()
    steps = trainer.state.max_steps
    stock = make_trainer(tmp_path / "stock", **arguments, max_steps=steps)
    stock.train()

    history = trainer.state.log_history
    # Not one row more than without SPICE, and the same keys besides.
    kinds = [set(row) - _spice_keys(row) for row in history]
    assert kinds == [set(row) for row in stock.state.log_history]
    logged = [row for row in history if "loss" in row]
    assert [row["step"] for row in logged] == list(range(2, steps + 1, 2)) and steps >= 6
    for row in history:
        assert _spice_keys(row) == (PICK_KEYS | CLOCK_KEYS if "loss" in row else set())
    for row in logged:
        expected = _expected(tmp_path / "spice", range(row["step"] - 2, row["step"]))
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)
    # Reporters are handed the same dict, without the step.
    assert reporter.logs == [{key: value for key, value in row.items() if key != "step"} for row in history]


def test_replayed_steps_log_what_they_trained_on_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice={"selection_epochs": 1}, num_train_epochs=2)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [_spice_keys(row) == PICK_KEYS | CLOCK_KEYS for row in logged[:6]] == [True] * 6
    assert [_spice_keys(row) for row in logged[6:]] == [{"spice/trained_samples"}] * 6


@pytest.mark.parametrize("max_steps", [-1, 3])
def test_speed_counts_the_samples_that_were_trained(max_steps: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice={}, num_train_epochs=2, max_steps=max_steps)
    result = trainer.train()
    last = trainer.state.log_history[-1]
    num_trained = sum(map(len, trained_indices(tmp_path)))
    assert num_trained == (12 if max_steps == 3 else 44)
    assert last["train_samples_per_second"] == pytest.approx(num_trained / last["train_runtime"], rel=1e-2)
    assert result.metrics["train_samples_per_second"] == last["train_samples_per_second"]


class LogsALoss(TrainerCallback):
    """Somebody's own number of the name that the trainer's has, where that logs nothing."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (3, 5):
            self.trainer.log({"loss": 1.5})


def test_a_log_of_somebody_elses_takes_no_averages(tmp_path: Path) -> None:
    found = []
    for name in ("logging", "not"):
        callback = LogsALoss()
        trainer = make_trainer(tmp_path / name, spice={}, logging_steps=2)
        if name == "logging":
            callback.trainer = trainer
            # Behind SPICE's own, which has taken the step by then.
            trainer.add_callback(callback)
        trainer.train()
        own = [row for row in trainer.state.log_history if row.get("loss") == 1.5]
        assert len(own) == (2 if name == "logging" else 0) and not any(map(_spice_keys, own))
        found.append([
            {key: value for key, value in row.items() if key in PICK_KEYS} for row in trainer.state.log_history
            if "loss" in row and row not in own
        ])  # fmt: skip
    assert len(found[0]) == 3 and found[0] == found[1] and all(row.keys() == PICK_KEYS for row in found[0])
