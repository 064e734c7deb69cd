"""`nn.Linear`, from what went in and the gradient of what came out.

    y = W x + b,    δ_ns = ∂(Σ_n ℓ_n)/∂y_ns,    ∂ℓ_n/∂W = Σ_s δ_ns x_nsᵀ,    ∂ℓ_n/∂b = Σ_s δ_ns

Axes: N samples, S tokens, I/O input and output features, D_l = O·I, plus O where the bias trains (PEFT's `lora_bias`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import ScoredLayer, register_layer

_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)")
# CUDA's product of 16-bit numbers with a result in float32, of newer torch.
_HAS_WIDE_BMM = "dtype" in torch.ops.aten.bmm.overloads()


@register_layer(nn.Linear)
class LinearLayer(ScoredLayer):
    """Weight first (row-major O×I), then the bias if it trains."""

    module: nn.Linear

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
        # `layers.0.experts.3.up_proj`, beside `layers.0.fc1`.
        self._is_routed = len(_NUMBERS.findall(name)) > 1
        self._has_bias = module.bias is not None and module.bias.requires_grad

    @property
    def parameters(self) -> Sequence[Tensor]:
        """W, and b if it trains."""
        return [self.module.weight, self.module.bias] if self._has_bias else [self.module.weight]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(O, I), and (O,) if the bias trains."""
        num_outputs = self.module.out_features
        weight = (num_outputs, self.module.in_features)
        return [weight, (num_outputs,)] if self._has_bias else [weight]

    def by_sample(self, inputs: Tensor, num_samples: int, num_tokens: int) -> Tensor | None:
        """(N, S, I): of any input where N is 1, of (N·S, I) but for one of several like layers."""
        if len(inputs) == num_samples and inputs.dim() == 3:
            return inputs
        if num_samples == 1 or (len(inputs) == num_samples and inputs.dim() > 3):
            # Not -1: an expert may get no token at all.
            return inputs.reshape(num_samples, math.prod(inputs.shape[:-1]) // num_samples, inputs.shape[-1])
        # An expert gets the tokens that are routed to it, in any order, which by chance may be as many as there are.
        is_flat = inputs.dim() == 2 and len(inputs) == num_samples * num_tokens
        return inputs.view(num_samples, num_tokens, -1) if is_flat and not self._is_routed else None

    def sample_gradients(
        self, inputs: Float[Tensor, "N S I"], output_gradients: Float[Tensor, "N S O"]
    ) -> Float[Tensor, "N D_l"]:
        """Σ_s δ_ns x_nsᵀ, then Σ_s δ_ns."""
        # float32 products whatever the training precision: a Gram matrix of rounded gradients would not be one. An
        # autocast around the backward reaches the hooks too, and would round the product to bfloat16.
        with torch.autocast(inputs.device.type, enabled=False):
            weight = _float32_bmm(output_gradients.transpose(1, 2), inputs).flatten(1)
            if not self._has_bias:
                return weight
            return torch.cat([weight, output_gradients.sum(1, dtype=torch.float32)], dim=1)

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """V x, or V x + v."""
        return nn.functional.linear(inputs, *parameters)


def _float32_bmm(left: Float[Tensor, "N O S"], right: Float[Tensor, "N S I"]) -> Float[Tensor, "N O I"]:
    """Products summed and kept in float32."""
    half = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    if half and _HAS_WIDE_BMM and left.is_cuda:
        # The same numbers, as products of two 16-bit numbers are exact in float32, at the speed of 16-bit products.
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
