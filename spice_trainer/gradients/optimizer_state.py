"""Where a sampler looks into the optimizer that trains its model: the state of the LoRA layers.

Two settings read it: `gradient_preconditioning` Adam's second moment (module `preconditioning`), and
`conflict_reference="momentum"` the mean of past gradients (module `momentum`). Both read it when they score, as a
Trainer makes its optimizer after everything else, and restores its state later still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.gradients.layers import trainable_bias


@dataclass(frozen=True)
class LayerState:
    """What an optimizer keeps of one layer.

    Args:
        group (`Mapping[str, Any]`): Settings of the parameter group that the layer's weight is in.
        parameters (`Sequence[Mapping[str, Any]]`): State of its weight and, if that trains, of its bias; empty before
            the first update.
    """

    group: Mapping[str, Any]
    parameters: Sequence[Mapping[str, Any]]

    def flat(self, name: str) -> Tensor | None:
        """Returns a tensor that is kept by coordinate, of shape (D_l,): weight first (row-major), then bias.

        Args:
            name (`str`): What the optimizer calls it.

        Returns:
            `torch.Tensor`, *optional*: `None` where nothing is kept yet.
        """
        if not all(isinstance(state.get(name), Tensor) for state in self.parameters):
            return None
        return torch.cat([state[name].detach().flatten() for state in self.parameters])


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer within Accelerate's wrapper."""
    while not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD) and hasattr(
        optimizer, "optimizer"
    ):
        optimizer = optimizer.optimizer
    return optimizer


def layer_states(optimizer: Any, modules: Mapping[str, nn.Linear], *, setting: str) -> list[LayerState]:
    """Looks up some layers.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, unwrapped.
        modules (`Mapping[str, torch.nn.Linear]`): The layers.
        setting (`str`): The setting that asks, with its value, for the message.

    Returns:
        `list[LayerState]`: In the layers' order.

    Raises:
        ValueError: If the optimizer has not been given a layer's weights.
    """
    groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    found = []
    for name, module in modules.items():
        weights = [module.weight, module.bias] if trainable_bias(module) else [module.weight]
        if not all(id(weight) in groups for weight in weights):
            raise ValueError(
                f"SpiceConfig: {setting} needs the optimizer's state of the LoRA layer {name!r}, and "
                f"{type(optimizer).__name__} does not train it. Fix: give the optimizer all trainable weights of the "
                f"model that scores, or leave {setting.partition('=')[0]} out."
            )
        found.append(LayerState(groups[id(module.weight)], [optimizer.state.get(weight) or {} for weight in weights]))
    return found
