"""Losses from hidden states at label positions against the full logits: values, gradients, chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spice_trainer.gradients.label_head
from spice_trainer.gradients.label_head import sample_losses, token_losses


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_gradients_are_those_of_cross_entropy(
    chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spice_trainer.gradients.label_head, "CHUNK_NUMBERS", 11 * chunk)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, targets = torch.randn(11, 5, dtype=torch.float64), torch.randint(0, 11, (7,))
    bias = torch.randn(11, dtype=torch.float64) if with_bias else None
    scales = torch.randn(7)
    found = token_losses(hidden, weight, bias, targets)
    (gradient,) = torch.autograd.grad((found * scales).sum(), hidden)
    expected = nn.functional.cross_entropy(nn.functional.linear(hidden, weight, bias), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * scales.double()).sum(), hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_no_tensor_of_all_logits_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing larger than a chunk of logits, beside what has the hidden states' size."""
    largest = 0
    positions, vocabulary, features = 64, 512, 8
    monkeypatch.setattr(spice_trainer.gradients.label_head, "CHUNK_NUMBERS", 4 * vocabulary)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    hidden = torch.randn(positions, features, requires_grad=True)
    weight, targets = torch.randn(vocabulary, features), torch.randint(0, vocabulary, (positions,))
    with Watch():
        token_losses(hidden, weight, None, targets).sum().backward()
    # The head's weight itself is seen too, transposed.
    assert largest == vocabulary * features


def test_means_of_samples_are_those_of_cross_entropy() -> None:
    logits, targets = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]).bool()
    found = sample_losses(logits, targets, mask)
    for row in (0, 2):
        expected = nn.functional.cross_entropy(logits[row][mask[row]], targets[row][mask[row]])
        torch.testing.assert_close(found[row], expected)
    assert found[1] == 0
