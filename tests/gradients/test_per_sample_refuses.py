"""What cannot be told apart by sample is refused while scoring, never silently wrong."""

from __future__ import annotations

import pytest
from torch import nn

from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.gradient_loop import CollectingSink, batched_gradients, collate, example_rows
from tests.support.models import tiny_lora_model


def _score(model: nn.Module) -> None:
    batched_gradients(model, example_rows())


def test_a_merged_or_disabled_adapter_is_refused_while_scoring() -> None:
    model = tiny_lora_model()
    modules = find_trained_modules(model)
    model.merge_adapter()
    with pytest.raises(
        RuntimeError, match=r"28 of 28 scored layers got no gradient.*and 23 more.*unmerge the adapter"
    ):
        batched_gradients(model, example_rows(), modules=modules)
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(RuntimeError, match=r"28 of 28 scored layers got no gradient.*enable_adapter_layers"):
        batched_gradients(model, example_rows(), modules=modules)


def test_inputs_embeds_are_refused() -> None:
    model = tiny_lora_model()
    inputs, labels = collate(example_rows())
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    with (
        pytest.raises(RuntimeError, match="cannot score a model that is fed `inputs_embeds`"),
        SampleGradients(model, find_trained_modules(model)) as sample_gradients,
    ):
        sample_gradients.compute(embedded, labels, CollectingSink())
