"""The sample gradients of `nn.Linear`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from spice_trainer.gradients.layers.linear import LinearLayer


def _layer(num_inputs: int, num_outputs: int, *, bias: bool = False) -> LinearLayer:
    return LinearLayer("layer", nn.Linear(num_inputs, num_outputs, bias=bias))


def test_gradients_equal_explicit_sums() -> None:
    inputs, deltas = torch.randn(3, 5, 4), torch.randn(3, 5, 2)
    expected = torch.zeros(3, 2 * 4 + 2)
    for n in range(3):
        for s in range(5):
            for o in range(2):
                for i in range(4):
                    expected[n, o * 4 + i] += deltas[n, s, o] * inputs[n, s, i]
                expected[n, 8 + o] += deltas[n, s, o]
    torch.testing.assert_close(_layer(4, 2, bias=True).sample_gradients(inputs, deltas), expected)
    torch.testing.assert_close(_layer(4, 2).sample_gradients(inputs, deltas), expected[:, :8])


def test_low_precision_products_accumulate_in_float32() -> None:
    inputs, deltas = torch.randn(1, 4000, 1).abs().bfloat16(), torch.ones(1, 4000, 1).bfloat16()
    found = _layer(1, 1, bias=True).sample_gradients(inputs, deltas)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0].double(), inputs.double().sum(), rtol=1e-6, atol=0)
    assert found[0, 1] == 4000


def test_a_bias_counts_only_if_it_trains() -> None:
    module = nn.Linear(3, 2)
    layer = LinearLayer("layer", module)
    assert layer.num_coordinates == 8 and layer.parameters == [module.weight, module.bias]
    module.bias.requires_grad_(False)
    layer = LinearLayer("layer", module)
    assert layer.num_coordinates == 6 and layer.parameters == [module.weight]
    assert _layer(3, 2).num_coordinates == 6


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_that_of_other_parameters(bias: bool) -> None:
    layer, other, inputs = _layer(3, 2, bias=bias), nn.Linear(3, 2, bias=bias), torch.randn(4, 5, 3)
    assert torch.equal(layer.output(inputs, list(other.parameters())), other(inputs))


@pytest.mark.parametrize("shape", [(2, 5, 3), (10, 3), (2, 4, 5, 3)])
def test_an_input_of_several_samples_is_told_apart(shape: tuple[int, ...]) -> None:
    inputs = torch.arange(math.prod(shape)).float().view(shape)
    assert torch.equal(_layer(3, 2).keep((inputs,), {}, 2, 5), inputs.reshape(2, -1, 3))


@pytest.mark.parametrize("shape", [(9, 3), (1, 10, 3), (5, 2, 3), (2, 3)])
def test_an_input_in_which_samples_are_mixed_is_not(shape: tuple[int, ...]) -> None:
    assert _layer(3, 2).keep((torch.zeros(shape),), {}, 2, 5) is None
    # A sample alone is all of it, also where nothing of it comes here.
    assert _layer(3, 2).keep((torch.zeros(shape),), {}, 1, 5).shape == (1, math.prod(shape) // 3, 3)
    assert _layer(3, 2).keep((torch.zeros(0, 3),), {}, 1, 5).shape == (1, 0, 3)


def test_an_experts_tokens_are_in_any_order_also_if_all_come() -> None:
    shared, expert = (
        LinearLayer(f"model.layers.0.mlp.{name}.up_proj", nn.Linear(3, 2)) for name in ("shared_expert", "experts.1")
    )
    assert shared.keep((torch.zeros(10, 3),), {}, 2, 5) is not None
    assert expert.keep((torch.zeros(10, 3),), {}, 2, 5) is None
