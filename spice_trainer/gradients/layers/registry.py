"""Finds the kind of a layer. Every module of this folder is imported, so that a kind is one file and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from torch import nn

from spice_trainer.gradients import layers
from spice_trainer.gradients.layers.base import LAYER_KINDS, ScoredLayer

for _module in pkgutil.iter_modules(layers.__path__, f"{layers.__name__}."):
    if _module.name != __name__:
        importlib.import_module(_module.name)


def layer_kind(module: nn.Module) -> type[ScoredLayer] | None:
    """The kind of the nearest of the module's classes that has one, or `None`."""
    return next((LAYER_KINDS[cls] for cls in type(module).__mro__ if cls in LAYER_KINDS), None)


def scored_layers(modules: Mapping[str, nn.Module]) -> list[ScoredLayer]:
    """What scores each of these modules, by their full names."""
    found = []
    for name, module in modules.items():
        kind = layer_kind(module)
        if kind is None:
            raise TypeError(f"{name!r} is a {type(module).__name__}, which is no kind of layer that SPICE can score.")
        found.append(kind(name, module))
    return found
