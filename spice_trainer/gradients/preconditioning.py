r"""Sample gradients as Adam would apply them: divided by the root of its second moment.

    P(g) = g / (√v̂⁺ + ε),      v̂⁺ = (β₂ v + (1 − β₂) g²) / (1 − β₂^(t+1))

with v Adam's second moment after its t updates, by coordinate. It is the step that Adam would take on this sample
alone without momentum (β₁ = 0), but for the learning rate: samples are compared by what they would do to the weights.
LESS takes the momentum in as well, which is the same for all samples. The sample's own g² is in v̂⁺, as there: without
it a coordinate that has had no gradient yet (all of LoRA's A in the first update) would count a hundred million times.
Before the first update P(g) is the signs of g.

Axes: N samples, D_l gradient coordinates of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.optimizer_state import LayerState, layer_states, unwrap_optimizer

SETTING = "gradient_preconditioning='adam'"


@dataclass(frozen=True)
class SecondMoment:
    """What Adam remembers of one layer's squared gradients.

    Args:
        values (`torch.Tensor` of shape `(D_l,)`, *optional*): v, weight first (row-major), then bias. `None` before
            the first update.
        num_updates (`int`): t.
        decay (`float`): β₂.
        epsilon (`float`): ε.
    """

    values: Float[Tensor, " D_l"] | None
    num_updates: int
    decay: float
    epsilon: float


def precondition_(gradients: Float[Tensor, "N D_l"], moment: SecondMoment) -> Float[Tensor, "N D_l"]:
    """Preconditions one layer's sample gradients, in place.

    Args:
        gradients (`torch.Tensor` of shape `(N, D_l)`): Raw gradients. Overwritten. Where one is not finite, neither is
            what comes of it.
        moment ([`SecondMoment`]): Adam's, of this layer.

    Returns:
        `torch.Tensor`: `gradients`.
    """
    root = gradients * math.sqrt(1.0 - moment.decay)
    if moment.values is None:
        root.abs_()
    else:
        # A hypotenuse rather than a root of squares: gradients of 1e-30 would vanish, and of 1e+30 overflow.
        torch.hypot(root, moment.values.to(root).mul(moment.decay).sqrt_(), out=root)
    root /= math.sqrt(1.0 - moment.decay ** (moment.num_updates + 1))
    root += moment.epsilon
    if moment.epsilon == 0.0:
        root.masked_fill_(root == 0, 1.0)
    return gradients.div_(root)


class AdamMoments:
    """Reads the second moments of LoRA layers from the optimizer that trains them.

    Args:
        get_optimizer (`Callable[[], torch.optim.Optimizer]`): Gives the optimizer at the moment of scoring.
        modules (`Mapping[str, torch.nn.Linear]`): The layers.
    """

    def __init__(self, get_optimizer: Callable[[], Any], modules: Mapping[str, nn.Linear]) -> None:
        self.get_optimizer = get_optimizer
        self.modules = modules

    def read(self) -> list[SecondMoment]:
        """The moments of now, in the layers' order.

        Raises:
            ValueError: If the optimizer is no Adam, or has not been given a layer's weights.
        """
        optimizer = unwrap_optimizer(self.get_optimizer())
        check_adam(optimizer)
        return [_read(state) for state in layer_states(optimizer, self.modules, setting=SETTING)]


def check_adam(optimizer: Any) -> None:
    """Refuses what keeps no second moment, or another than PyTorch's Adam.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, unwrapped.

    Raises:
        ValueError: With the reason.
    """
    given = f"SpiceConfig: {SETTING} divides gradients by the optimizer's second moment"
    if optimizer is None:
        raise ValueError(
            f"{given}, and there is no optimizer. Fix: pass `optimizer=` to SpiceSampler.bind, or leave "
            "gradient_preconditioning out."
        )
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"{given}, and {type(optimizer).__name__} is not PyTorch's Adam or AdamW: it keeps none, or in a form of "
            "its own (8 bits, factors). Fix: set optim='adamw_torch_fused' or 'adamw_torch', or leave "
            "gradient_preconditioning out."
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError(
            f"{given}, and with amsgrad=True {type(optimizer).__name__} divides by the largest one so far instead. "
            "Fix: set amsgrad=False, or leave gradient_preconditioning out."
        )


def _read(state: LayerState) -> SecondMoment:
    decay, epsilon = float(state.group["betas"][1]), float(state.group["eps"])
    values = state.flat("exp_avg_sq")
    num_updates = 0 if values is None else int(state.parameters[0]["step"])
    return SecondMoment(values, num_updates, decay, epsilon)
