"""The check of sample gradients that forms no gradient of any weight, for models whose weights are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.layers.linear import LinearLayer
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.gradients.verification import GradientMismatchError, verify_directions
from tests.gradients.test_verification import _bypass_both, _call_twice_on_halves, _flatten_batch, _mix_rows
from tests.support.gradient_loop import CollectingSink, example_rows
from tests.support.gradient_loop import collate as collate_rows
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.traces import model_state, random_states
from tests.support.trainers import collate, make_trainer, tiny_rows


def verify_two_rows(model: nn.Module, **settings: Any) -> float:
    rows = [collate_row(number, tiny_rows()[number], collate) for number in (0, 1)]
    return verify_directions(model, find_trained_modules(model), rows, device=torch.device("cpu"), **settings)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_sound_models_pass(architecture: str) -> None:
    model = tiny_lora_model(architecture, lora_dropout=0.3).train()
    assert 0 < verify_two_rows(model) < 1e-5
    mixed = verify_two_rows(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    # Gemma's attention rounds alike with and without padding.
    assert (0 if architecture == "gemma2" else 1e-4) < mixed < 0.15


@pytest.mark.parametrize(
    "build",
    [
        lambda: add_lora(tiny_model(attention_bias=True, mlp_bias=True), lora_bias=True),
        lambda: tiny_lora_model(randomize=False),
    ],
    ids=["lora_bias", "fresh_adapter"],
)
def test_other_sound_models_pass(build: Callable[[], nn.Module]) -> None:
    assert verify_two_rows(build()) < 1e-5


@pytest.mark.parametrize("change", [_call_twice_on_halves, _flatten_batch, _bypass_both])
def test_a_layer_that_is_called_in_another_way_is_followed(change: Callable[[nn.Module], None]) -> None:
    model = tiny_lora_model()
    change(model)
    assert verify_two_rows(model) < 1e-5


def test_a_model_whose_rows_influence_each_other_needs_rows_alone() -> None:
    model = tiny_lora_model()
    _mix_rows(model)
    assert verify_two_rows(model) < 1e-5
    with (
        SampleGradients(model, find_trained_modules(model), can_repeat=False) as sample_gradients,
        pytest.raises(RuntimeError, match=r"padding changes a row's gradient.*scoring_tokens_per_batch=1"),
    ):
        sample_gradients.compute(*collate_rows(example_rows()), CollectingSink())


def test_a_bypassed_layer_is_refused_where_weights_are_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora_model()
    _bypass_both(model)
    monkeypatch.setattr("spice_trainer.gradients.per_sample.is_sharded", lambda model: True)
    with pytest.raises(RuntimeError, match=r"2 of 28 scored layers got no gradient .*self_attn\.q_proj.*fused"):
        verify_two_rows(model)


@pytest.mark.parametrize("factor", [1.1, -1.0, 0.0, float("nan")])
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_a_wrong_gradient_is_caught(matrix: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearLayer.sample_gradients

    def scaled(self: LinearLayer, inputs: Tensor, output_gradients: Tensor, *cut: int) -> Tensor:
        is_matrix_a = output_gradients.shape[-1] == 4
        gradients = right(self, inputs, output_gradients, *cut)
        return gradients * factor if is_matrix_a == (matrix == "lora_A") else gradients

    monkeypatch.setattr(LinearLayer, "sample_gradients", scaled)
    with pytest.raises(GradientMismatchError, match=f"{matrix}.*differs from autograd's"):
        verify_two_rows(tiny_lora_model())


def test_the_check_leaves_no_trace() -> None:
    model = tiny_lora_model(lora_dropout=0.3).train()
    model.get_submodule("base_model.model.model.layers.1").training = False
    before, states = random_states(), model_state(model)
    verify_two_rows(model)
    assert random_states() == before and model_state(model) == states
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_partitioned_model_is_verified_when_training_begins_and_once_more(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A's gradient is zero until B is not, so the second look is after the first update."""
    monkeypatch.setattr("spice_trainer.trainer.checks.is_sharded", lambda model: True)
    steps: list[int] = []

    def note(*args: Any, **kwargs: Any) -> float:
        steps.append(trainer.state.global_step)
        return verify_directions(*args, **kwargs)

    monkeypatch.setattr("spice_trainer.trainer.checks.verify_directions", note)
    trainer = make_trainer(tmp_path, spice={}, verify=True, max_steps=4)
    assert steps == []
    trainer.train()
    assert steps == [0, 1]
    make_trainer(tmp_path, spice={}, verify=False, max_steps=4).train()
    assert steps == [0, 1]


def test_a_partitioned_model_that_is_wrong_ends_the_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spice_trainer.trainer.checks.is_sharded", lambda model: True)
    right = LinearLayer.sample_gradients
    monkeypatch.setattr(LinearLayer, "sample_gradients", lambda *args: 1.1 * right(*args))
    trainer = make_trainer(tmp_path, spice={}, verify=True)
    with pytest.raises(GradientMismatchError, match="differs from autograd's"):
        trainer.train()
    assert trainer.state.global_step == 0
