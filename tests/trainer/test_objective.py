"""Samples are scored by what trains: against the stock trainer's own loss. What is not in the scores is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from spice_trainer import SpiceConfig
from spice_trainer.data.rows import pad_rows
from spice_trainer.gradients.label_head import LabelLoss
from spice_trainer.trainer.inputs import build_inputs
from spice_trainer.trainer.objective import label_loss_of
from tests.support.gradient_loop import relative_error
from tests.support.models import tiny_lora_model
from tests.support.trainers import make_sft_trainer, make_trainer

# TRL says that it will not smooth labels for ever.
pytestmark = [pytest.mark.oldest, pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated")]
has_dft = pytest.mark.skipif("loss_type" not in SFTConfig.__dataclass_fields__, reason="this TRL has one loss")

SMOOTHED, DFT = {"label_smoothing_factor": 0.2}, {"loss_type": "dft"}
LOSSES = [
    pytest.param(make_trainer, SMOOTHED, LabelLoss(smoothing=0.2), id="smoothing"),
    pytest.param(make_sft_trainer, SMOOTHED, LabelLoss(smoothing=0.2), id="smoothing, SFT"),
    pytest.param(make_sft_trainer, DFT, LabelLoss("dft"), id="dft", marks=has_dft),
    # In TRL the one leaves no room for the other.
    pytest.param(make_sft_trainer, SMOOTHED | DFT, LabelLoss("dft", 0.0), id="dft over smoothing", marks=has_dft),
]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize(("make", "arguments", "label_loss"), LOSSES)
def test_a_samples_gradient_is_that_of_the_trained_loss(
    make: Any,
    arguments: dict[str, Any],
    label_loss: LabelLoss,
    architecture: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Through the head's stand-in (Llama) and through logits (Gemma 2); the recorded loss is the plain one."""
    trainer = make(tmp_path, model=tiny_lora_model(architecture), spice={}, verify=True, **arguments)
    assert label_loss_of(trainer) == label_loss
    assert not [message for message in caplog.messages if "trains by" in message]
    config = SpiceConfig(pool_size=10, num_selected=4, sketch_dim=0)
    scorer = build_inputs(trainer, config, trainer.get_train_dataloader, proxy=None).selector.gradient_scorer
    indices = (3, 7, 20)
    shared = scorer.share({0: indices})
    buffer = scorer.compute(shared)
    weights = [weight for module in scorer.modules.values() for weight in module.parameters() if weight.requires_grad]
    model = trainer.model.eval()
    for number, position in enumerate(shared.held):
        row = shared.rows[position]
        inputs, labels = pad_rows([row])
        with torch.no_grad():
            plain = model(**inputs, labels=labels).loss
        torch.testing.assert_close(buffer.losses[number], plain, rtol=1e-5, atol=1e-6)
        num_items = torch.tensor(row.num_label_tokens)
        loss = trainer.compute_loss(model, inputs | {"labels": labels}, num_items_in_batch=num_items)
        expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])
        assert relative_error([buffer.features[number][None]], [expected[None]]) < 1e-5


def _own(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.loss


def _of_another_name() -> Any:
    model = tiny_lora_model()
    inner = model.get_base_model()
    inner.__class__ = type("OwnModel", (type(inner),), {})
    return model


def _with_router_loss() -> Any:
    model = tiny_lora_model()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.01
    return model


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, None),
        # The Trainer does not shift the labels of a model whose name it does not know.
        ({"model": _of_another_name} | SMOOTHED, "label_smoothing_factor=0.2"),
        ({"compute_loss_func": _own}, "a compute_loss_func"),
        ({"model": _with_router_loss}, "an auxiliary loss of the router (output_router_logits)"),
        # A loss of somebody's own takes the smoothed one's place.
        ({"compute_loss_func": _own} | SMOOTHED, "a compute_loss_func"),
    ],
)
def test_a_loss_that_is_not_the_scored_one_is_named_once(
    options: dict[str, Any], named: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = {name: value() if name == "model" else value for name, value in options.items()}
    trainer = make_trainer(tmp_path, spice={}, **built)
    assert label_loss_of(trainer) == LabelLoss()
    said = [message for message in caplog.messages if "trains by" in message]
    assert len(said) == (named is not None)
    assert named is None or said[0].startswith(f"SPICE: the trainer trains by {named}, and samples are scored by")
