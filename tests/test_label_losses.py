"""Losses from hidden states at label positions against the full logits: values, gradients, chunks, fallbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spice_trainer.label_losses
from spice_trainer.gradients import sample_losses
from spice_trainer.label_losses import LabelHead, token_losses

from .models import ARCHITECTURES, PlainLanguageModel, tiny_lora_model, tiny_model


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_losses_and_gradients_are_those_of_cross_entropy(
    chunk: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spice_trainer.label_losses, "CHUNK_NUMBERS", 11 * chunk)
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
    monkeypatch.setattr(spice_trainer.label_losses, "CHUNK_NUMBERS", 4 * vocabulary)

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


def forward_with_head(model: nn.Module, head: LabelHead, input_ids: Tensor, labels: Tensor) -> Tensor | None:
    targets = labels[:, 1:]
    handles = head.attach()
    head.expect(targets, targets != -100)
    try:
        outputs = model(input_ids=input_ids)
        return head.losses(outputs["logits"] if isinstance(outputs, dict) else outputs.logits)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_models_own_head(architecture: str) -> None:
    """Gemma2 caps its logits behind the head: it says so, and is computed in full. All others agree with that."""
    model = tiny_lora_model(architecture).eval()
    input_ids = torch.randint(3, 60, (3, 9))
    labels = input_ids.clone()
    labels[0, :4], labels[1] = -100, -100
    targets = labels[:, 1:]
    logits = model(input_ids=input_ids).logits[:, :-1]
    head = LabelHead.of(model)
    assert head is not None
    found = forward_with_head(model, head, input_ids, labels)
    if architecture == "gemma2":
        assert found is None
        return
    expected = sample_losses(logits, targets, targets != -100)
    assert found is not None and found[1] == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(found.sum(), parameters)
    theirs = torch.autograd.grad(expected.sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # Without the hooks the head is its own again.
    torch.testing.assert_close(model(input_ids=input_ids).logits[:, :-1], logits)


def test_logits_that_are_changed_behind_the_head_are_seen() -> None:
    model = tiny_model()
    forward = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.001
        return outputs

    model.forward = scaled
    input_ids = torch.randint(3, 60, (2, 6))
    head = LabelHead.of(model)
    assert head is not None and forward_with_head(model, head, input_ids, input_ids) is None
    model.forward = forward
    assert forward_with_head(model, head, input_ids, input_ids) is not None


def test_logits_that_are_not_finite_are_no_change() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    input_ids = torch.randint(8, 60, (2, 6))
    input_ids[1, 2] = 7
    head = LabelHead.of(model)
    losses = forward_with_head(model, head, input_ids, input_ids) if head is not None else None
    assert losses is not None and losses.isfinite().tolist() == [True, False]


def test_models_without_a_plain_head() -> None:
    assert LabelHead.of(PlainLanguageModel()) is None
    model = tiny_model()

    class OwnLinear(nn.Linear):
        pass

    model.set_output_embeddings(OwnLinear(32, 61, bias=False))
    assert LabelHead.of(model) is None


def test_a_head_that_is_called_twice_falls_back() -> None:
    model = tiny_model()
    forward = model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        model.get_output_embeddings()(torch.zeros(2, 1, 32))
        return outputs

    model.forward = twice
    input_ids = torch.randint(3, 60, (2, 6))
    head = LabelHead.of(model)
    assert head is not None and forward_with_head(model, head, input_ids, input_ids) is None
