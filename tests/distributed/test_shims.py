"""Reasons for the shims that can be shown in one process. When one of these fails, upstream may have mended it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import nn

from tests.support.models import tiny_lora_model
from tests.support.versions import before


class WrappedLayer(nn.Module):
    """A layer as FSDP1 wraps it; its state dict has the plain names, as FSDP1's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module(*args, **kwargs)


@pytest.mark.skipif(before("peft", "0.21"), reason="PEFT 0.21 began it")
def test_peft_finds_no_adapter_in_layers_that_fsdp1_wrapped() -> None:
    model = tiny_lora_model()
    state_dict = {name: torch.clone(value) for name, value in model.state_dict().items()}
    assert len(get_peft_model_state_dict(model, state_dict=state_dict)) == 28
    layers = model.base_model.model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = WrappedLayer(layer)
    assert get_peft_model_state_dict(model, state_dict=state_dict) == {}
