"""Losses from hidden states at label positions, and the head's stand-in: when it steps aside, what stays of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spice_trainer.gradients.label_head
from spice_trainer.gradients.label_head import LabelHead, sample_losses, token_losses
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
from tests.support.models import ARCHITECTURES, PlainLanguageModel, tiny_lora_model, tiny_model

pytestmark = pytest.mark.oldest


def logits_of(outputs: Any) -> Tensor:
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


def observe(model: nn.Module, input_ids: Tensor, **options: Any) -> LabelHead:
    head = LabelHead.of(model)
    assert head is not None
    handles = head.attach()
    with head.observing():
        head.judge(logits_of(model(input_ids=input_ids, **options)))
    for handle in handles:
        handle.remove()
    return head


def forward_with_head(model: nn.Module, head: LabelHead, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    targets = labels[:, 1:]
    handles = head.attach()
    try:
        with head.expecting(targets, targets != -100):
            logits = logits_of(model(input_ids=input_ids))
            return head.losses(), logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_models_own_head(architecture: str) -> None:
    """Gemma2 caps its logits behind the head: it shows, and is computed in full. All others agree with that."""
    model = tiny_lora_model(architecture).eval()
    input_ids = torch.randint(3, 60, (3, 9))
    labels = input_ids.clone()
    labels[0, :4], labels[1] = -100, -100
    targets = labels[:, 1:]
    head = observe(model, input_ids)
    assert head.is_plain is (architecture != "gemma2")
    if not head.is_plain:
        return
    logits = logits_of(model(input_ids=input_ids))[:, :-1]
    expected = sample_losses(logits, targets, targets != -100)
    found, seen = forward_with_head(model, head, input_ids, labels)
    assert seen.shape[1] == 1 and found[1] == 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(found.sum(), parameters)
    theirs = torch.autograd.grad(expected.sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    # Without the hooks the head is its own again.
    torch.testing.assert_close(logits_of(model(input_ids=input_ids))[:, :-1], logits)


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "cohere"])
def test_caps_and_scales_behind_the_head_are_scored_in_full(architecture: str) -> None:
    """What a cap or a scale does to the gradients is in them: against one row at a time."""
    model = tiny_lora_model(architecture)
    assert (
        relative_error(batched_gradients(model, example_rows())[1], looped_gradients(model, example_rows())[1]) < 1e-5
    )
    head = LabelHead.of(model)
    assert head is not None and head.is_plain is False


def test_what_the_head_still_multiplies_is_no_view() -> None:
    """Of a view torch multiplies each sample by a copy of a frozen weight, in bfloat16 on the CPU."""
    model, input_ids = tiny_model().bfloat16().requires_grad_(False), torch.randint(3, 60, (4, 6))
    with torch.profiler.profile(record_shapes=True) as profile:
        head = observe(model, input_ids, logits_to_keep=1)
        forward_with_head(model, head, input_ids, input_ids.clone())
    weight = list(model.get_output_embeddings().weight.shape)
    products = [event.input_shapes[1] for event in profile.events() if event.name in ("aten::mm", "aten::bmm")]
    assert weight[::-1] in products and [4, *weight[::-1]] not in products


def changed(model: nn.Module, change: Any) -> None:
    """The model's logits go through `change` behind its head."""
    forward = model.forward

    def forward_and_change(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        outputs.logits = change(outputs.logits)
        return outputs

    model.forward = forward_and_change


def test_what_changes_logits_behind_the_head_is_seen() -> None:
    input_ids = torch.randint(3, 60, (2, 6))
    assert observe(tiny_model(), input_ids).is_plain is True
    for change in (lambda logits: logits * 1.001, lambda logits: 30 * torch.tanh(logits / 30), lambda x: x[:, :, :50]):
        model = tiny_model()
        changed(model, change)
        assert observe(model, input_ids).is_plain is False
    model = tiny_model()
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill(torch.arange(output.shape[-1]) == 3, -torch.inf)
    )
    assert observe(model, input_ids).is_plain is False
    model = tiny_model()
    changed(model, lambda logits: logits.double())
    assert observe(model, input_ids).is_plain is True


def test_logits_that_are_not_finite_tell_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    input_ids = torch.randint(8, 60, (2, 6))
    row = torch.full((1, 6), 7)
    assert observe(model, torch.cat([input_ids, row])).is_plain is True
    changed(model, lambda logits: logits * 1.001)
    assert observe(model, torch.cat([input_ids, row])).is_plain is False
    model.forward = type(model).forward.__get__(model)
    assert observe(model, row).is_plain is False


def test_models_without_a_plain_head() -> None:
    assert LabelHead.of(PlainLanguageModel()) is None
    model = tiny_model()

    class OwnLinear(nn.Linear):
        pass

    model.set_output_embeddings(OwnLinear(32, 61, bias=False))
    assert LabelHead.of(model) is None


def test_a_head_that_is_called_twice_steps_aside() -> None:
    model = tiny_model()
    forward = model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        model.get_output_embeddings()(torch.zeros(2, 1, 32))
        return outputs

    input_ids = torch.randint(3, 60, (2, 6))
    model.forward = twice
    assert observe(model, input_ids).is_plain is False


def test_a_head_that_is_called_twice_later_is_an_error() -> None:
    model = tiny_model()
    input_ids = torch.randint(3, 60, (2, 6))
    head = observe(model, input_ids)
    forward = model.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        model.get_output_embeddings()(torch.zeros(2, 1, 32))
        return outputs

    model.forward = twice
    with pytest.raises(RuntimeError, match=r"head \(Linear\) was called 2 times in a forward, where it had been"):
        forward_with_head(model, head, input_ids, input_ids)


def test_scoring_uses_it_after_one_look() -> None:
    """And gives the gradients of the full computation, of samples with labels at different positions."""
    model = tiny_lora_model()
    inputs, labels = collate(example_rows())
    shapes: list[tuple[int, ...]] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    sinks, losses = (CollectingSink(), CollectingSink()), []
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        losses.append(sample_gradients.compute(inputs, labels, sinks[0]))
        losses.append(sample_gradients.compute(inputs, labels, CollectingSink()))
        assert torch.equal(*losses)
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.forward.head = None
        losses[1] = sample_gradients.compute(inputs, labels, sinks[1])
    assert [shape[1] for shape in shapes] == [1, 1, 1, int((labels[:, 1:] != -100).any(0).sum())]
    torch.testing.assert_close(*losses)
    for index, gradients in sinks[0].gradients.items():
        torch.testing.assert_close(sinks[1].gradients[index], gradients, rtol=1e-5, atol=1e-6)


# Losses


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
