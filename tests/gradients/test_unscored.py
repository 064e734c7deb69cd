"""How much of the gradient is left out where LoRA alone scores."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.lora import find_trained_modules, is_lora
from spice_trainer.gradients.unscored import unscored_share
from tests.support.gradient_loop import looped_gradients
from tests.support.models import tiny_lora_model
from tests.support.trainers import attach, collate, make_trainer, read_records, tiny_rows

CPU = torch.device("cpu")


def test_the_share_is_that_of_autograd() -> None:
    model = tiny_lora_model(modules_to_save=["lm_head", "norm"])
    trained = find_trained_modules(model)
    rows = tiny_rows()[:3]
    found = unscored_share(
        model,
        trained,
        find_trained_modules(model, scoring_parameters="lora"),
        [collate_row(number, row, collate) for number, row in enumerate(rows)],
        device=CPU,
    )
    _, gradients = looped_gradients(model, [(row["input_ids"], row["labels"]) for row in rows])
    squares = torch.stack([gradient.double().square().sum(1) for gradient in gradients])
    outside = torch.tensor([not is_lora(name) for name in trained])
    assert found == pytest.approx(float((squares[outside].sum(0) / squares.sum(0)).mean()), rel=1e-5)
    assert 0.05 < found < 0.95


def test_nothing_is_known_of_rows_without_a_gradient() -> None:
    model = tiny_lora_model(modules_to_save=["norm"])
    row = {**tiny_rows()[0], "labels": [-100] * len(tiny_rows()[0]["input_ids"])}
    trained = find_trained_modules(model)
    assert math.isnan(unscored_share(model, trained, {}, [collate_row(0, row, collate)], device=CPU))


def test_attaching_says_what_is_left_out_and_scores_by_lora_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_lora_model(modules_to_save=["lm_head"], lora_dropout=0.0)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    attach(trainer, {"scoring_parameters": "lora"}, verify=True)
    text = caplog.text
    assert (
        "leaves 1 modules that train out of the score (base_model.model.lm_head.modules_to_save.default), with" in text
    )
    assert "% of a row's squared gradient norm at these weights" in text
    trainer.train()
    assert read_records(tmp_path, "selections")


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attach(make_trainer(tmp_path), {"scoring_parameters": "lora"}, verify=True)
    assert "out of the score" not in caplog.text
