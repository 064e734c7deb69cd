"""Whole runs on rows whose loss or gradient is not finite, or zero, or always the same, and in float16.

The models' weights are sound; their forward breaks on some tokens.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from spice_trainer import attach_spice
from spice_trainer.config import SpiceConfig
from spice_trainer.gradients.lora import find_trained_modules
from tests.runs.audit_oracle import Witness, expect_pool, num_label_tokens
from tests.support.models import tiny_lora_model
from tests.support.scorers import make_scorer
from tests.support.trainers import (
    collate,
    make_sft_trainer,
    make_trainer,
    read_records,
    same_weights,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

NAN_INPUT, INFINITE_INPUT, MASKED_LABEL = 60, 59, 58
NUM_ROWS, POOL_SIZE = 60, 10
# Two pools a step, four picks of each; three steps.
# SFTTrainer leaves rows without labels out of the dataset.
BROKEN = {
    "plain": ("nan", "infinite", "masked_label", "zero"),
    "sft": ("nan", "infinite", "masked_label", "infinite"),
}
SETTINGS = {"pool_size": POOL_SIZE, "num_selected": 4, "pools_per_step": 2}


def fragile_model(**lora: Any) -> PeftModel:
    """Two tokens break the forward. A third has no probability: as a label its loss is infinite, its gradient not."""
    model = tiny_lora_model(**lora)

    def break_inputs(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.masked_fill((args[0] == NAN_INPUT)[..., None], math.nan)
        return output.masked_fill((args[0] == INFINITE_INPUT)[..., None], math.inf)

    def mask_vocabulary(module: Any, args: Any, output: Tensor) -> Tensor:
        is_masked = torch.arange(output.shape[-1]) == MASKED_LABEL
        return output.masked_fill(is_masked, -math.inf)

    model.get_input_embeddings().register_forward_hook(break_inputs)
    model.get_output_embeddings().register_forward_hook(mask_vocabulary)
    return model


def sound_rows(num_rows: int = NUM_ROWS) -> list[dict[str, list[int]]]:
    """Rows without the tokens that break something."""
    rows = tiny_rows(num_rows)
    for row in rows:
        row["input_ids"] = [min(token, MASKED_LABEL - 1) for token in row["input_ids"]]
        row["labels"] = [min(label, MASKED_LABEL - 1) for label in row["labels"]]
    return rows


def break_row(row: dict[str, list[int]], kind: str) -> None:
    if kind == "zero":
        row["labels"] = [-100] * len(row["labels"])
    elif kind == "masked_label":
        row["input_ids"] = [*row["input_ids"][:-1], MASKED_LABEL]
        row["labels"] = [*row["labels"][:-1], MASKED_LABEL]
    else:
        row["input_ids"] = [NAN_INPUT if kind == "nan" else INFINITE_INPUT, *row["input_ids"][1:]]


def drawn_pools(directory: Path, **arguments: Any) -> list[list[int]]:
    """The pools of a run, which no row's content changes."""
    trainer = run_trainer(directory, sound_rows(), **arguments)
    trainer.train()
    return [line["candidates"] for line in read_records(directory, "pools")]


def run_trainer(
    directory: Path, rows: Sequence[Any], *, kind: str = "plain", spice: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    options = {"per_device_train_batch_size": 8, "logging_nan_inf_filter": False} | arguments
    settings = SETTINGS | (spice or {})
    if kind == "sft":
        dataset = Dataset.from_list(
            [
                {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
                for row in rows
            ]
        )
        return make_sft_trainer(directory, spice=settings, model=fragile_model(), train_dataset=dataset, **options)
    return make_trainer(directory, spice=settings, model=fragile_model(), train_dataset=list(rows), **options)


def check_finite(directory: Path, trainer: Any) -> None:
    """Weights, log and records hold no NaN and no infinity."""
    assert all(weight.isfinite().all() for weight in trainable_weights(trainer.model).values())
    for line in trainer.state.log_history:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, int | float)), line
    for name in ("pools", "selections", "trained", "costs"):
        text = (directory / "spice" / f"{name}.jsonl").read_text()
        assert "NaN" not in text and "Infinity" not in text
    json.loads((directory / "spice" / "ledger.json").read_text())


@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize(
    "spice", [{}, {"sketch_dim": 256}, {"information": "diagonal"}], ids=["exact", "sketch", "diagonal"]
)
def test_a_pool_without_a_sound_row_gives_none_and_others_give_theirs(tmp_path: Path, kind: str, spice: Any) -> None:
    pools = drawn_pools(tmp_path / "before", kind=kind)
    rows = sound_rows()
    for place, index in [*enumerate(pools[1]), *enumerate(pools[4][:8])]:
        break_row(rows[index], BROKEN[kind][place % 4])
    trainer = run_trainer(tmp_path / "run", rows, kind=kind, spice=spice)
    trainer.train()

    lines = read_records(tmp_path / "run", "pools")
    assert [line["candidates"] for line in lines] == pools
    assert [line["num_selected"] for line in lines] == [4, 0, 4, 4, 2, 4]
    zero = [*pools[1][3::4], *pools[4][3:8:4]] if kind == "plain" else []
    assert sorted(sum((line["zero"] for line in lines), [])) == sorted(zero)
    broken = {*pools[1], *pools[4][:8]}
    assert sorted(sum((line["nonfinite"] for line in lines), [])) == sorted(broken - set(zero))
    assert not broken & set(sum(trained_indices(tmp_path / "run"), []))
    assert [len(indices) for indices in trained_indices(tmp_path / "run")] == [4, 8, 6]
    check_finite(tmp_path / "run", trainer)


class StepWatcher(TrainerCallback):
    """The weights around every step, and what the optimizer makes of them with a gradient of zero."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []
        self.with_zero_gradient: list[list[Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        # A copy of parameters and state: deepcopy keeps them in step with each other.
        twin = copy.deepcopy(optimizer)
        twin_parameters = [parameter for group in twin.param_groups for parameter in group["params"]]
        self.before.append([parameter.detach().clone() for parameter in twin_parameters])
        for parameter in twin_parameters:
            parameter.grad = torch.zeros_like(parameter)
        twin.step()
        self.with_zero_gradient.append([parameter.detach().clone() for parameter in twin_parameters])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.after.append([parameter.detach().clone() for parameter in parameters])


@pytest.mark.parametrize("kind", ["plain", "sft"])
@pytest.mark.parametrize(("optimizer", "accumulation"), [("adamw_torch", 1), ("adamw_torch", 4), ("sgd", 2)])
def test_a_step_without_a_sound_row_trains_on_nothing(
    tmp_path: Path, kind: str, optimizer: str, accumulation: int, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {
        "per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation,
        "optim": optimizer, "weight_decay": 0.01 if optimizer == "adamw_torch" else 0.0,
    }  # fmt: skip
    pools = drawn_pools(tmp_path / "before", kind=kind, **arguments)
    rows = sound_rows()
    for place, index in enumerate(pools[2] + pools[3]):
        break_row(rows[index], BROKEN[kind][place % 4])
    trainer = run_trainer(tmp_path / "run", rows, kind=kind, **arguments)
    watcher = StepWatcher()
    trainer.add_callback(watcher)
    trainer.train()

    assert [len(indices) for indices in trained_indices(tmp_path / "run")] == [8, 0, 8]
    check_finite(tmp_path / "run", trainer)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert logs[1]["loss"] == 0 and logs[1]["grad_norm"] == 0 and logs[0]["loss"] > 0 and logs[2]["loss"] > 0
    assert logs[1]["spice/num_selected"] == 0 and "spice/information" not in logs[1]
    for step in range(3):
        is_empty = all(map(torch.equal, watcher.after[step], watcher.with_zero_gradient[step]))
        assert is_empty == (step == 1)
        unchanged = all(map(torch.equal, watcher.after[step], watcher.before[step]))
        assert unchanged == (step == 1 and optimizer == "sgd")
    found = "15 candidates had a gradient that is not finite and 5 a zero" if kind == "plain" else "20 candidates had"
    warning = f"no sample could be picked for step 1: {found}"
    assert sum(warning in record.getMessage() for record in caplog.records) == 1


def test_a_run_resumed_before_a_step_without_a_sound_row_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Dropout draws by the filler's length, so the filler must be the same row."""
    arguments = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    pools = drawn_pools(tmp_path / "before", per_device_train_batch_size=4, gradient_accumulation_steps=2)

    def make(directory: Path) -> Any:
        rows = sound_rows()
        for index in pools[2] + pools[3]:
            break_row(rows[index], "nan")
        model = fragile_model(lora_dropout=0.3)
        return make_trainer(
            directory, spice=SETTINGS, model=model, train_dataset=rows, per_device_train_batch_size=4, **arguments
        )

    whole, resumed = make(tmp_path / "whole"), make(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert [len(indices) for indices in trained_indices(tmp_path / "resumed")] == [8, 0, 8]
    assert same_weights(trainable_weights(whole.model), trainable_weights(resumed.model))
    assert all(weight.isfinite().all() for weight in trainable_weights(whole.model).values())


def test_a_first_step_without_a_sound_row_takes_its_filler_from_the_next(tmp_path: Path) -> None:
    pools = drawn_pools(tmp_path / "before")
    rows = sound_rows()
    for index in pools[0] + pools[1]:
        break_row(rows[index], "nan")
    trainer = run_trainer(tmp_path / "run", rows)
    trainer.train()
    assert [len(indices) for indices in trained_indices(tmp_path / "run")] == [0, 8, 8]
    check_finite(tmp_path / "run", trainer)


def test_three_steps_without_a_sound_row_end_the_run(tmp_path: Path) -> None:
    rows = sound_rows()
    for row in rows:
        break_row(row, "masked_label")
    trainer = run_trainer(tmp_path, rows)
    before = trainable_weights(trainer.model)
    error = r"no sample in 3 of the last 3 optimizer steps\. In step 2 20 candidates had a gradient that is not finite"
    with pytest.raises(RuntimeError, match=error):
        trainer.train()
    assert trained_indices(tmp_path) == [[], []]
    after = trainable_weights(trainer.model)
    # Weight decay alone is what a step without a gradient does, and here there is none.
    assert same_weights(before, after)


def test_a_fresh_adapter_whose_b_is_zero_is_scored_by_the_gradient_of_b(tmp_path: Path) -> None:
    rows = sound_rows()
    model = tiny_lora_model(randomize=False)
    trainer = make_trainer(tmp_path, model=model, train_dataset=rows, per_device_train_batch_size=8)
    witness = Witness(trainer)
    config = SpiceConfig(**SETTINGS, gradient_normalization="sqrt_tokens")
    attach_spice(trainer, config)
    trainer.train()
    is_a = torch.cat([torch.full((value.numel(),), "lora_A" in name) for name, value in witness.weights[0].items()])
    picks = read_records(tmp_path, "selections")
    for line in read_records(tmp_path, "pools")[:2]:
        candidates = [rows[index] for index in line["candidates"]]
        gradients = witness.gradients(0, candidates)
        assert not gradients[:, is_a].any() and gradients[:, ~is_a].any(1).all()
        expected = expect_pool(gradients, [num_label_tokens(row) for row in candidates], 4, config)
        found = [pick["index"] for pick in picks if (pick["step"], pick["pool"]) == (0, line["pool"])]
        assert found == [line["candidates"][pick.position] for pick in expected.picks]
        assert line["zero"] == line["nonfinite"] == []
    check_finite(tmp_path, trainer)


@pytest.mark.parametrize(
    "spice",
    [
        {}, {"sketch_dim": 128}, {"gradient_normalization": "unit"}, {"information": "diagonal"},
        {"information": "adafisher", "alpha_scaling": "pool"}, {"fisher_alpha": 1e12},
        {"conflict_reference": "candidates", "conflict_penalty": 10.0}, {"stop_ratio": 0.3},
    ],
)  # fmt: skip
def test_a_dataset_of_one_row_over_and_over(tmp_path: Path, spice: dict[str, Any]) -> None:
    """Equal scores go to the lowest positions, gains are those of copies, and nothing opposes anything."""
    rows = [dict(sound_rows(1)[0]) for _ in range(NUM_ROWS)]
    trainer = run_trainer(tmp_path, rows, spice=spice)
    trainer.train()
    picks = read_records(tmp_path, "selections")
    for line in read_records(tmp_path, "pools"):
        own = [pick for pick in picks if (pick["step"], pick["pool"]) == (line["step"], line["pool"])]
        assert [pick["index"] for pick in own] == line["candidates"][: len(own)]
        assert all(pick["conflict"] == 0 for pick in own)
        assert len(own) == 4 or (spice.get("stop_ratio") and line["stopped_early"])
        if "information" not in spice:
            size = math.expm1(own[0]["gain"])
            expected = [math.log1p(size / (1 + order * size)) for order in range(len(own))]
            assert [pick["gain"] for pick in own] == pytest.approx(expected, rel=1e-4)
    check_finite(tmp_path, trainer)


def overflowing_model(factor: float) -> PeftModel:
    """Its forward is sane in float16; the gradient of A is `factor` times that of `tiny_lora_model`."""
    model = tiny_lora_model(lora_alpha=8 * factor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.div_(factor)
    return model


@pytest.mark.parametrize("sketch_dim", [0, 512])
@pytest.mark.parametrize("tokens_per_batch", [1, 4096])
def test_float16_overflow_while_scoring(sketch_dim: int, tokens_per_batch: int) -> None:
    """A row that float16 cannot hold is not finite; one that only the loss scale broke is scored without it."""
    rows, pool = sound_rows(12), list(range(12))
    for index in (2, 7):
        rows[index]["input_ids"][0] = NAN_INPUT
    model = overflowing_model(125)
    broken: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: broken.append((args[0] == NAN_INPUT).any(1)[:, None, None])
    )
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: (output * (1 + 1e6 * broken[-1])).to(output.dtype))

    def score(autocast: Any) -> Any:
        config = SpiceConfig(sketch_dim=sketch_dim, scoring_tokens_per_batch=tokens_per_batch)
        modules = find_trained_modules(model)
        return next(
            make_scorer(model, config, modules=modules, rows=rows, collate=collate, autocast=autocast).score([pool])
        )

    exact, half = score(nullcontext), score(lambda: torch.autocast("cpu", torch.float16))
    sound = [index for index in pool if index not in (2, 7)]
    assert exact.finite.all()
    assert half.finite.nonzero()[:, 0].tolist() == half.sound.nonzero()[:, 0].tolist() == sound
    norms = exact.gradient_norms[sound]
    assert float(norms.max()) > 600 > 300 > float(norms.min()), "some must overflow under the scale, and some not"
    torch.testing.assert_close(half.gradient_norms[sound], norms, rtol=0.01, atol=0)
    lengths = norms.outer(norms)
    error = (half.gram[sound][:, sound] - exact.gram[sound][:, sound]) / lengths
    assert float(error.abs().max()) < 0.02
    assert not half.gram[[2, 7]].any() and not half.gram[:, [2, 7]].any()
