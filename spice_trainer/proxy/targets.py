"""The layers that a selector's fresh adapter goes on: the attention and the MLPs of a language model.

    model ─┬─ vision tower, projector      left out
           ├─ language model ─ layers.0 ─┬─ attention, MLP or shared experts
           │                             └─ router, experts          left out
           └─ head                         left out

An expert sees few tokens of a row, and experts stacked into one parameter score a row at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from spice_trainer.gradients.forward import base_model
from spice_trainer.gradients.lora import UnsupportedModelError

_LEFT_OUT = re.compile(
    r"(?:^|\.)(?:gate|router|\w*_(?:gate|router)|(?:local_|routed_)?experts"
    r"|\w*(?:vision|visual|image|audio)\w*|multi_modal_projector"
    # Neither is called as other layers are.
    r"|mamba|mixer\.out_proj|mixer\.dt_proj)(?:\.|$)"
)


def language_model_targets(model: nn.Module) -> list[str]:
    """Names of the linear layers, for `target_modules`, of the attention and the MLPs of a model's language model."""
    model = base_model(model)
    get_decoder, get_head = (getattr(model, f"get_{name}", None) for name in ("decoder", "output_embeddings"))
    # Before transformers 5 some models give none.
    decoder = (get_decoder() if callable(get_decoder) else None) or model
    within, head = set(decoder.modules()), get_head() if callable(get_head) else None
    experts = _names_of_experts(model)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module in within
        and module is not head
        and not _LEFT_OUT.search(name)
        and name.rpartition(".")[2] not in experts
    ]
    if not found:
        raise UnsupportedModelError(
            f"The model ({type(model).__name__}) has no linear layer of a language model that an adapter could go on "
            "by itself. Fix: name the layers, `lora_config=LoraConfig(target_modules=[...])` or "
            "`--lora_target_modules`."
        )
    # Projections before and after all layers have no number.
    return [name for name in found if re.search(r"\.\d+\.", name)] or found


def _names_of_experts(model: nn.Module) -> Collection[str]:
    """Names that PEFT takes for stacked experts', also where a dense or a shared MLP has them."""
    try:
        from peft.utils.transformers_weight_conversion import (
            _MODEL_TO_CONVERSION_PATTERN,
            _MOE_TARGET_MODULE_MAPPING,
        )
    except ImportError:  # Of before transformers 5, which stacks them.
        return ()
    kind = _MODEL_TO_CONVERSION_PATTERN.get(getattr(getattr(model, "config", None), "model_type", None))
    names: dict[str, str] = _MOE_TARGET_MODULE_MAPPING.get(kind, {})
    return names
