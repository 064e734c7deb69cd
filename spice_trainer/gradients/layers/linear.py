"""`nn.Linear` and GPT-2's `Conv1D`, from what went in and the gradient of what came out.

    y = W x + b,    δ_ns = ∂(Σ_n ℓ_n)/∂y_ns,    ∂ℓ_n/∂W = Σ_s δ_ns x_nsᵀ,    ∂ℓ_n/∂b = Σ_s δ_ns

`Conv1D` keeps Wᵀ. Axes: N samples, S tokens, I/O input and output features, D_l = O·I, plus O where the bias trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import ScoredLayer, by_sample, holds_only, register_layer, trains

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
# They write x Wᵀ + b out.
_PLAIN = ("FalconLinear",)
# CUDA's product of 16-bit numbers with a result in float32, of newer torch.
_HAS_WIDE_BMM = "dtype" in torch.ops.aten.bmm.overloads()


@register_layer(nn.Linear)
class LinearLayer(ScoredLayer):
    """Weight first (row-major O×I), then the bias, each if it trains."""

    module: nn.Linear

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
        # `layers.0.experts.3.up_proj`, beside `layers.0.fc1`.
        self._is_routed = len(_NUMBERS.findall(name)) > 1
        self._has_bias = module.bias is not None and trains(module.bias)
        # Of what is sharded the flag may be lost.
        self._has_weight = trains(module.weight) or not self._has_bias

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Those with no more than a weight and a bias, and no forward of their own that may do anything."""
        is_plain = type(module).forward is nn.Linear.forward or type(module).__name__ in _PLAIN
        return holds_only(module, "weight", "bias") and (is_plain or not isinstance(module, nn.Linear))

    @property
    def parameters(self) -> Sequence[Tensor]:
        """W and b, each if it trains."""
        found = [self.module.weight] if self._has_weight else []
        return [*found, self.module.bias] if self._has_bias else found

    @property
    def _weight_shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def _num_outputs(self) -> int:
        return self.module.out_features

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(O, I) and (O,), each if it trains."""
        found: list[tuple[int, ...]] = [self._weight_shape] if self._has_weight else []
        return [*found, (self._num_outputs,)] if self._has_bias else found

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_tokens: int) -> Tensor | None:
        """The input (N, S, I): of any input where N is 1, of (N·S, I) but for one of several like layers."""
        # An expert gets the tokens that are routed to it, in any order, which by chance may be as many as there are.
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        return by_sample(inputs.detach(), num_samples, num_tokens, may_be_flat=not self._is_routed)

    def sample_gradients(
        self,
        inputs: Float[Tensor, "N S I"],
        output_gradients: Float[Tensor, "N S O"],
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "N _"]:
        """Σ_s δ_ns x_nsᵀ, then Σ_s δ_ns."""
        left, right = self._factors(inputs, output_gradients)
        size = math.prod(self._weight_shape) if self._has_weight else 0
        stop = self.num_coordinates if stop is None else stop
        parts = []
        # float32 products whatever the training precision: a Gram matrix of rounded gradients would not be one. An
        # autocast around the backward reaches the hooks too, and would round the product to bfloat16.
        with torch.autocast(inputs.device.type, enabled=False):
            if start < size:
                rows = slice(start // right.shape[2], min(stop, size) // right.shape[2])
                parts.append(_float32_bmm(left[:, :, rows].transpose(1, 2), right).flatten(1))
            if stop > size:
                parts.append(output_gradients.sum(1, dtype=torch.float32)[:, max(start - size, 0) : stop - size])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _factors(self, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """What makes the weight's rows, and its columns."""
        return output_gradients, inputs

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """V x, or V x + v."""
        weight, bias = self._split(inputs, parameters)
        return nn.functional.linear(inputs, weight, bias)

    def _split(self, inputs: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        weight = parameters[0] if self._has_weight else inputs.new_zeros(self._weight_shape)
        return weight, parameters[-1] if self._has_bias else None


@register_layer("transformers.pytorch_utils.Conv1D")
class TransposedLinearLayer(LinearLayer):
    """The same with a weight of I×O."""

    module: Any

    @property
    def _weight_shape(self) -> tuple[int, int]:
        return self.module.nx, self.module.nf

    @property
    def _num_outputs(self) -> int:
        return int(self.module.nf)

    def _factors(self, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, output_gradients

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Vᵀ x, or Vᵀ x + v."""
        weight, bias = self._split(inputs, parameters)
        return nn.functional.linear(inputs, weight.T, bias)


def _float32_bmm(left: Float[Tensor, "N O S"], right: Float[Tensor, "N S I"]) -> Float[Tensor, "N O I"]:
    """Products summed and kept in float32."""
    half = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    if half and _HAS_WIDE_BMM and left.is_cuda:
        # The same numbers, as products of two 16-bit numbers are exact in float32, at the speed of 16-bit products.
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
