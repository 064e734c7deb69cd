r"""The optimizer's momentum: the direction of the last steps, which a candidate may oppose.

    c(x) = max(0, −cos(g_x, m)),      m = Adam's first moment (`exp_avg`), or SGD's momentum buffer

m is a mean of the gradients that the last steps trained on, with the gradients' own sign. With
`gradient_preconditioning="adam"` it is taken as Adam applies it, m / (√v̂ + ε), v̂ being the second moment at the last
update, as the candidates' gradients then are. m is seen through the same features as they are, exact or sketched; only
its direction counts. Before the first update it is 0, and nothing conflicts.

Axes: D_l gradient coordinates of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.optimizer_state import layer_states, unwrap_optimizer
from spice_trainer.gradients.preconditioning import SecondMoment

SETTING = "conflict_reference='momentum'"


class OptimizerMomentum:
    """Reads the momentum of LoRA layers from the optimizer that trains them.

    Args:
        get_optimizer (`Callable[[], torch.optim.Optimizer]`): Gives the optimizer at the moment of scoring.
        modules (`Mapping[str, torch.nn.Linear]`): The layers.
    """

    def __init__(self, get_optimizer: Callable[[], Any], modules: Mapping[str, nn.Linear]) -> None:
        self.get_optimizer = get_optimizer
        self.modules = modules

    def read(self, moments: Sequence[SecondMoment] | None = None) -> list[Float[Tensor, " D_l"] | None]:
        """The momentum of now.

        Args:
            moments (`Sequence[SecondMoment]`, *optional*): Adam's second moments of the layers, to apply it with.

        Returns:
            `list[torch.Tensor | None]`: Of each layer, weight first (row-major), then bias; `None` before its first
            update.

        Raises:
            ValueError: If the optimizer keeps none, or has not been given a layer's weights.
        """
        optimizer = unwrap_optimizer(self.get_optimizer())
        check_momentum(optimizer)
        name = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
        states = layer_states(optimizer, self.modules, setting=SETTING)
        found = [state.flat(name) for state in states]
        if moments is None:
            return found
        return [_applied(momentum, moment) for momentum, moment in zip(found, moments, strict=True)]


def check_momentum(optimizer: Any) -> None:
    """Refuses optimizers that keep no momentum, or in a form of their own.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, unwrapped.

    Raises:
        ValueError: With the reason.
    """
    given = f"SpiceConfig: {SETTING} holds gradients against the optimizer's momentum"
    if optimizer is None:
        raise ValueError(
            f"{given}, and there is no optimizer. Fix: pass `optimizer=` to SpiceSampler.bind, or leave "
            "conflict_reference out."
        )
    if isinstance(optimizer, torch.optim.SGD):
        if all(group.get("momentum") for group in optimizer.param_groups):
            return
        raise ValueError(
            f"{given}, and SGD with momentum=0 keeps none. Fix: give it a momentum, or leave conflict_reference out."
        )
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"{given}, and {type(optimizer).__name__} is not PyTorch's Adam, AdamW or SGD: it keeps none, or in a "
            "form of its own (8 bits, factors). Fix: set optim='adamw_torch_fused' or 'adamw_torch', or leave "
            "conflict_reference out."
        )


def _applied(momentum: Float[Tensor, " D_l"] | None, moment: SecondMoment) -> Float[Tensor, " D_l"] | None:
    """Divides a momentum as Adam does."""
    if momentum is None or moment.values is None:
        return None
    root = moment.values.to(momentum).sqrt() / math.sqrt(1.0 - moment.decay**moment.num_updates) + moment.epsilon
    # ε may be 0, and where no gradient has come yet so is everything else.
    return momentum / torch.where(root > 0, root, 1.0)
