"""Finds the trainable LoRA layers of a model, and refuses by name what cannot be scored.

A sample gradient of the paper is taken with respect to the trainable LoRA weights. What trains beside them (norms,
embeddings, `modules_to_save`, DoRA magnitudes, expert parameters) has no linear layer whose input and output gradient
give its sample gradient, so a model that trains it is refused rather than scored on part of its gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

_OUTSIDE = "parameters outside the adapter; freeze them with `requires_grad_(False)`"
_VARIANT_OPTIONS = {"Dora": "DoRA (`use_dora`)", "ALora": "aLoRA (`alora_invocation_tokens`)"}
_OTHER_TASKS = tuple(
    f"For{task}"
    for task in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
)


class UnsupportedModelError(ValueError):
    """The model trains something whose sample gradients SPICE cannot compute."""


def find_lora_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Trainable `lora_A`/`lora_B` layers by their full name, in the order of `model.named_modules()`.

    Call it before the model is wrapped or sharded: `requires_grad` is read from the layers' own parameters.

    Args:
        model (`torch.nn.Module`):
            A PEFT model with a LoRA adapter.

    Returns:
        `dict[str, torch.nn.Linear]`

    Raises:
        UnsupportedModelError: If nothing trains, if anything but plain LoRA linear layers trains, or if a LoRA layer
            is of a variant that calls its matrices in another way (DoRA, activated LoRA, expert parameters, ...).
    """
    _check_predicts_next_tokens(model)
    found: dict[str, nn.Linear] = {}
    refused: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        trainable = [key for key, parameter in module.named_parameters(recurse=False) if parameter.requires_grad]
        if not trainable:
            continue
        is_lora = ".lora_A." in f".{name}" or ".lora_B." in f".{name}"
        if is_lora and isinstance(module, nn.Linear):
            reason = _refuse_layer(model, name)
            if reason is None:
                found[name] = module
            else:
                refused.setdefault(reason, []).append(name)
        else:
            for key in trainable:
                full_name = f"{name}.{key}" if name else key
                refused.setdefault(_refuse_parameter(full_name), []).append(full_name)
    # A model that trains in full, or another kind of adapter, lacks LoRA altogether: that is said below.
    if refused and (found or set(refused) != {_OUTSIDE}):
        lines = "\n".join(
            f"- {reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for reason, names in refused.items()
        )
        raise UnsupportedModelError(
            "SPICE scores samples by the gradients of plain LoRA layers, and cannot compute the sample gradient of "
            f"everything this model trains:\n{lines}\nTrain these without SPICE, or change the adapter as said above."
        )
    if not found:
        num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        state = f"trains {num_trainable:,} parameters but has" if num_trainable else "has no trainable parameter and"
        raise UnsupportedModelError(
            f"The model ({type(model).__name__}) {state} no trainable LoRA layer. SPICE scores samples by their LoRA "
            "gradients: pass `peft_config=LoraConfig(...)` to SFTTrainer, or wrap the model with "
            "`peft.get_peft_model(model, LoraConfig(...))` before building the Trainer. A loaded adapter must be "
            "trainable: `PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    return found


def _check_predicts_next_tokens(model: nn.Module) -> None:
    """Refuses models that were loaded for another task, whose logits say nothing of the next token."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name = type(base).__name__
    get_head = getattr(base, "get_output_embeddings", None)
    is_headless = name.endswith("Model") and "LMHead" not in name and callable(get_head) and get_head() is None
    if is_headless or name.endswith(_OTHER_TASKS):
        raise UnsupportedModelError(
            f"The model is a {name}, which does not predict next tokens. SPICE scores samples by the likelihood of "
            "their label tokens under a causal language model: load it with `AutoModelForCausalLM`."
        )


def _refuse_layer(model: nn.Module, name: str) -> str | None:
    """Why a trainable LoRA linear layer cannot be scored, or `None`."""
    marker = ".lora_A." if ".lora_A." in name else ".lora_B."
    parent_name, adapter = name.rsplit(marker, 1)
    parent = model.get_submodule(parent_name)
    kind = type(parent).__name__
    if kind == "ParamWrapper":
        return "LoRA on expert parameters (`target_parameters`); use `target_modules` only"
    if kind == "MultiheadAttention":
        return "LoRA on `torch.nn.MultiheadAttention`, which merges its weights instead of calling them"
    variants = getattr(parent, "lora_variant", {})
    if adapter in variants:
        variant = type(variants[adapter]).__name__.removesuffix("LinearVariant").removesuffix("Variant")
        return f"the LoRA variant {_VARIANT_OPTIONS.get(variant, variant)}; use plain LoRA"
    if getattr(parent, "use_dora", {}).get(adapter):
        return "the LoRA variant DoRA (`use_dora`); use plain LoRA"
    if getattr(parent, "merged", False):
        return "a merged LoRA adapter; call `model.unmerge_adapter()`"
    return None


def _refuse_parameter(name: str) -> str:
    """Why a trainable parameter that is not of a LoRA linear layer cannot be scored."""
    if "lora_magnitude_vector" in name:
        return "the magnitude of DoRA (`use_dora`); use plain LoRA"
    if "lora_embedding_" in name:
        return "LoRA on an embedding; leave it out of `target_modules`"
    if "trainable_tokens" in name:
        return "trained token embeddings of the LoRA adapter (`trainable_token_indices`); leave them out"
    if "modules_to_save" in name:
        return "modules trained in full beside LoRA (`modules_to_save`); leave them out"
    if "lora_" in name:
        return "LoRA on a layer that is not linear (a convolution, say); leave it out of `target_modules`"
    if name.endswith(".base_layer.bias"):
        return 'biases of the base model (`bias="lora_only"` or `bias="all"`); use `bias="none"`'
    return _OUTSIDE


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes; PEFT's own is (*args, **kwargs), so the base model's tells."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inspect.signature(base.forward).parameters
