"""Picking everything trains like the plain Trainer; fewer picks than slots train like an exact token mean."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from spice_trainer import SpiceConfig
from spice_trainer.sampling.schedule import PoolSchedule, plan_step
from tests.support.models import tiny_lora_model
from tests.support.trainers import (
    collate,
    make_sft_trainer,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)
from tests.support.versions import before

pytestmark = pytest.mark.oldest

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 0.5}


class Weights(TrainerCallback):
    """The weights before every step, and after the last."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.taken.append(trainable_weights(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.taken.append(trainable_weights(model))


def model_without_loss_kwargs() -> nn.Module:
    """A model whose loss is the mean of its micro-batch, whatever `num_items_in_batch` is."""
    model = tiny_lora_model()
    model.get_base_model().accepts_loss_kwargs = False
    return model


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def in_slots(indices: Sequence[int], num_slots: int) -> list[list[int]]:
    """The picks of a step over its micro-batches, the first ones one longer; none empty."""
    slots = []
    for left in range(num_slots, 0, -1):
        size = math.ceil(len(indices) / left)
        slots.append(list(indices[:size]))
        indices = indices[size:]
    return [slot for slot in slots if slot]


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user's `compute_loss_func`."""
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / num_items_in_batch


LOSSES: dict[str, dict[str, Any]] = {
    "num_items_in_batch": {},
    "mean-per-micro-batch": {"loss_kwargs": False},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "compute_loss_func": {"loss_kwargs": False, "compute_loss_func": summed_loss},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_picking_everything_trains_like_the_plain_trainer(tmp_path: Any, loss: str) -> None:
    # 43 rows in pools of 8: the last step has 3 rows for its 4 micro-batches, too few where they must be equal.
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4} | LOSSES[loss]
    build_model = tiny_lora_model if options.pop("loss_kwargs", True) else model_without_loss_kwargs
    ours, theirs = Weights(), Weights()
    dataset = tiny_dataset(43)
    spiced = make_trainer(
        tmp_path,
        spice={"pool_size": 8, "num_selected": 8},
        model=build_model(),
        train_dataset=dataset,
        callbacks=[ours],
        **options,
    )
    spiced.train()
    steps = trained_indices(tmp_path)
    # A LabelSmoother of before transformers 5.15 takes a mean per micro-batch too.
    has_last_step = loss != "mean-per-micro-batch" and (
        loss != "label smoothing" or not before("transformers", "5.15")
    )
    assert [len(indices) for indices in steps] == [8, 8, 8, 8, 8] + [3] * has_last_step

    plain = make_trainer(tmp_path / "plain", model=build_model(), train_dataset=dataset, callbacks=[theirs], **options)
    micro_batches = [slot for indices in steps for slot in in_slots(indices, 4)]
    loader = DataLoader(dataset, batch_sampler=micro_batches, collate_fn=collate)
    plain.get_train_dataloader = lambda: plain.accelerator.prepare(loader)
    plain.train()
    assert plain.state.global_step == spiced.state.global_step == len(steps)
    for step, (first, second) in enumerate(zip(ours.taken, theirs.taken, strict=True)):
        assert largest_difference(first, second) <= 1e-6, f"weights before step {step} differ"
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (spiced, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def token_mean_step(model: nn.Module, weights: dict[str, Tensor], rows: Sequence[dict[str, list[int]]]) -> Any:
    """One SGD step on Σ of the rows' token losses over Σ of their label tokens, a row at a time."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(weights[name])
            value.grad = None
    total, num_tokens = torch.zeros(()), 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total = total - logits[position].log_softmax(-1)[label]
                num_tokens += 1
    if num_tokens:
        (total / num_tokens).backward()
    return {
        name: value.detach() - SGD["learning_rate"] * (value.grad if value.grad is not None else 0.0)
        for name, value in parameters.items()
    }


def check_token_mean_steps(output_dir: Any, model: nn.Module, weights: Weights, rows: Sequence[Any]) -> None:
    """Every step of the run against [`token_mean_step`] from the weights it began with."""
    steps = trained_indices(output_dir)
    assert len(weights.taken) == len(steps) + 1
    for step, indices in enumerate(steps):
        expected = token_mean_step(model, weights.taken[step], [rows[index] for index in indices])
        assert largest_difference(weights.taken[step + 1], expected) <= 1e-6, f"step {step}: {len(indices)} rows"


def test_fewer_picks_than_slots_train_like_their_token_mean(tmp_path: Any) -> None:
    rows, weights = tiny_rows(), Weights()
    model = tiny_lora_model()
    trainer = make_trainer(
        tmp_path,
        spice={"pools_per_step": 1, "stop_ratio": 0.8},
        model=model,
        callbacks=[weights],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **SGD,
    )
    trainer.train()
    sizes = [len(indices) for indices in trained_indices(tmp_path)]
    assert len(sizes) == 6 and min(sizes) < 4 < sum(sizes)
    assert trainer._spice.callback.totals.num_fillers == sum(4 - size for size in sizes)
    check_token_mean_steps(tmp_path, copy.deepcopy(model), weights, rows)


def unlabelled_steps(num_rows: int, steps: Sequence[int], *, samples_per_step: int, num_slots: int) -> list[Any]:
    """Rows of which those of these steps' pools, at the Trainer's seed 42, have no label token."""
    shape = plan_step(
        pool_size=10, num_selected=4, pools_per_step=None, samples_per_step=samples_per_step, num_slots=num_slots
    )
    schedule = PoolSchedule(num_rows, shape, pool_size=10, seed=42)
    rows = tiny_rows(num_rows)
    for step in steps:
        for pool in schedule.pools(0, step).pools:
            for index in pool:
                rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    return rows


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_without_picks_trains_on_nothing(tmp_path: Any, caplog: Any, accumulation: int) -> None:
    rows, weights = unlabelled_steps(50, (1, 3), samples_per_step=4, num_slots=accumulation), Weights()
    model = tiny_lora_model()
    trainer = make_trainer(
        tmp_path,
        spice={},
        model=model,
        train_dataset=rows,
        callbacks=[weights],
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_nan_inf_filter=False,
        **SGD,
    )
    trainer.train()
    assert [len(indices) for indices in trained_indices(tmp_path)] == [4, 0, 4, 0, 4]
    assert same_weights(weights.taken[1], weights.taken[2]) and same_weights(weights.taken[3], weights.taken[4])
    assert not same_weights(weights.taken[2], weights.taken[3])
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [logs[step]["loss"] for step in (1, 3)] == [0.0, 0.0]
    # Before transformers 5.4 the norm is known only where it clips.
    assert logs[1].get("grad_norm") == (None if before("transformers", "5.4") else 0.0)
    assert all(math.isfinite(value) for row in logs for value in row.values())
    assert trainer._spice.callback.totals.num_fillers == 2 * accumulation
    assert "no sample could be picked for step 1" in caplog.text
    check_token_mean_steps(tmp_path, copy.deepcopy(model), weights, rows)


def test_a_step_without_picks_in_sft_trainer(tmp_path: Any) -> None:
    weights = Weights()
    trainer = make_sft_trainer(
        tmp_path,
        spice={"pools_per_step": 1, "min_gain": 1e6},
        callbacks=[weights],
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        max_steps=2,
        logging_nan_inf_filter=False,
        **SGD,
    )
    trainer.train()
    assert trained_indices(tmp_path) == [[], []]
    assert same_weights(weights.taken[0], weights.taken[2])
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == [0.0, 0.0]


def equal_slots_trainer(output_dir: Any, rows: Sequence[Any], **settings: Any) -> Any:
    """Eight samples a step in four micro-batches whose losses are means."""
    return make_trainer(
        output_dir,
        spice={"num_selected": 8} | settings,
        model=model_without_loss_kwargs(),
        train_dataset=rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )


def test_equal_slots_round_the_picks_down(tmp_path: Any, caplog: Any) -> None:
    rows = tiny_rows(30)
    schedule_shape = plan_step(
        pool_size=10, num_selected=8, pools_per_step=None, samples_per_step=8, num_slots=4, equal_slots=True
    )
    first_pool = PoolSchedule(30, schedule_shape, pool_size=10, seed=42).pools(0, 0).pools[0]
    for index in first_pool[:3]:
        rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    equal_slots_trainer(tmp_path, rows).train()
    # Seven of the first pool's rows could be picked, which makes four.
    assert [len(indices) for indices in trained_indices(tmp_path)] == [4, 8, 8]
    assert [line["num_selected"] for line in read_records(tmp_path, "pools")] == [4, 8, 8]
    assert len([line for line in read_records(tmp_path, "selections") if line["step"] == 0]) == 4
    assert "rounded down to a multiple of the 4 micro-batches" in caplog.text


def test_equal_slots_with_too_few_picks_is_an_error(tmp_path: Any) -> None:
    rows = tiny_rows(30)
    shape = plan_step(
        pool_size=10, num_selected=8, pools_per_step=None, samples_per_step=8, num_slots=4, equal_slots=True
    )
    for index in PoolSchedule(30, shape, pool_size=10, seed=42).pools(0, 1).pools[0][:7]:
        rows[index]["labels"] = [-100] * len(rows[index]["labels"])
    with pytest.raises(RuntimeError, match="too few samples for step 1: this model's loss is a mean per micro-batch"):
        equal_slots_trainer(tmp_path, rows).train()


def test_adaptive_stopping_needs_num_items_in_batch(tmp_path: Any) -> None:
    config = SpiceConfig(pool_size=10, num_selected=8, pools_per_step=1, stop_ratio=0.5)
    with pytest.raises(ValueError, match=r"Adaptive stopping .* cannot be used here: .* not normalised"):
        make_trainer(tmp_path, spice=config, model=model_without_loss_kwargs(), per_device_train_batch_size=8)
