"""The check of sample gradients at attach time: what it must catch, what it must let through, and no trace of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, collate_row
from spice_trainer.gradients.layers.linear import LinearLayer
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.verification import GradientMismatchError, verify_gradients
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients, relative_error
from tests.support.models import PlainLanguageModel, add_lora, enable_checkpointing, tiny_lora_model, tiny_model
from tests.support.traces import model_state, random_states, trainer_state
from tests.support.trainers import attach, collate, make_trainer, tiny_rows

pytestmark = pytest.mark.oldest

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def _rows(numbers: tuple[int, ...] = (0, 1)) -> list[CandidateRow]:
    return [collate_row(number, tiny_rows()[number], collate) for number in numbers]


def _verify(model: nn.Module, **settings: Any) -> float:
    return verify_gradients(model, find_trained_modules(model), _rows(), device=torch.device("cpu"), **settings)


# Breaking the model


def _bypass_both(model: nn.Module) -> None:
    """As fused LoRA kernels do: the weights are read, the modules never called."""
    layer = model.get_submodule(Q_PROJ)

    def forward(x: Tensor) -> Tensor:
        low = x @ layer.lora_A["default"].weight.T
        return layer.base_layer(x) + low @ layer.lora_B["default"].weight.T * layer.scaling["default"]

    layer.forward = forward


def _bypass_in_part(model: nn.Module) -> None:
    """The modules are called, and their weights used once more beside them."""
    layer = model.get_submodule(Q_PROJ)
    original = layer.forward
    layer.forward = lambda x: original(x) + x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T


def _mix_rows(model: nn.Module) -> None:
    """Every row sees the mean of its batch, as normalisation over a batch does."""
    model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(
        lambda module, args, output: output + 0.1 * output.mean(0, keepdim=True)
    )


def _flatten_batch(model: nn.Module) -> None:
    """As mixture-of-experts layers do."""
    layer = model.get_submodule(Q_PROJ)
    original = layer.forward
    layer.forward = lambda x: original(x.flatten(0, 1)).view(*x.shape[:2], -1)


def _call_twice_on_halves(model: nn.Module) -> None:
    """A layer called on half the tokens at a time."""
    layer = model.get_submodule(Q_PROJ)
    original = layer.forward
    layer.forward = lambda x: torch.cat([original(half) for half in x.split(5, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("break_model", "error", "words"),
    [
        (_bypass_in_part, GradientMismatchError, r"q_proj\.lora_\w\.default' differs from autograd's by .*refused"),
    ],
)
def test_models_that_the_hooks_cannot_follow_are_caught(
    break_model: Callable[[nn.Module], None], error: type[Exception], words: str, tmp_path: Path
) -> None:
    model = tiny_lora_model(lora_dropout=0.3)
    break_model(model)
    trainer = make_trainer(tmp_path, model=model)
    before = trainer_state(trainer)
    with pytest.raises(error, match=f"(?s){words}"):
        attach(trainer, {}, verify=True)
    assert trainer_state(trainer) == before
    # Without the check SPICE would be attached.
    attach(trainer, {}, verify=False)


def test_a_model_whose_rows_influence_each_other_is_scored_row_by_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = tiny_lora_model(), example_rows()
    _mix_rows(model)
    expected = looped_gradients(model, rows)[1]
    assert relative_error(batched_gradients(model, rows)[1], expected) > 0.01
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    with caplog.at_level("WARNING", "spice_trainer"):
        attach(trainer, {}, verify=True)
    assert [text for text in caplog.messages if "padding, or the other rows of a batch, change" in text]
    assert relative_error(batched_gradients(model, rows)[1], expected) < 1e-5
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("change", [_call_twice_on_halves, _flatten_batch, _bypass_both])
def test_a_layer_that_is_called_in_another_way_is_followed(change: Callable[[nn.Module], None]) -> None:
    model = tiny_lora_model()
    change(model)
    assert _verify(model) < 1e-5


@pytest.mark.parametrize("factor", [1.01, -1.0, 0.0, float("nan")])
def test_a_wrong_gradient_is_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora_model()
    assert _verify(model) < 1e-5
    right = LinearLayer.sample_gradients
    monkeypatch.setattr(LinearLayer, "sample_gradients", lambda *args: factor * right(*args))
    with pytest.raises(GradientMismatchError, match=r"by \S+ of the gradient's norm \(row 0 of the training dataset"):
        _verify(model)


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_wrong_gradient_of_a_fresh_adapter_is_caught(matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B of a fresh adapter is zero, and with it the gradient of A, wrong or not."""
    model = tiny_lora_model(randomize=False)
    before = model_state(model)

    right = LinearLayer.sample_gradients

    def scaled(self: LinearLayer, inputs: Tensor, output_gradients: Tensor, *cut: int) -> Tensor:
        is_matrix_a = output_gradients.shape[-1] == 4
        gradients = right(self, inputs, output_gradients, *cut)
        return gradients * 1.5 if is_matrix_a == (matrix == "lora_A") else gradients

    monkeypatch.setattr(LinearLayer, "sample_gradients", scaled)
    with pytest.raises(GradientMismatchError, match=matrix):
        _verify(model)
    assert model_state(model) == before


def test_one_wrong_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora_model()
    modules = find_trained_modules(model)
    wrong = next(name for name in modules if "layers.1.mlp.down_proj.lora_A" in name)

    right = LinearLayer.sample_gradients

    def scaled(self: LinearLayer, inputs: Tensor, output_gradients: Tensor, *cut: int) -> Tensor:
        gradients = right(self, inputs, output_gradients, *cut)
        return gradients * 1.1 if gradients.shape[1] == modules[wrong].weight.numel() else gradients

    monkeypatch.setattr(LinearLayer, "sample_gradients", scaled)
    sizes = [name for name, module in modules.items() if module.weight.numel() == modules[wrong].weight.numel()]
    with pytest.raises(GradientMismatchError) as caught:
        _verify(model)
    assert any(repr(name) in str(caught.value) for name in sizes)


# What is fine


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2", "gemma2"])
def test_sound_models_pass_in_float32(architecture: str) -> None:
    assert _verify(tiny_lora_model(architecture, lora_dropout=0.3).train()) < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sound_models_pass_in_bfloat16(architecture: str) -> None:
    model = tiny_lora_model(architecture)
    mixed = _verify(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    assert 1e-4 < mixed < 0.1
    assert 1e-4 < _verify(model.to(torch.bfloat16)) < 0.15


@pytest.mark.parametrize(
    "build",
    [
        lambda: add_lora(PlainLanguageModel(), target_modules=["mix", "head"], task_type=None),
        lambda: add_lora(tiny_model(attention_bias=True, mlp_bias=True), lora_bias=True),
        lambda: tiny_lora_model(randomize=False),
        lambda: tiny_lora_model(use_rslora=True, target_modules=["q_proj"], layers_to_transform=[1]),
    ],
    ids=["plain", "lora_bias", "fresh_adapter", "rslora"],
)
def test_other_sound_models_pass(build: Callable[[], nn.Module]) -> None:
    assert _verify(build()) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_models_pass(use_reentrant: bool) -> None:
    model = tiny_lora_model().train()
    enable_checkpointing(model, use_reentrant=use_reentrant)
    assert _verify(model) < 1e-5


def test_packed_rows_are_checked_one_at_a_time() -> None:
    def packed(rows: list[Any]) -> dict[str, Tensor]:
        ids = torch.tensor([rows[0]["input_ids"]])
        positions = torch.tensor([[*range(2), *range(ids.shape[1] - 2)]])
        labels = ids.masked_fill(positions == 0, -100)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    model = tiny_lora_model()
    rows = [collate_row(number, tiny_rows()[number], packed) for number in (0, 1)]
    assert not any(row.can_be_padded for row in rows)
    assert verify_gradients(model, find_trained_modules(model), rows, device=torch.device("cpu")) < 1e-5


def test_rows_whose_gradient_is_not_finite_are_passed_over() -> None:
    model, (first, second) = tiny_lora_model(), _rows()
    with torch.no_grad():
        model.get_input_embeddings().weight[first.inputs["input_ids"][0, 0]] = float("nan")
    assert _verify(model) < 1e-5
    with torch.no_grad():
        model.get_input_embeddings().weight[second.inputs["input_ids"][0, 0]] = float("nan")
    with pytest.raises(ValueError, match="rows 0, 1 of the training dataset are not finite, also by plain autograd"):
        _verify(model)


@pytest.mark.parametrize("randomize", [True, False])
def test_the_check_leaves_no_trace(randomize: bool) -> None:
    model = tiny_lora_model(lora_dropout=0.3, randomize=randomize).train()
    model.get_submodule("base_model.model.model.layers.1").training = False
    for parameter in list(find_trained_modules(model).values())[:3]:
        parameter.weight.grad = torch.ones_like(parameter.weight)
    before, states = random_states(), model_state(model)
    _verify(model)
    assert random_states() == before and model_state(model) == states
