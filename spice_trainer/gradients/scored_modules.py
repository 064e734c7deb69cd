"""Which of the trainable LoRA layers candidates are scored by: all, those of the last layers, or those of some names.

    model.layers.27.self_attn.q_proj.lora_A.default
                 └ layer            └ what `scoring_target_modules` names

Gradients of the last layers need no backward below them, and gradients of fewer modules need fewer products.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_ADAPTER = re.compile(r"\.lora_[AB](?:\.|$)")
# Names listed in an error.
_MAX_LISTED = 8


def choose_modules(
    modules: Mapping[str, nn.Linear], *, layers: int | None = None, target_modules: Sequence[str] | None = None
) -> dict[str, nn.Linear]:
    """Chooses the LoRA layers that candidates are scored by.

    Args:
        modules (`Mapping[str, torch.nn.Linear]`): All trainable ones by name, from
            [`find_lora_modules`].
        layers (`int`, *optional*): Those of the last so many of the model's layers that train.
        target_modules (`Sequence[str]`, *optional*): Those whose adapted module has one of these names, or a name that
            ends with one of them.

    Returns:
        `dict[str, torch.nn.Linear]`: In the order of `modules`.

    Raises:
        ValueError: If a name fits none, names and layers have none in common, or the layers have no numbers.
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
            if not any(_is_named(name, target) for name in modules):
                raise ValueError(
                    f"SpiceConfig: scoring_target_modules has {target!r}, which is the name of none of the modules "
                    f"that LoRA adapts. Fix: use names among {_listed(modules)}."
                )
        chosen = {name: m for name, m in chosen.items() if any(_is_named(name, target) for target in target_modules)}
        if not chosen:
            raise ValueError(
                f"SpiceConfig: scoring_target_modules={list(target_modules)} with scoring_layers={layers}: no module "
                "of these names lies in these layers. Fix: raise scoring_layers, or name other modules."
            )
    return chosen


def _adapted_module(name: str) -> str:
    """The name of the module that a LoRA layer adapts."""
    return _ADAPTER.split(name)[0]


def _layer_number(name: str) -> int | None:
    # The first number: that of an expert or a stage within the layer comes behind it.
    found = _LAYER_NUMBER.search(_adapted_module(name) + ".")
    return int(found.group(1)) if found else None


def _is_named(name: str, target: str) -> bool:
    adapted = _adapted_module(name)
    return adapted == target or adapted.endswith("." + target)


def _listed(modules: Mapping[str, nn.Linear]) -> str:
    names = list(dict.fromkeys(_adapted_module(name).rpartition(".")[2] for name in modules))
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(repr(name) for name in names[:_MAX_LISTED]) + more
