"""Step counts, early stops, and rows that cannot be picked, inside a Trainer."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.sampling.empty_steps import EmptyStepWatch
from spice_trainer.sampling.run import SelectionRun
from tests.support.models import VOCAB_SIZE, tiny_lora_model
from tests.support.trainers import make_trainer, read_records, tiny_rows, trainable_weights, trained_indices

pytestmark = pytest.mark.oldest


class Planned(TrainerCallback):
    """The steps that the Trainer plans before the first one, as progress bars and learning rates see them."""

    max_steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.max_steps = state.max_steps


@pytest.fixture
def scored_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(epoch, step of the epoch) of every scoring."""
    steps: list[tuple[int, int]] = []
    score_step = SelectionRun._score_step

    def noted(self: SelectionRun, epoch: int, step_in_epoch: int) -> Any:
        steps.append((epoch, step_in_epoch))
        return score_step(self, epoch, step_in_epoch)

    monkeypatch.setattr(SelectionRun, "_score_step", noted)
    return steps


# 55 rows in pools of 10: five whole ones and a half. Epochs of every trained step, and how many rows each trained on.
COUNTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[int], list[int]]] = {
    "short last pool": ({}, {}, [0] * 6, [4, 4, 4, 4, 4, 2]),
    "epochs": ({}, {"num_train_epochs": 2}, [0] * 6 + [1] * 6, [4, 4, 4, 4, 4, 2] * 2),
    "half an epoch": ({}, {"num_train_epochs": 1.5}, [0] * 6 + [1] * 3, [4, 4, 4, 4, 4, 2, 4, 4, 4]),
    "max_steps": ({}, {"max_steps": 8}, [0] * 6 + [1] * 2, [4, 4, 4, 4, 4, 2, 4, 4]),
    "drop_last": ({}, {"dataloader_drop_last": True, "num_train_epochs": 2}, [0] * 5 + [1] * 5, [4] * 10),
    "two pools a step": ({"num_selected": 2}, {}, [0] * 3, [4, 4, 3]),
    "uneven pools": ({"num_selected": 3}, {"per_device_train_batch_size": 7}, [0] * 3, [7, 7, 6]),
    "more slots than the last picks": ({}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
                                       [0] * 6, [4, 4, 4, 4, 4, 2]),
    "explicit pools": ({"num_selected": 1, "pools_per_step": 3}, {}, [0] * 2, [3, 3]),
    "everything in one step": ({"pool_size": 80}, {}, [0], [3]),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTS)
def test_steps_known_beforehand_are_done(tmp_path: Any, scored_steps: list[tuple[int, int]], case: str) -> None:
    settings, options, epochs, sizes = COUNTS[case]
    planned = Planned()
    trainer = make_trainer(tmp_path, spice=settings, callbacks=[planned], **options)
    steps_per_epoch = max(len(list(group)) for _, group in itertools.groupby(epochs))
    accumulation = options.get("gradient_accumulation_steps", 1)
    assert len(trainer.get_train_dataloader()) == steps_per_epoch * accumulation
    trainer.train()
    assert planned.max_steps == trainer.state.global_step == len(epochs)
    assert trainer.state.epoch == pytest.approx(len(epochs) / steps_per_epoch)
    lines = read_records(tmp_path, "trained")
    assert [line["step"] for line in lines] == list(range(len(epochs)))
    assert [line["epoch"] for line in lines] == epochs
    assert [len(line["indices"]) for line in lines] == sizes
    assert [epoch for epoch, _ in scored_steps] == epochs
    for epoch in set(epochs):
        rows = [
            row for line in read_records(tmp_path, "pools") if line["epoch"] == epoch for row in line["candidates"]
        ]
        assert len(set(rows)) == len(rows), "a row was a candidate twice in an epoch"


@pytest.mark.parametrize("settings", [{"stop_ratio": 0.9}, {"min_gain": 4.5}], ids=["stop_ratio", "min_gain"])
def test_adaptive_stopping_changes_no_step_count(tmp_path: Any, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, spice={"pools_per_step": 2, "num_selected": 2} | settings, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 6
    pools = read_records(tmp_path, "pools")
    assert {line["stopped_early"] for line in pools} == {True, False}
    for line in pools:
        limit = settings.get("min_gain", 0.9 * (line["gain_first"] or 0.0))
        assert line["gain_last"] is None or line["gain_last"] >= limit
        assert line["stopped_early"] == (line["num_selected"] < (2 if len(line["candidates"]) == 10 else 1))
    sizes = [sum(line["num_selected"] for line in pools if line["step"] == step) for step in range(6)]
    assert [len(indices) for indices in trained_indices(tmp_path)] == sizes


def test_selection_epochs_replay_without_scoring(tmp_path: Any, scored_steps: list[tuple[int, int]]) -> None:
    trainer = make_trainer(
        tmp_path, spice={"selection_epochs": 1}, num_train_epochs=3, gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 18
    assert scored_steps == [(0, step) for step in range(6)]
    assert {line["epoch"] for line in read_records(tmp_path, "pools")} == {0}
    lines = read_records(tmp_path, "trained")
    epochs = [[line["indices"] for line in lines if line["epoch"] == epoch] for epoch in range(3)]
    picks = sorted(itertools.chain(*epochs[0]))
    for replayed in epochs[1:]:
        assert sorted(itertools.chain(*replayed)) == picks
        # Dealt evenly: 22 picks over six steps.
        assert [len(indices) for indices in replayed] == [4, 4, 4, 4, 3, 3]
    assert epochs[1] != epochs[2] != epochs[0]
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [("spice/information" in row, "spice/trained_samples" in row) for row in logs] == (
        [(True, True)] * 6 + [(False, True)] * 12
    )


class Stopper(TrainerCallback):
    """Stops the epoch or the training after a step."""

    def __init__(self, after: int, what: str) -> None:
        self.after = after
        self.what = what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            setattr(control, self.what, True)


def test_stopping_the_training_scores_no_further(tmp_path: Any, scored_steps: list[tuple[int, int]]) -> None:
    trainer = make_trainer(tmp_path, spice={}, callbacks=[Stopper(3, "should_training_stop")])
    trainer.train()
    assert trainer.state.global_step == 3 and scored_steps == [(0, 0), (0, 1), (0, 2)]
    assert [line["step"] for line in read_records(tmp_path, "trained")] == [0, 1, 2]
    assert len(read_records(tmp_path, "costs")) == 3


def test_stopping_an_epoch_goes_on_with_the_next(tmp_path: Any, scored_steps: list[tuple[int, int]]) -> None:
    trainer = make_trainer(tmp_path, spice={}, callbacks=[Stopper(2, "should_epoch_stop")], num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 8
    assert scored_steps == [(0, 0), (0, 1)] + [(1, step) for step in range(6)]
    assert [(line["step"], line["epoch"]) for line in read_records(tmp_path, "trained")] == [
        (step, int(step > 1)) for step in range(8)
    ]


# ---------------------------------------------------------------------------------------------------- rows

POISON = VOCAB_SIZE - 1


def test_rows_that_cannot_be_picked_are_reported(tmp_path: Any) -> None:
    """Rows without labels, with one-token answers, with NaN gradients, and one a hundred times longer."""
    rows = tiny_rows()
    for row in rows:
        row["input_ids"] = [min(token, POISON - 1) for token in row["input_ids"]]
        row["labels"] = [min(label, POISON - 1) for label in row["labels"]]
    unlabelled, nonfinite, single, long = {3, 11, 40}, {0, 7, 30, 31}, {5, 21}, 13
    for index in unlabelled:
        rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    # A label on the first token alone is none after the shift.
    rows[11]["labels"][0] = rows[11]["input_ids"][0]
    for index in nonfinite:
        rows[index]["input_ids"][0] = POISON
        rows[index]["labels"][-1] = rows[index]["input_ids"][-1]
    for index in single:
        rows[index]["labels"] = [-100] * (len(rows[index]["labels"]) - 1) + rows[index]["labels"][-1:]
        rows[index]["labels"][-1] = rows[index]["input_ids"][-1]
    tokens = (rows[long]["input_ids"] * 500)[:1200]
    rows[long] = {"input_ids": tokens, "attention_mask": [1] * 1200, "labels": [-100] * 4 + tokens[4:]}

    model = tiny_lora_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    trainer = make_trainer(
        tmp_path, spice={"pools_per_step": 1, "num_selected": 9, "scoring_tokens_per_batch": 100},
        model=model, train_dataset=rows, per_device_train_batch_size=9,
    )  # fmt: skip
    trainer.train()

    pools = read_records(tmp_path, "pools")
    assert sorted(index for line in pools for index in line["nonfinite"]) == sorted(nonfinite)
    assert sorted(index for line in pools for index in line["zero"]) == sorted(unlabelled)
    for line in pools:
        budget = 9 if len(line["candidates"]) == 10 else 5
        unsound = set(line["nonfinite"] + line["zero"])
        assert unsound <= set(line["candidates"])
        assert line["num_selected"] == min(budget, len(line["candidates"]) - len(unsound))
    trained = set(itertools.chain(*trained_indices(tmp_path)))
    assert not trained & (unlabelled | nonfinite)
    assert trained & single, "no one-token answer was picked, so nothing is tested of them"
    assert all(weight.isfinite().all() for weight in trainable_weights(model).values())
    assert all(row["loss"] > 0 for row in trainer.state.log_history if "loss" in row)
    picks = {line["index"]: line for line in read_records(tmp_path, "selections")}
    assert {picks[index]["label_tokens"] for index in single & trained} == {1}


def test_a_long_row_is_scored_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny_rows(10)
    tokens = (rows[4]["input_ids"] * 500)[:1200]
    rows[4] = {"input_ids": tokens, "attention_mask": [1] * 1200, "labels": tokens}
    shapes: list[tuple[int, int]] = []
    compute = SampleGradients.compute

    def noted(self: SampleGradients, inputs: Any, *args: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return compute(self, inputs, *args)

    monkeypatch.setattr(SampleGradients, "compute", noted)
    make_trainer(tmp_path, spice={"scoring_tokens_per_batch": 100}, train_dataset=rows).train()
    assert shapes[0] == (1, 1200) and sum(size for size, _ in shapes) == 10
    assert all(size * length <= 100 for size, length in shapes[1:])


def test_too_many_steps_without_picks_end_the_run(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, spice={"pools_per_step": 1, "min_gain": 1e6}, save_strategy="steps", save_steps=1)
    error = (
        r"could pick no sample in 3 of the last 3 optimizer steps\. In step 2 0 candidates had a gradient that is not "
        r"finite and 0 a zero gradient, and no gain reached min_gain=1000000\.0\. Likely causes"
    )
    with pytest.raises(RuntimeError, match=error):
        trainer.train()
    assert trained_indices(tmp_path) == [[], []]
    # The count survives a resume: the next such step is the third.
    state = json.loads((tmp_path / "checkpoint-2" / "spice" / "state.json").read_text())
    assert state["sampler"]["empty_steps"] == [1, 1]
    resumed = make_trainer(tmp_path, spice={"pools_per_step": 1, "min_gain": 1e6}, save_strategy="no")
    with pytest.raises(RuntimeError, match=r"3 of the last 3 optimizer steps\. In step 2 "):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_steps_without_picks_are_counted_over_twenty_steps() -> None:
    watch = EmptyStepWatch(min_gain=None)
    empty, picked = (
        [SimpleNamespace(indices=(), candidates=(1,), nonfinite=(1,), zero=(), out_of_memory=())],
        [SimpleNamespace(indices=(0,))],
    )
    for step, is_empty in enumerate([1, 1] + [0] * 18 + [1] + [0] * 10):
        watch.note(step, empty if is_empty else picked, broken_weight=lambda: None)
    with pytest.raises(RuntimeError, match="3 of the last 20"):
        for step in (31, 32):
            watch.note(step, empty, broken_weight=lambda: None)
