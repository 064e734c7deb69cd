"""Other libraries' per-sample gradients are the ones we compute: a comparison of times is one of equal work."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor

from spice_trainer.gradients.lora import find_trained_modules
from tests.benchmarks.comparators import COMPARATORS, GradientTable, Unavailable, summed_losses
from tests.support.gradient_loop import batched_gradients, collate, example_rows, looped_gradients, relative_error
from tests.support.models import tiny_lora_model

pytestmark = pytest.mark.slow

ROWS = example_rows()
# Rows of unlike length share a micro-batch, and one is alone.
GROUPS = ([1, 2], [0, 4], [3])


@pytest.fixture
def model() -> torch.nn.Module:
    # Dropout would show if a library's training mode reached it.
    return tiny_lora_model("qwen2", lora_dropout=0.3)


def collected(name: str, model: torch.nn.Module, **options: bool) -> Tensor:
    """All rows' gradients in the order of `ROWS`, computed twice by the same hooks."""
    batches = [collate([ROWS[index] for index in group]) for group in GROUPS]
    try:
        with COMPARATORS[name].open(model, find_trained_modules(model), batches, **options) as collect:
            collect()
            found = collect()
    except Unavailable as reason:
        pytest.skip(str(reason))
    ordered = torch.empty_like(found)
    ordered[[index for group in GROUPS for index in group]] = found
    return ordered


@pytest.mark.parametrize("name", COMPARATORS)
def test_the_gradients_are_those_of_a_loop_and_ours(name: str, model: torch.nn.Module) -> None:
    found = collected(name, model)
    assert found.dtype == torch.float32
    for _, expected in (looped_gradients(model, ROWS), batched_gradients(model, ROWS)):
        assert relative_error([found], expected) < 1e-4


@pytest.mark.parametrize("name", [name for name in COMPARATORS if not name.startswith("bergson")])
def test_logits_at_label_columns_change_nothing(name: str, model: torch.nn.Module) -> None:
    assert relative_error([collected(name, model, label_columns=True)], looped_gradients(model, ROWS)[1]) < 1e-4


@pytest.mark.parametrize("name", COMPARATORS)
def test_under_autocast_they_are_the_same_but_rounded(name: str, model: torch.nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = collected(name, model)
    assert found.dtype == torch.float32
    assert 1e-4 < relative_error([found], looped_gradients(model, ROWS)[1]) < 0.05


@pytest.mark.parametrize("name", COMPARATORS)
def test_the_model_is_left_as_it_was(name: str, model: torch.nn.Module) -> None:
    def state() -> list[object]:
        return [
            [(module.training, len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()],
            ["forward" in vars(module) for module in model.modules()],
            [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        ]

    model.train()
    before = state()
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    collected(name, model)
    assert state() == before
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


@pytest.mark.parametrize("name", COMPARATORS)
def test_a_library_that_is_not_there_says_what_to_install(
    name: str, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = COMPARATORS[name].requirement.split("==")[0].replace("-", "_")
    for module in [package, *(other for other in sys.modules if other.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with (
        pytest.raises(Unavailable, match=f"Error: .*{package}.*; pip install {COMPARATORS[name].requirement}"),
        COMPARATORS[name].open(model, find_trained_modules(model), [collate(ROWS)]),
    ):
        pass


@pytest.mark.parametrize("label_columns", [False, True])
def test_the_summed_losses_and_their_place_in_the_table(label_columns: bool, model: torch.nn.Module) -> None:
    """What the comparators share, where none of them is installed."""
    model.eval()
    batches = [collate([ROWS[index] for index in group]) for group in GROUPS]
    losses, gradients = looped_gradients(model, ROWS)
    modules = find_trained_modules(model)
    table = GradientTable(modules, batches)
    for number, (inputs, labels) in enumerate(batches):
        found = summed_losses(model, inputs, labels, label_columns=label_columns)
        torch.testing.assert_close(found.detach(), losses[GROUPS[number]].sum())
        for name, gradient in zip(modules, gradients, strict=True):
            table.put(number, name, gradient[GROUPS[number]])
    order = [index for group in GROUPS for index in group]
    torch.testing.assert_close(table.gradients, torch.cat(gradients, dim=1)[order], rtol=0, atol=0)
