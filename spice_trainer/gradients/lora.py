"""Finds the modules of a model that train, and chooses those to score by.

A sample gradient of the paper is taken with respect to the trainable LoRA weights; here it is of everything that
trains (norms, embeddings, `modules_to_save`, DoRA magnitudes, a model in full), or of the LoRA weights alone.

Gradients of the last layers need no backward below them, and gradients of fewer modules need fewer products:

    model.layers.27.self_attn.q_proj.lora_A.default
                 └ layer            └ what `scoring_target_modules` names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from spice_trainer.config import ScoringParameters
from spice_trainer.gradients.forward import base_model
from spice_trainer.gradients.layers.registry import layer_kind

_OTHER_TASKS = tuple(
    f"For{task}"
    for task in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
)
_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
# What PEFT puts below a module that it adapts.
_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|token_adapter)(?:\.|$)")
_LORA_LAYER = re.compile(r"(?:^|\.)lora_[AB]\.([^.]+)")
# Names listed in an error.
_MAX_LISTED = 8


class UnsupportedModelError(ValueError):
    """The model trains nothing, or something that SPICE cannot score by."""


def find_trained_modules(
    model: nn.Module,
    named: Mapping[str, nn.Module] | None = None,
    trains: Callable[[Tensor], bool] = lambda parameter: parameter.requires_grad,
    *,
    scoring_parameters: ScoringParameters = "all",
) -> dict[str, nn.Module]:
    """Modules with parameters of their own that train, by their full name, in the order of `model.named_modules()`.

    With `scoring_parameters="lora"` those of LoRA alone. A model that was wrapped or sharded comes with its modules as
    they were `named` before. Raises an UnsupportedModelError if there are none, or an adapter is merged.
    """
    check_predicts_next_tokens(model)
    _check_keeps_length(model)
    named = dict(model.named_modules()) if named is None else named
    found: dict[str, nn.Module] = {}
    num_others = 0
    for name, module in named.items():
        if not any(trains(parameter) for parameter in module.parameters(recurse=False)):
            continue
        if scoring_parameters == "lora" and not is_lora(name):
            num_others += 1
            continue
        parent: nn.Module = named.get(split_adapter(name)[0]) or module
        if getattr(parent, "merged", False):
            raise UnsupportedModelError(
                f"The LoRA adapter of {split_adapter(name)[0]!r} is merged into the base weights, so that training "
                "it changes nothing. Fix: call `model.unmerge_adapter()`."
            )
        # The matrices of expert parameters are scored together, by the first one's name.
        if parent is module or not layer_kind(parent).owns_children:
            found[name] = module
        elif parent not in found.values():
            found[name] = parent
    if found:
        return found
    if num_others:
        raise UnsupportedModelError(
            f'SpiceConfig: scoring_parameters="lora", and of the {num_others} modules of {type(model).__name__} that '
            'train none is of LoRA. Fix: leave it out (scoring_parameters="all"), or train a LoRA adapter.'
        )
    raise UnsupportedModelError(
        f"The model ({type(model).__name__}) has no trainable parameter, so there is no gradient to score by. Pass "
        "`peft_config=LoraConfig(...)` to SFTTrainer, wrap the model with `peft.get_peft_model(model, "
        "LoraConfig(...))` before building the Trainer, or unfreeze what is to train. A loaded adapter must be "
        "trainable: `PeftModel.from_pretrained(..., is_trainable=True)`."
    )


def is_lora(name: str) -> bool:
    """Whether a module of this name holds weights of LoRA."""
    return ".lora_" in f".{name}"


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
    if name.startswith("Reformer"):
        raise UnsupportedModelError(
            f"The model is a {name}, whose reversible layers go backward in training mode only, where dropout and "
            "random hashes are part of the loss, so that a sample has no gradient of its own. Train another model, "
            "or let another one score: attach_spice(trainer, config, proxy=ProxyModel(...))."
        )


def _check_keeps_length(model: nn.Module) -> None:
    """Refuses PEFT's prompt tuning; prefix tuning, which goes by the cache, leaves rows as they are."""
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False) and adapter.peft_type != "PREFIX_TUNING":  # type: ignore[union-attr]
        raise UnsupportedModelError(
            f"The model trains virtual tokens in front of each row ({type(adapter).__name__}), whose logits stand at "
            "other places than the row's labels: SPICE cannot score that. Fix: train a LoRA adapter (LoraConfig) or "
            "a prefix (PrefixTuningConfig) instead."
        )


def adapter_state(layer: nn.Module, name: str, default: Any) -> Any:
    """A property of PEFT's layers, or the default; models of transformers have methods of the same names."""
    found = getattr(layer, name, default)
    return default if callable(found) else found


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
        if adapter_state(parent, "disable_adapters", False):
            return "The adapter is disabled: `model.base_model.enable_adapter_layers()`."
        inactive = sorted(adapters - set(adapter_state(parent, "active_adapters", adapters)))
        if inactive:
            return f"The adapter {inactive[0]!r} is not the active one: `model.set_adapter({inactive[0]!r})`."
    return None


def choose_modules(
    modules: Mapping[str, nn.Module],
    *,
    layers: int | None = None,
    target_modules: Sequence[str] | None = None,
    names: Collection[str] = (),
) -> dict[str, nn.Module]:
    """The modules that candidates are scored by, in the order of `modules`.

    `layers` keeps those of the last so many of the model's layers that train, and nothing outside of them;
    `target_modules` those whose adapted module has one of these names, or a name that ends with one of them. What
    shares a weight with one that is kept is kept, too. Raises a ValueError if a name fits none of `names`, which may
    be frozen (by default those of `modules`), nothing is left, or the layers have no numbers.
    """
    chosen = dict(modules)
    if layers is not None:
        numbers = {name: _layer_number(name) for name in chosen}
        last = sorted({number for number in numbers.values() if number is not None})[-layers:]
        if not last:
            raise ValueError(
                f"SpiceConfig: scoring_layers={layers} cannot be told from the names of what this model trains: "
                f"{next(iter(numbers))!r} has no layer number. Fix: name modules instead (scoring_target_modules), or "
                "leave scoring_layers out."
            )
        chosen = {name: module for name, module in chosen.items() if numbers[name] in last}
    if target_modules is not None:
        for target in target_modules:
            if not any(_is_named(name, target) for name in names or modules):
                raise ValueError(
                    f"SpiceConfig: scoring_target_modules has {target!r}, which is the name of none of the modules "
                    f"that train. Fix: use names among {_listed(modules)}."
                )
        chosen = {name: m for name, m in chosen.items() if any(_is_named(name, target) for target in target_modules)}
        if not chosen:
            where = "trains" if layers is None else "lies in these layers"
            raise ValueError(
                f"SpiceConfig: scoring_target_modules={list(target_modules)} with scoring_layers={layers}: no module "
                f"of these names {where}. Fix: raise scoring_layers, or name other modules."
            )
    # A weight's gradient is the sum over all modules that use it (tied embeddings).
    weights = {id(weight) for module in chosen.values() for weight in module.parameters(recurse=False)}
    return {
        name: module
        for name, module in modules.items()
        if name in chosen or not weights.isdisjoint(map(id, module.parameters(recurse=False)))
    }


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
