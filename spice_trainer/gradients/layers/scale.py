"""Norms, and the magnitude of DoRA: one weight a feature, which the output depends on linearly.

    y = a(x) ⊙ w + b + c(x),    a(x) = y|w=1 − y|w=0,    ∂ℓ_n/∂w = Σ_s δ_ns ⊙ a(x)_ns,    ∂ℓ_n/∂b = Σ_s δ_ns

The layer itself tells a(x), called again with ones and with zeros in the place of its weight: so it does not matter
how it normalises, or whether it multiplies by w or by 1 + w. Axes: N samples, S positions, F features, D_l = F or 2 F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import (
    NotLinearError,
    ScoredLayer,
    by_sample,
    holds_only,
    register_layer,
    stand_ins,
    trains,
    whole_shape,
)

# Their features are not the last axis.
_CHANNELS_FIRST = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_LINEAR_FORWARDS = (nn.LayerNorm.forward, nn.RMSNorm.forward)
# Others, as was found when they were first scored.
_linear: WeakSet[nn.Module] = WeakSet()


def _is_dora(module: nn.Module) -> bool:
    return type(module).__name__ == "DoraLinearLayer"


@register_layer(nn.LayerNorm, nn.RMSNorm, "peft.tuners.lora.dora.DoraLinearLayer")
class ScaleLayer(ScoredLayer):
    """The weight, then the bias, each if it trains."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        names = [key for key in ("weight", "bias") if getattr(module, key, None) is not None]
        self._names = [key for key in names if trains(getattr(module, key))] or names

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Those whose parameters are a weight and a bias of one axis; DoRA's own subclasses return pairs."""
        shapes = {key: whole_shape(module, key) for key in module._parameters if getattr(module, key) is not None}
        is_plain = holds_only(module, "weight", "bias") and all(len(shape) == 1 for shape in shapes.values())
        is_other = type(module).__name__.startswith("Dora") and not _is_dora(module)
        return is_plain and not is_other and not isinstance(module, _CHANNELS_FIRST)

    @property
    def parameters(self) -> Sequence[Tensor]:
        """W and b, each if it trains."""
        return [getattr(self.module, key) for key in self._names]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(F,) each."""
        return [whole_shape(self.module, key) for key in self._names]

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_tokens: int) -> Any:
        """The call itself."""
        args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
        inputs = args[0] if args else next(iter(kwargs.values()))
        if not (type(self.module).forward in _LINEAR_FORWARDS or self.module in _linear or _is_dora(self.module)):
            self._check_linearity(args, kwargs)
        return None if by_sample(inputs, num_samples, num_tokens) is None else (args, kwargs, num_samples)

    @torch.no_grad()
    def inputs(self, kept: Any) -> Tensor:
        """a(x), or of a bias alone something of no meaning."""
        args, kwargs, num_samples = kept
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        slope = first if "weight" not in self._names else self._slope(args, kwargs)
        return slope.reshape(num_samples, -1, slope.shape[-1])

    def _slope(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self._run(args, kwargs, 1.0) - self._run(args, kwargs, 0.0)

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: float | Tensor, bias: float | Tensor = 0.0
    ) -> Tensor:
        """The layer's output with another weight and bias."""
        given, values = {"weight": weight, "bias": bias}, {}
        for key, value in given.items():
            parameter = getattr(self.module, key, None)
            if isinstance(parameter, Tensor):
                made = torch.zeros(whole_shape(self.module, key), dtype=parameter.dtype, device=parameter.device)
                values[key] = made + value
        # Past the module's hooks, which gather what is sharded.
        with stand_ins(self.module, values):
            output: Tensor = self.module.forward(*args, **kwargs)
        return output

    @torch.no_grad()
    def _check_linearity(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tries another weight and bias: one that is a norm by its name alone may do anything with them."""
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        features = torch.arange(*self.shapes[0], device=first.device)
        # Far from the 0 and 1 between which a curve may look straight.
        weight, bias = 2.0 + features % 3, 1.0 + features % 2
        scaled, shifted = self._run(args, kwargs, weight), self._run(args, kwargs, weight, bias)
        has_bias = isinstance(getattr(self.module, "bias", None), Tensor)
        # What is found and expected, and the numbers that it was made of, whose size rounding has.
        trials = (
            (scaled, self._run(args, kwargs, 0.0) + self._slope(args, kwargs) * weight, scaled),
            (shifted - scaled, bias * has_bias + torch.zeros_like(scaled), torch.cat([scaled, shifted])),
        )
        if not scaled.numel() or not scaled.isfinite().all():
            return
        eps = max(torch.finfo(dtype).eps for dtype in (scaled.dtype, first.dtype, self.parameters[0].dtype))
        if not all(
            (found - expected).abs().amax() <= 16 * eps * size.abs().amax() for found, expected, size in trials
        ):
            raise NotLinearError
        _linear.add(self.module)

    def sample_gradients(
        self,
        inputs: Float[Tensor, "N S F"],
        output_gradients: Tensor,
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "N _"]:
        """Σ_s δ_ns ⊙ a(x)_ns, then Σ_s δ_ns."""
        size = self.shapes[0][0]
        deltas = output_gradients.reshape(len(inputs), -1, size).float()
        found = {"weight": lambda: (deltas * inputs.float()).sum(1), "bias": lambda: deltas.sum(1)}
        whole = torch.cat([found[key]() for key in self._names], dim=1)
        return whole[:, start:stop]

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """V ⊙ a(x) + u."""
        given = dict(zip(self._names, parameters, strict=True))
        found = given["weight"] * inputs if "weight" in given else torch.zeros_like(inputs)
        return found + given["bias"] if "bias" in given else found
