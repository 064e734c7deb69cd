"""Rows that train without padding: scored and trained as alone, packed into micro-batches of about equal tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from tests.support.trainers import (
    make_sft_trainer,
    make_trainer,
    read_records,
    same_weights,
    tiny_rows,
    trainable_weights,
)

pytestmark = pytest.mark.oldest

PADDING_FREE = {"padding_free": True, "max_length": None}
SLOTS = 3
# A step is 9 picks of 30 in three micro-batches.
STEP = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": SLOTS}
POOLS = {"pool_size": 30, "num_selected": 9}


class WatchesSteps(TrainerCallback):
    """The gradient of each step before it is clipped, and the tokens of the micro-batches it is of."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.gradients: list[Tensor] = []
        self.num_tokens: list[int] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.gradients.append(torch.cat([weight.grad.flatten() for weight in weights]).clone())

    def steps(self) -> list[list[int]]:
        return [self.num_tokens[start : start + SLOTS] for start in range(0, len(self.num_tokens), SLOTS)]


def watched(output_dir: Path, make: Any = make_sft_trainer, **options: Any) -> Any:
    watch = WatchesSteps()
    trainer = make(output_dir, callbacks=[watch], **(STEP | {"max_grad_norm": 1e9} | options))
    compute_loss = trainer.compute_loss

    def noting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        # The loss is also tried before training.
        if model.training:
            watch.num_tokens.append(int(mask.sum()) if positions is None else positions.numel())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noting
    trainer.watch = watch
    return trainer


def picked(output_dir: Path) -> list[Any]:
    return [(line["step"], line["index"]) for line in read_records(output_dir, "selections")]


def test_padding_free_rows_are_scored_and_trained_as_padded_ones(tmp_path: Path) -> None:
    runs = {}
    for name, options in {"padded": {}, "free": PADDING_FREE}.items():
        runs[name] = watched(tmp_path / name, spice=POOLS, verify=True, max_steps=1, **options)
        runs[name].train()
    assert picked(tmp_path / "free") == picked(tmp_path / "padded")
    norms = [
        torch.tensor([line["gradient_norm"] for line in read_records(tmp_path / name, "selections")]) for name in runs
    ]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    ours, theirs = (run.watch.gradients[0] for run in runs.values())
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_packed_picks_train_the_same_gradient_in_even_micro_batches(tmp_path: Path) -> None:
    runs = {}
    for pack in (False, True):
        spice = POOLS | {"pack_picks": pack}
        runs[pack] = watched(tmp_path / str(pack), spice=spice, max_steps=1, **PADDING_FREE)
        runs[pack].train()
    assert picked(tmp_path / "True") == picked(tmp_path / "False")
    plain, packed = (runs[pack].watch for pack in (False, True))
    assert float((packed.gradients[0] - plain.gradients[0]).norm() / plain.gradients[0].norm()) < 1e-6
    assert sum(packed.num_tokens) == sum(plain.num_tokens)
    spreads = [max(watch.num_tokens) - min(watch.num_tokens) for watch in (packed, plain)]
    assert spreads[0] <= 3 < spreads[1], (packed.num_tokens, plain.num_tokens)


@pytest.mark.parametrize("selection_epochs", [None, 1], ids=["selecting", "replaying"])
def test_a_resumed_run_packs_as_the_whole_one(selection_epochs: int | None, tmp_path: Path) -> None:
    """55 rows are two steps an epoch; the third, which the checkpoint is behind, is a replayed one."""
    options: dict[str, Any] = {
        "spice": POOLS | {"pack_picks": True, "selection_epochs": selection_epochs},
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "make": make_trainer,
    }
    whole = watched(tmp_path / "whole", **options)
    whole.train()
    resumed = watched(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.watch.steps() == whole.watch.steps()[3:]
    assert same_weights(trainable_weights(resumed.model), trainable_weights(whole.model))
    assert all(max(step) - min(step) <= 5 for step in whole.watch.steps()), whole.watch.steps()


# Where TRL has packed already


def _texts(num_rows: int = 60) -> Dataset:
    return Dataset.from_list([{"input_ids": row["input_ids"]} for row in tiny_rows(num_rows)])


def _said(messages: Sequence[str]) -> str:
    (line,) = (message for message in messages if "a candidate, and with it a pick" in message)
    return line


PACKED = {"packing": True, "max_length": 48, "completion_only_loss": None}


def test_a_bin_is_scored_as_it_trains(tmp_path: Path) -> None:
    """By the gradient of the stock loss of the bin alone, whose documents do not see each other."""
    options: dict[str, Any] = {"train_dataset": _texts(), **PACKED}
    spice = {"pool_size": 12, "num_selected": 4}
    make_sft_trainer(tmp_path, spice=spice, verify=True, max_steps=1, **options).train()
    stock = make_sft_trainer(tmp_path / "stock", **options)
    model = stock.model.eval()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    picks = read_records(tmp_path, "selections")
    assert len(picks) == 4
    for pick in picks:
        batch = stock.data_collator([stock.train_dataset[pick["index"]]])
        assert int((batch["position_ids"] == 0).sum()) > 1
        loss = stock.compute_loss(model, batch, num_items_in_batch=torch.tensor(pick["label_tokens"]))
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
        assert pick["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)


def test_what_a_pick_is_where_rows_are_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    options = {"train_dataset": _texts(), **PACKED}
    trainer = make_sft_trainer(tmp_path, spice={}, **options)
    bins = [len(row["seq_lengths"]) for row in trainer.train_dataset]
    per_bin = sum(bins) / len(bins)
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset) / len(bins)
    line = _said(caplog.messages)
    assert f"is a bin of about {per_bin:.3g} rows (about {tokens:.0f} tokens). To select rows, set packing=F" in line
    assert f"per_device_train_batch_size={round(per_bin * 4)} (rows" in line and "SpiceConfig(pack_picks=True)" in line
    # What it says to set does select rows.
    rows = options | {"packing": False, **PADDING_FREE, "per_device_train_batch_size": round(per_bin * 4)}
    trainer = make_sft_trainer(tmp_path, spice={"pack_picks": True, "num_selected": 10, "pool_size": 20}, **rows)
    assert len(trainer.train_dataset) == 60
    _said(caplog.messages)


def test_what_a_pick_is_where_rows_are_wrapped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = PACKED | {"packing_strategy": "wrapped", "max_length": 40}
    trainer = make_sft_trainer(tmp_path, spice={}, train_dataset=_texts(), **options)
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset) / len(trainer.train_dataset)
    line = _said(caplog.messages)
    assert f"is a block that rows begin and end anywhere in (about {tokens:.0f} tokens). To select rows" in line
    assert "per_device_train_batch_size=as many rows as a micro-batch shall hold" in line
