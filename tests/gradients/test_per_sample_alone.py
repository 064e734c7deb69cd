"""Layers that are fed the tokens of all rows, and expert parameters, against one-sample autograd."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.gradient_loop import (
    CollectingSink,
    batched_gradients,
    collate,
    example_rows,
    looped_gradients,
    relative_error,
)
from tests.support.models import MIXTURES, add_lora, enable_checkpointing, tiny_lora_model, tiny_model
from tests.support.trainers import make_trainer, trained_indices
from tests.support.versions import before

# PEFT warns of the rank patterns that it makes for fused experts itself.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

TOLERANCE = 1e-5
ALONE = "candidates are scored one at a time"
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}


def _check(model: nn.Module) -> list[torch.Tensor]:
    rows = example_rows()
    losses, found = batched_gradients(model, rows)
    expected_losses, expected = looped_gradients(model, rows, allow_unused=True)
    torch.testing.assert_close(losses, expected_losses, rtol=TOLERANCE, atol=1e-6)
    assert relative_error(found, expected) < TOLERANCE
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


@pytest.mark.parametrize("architecture", ["opt", *MIXTURES])
def test_all_linear_equals_autograd(architecture: str) -> None:
    assert all(gradients.any() for gradients in _check(tiny_lora_model(architecture)))


@pytest.mark.skipif(before("transformers", "5"), reason="the experts are modules, not parameters")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_expert_parameters_that_are_named_equal_autograd(architecture: str, checkpointing: bool) -> None:
    model = tiny_lora_model(architecture, **EXPERTS)
    if checkpointing:
        enable_checkpointing(model.train(), use_reentrant=True)
    _check(model)
    # Alone, below all else that is scored.
    modules = {name: module for name, module in find_trained_modules(model).items() if ".mlp.experts.lora_A" in name}
    found = batched_gradients(model, example_rows(), modules=modules)[1]
    whole = dict(zip(find_trained_modules(model), _check(model), strict=True))
    assert relative_error(found, [whole[name] for name in modules]) < TOLERANCE


@pytest.mark.skipif(before("transformers", "5"), reason="the experts are modules, not parameters")
def test_expert_parameters_in_float16_are_scaled() -> None:
    model, rows = tiny_lora_model("mixtral", **EXPERTS | {"lora_alpha": 1e-4}), example_rows()
    exact = batched_gradients(model, rows)[1]
    with torch.autocast("cpu", dtype=torch.float16):
        assert relative_error(batched_gradients(model, rows)[1], exact) < 0.05


@pytest.mark.skipif(before("transformers", "5"), reason="the experts are modules, not parameters")
def test_sharded_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora_model("mixtral", **EXPERTS)
    monkeypatch.setattr("spice_trainer.gradients.per_sample.is_sharded", lambda model: True)
    with pytest.raises(
        RuntimeError, match=r"0\.mlp\.experts.*ParamWrapper\).*scoring_parameters=\"lora\".*scoring_target_mod"
    ):
        SampleGradients(model, find_trained_modules(model))


class _Expert(nn.Module):
    """As mixtures were before their experts were fused: tokens of first choice come before those of second."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        order = torch.cat([torch.arange(1, len(flat), 2), torch.arange(0, len(flat), 2)])
        return torch.empty_like(flat).index_copy(0, order, self.experts[0](flat[order])).view(hidden.shape)


def _route(model: nn.Module) -> nn.Module:
    model.model.layers[0].mlp = _Expert(model.model.layers[0].mlp)
    return add_lora(model)


def _flatten(*, batch: bool) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        mlp = model.model.layers[0].mlp
        forward = mlp.forward
        mlp.forward = lambda x: forward(x.flatten(0, 1)[None] if batch else x.flatten(0, 1)).view(x.shape)
        return add_lora(model)

    return change


@pytest.mark.parametrize(
    ("change", "is_alone"), [(_route, True), (_flatten(batch=False), False), (_flatten(batch=True), True)]
)
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_rows_are_alone_where_a_layer_mixes_them(
    change: Any, is_alone: bool, precision: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = change(tiny_model())
    with caplog.at_level(logging.WARNING, "spice_trainer"):
        _check(model)
        _check(model)
        if precision == torch.float16:
            exact = batched_gradients(model, example_rows())[1]
            with torch.autocast("cpu", dtype=precision):
                assert relative_error(batched_gradients(model, example_rows())[1], exact) < 0.02
    told = [record.getMessage() for record in caplog.records if ALONE in record.getMessage()]
    assert len(told) == is_alone and all("layers.0.mlp" in text and "scoring_target_modules" in text for text in told)


def test_with_sharded_weights_the_setting_for_single_rows_is_named() -> None:
    model = _route(tiny_model())
    with (
        SampleGradients(model, find_trained_modules(model), can_repeat=False) as sample_gradients,
        pytest.raises(RuntimeError, match=r"SpiceConfig\(scoring_tokens_per_batch=1\)"),
    ):
        sample_gradients.compute(*collate(example_rows()), CollectingSink())


@pytest.mark.parametrize("where", ["embedded", "within"])
def test_activations_that_the_model_makes_require_a_gradient_change_nothing(where: str) -> None:
    model, rows = tiny_lora_model(), example_rows()
    expected = looped_gradients(model, rows)[1]
    if where == "embedded":
        layer = model.base_model.model.model.layers[0]
        layer.forward = lambda hidden, *args, forward=layer.forward, **kwargs: forward(
            hidden.requires_grad_(True), *args, **kwargs
        )
    else:
        attention = model.base_model.model.model.layers[0].self_attn
        attention.q_proj.forward = lambda x, forward=attention.q_proj.forward: forward(x.clone().requires_grad_(True))
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        for _ in range(2):
            sink = CollectingSink()
            sample_gradients.compute(*collate(rows), sink)
            assert relative_error(sink.by_module(), expected) < TOLERANCE
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(before("transformers", "5"), reason="the experts are modules, not parameters")
@pytest.mark.parametrize("sketch_dim", [0, 500])
def test_a_mixture_of_experts_trains(tmp_path: Path, sketch_dim: int) -> None:
    """Also by a sketch and with Adam's second moments, which go by a layer's coordinates."""
    model = tiny_lora_model("qwen3_moe")
    assert any(layer.takes_autograd for layer in scored_layers(find_trained_modules(model)))
    settings = {"sketch_dim": sketch_dim, "gradient_preconditioning": "adam"}
    trainer = make_trainer(tmp_path, model=model, spice=settings, verify=True, max_steps=3)
    trainer.train()
    assert [len(step) for step in trained_indices(tmp_path)] == [4, 4, 4]
