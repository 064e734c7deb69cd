"""Norms, and the magnitude of DoRA: one weight a feature, which the output depends on linearly.

    y = a(x) ⊙ w + b + c(x),    a(x) = y|w=1 − y|w=0,    ∂ℓ_n/∂w = Σ_s δ_ns ⊙ a(x)_ns,    ∂ℓ_n/∂b = Σ_s δ_ns

The layer itself tells a(x), called again with ones and with zeros in the place of its weight: so it does not matter
how it normalises, or whether it multiplies by w or by 1 + w. Axes: N samples, S positions, F features, D_l = F or 2 F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import ScoredLayer, by_sample, holds_only, register_layer, whole_shape

# Their features are not the last axis.
_CHANNELS_FIRST = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@register_layer(nn.LayerNorm, nn.RMSNorm, "peft.tuners.lora.dora.DoraLinearLayer")
class ScaleLayer(ScoredLayer):
    """The weight, then the bias, each if it trains."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        names = [key for key in ("weight", "bias") if getattr(module, key, None) is not None]
        self._names = [key for key in names if getattr(module, key).requires_grad] or names

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Those whose parameters are a weight and a bias of one axis; DoRA's own subclasses return pairs."""
        shapes = {key: whole_shape(module, key) for key in module._parameters if getattr(module, key) is not None}
        is_plain = holds_only(module, "weight", "bias") and all(len(shape) == 1 for shape in shapes.values())
        is_other = type(module).__name__.startswith("Dora") and type(module).__name__ != "DoraLinearLayer"
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
        return None if by_sample(inputs, num_samples, num_tokens) is None else (args, kwargs, num_samples)

    @torch.no_grad()
    def inputs(self, kept: Any) -> Tensor:
        """a(x), or of a bias alone something of no meaning."""
        args, kwargs, num_samples = kept
        first: Tensor = args[0] if args else next(iter(kwargs.values()))
        slope = first if "weight" not in self._names else self._run(1.0, args, kwargs) - self._run(0.0, args, kwargs)
        return slope.reshape(num_samples, -1, slope.shape[-1])

    def _run(self, weight: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's output with another weight, and no bias."""
        attributes = vars(self.module)
        before = dict(attributes)
        # As attributes, which come before parameters: those of sharded models may not be there at this moment. Past
        # the module's hooks, which gather them.
        for key in ("weight", "bias"):
            parameter = getattr(self.module, key, None)
            if isinstance(parameter, Tensor):
                value, shape = weight if key == "weight" else 0.0, whole_shape(self.module, key)
                attributes[key] = torch.full(shape, value, dtype=parameter.dtype, device=parameter.device)
        try:
            output: Tensor = self.module.forward(*args, **kwargs)
        finally:
            for key in ("weight", "bias"):
                attributes.pop(key, None)
                if key in before:
                    attributes[key] = before[key]
        return output

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
