"""Norms that are none but by their names: found out when they are first called, and left to autograd."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spice_trainer.gradients.layers.scale import ScaleLayer
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients, relative_error
from tests.support.models import PlainLanguageModel, tiny_model

TOLERANCE = 1e-5


class _OwnNorm(nn.Module):
    """A norm whose weight and bias are used as `change` says."""

    def __init__(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16))
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, 16))
        self.change = change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(nn.functional.rms_norm(hidden, (16,)), self.weight, self.bias)


class _Wrapped(nn.Module):
    def __init__(self, mix: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.mix, self.norm = mix, norm

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.mix(hidden))
        return normed


def _model(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> nn.Module:
    model = PlainLanguageModel()
    model.mix = _Wrapped(model.mix, _OwnNorm(change))
    return model


LINEAR = {
    "plain": lambda x, w, b: x * w + b,
    "one_more": lambda x, w, b: x * (1.0 + w) + b,
    "bias_first": lambda x, w, b: x + b + w * x.tanh(),
}
CURVED = {
    "square": lambda x, w, b: x * w**2 + b,
    "exponential": lambda x, w, b: x * w.exp() + b,
    "sigmoid": lambda x, w, b: x * w.sigmoid() + b,
    "scaled_bias": lambda x, w, b: (x + b) * w,
    "double_bias": lambda x, w, b: x * w + 2.0 * b,
    "mixed_features": lambda x, w, b: x * w.flip(0) + b,
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LINEAR, *CURVED])
def test_a_norm_by_its_name_is_scored_as_what_it_does(
    name: str, precision: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = _model((LINEAR | CURVED)[name]).to(precision), example_rows()
    assert isinstance(ScaleLayer("norm", model.mix.norm), ScaleLayer)
    with caplog.at_level(logging.WARNING, "spice_trainer"):
        found = batched_gradients(model, rows)[1]
    expected = looped_gradients(model, rows)[1]
    assert relative_error(found, expected) < (TOLERANCE if precision == torch.float32 else 0.1)
    told = ["(_OwnNorm) has no rule of its own" in record.getMessage() for record in caplog.records]
    assert told == [True] * (name in CURVED)


def test_a_norm_of_numbers_that_are_not_finite_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    broken, sound = ([3, 9, 4], [3, 9, 4]), ([3, 8, 4], [3, 8, 4])
    assert not torch.cat(batched_gradients(model, [broken])[1], 1).isfinite().all()
    found, expected = batched_gradients(model, [sound])[1], looped_gradients(model, [sound])[1]
    assert relative_error(found, expected) < TOLERANCE
    assert "has no rule of its own" not in caplog.text
