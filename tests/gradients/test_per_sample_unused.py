"""Layers that a row does not use have gradient 0, as autograd says; those that a kernel bypasses are still refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.gradients.verification import verify_gradients
from tests.support.gradient_loop import (
    CollectingSink,
    batched_gradients,
    example_rows,
    looped_gradients,
    relative_error,
)
from tests.support.models import add_lora, enable_checkpointing, tiny_lora_model
from tests.support.multimodal import (
    MULTIMODAL,
    autograd_gradients,
    collated,
    collator,
    multimodal_rows,
    tiny_multimodal_model,
)
from tests.support.trainers import attach, make_trainer, trained_indices

TOLERANCE = 1e-5
LANGUAGE_ATTENTION = r".*language_model.*\.(q_proj|v_proj|o_proj)"
VISION_ATTENTION = r".*vis.*\.(q_proj|v_proj|qkv|fc1)"
CPU = torch.device("cpu")


def score(model: nn.Module, row: CandidateRow) -> list[Tensor]:
    """One row's gradients by layer, as scoring takes them."""
    sink, modules = CollectingSink(), find_trained_modules(model)
    with SampleGradients(model, modules) as sample_gradients:
        sample_gradients.compute(*pad_rows([row]), sink)
    return [gradients[0] for gradients in sink.by_module(modules)]


def _skip(layer: Any) -> None:
    """As an early exit does: what goes in comes out."""
    layer.forward = lambda hidden, *args, **kwargs: hidden


def _detach(layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda module, args, output: output.detach())


def _without_graph(layer: Any) -> None:
    layer.mlp.forward = torch.no_grad()(layer.mlp.forward)


def _discard_a_call(layer: Any) -> None:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda hidden: forward(hidden) + 0.1 * forward(hidden.flip(2)).detach()


def _discard_all_calls(layer: Any) -> None:
    forward = layer.mlp.forward
    layer.mlp.forward = lambda hidden: hidden.tanh() if forward(hidden) is not None else hidden


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("change", "num_zero"),
    [(_skip, 14), (_detach, 6), (_without_graph, 6), (_discard_a_call, 0), (_discard_all_calls, 6)],
)
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_the_loss_does_not_depend_on_has_gradient_0(
    change: Any, num_zero: int, number: int, precision: torch.dtype
) -> None:
    model, rows = tiny_lora_model(), example_rows()
    change(model.base_model.model.model.layers[number])
    expected = looped_gradients(model, rows, allow_unused=True)[1]
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        found = batched_gradients(model, rows)[1]
    assert sum(not gradients.any() for gradients in expected) == num_zero
    assert all(bool(ours.any()) == bool(oracle.any()) for ours, oracle in zip(found, expected, strict=True))
    assert relative_error(found, expected) < (TOLERANCE if precision == torch.float32 else 0.02)


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [
        (architecture, targets)
        for architecture in MULTIMODAL
        for targets in ("all-linear", LANGUAGE_ATTENTION, VISION_ATTENTION)
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_with_and_without_images_equal_autograd(architecture: str, targets: str, checkpointing: bool) -> None:
    model = add_lora(tiny_multimodal_model(architecture), target_modules=targets).train()
    rows = collated(architecture, [0, 0, 1, 3])
    expected = [autograd_gradients(model, row) for row in rows]
    if checkpointing:
        # It makes the outputs of all embeddings require a gradient, those of the images too.
        enable_checkpointing(model, use_reentrant=True)
    for row, oracle in zip(rows, expected, strict=True):
        found = torch.cat(score(model, row))
        assert float((found - torch.cat(oracle)).norm()) < TOLERANCE * float(torch.cat(expected[-1]).norm())
    used = [sum(bool(gradient.any()) for gradient in oracle) for oracle in expected]
    assert used[2] == used[3] == len(expected[0]) and used[0] == used[1]
    if targets != LANGUAGE_ATTENTION or architecture == "mllama":
        assert used[0] < used[2], "a row without an image must leave something unused"
    assert verify_gradients(model, find_trained_modules(model), rows, device=CPU) < TOLERANCE


def test_a_row_that_uses_no_scored_layer_has_gradient_0_everywhere() -> None:
    model = add_lora(tiny_multimodal_model("llava"), target_modules=r".*vision_tower.*q_proj")
    text, image = collated("llava", [0, 1])
    assert not any(gradient.any() for gradient in score(model, text))
    assert all(gradient.any() for gradient in score(model, image))
    assert verify_gradients(model, find_trained_modules(model), [text, image], device=CPU) < TOLERANCE
    with pytest.raises(ValueError, match=r"No scored layer gets a gradient from rows 0 of the training dataset"):
        verify_gradients(model, find_trained_modules(model), [text], device=CPU)


@pytest.mark.parametrize("architecture", MULTIMODAL)
def test_a_vision_tower_that_texts_leave_out_keeps_them_in_batches(
    architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its convolutions have no rule; a row with an image needs none, for it is alone."""
    model, rows = tiny_multimodal_model(architecture), example_rows()
    for _ in range(2):
        losses, found = batched_gradients(model, rows)
        expected_losses, expected = looped_gradients(model, rows, allow_unused=True)
        torch.testing.assert_close(losses, expected_losses, rtol=TOLERANCE, atol=0)
        assert relative_error(found, expected) < TOLERANCE
        image = collated(architecture, [1])[0]
        oracle = torch.cat(autograd_gradients(model, image))
        assert float((torch.cat(score(model, image)) - oracle).norm()) < TOLERANCE * float(oracle.norm())
    assert not [record for record in caplog.records if "one at a time" in record.getMessage()]


@pytest.mark.parametrize("architecture", MULTIMODAL)
def test_a_model_with_a_vision_tower_trains_in_full(architecture: str, tmp_path: Path) -> None:
    model, rows = tiny_multimodal_model(architecture), multimodal_rows([0, 0, 1] * 16)
    trainer = make_trainer(
        tmp_path,
        model=model,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator(architecture),
        remove_unused_columns=False,
    )
    attach(trainer, {"pool_size": 12, "num_selected": 4, "sketch_dim": 512}, verify=True)
    trainer.train()
    assert [len(step) for step in trained_indices(tmp_path)] == [4] * 4


def test_a_bypass_shows_also_where_other_layers_are_unused(caplog: pytest.LogCaptureFixture) -> None:
    model = add_lora(tiny_multimodal_model("llava"))
    layer = model.get_submodule("base_model.model.model.language_model.layers.0.mlp.up_proj")
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    layer.forward = lambda hidden: layer.base_layer(hidden) + hidden @ weights[0].T @ weights[1].T
    rows = collated("llava", [0, 1])
    assert verify_gradients(model, find_trained_modules(model), rows, device=CPU) < TOLERANCE
    assert "up_proj.lora_A.default' is bypassed: its weights are used without calling it" in caplog.text


def test_a_kind_of_rows_that_attaching_never_saw_does_not_end_the_run(tmp_path: Path) -> None:
    rows = multimodal_rows([1] * 48)
    for number in (40, 41):  # Attaching looks at 32 of 48 rows, spread; these two are not among them.
        rows[number] = multimodal_rows([0])[0]
    model = add_lora(tiny_multimodal_model("llava"), randomize=False)
    trainer = make_trainer(
        tmp_path,
        model=model,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator("llava"),
        remove_unused_columns=False,
    )
    attach(trainer, {"pool_size": 12, "num_selected": 4}, verify=True)
    trainer.train()
    assert [len(step) for step in trained_indices(tmp_path)] == [4] * 4
