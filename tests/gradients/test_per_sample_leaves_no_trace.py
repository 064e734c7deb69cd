"""Scoring leaves no trace: not in gradients, modes, hooks or random states, and not after an exception."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

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
from tests.support.models import add_lora, enable_checkpointing, tiny_model

pytestmark = pytest.mark.oldest

TOLERANCE = 1e-5


def _training_model(checkpointing: str) -> PeftModel:
    """Dropout everywhere, checkpointing as asked, and modules whose mode differs from their parents'."""
    model = add_lora(tiny_model(attention_dropout=0.1), lora_dropout=0.3).train()
    if checkpointing != "off":
        enable_checkpointing(model, use_reentrant=checkpointing == "reentrant")
    model.base_model.model.model.layers[1].mlp.eval()
    model.base_model.model.model.norm.training = False
    return model


def _hooks(model: nn.Module) -> list[tuple[int, ...]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [tuple(len(getattr(module, kind)) for kind in kinds) for module in model.modules()]


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def _random_state() -> tuple[bytes, object, tuple[object, ...]]:
    numpy_state = np.random.get_state()
    return bytes(torch.get_rng_state().tolist()), random.getstate(), (numpy_state[0], numpy_state[1].tolist())


CHECKPOINTING = pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])


@CHECKPOINTING
def test_scoring_leaves_no_trace(checkpointing: str) -> None:
    model = _training_model(checkpointing)
    modes, hooks, random_state = _modes(model), _hooks(model), _random_state()
    assert len(set(modes)) == 2, "the flags must be mixed for this test to see a blanket train()"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]

    _, found = batched_gradients(model, example_rows())

    assert relative_error(found, looped_gradients(model, example_rows())[1]) < TOLERANCE
    assert all(parameter.grad is None for parameter in model.parameters())
    assert _modes(model) == modes
    assert _hooks(model) == hooks
    assert _random_state() == random_state
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@CHECKPOINTING
def test_training_around_scoring_is_bit_identical(checkpointing: str) -> None:
    def run(*, scoring: bool) -> tuple[list[float], Tensor]:
        torch.manual_seed(1)
        model = _training_model(checkpointing)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(3):
            for half in range(2):  # scoring between the micro-batches too: gradients that wait must stay
                if scoring:
                    batched_gradients(model, example_rows(seed=50 + step))
                inputs, labels = collate(example_rows(seed=10 * step + half))
                loss = model(**inputs, labels=labels).loss
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        return losses, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    losses, weights = run(scoring=True)
    expected_losses, expected_weights = run(scoring=False)
    assert losses == expected_losses
    assert torch.equal(weights, expected_weights)


class _FailingSink:
    def add(self, module_index: int, gradients: Tensor, *where: Any) -> None:
        raise FloatingPointError("the sink failed")


def _fail_in_sink(model: PeftModel, sample_gradients: SampleGradients) -> None:
    sample_gradients.compute(*collate(example_rows()), _FailingSink())


def _fail_in_forward(model: PeftModel, sample_gradients: SampleGradients) -> None:
    inputs, labels = collate(example_rows())
    inputs["input_ids"] = inputs["input_ids"] + 1000  # beyond the vocabulary
    sample_gradients.compute(inputs, labels, CollectingSink())


def _fail_in_body(model: PeftModel, sample_gradients: SampleGradients) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fail", "error"),
    [(_fail_in_sink, FloatingPointError), (_fail_in_forward, IndexError), (_fail_in_body, KeyboardInterrupt)],
)
def test_an_exception_leaves_no_trace(
    fail: Callable[[PeftModel, SampleGradients], None], error: type[BaseException]
) -> None:
    model = _training_model("off")
    modes, hooks, random_state = _modes(model), _hooks(model), _random_state()
    with pytest.raises(error), SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        fail(model, sample_gradients)
    assert _modes(model) == modes
    assert _hooks(model) == hooks
    assert _random_state() == random_state
    assert all(parameter.grad is None for parameter in model.parameters())
    # And it works again afterwards.
    assert (
        relative_error(batched_gradients(model, example_rows())[1], looped_gradients(model, example_rows())[1])
        < TOLERANCE
    )


def test_an_exception_while_opening_leaves_no_trace() -> None:
    model = _training_model("off")
    modes, hooks, modules = _modes(model), _hooks(model), find_trained_modules(model)

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("no hook here")

    next(reversed(modules.values())).register_forward_hook = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match="no hook here"), SampleGradients(model, modules):
        pass
    assert _modes(model) == modes
    assert _hooks(model) == hooks
