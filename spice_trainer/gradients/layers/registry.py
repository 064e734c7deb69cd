"""Finds the kind of a layer. Every module of this folder is imported, so that a kind is one file and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from weakref import WeakSet

from torch import nn

from spice_trainer.gradients import layers
from spice_trainer.gradients.layers.base import LAYER_KINDS, ScoredLayer
from spice_trainer.gradients.layers.parameters import ParameterLayer
from spice_trainer.gradients.layers.scale import ScaleLayer
from spice_trainer.gradients.layers.tied import TiedLayer

for _module in pkgutil.iter_modules(layers.__path__, f"{layers.__name__}."):
    if _module.name != __name__:
        importlib.import_module(_module.name)

# Modules whose weights are used without calling them, as was found when they were first scored.
_bypassed: WeakSet[nn.Module] = WeakSet()


def layer_kind(module: nn.Module) -> type[ScoredLayer]:
    """The kind of the nearest of the module's classes that has one; of others, norms but by their names, no own."""
    if module in _bypassed:
        return ParameterLayer
    for cls in type(module).__mro__:
        kind = LAYER_KINDS.get(cls) or LAYER_KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None:
            return kind if kind.accepts(module) else ParameterLayer
    is_norm = type(module).__name__.endswith("Norm") and ScaleLayer.accepts(module)
    return ScaleLayer if is_norm else ParameterLayer


def score_by_autograd(modules: Sequence[nn.Module]) -> None:
    """From here on the gradients of these are autograd's own."""
    _bypassed.update(modules)


def scored_layers(modules: Mapping[str, nn.Module]) -> list[ScoredLayer]:
    """What scores these modules, by their full names; those that share a parameter are one layer."""
    groups: list[list[ScoredLayer]] = []
    by_parameter: dict[int, list[ScoredLayer]] = {}
    for name, module in modules.items():
        layer = layer_kind(module)(name, module)
        # Flat or empty parameters of sharded weights are nobody's.
        shared = {id(found): found for weight in layer.parameters if (found := by_parameter.get(id(weight)))}
        group, *others = shared.values() or [[]]
        if not group:
            groups.append(group)
        # One that joins layers which had nothing in common: a tied head with a bias that its parent holds, too.
        for other in others:
            group += other
            groups.remove(other)
        group.append(layer)
        by_parameter.update((id(weight), group) for member in group for weight in member.parameters)
    return [group[0] if len(group) == 1 else _tied(group) for group in groups]


def _tied(group: Sequence[ScoredLayer]) -> ScoredLayer:
    same = all(
        list(map(id, layer.parameters)) == list(map(id, group[0].parameters)) and not layer.takes_autograd
        for layer in group
    )
    if same:
        return TiedLayer(group)
    first, *others = group
    return ParameterLayer(first.name, first.module, others)
