"""Finds the trainable LoRA layers of a model, chooses those to score by, and refuses by name what cannot be scored.

A sample gradient of the paper is taken with respect to the trainable LoRA weights. What trains beside them (norms,
embeddings, `modules_to_save`, DoRA magnitudes, expert parameters) is of no kind of layer whose sample gradient is
known, so a model that trains it is refused rather than scored on part of its gradient.

Gradients of the last layers need no backward below them, and gradients of fewer modules need fewer products:

    model.layers.27.self_attn.q_proj.lora_A.default
                 └ layer            └ what `scoring_target_modules` names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from spice_trainer.gradients.forward import base_model
from spice_trainer.gradients.layers.registry import layer_kind

_OUTSIDE = "parameters outside the adapter; freeze them with `requires_grad_(False)`"
# By a part of a parameter's name, the first that fits.
_REFUSED_PARAMETERS = {
    "lora_magnitude_vector": "the magnitude of DoRA (`use_dora`); use plain LoRA",
    "lora_embedding_": "LoRA on an embedding; leave it out of `target_modules`",
    "trainable_tokens": "trained token embeddings of the LoRA adapter (`trainable_token_indices`); leave them out",
    "modules_to_save": "modules trained in full beside LoRA (`modules_to_save`); leave them out",
    "lora_": "LoRA on a layer that is not linear (a convolution, say); leave it out of `target_modules`",
    ".base_layer.bias": 'biases of the base model (`bias="lora_only"` or `bias="all"`); use `bias="none"`',
}
_VARIANT_OPTIONS = {"Dora": "DoRA (`use_dora`)", "ALora": "aLoRA (`alora_invocation_tokens`)"}
_OTHER_TASKS = tuple(
    f"For{task}"
    for task in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
)
_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_ADAPTER = re.compile(r"\.lora_[AB](?:\.|$)")
_LORA_LAYER = re.compile(r"(?:^|\.)lora_[AB]\.([^.]+)")
# Names listed in an error.
_MAX_LISTED = 8


class UnsupportedModelError(ValueError):
    """The model trains something whose sample gradients SPICE cannot compute."""


def find_lora_modules(
    model: nn.Module,
    named: Mapping[str, nn.Module] | None = None,
    trains: Callable[[Tensor], bool] = lambda parameter: parameter.requires_grad,
) -> dict[str, nn.Module]:
    """Trainable `lora_A`/`lora_B` layers by their full name, in the order of `model.named_modules()`.

    A model that was wrapped or sharded comes with its modules as they were `named` before. Raises an
    UnsupportedModelError if nothing trains, if anything but plain LoRA layers of a known kind trains, or if a LoRA
    layer is of a variant that calls its matrices in another way (DoRA, activated LoRA, expert parameters, ...).
    """
    check_predicts_next_tokens(model)
    named = dict(model.named_modules()) if named is None else named
    found: dict[str, nn.Module] = {}
    refused: dict[str, list[str]] = {}
    for name, module in named.items():
        trainable = [key for key, parameter in module.named_parameters(recurse=False) if trains(parameter)]
        if not trainable:
            continue
        is_lora = ".lora_A." in f".{name}" or ".lora_B." in f".{name}"
        if is_lora and layer_kind(module) is not None:
            reason = _refuse_layer(named, name, trainable)
            if reason is None:
                wrapper = named[split_adapter(name)[0]]
                if layer_kind(wrapper) is None:
                    found[name] = module
                # The matrices of expert parameters are scored together, by the first one's name.
                elif wrapper not in found.values():
                    found[name] = wrapper
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


def check_predicts_next_tokens(model: nn.Module) -> None:
    """Refuses models that were loaded for another task, whose logits say nothing of the next token."""
    base = base_model(model)
    name = type(base).__name__
    get_head = getattr(base, "get_output_embeddings", None)
    is_headless = name.endswith("Model") and "LMHead" not in name and callable(get_head) and get_head() is None
    if is_headless or name.endswith(_OTHER_TASKS):
        raise UnsupportedModelError(
            f"The model is a {name}, which does not predict next tokens. SPICE scores samples by the likelihood of "
            "their label tokens under a causal language model: load it with `AutoModelForCausalLM`."
        )


def _refuse_layer(named: Mapping[str, nn.Module], name: str, trainable: Sequence[str]) -> str | None:
    """Why a LoRA linear layer, of which these parameters train, cannot be scored, or `None`."""
    parent_name, adapter = split_adapter(name)
    parent = named[parent_name]
    if type(parent).__name__ == "MultiheadAttention":
        return "LoRA on `torch.nn.MultiheadAttention`, which merges its weights instead of calling them"
    variants = getattr(parent, "lora_variant", {})
    if adapter in variants:
        variant = type(variants[adapter]).__name__.removesuffix("LinearVariant").removesuffix("Variant")
        return f"the LoRA variant {_VARIANT_OPTIONS.get(variant, variant)}; use plain LoRA"
    if getattr(parent, "use_dora", {}).get(adapter):
        return "the LoRA variant DoRA (`use_dora`); use plain LoRA"
    if getattr(parent, "merged", False):
        return "a merged LoRA adapter; call `model.unmerge_adapter()`"
    if "weight" not in trainable:
        return "a LoRA bias whose layer's weight is frozen (`lora_bias`); freeze both or neither"
    return None


def why_switched_off(model: nn.Module, modules: Iterable[nn.Module]) -> str | None:
    """Why an adapter with one of these LoRA matrices does not act in a forward, and the fix; `None` if all do."""
    wanted = set(map(id, modules))
    for parent in model.modules():
        adapters = {
            adapter
            for matrices in (getattr(parent, "lora_A", None), getattr(parent, "lora_B", None))
            if isinstance(matrices, nn.ModuleDict)
            for adapter, matrix in matrices.items()
            if id(matrix) in wanted
        }
        if not adapters and id(parent) not in wanted:
            continue
        if getattr(parent, "merged", False):
            return "The adapter is merged into the base model: unmerge the adapter, `model.unmerge_adapter()`."
        if getattr(parent, "disable_adapters", False):
            return "The adapter is disabled: `model.base_model.enable_adapter_layers()`."
        inactive = sorted(adapters - set(getattr(parent, "active_adapters", adapters)))
        if inactive:
            return f"The adapter {inactive[0]!r} is not the active one: `model.set_adapter({inactive[0]!r})`."
    return None


def _refuse_parameter(name: str) -> str:
    """Why a trainable parameter that is not of a LoRA layer of a known kind cannot be scored."""
    return next((reason for part, reason in _REFUSED_PARAMETERS.items() if part in name), _OUTSIDE)


def choose_modules(
    modules: Mapping[str, nn.Module],
    *,
    layers: int | None = None,
    target_modules: Sequence[str] | None = None,
    names: Collection[str] = (),
) -> dict[str, nn.Module]:
    """The LoRA layers that candidates are scored by, in the order of `modules`.

    `layers` keeps those of the last so many of the model's layers that train; `target_modules` those whose adapted
    module has one of these names, or a name that ends with one of them. Raises a ValueError if a name fits none of
    `names`, which may be frozen (by default those of `modules`), nothing is left, or the layers have no numbers.
    """
    chosen = dict(modules)
    if layers is not None:
        numbers = {name: _layer_number(name) for name in chosen}
        without = [name for name, number in numbers.items() if number is None]
        if without:
            raise ValueError(
                f"SpiceConfig: scoring_layers={layers} cannot be told from the names of this model's LoRA layers: "
                f"{without[0]!r} has no layer number. Fix: name modules instead (scoring_target_modules), or leave "
                "scoring_layers out."
            )
        last = sorted({number for number in numbers.values() if number is not None})[-layers:]
        chosen = {name: module for name, module in chosen.items() if numbers[name] in last}
    if target_modules is not None:
        for target in target_modules:
            if not any(_is_named(name, target) for name in names or modules):
                raise ValueError(
                    f"SpiceConfig: scoring_target_modules has {target!r}, which is the name of none of the modules "
                    f"that LoRA adapts. Fix: use names among {_listed(modules)}."
                )
        chosen = {name: m for name, m in chosen.items() if any(_is_named(name, target) for target in target_modules)}
        if not chosen:
            where = "trains" if layers is None else "lies in these layers"
            raise ValueError(
                f"SpiceConfig: scoring_target_modules={list(target_modules)} with scoring_layers={layers}: no module "
                f"of these names {where}. Fix: raise scoring_layers, or name other modules."
            )
    return chosen


def split_adapter(name: str) -> tuple[str, str]:
    """The layer of PEFT's that a LoRA layer belongs to, and its adapter; an empty one for any other layer."""
    found = _LORA_LAYER.search(name)
    return (name, "") if found is None else (name[: found.start()], found[1])


def _adapted_module(name: str) -> str:
    """The name of the module that a LoRA layer adapts."""
    adapted = _ADAPTER.split(name)[0]
    while adapted.endswith(".base_layer"):
        # Several parameters of a module have a wrapper each, one within the other.
        adapted = adapted.removesuffix(".base_layer")
    return adapted


def _layer_number(name: str) -> int | None:
    # The first number: that of an expert or a stage within the layer comes behind it.
    found = _LAYER_NUMBER.search(_adapted_module(name) + ".")
    return int(found.group(1)) if found else None


def _is_named(name: str, target: str) -> bool:
    adapted = _adapted_module(name)
    return adapted == target or adapted.endswith("." + target)


def _listed(modules: Mapping[str, nn.Module]) -> str:
    names = list(dict.fromkeys(_adapted_module(name).rpartition(".")[2] for name in modules))
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(repr(name) for name in names[:_MAX_LISTED]) + more
