r"""What a sampler reads from the optimizer that trains its model: Adam's second moment, and the momentum.

`gradient_preconditioning="adam"` takes sample gradients as Adam would apply them, divided by the root of its second
moment:

    P(g) = g / (√v̂⁺ + ε),      v̂⁺ = (β₂ v + (1 − β₂) g²) / (1 − β₂^(t+1))

with v Adam's second moment after its t updates, by coordinate. It is the step that Adam would take on this sample
alone without momentum (β₁ = 0), but for the learning rate: samples are compared by what they would do to the weights.
LESS takes the momentum in as well, which is the same for all samples. The sample's own g² is in v̂⁺, as there: without
it a coordinate that has had no gradient yet (all of LoRA's A in the first update) would count a hundred million times.
Before the first update P(g) is the signs of g.

`conflict_reference="momentum"` asks which candidates oppose the direction of the last steps:

    c(x) = max(0, −cos(g_x, m)),      m = Adam's first moment (`exp_avg`), or SGD's momentum buffer

m is a mean of the gradients that the last steps trained on, with the gradients' own sign. With preconditioning it is
taken as Adam applies it, m / (√v̂ + ε), v̂ being the second moment at the last update, as the candidates' gradients then
are. m is seen through the same features as they are, exact or sketched; only its direction counts. Before the first
update it is 0, and nothing conflicts.

Both are read when candidates are scored, as a Trainer makes its optimizer after everything else, and restores its
state later still. `modules` are those that score, by name, and what is returned is in their order.

Axes: N samples, D_l gradient coordinates of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.layers.registry import scored_layers

PRECONDITIONING_SETTING = "gradient_preconditioning='adam'"
MOMENTUM_SETTING = "conflict_reference='momentum'"


@dataclass(frozen=True)
class LayerState:
    """What an optimizer keeps of one layer: its parameter group's settings, and each parameter's state.

    The states are in the order of the gradient's coordinates, and empty before the first update.
    """

    group: Mapping[str, Any]
    parameters: Sequence[Mapping[str, Any]]

    def flat(self, name: str) -> Float[Tensor, " D_l"] | None:
        """What is kept under this name, by coordinate; `None` where nothing is kept yet."""
        if not all(isinstance(state.get(name), Tensor) for state in self.parameters):
            return None
        parts = [state[name].detach().flatten() for state in self.parameters]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer within Accelerate's wrapper."""
    while not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW | torch.optim.SGD) and hasattr(
        optimizer, "optimizer"
    ):
        optimizer = optimizer.optimizer
    return optimizer


def layer_states(optimizer: Any, modules: Mapping[str, nn.Module], *, setting: str) -> list[LayerState]:
    """Looks layers up in an unwrapped optimizer; `setting`, with its value, is what a ValueError says asked for it."""
    groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    found = []
    for layer in scored_layers(modules):
        weights = layer.parameters
        if not all(id(weight) in groups for weight in weights):
            raise ValueError(
                f"SpiceConfig: {setting} needs the optimizer's state of the LoRA layer {layer.name!r}, and "
                f"{type(optimizer).__name__} does not train it. Fix: give the optimizer all trainable weights of the "
                f"model that scores, or leave {setting.partition('=')[0]} out."
            )
        found.append(LayerState(groups[id(weights[0])], [optimizer.state.get(weight) or {} for weight in weights]))
    return found


def learning_rate_of(optimizer: Any) -> float:
    """The learning rate of an optimizer's next step, of its first parameter group; a `ValueError` without one."""
    if optimizer is None:
        raise ValueError(
            "SpiceConfig: this strategy reads the learning rate, and there is no optimizer. Fix: pass `optimizer=` to "
            "SpiceSampler.bind, or choose another strategy."
        )
    return float(optimizer.param_groups[0]["lr"])


# Preconditioning


@dataclass(frozen=True)
class SecondMoment:
    """What Adam remembers of one layer's squared gradients: v (`None` before the first update), t, β₂ and ε."""

    values: Float[Tensor, " D_l"] | None
    num_updates: int
    decay: float
    epsilon: float

    def at(self, coordinates: slice | Tensor) -> SecondMoment:
        """That of some coordinates."""
        return self if self.values is None else replace(self, values=self.values[coordinates])


def precondition_(gradients: Float[Tensor, "N D_l"], moment: SecondMoment) -> Float[Tensor, "N D_l"]:
    """P(g) of one layer's raw sample gradients, in place. Where one is not finite, neither is what comes of it."""
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


@dataclass(frozen=True)
class AdamMoments:
    """Reads the second moments of layers from the optimizer that `get_optimizer` gives at the moment of scoring."""

    get_optimizer: Callable[[], Any]
    modules: Mapping[str, nn.Module]

    def read(self) -> list[SecondMoment]:
        """The moments of now."""
        optimizer = unwrap_optimizer(self.get_optimizer())
        check_adam(optimizer)
        states = layer_states(optimizer, self.modules, setting=PRECONDITIONING_SETTING)
        return [_second_moment(state) for state in states]


def _second_moment(state: LayerState) -> SecondMoment:
    decay, epsilon = float(state.group["betas"][1]), float(state.group["eps"])
    values = state.flat("exp_avg_sq")
    num_updates = 0 if values is None else int(state.parameters[0]["step"])
    return SecondMoment(values, num_updates, decay, epsilon)


def check_adam(optimizer: Any) -> None:
    """Refuses an unwrapped optimizer that keeps no second moment, or another than PyTorch's Adam."""
    given = f"SpiceConfig: {PRECONDITIONING_SETTING} divides gradients by the optimizer's second moment"
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


# Momentum


@dataclass(frozen=True)
class OptimizerMomentum:
    """Reads the momentum of layers from the optimizer that `get_optimizer` gives at the moment of scoring."""

    get_optimizer: Callable[[], Any]
    modules: Mapping[str, nn.Module]

    def read(self, moments: Sequence[SecondMoment] | None = None) -> list[Float[Tensor, " D_l"] | None]:
        """The momentum of now, applied with Adam's second moments if given; `None` before a layer's first update."""
        optimizer = unwrap_optimizer(self.get_optimizer())
        check_momentum(optimizer)
        name = "momentum_buffer" if isinstance(optimizer, torch.optim.SGD) else "exp_avg"
        states = layer_states(optimizer, self.modules, setting=MOMENTUM_SETTING)
        found = [state.flat(name) for state in states]
        if moments is None:
            return found
        return [_applied(momentum, moment) for momentum, moment in zip(found, moments, strict=True)]


def _applied(momentum: Float[Tensor, " D_l"] | None, moment: SecondMoment) -> Float[Tensor, " D_l"] | None:
    """A momentum divided as Adam does."""
    if momentum is None or moment.values is None:
        return None
    root = moment.values.to(momentum).sqrt() / math.sqrt(1.0 - moment.decay**moment.num_updates) + moment.epsilon
    # ε may be 0, and where no gradient has come yet so is everything else.
    return momentum / torch.where(root > 0, root, 1.0)


def check_momentum(optimizer: Any) -> None:
    """Refuses an unwrapped optimizer that keeps no momentum, or in a form of its own."""
    given = f"SpiceConfig: {MOMENTUM_SETTING} holds gradients against the optimizer's momentum"
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
