"""`nn.Linear`, from what went in and the gradient of what came out.

    y = W x + b,    δ_ns = ∂(Σ_n ℓ_n)/∂y_ns,    ∂ℓ_n/∂W = Σ_s δ_ns x_nsᵀ,    ∂ℓ_n/∂b = Σ_s δ_ns

Axes: N samples, S tokens, I/O input and output features, D_l = O·I, plus O where the bias trains (PEFT's `lora_bias`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import ScoredLayer, register_layer

# CUDA's product of 16-bit numbers with a result in float32, of newer torch.
_HAS_WIDE_BMM = "dtype" in torch.ops.aten.bmm.overloads()


@register_layer(nn.Linear)
class LinearLayer(ScoredLayer):
    """Weight first (row-major O×I), then the bias if it trains."""

    module: nn.Linear

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
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

    def check_input(self, inputs: Tensor, num_samples: int) -> None:
        """Takes (N, S, I) alone."""
        if inputs.dim() != 3 or inputs.shape[0] != num_samples:
            raise RuntimeError(
                f"The LoRA layer {self.name!r} was fed a tensor of shape {tuple(inputs.shape)} where "
                f"({num_samples} samples, tokens, features) was expected, so its gradient cannot be told "
                "apart by sample. This happens in mixture-of-experts layers, which flatten the batch. Leave this "
                "layer out of `target_modules`."
            )

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
