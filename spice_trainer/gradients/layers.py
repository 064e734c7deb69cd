"""The sample gradient of one linear layer, from what went in and the gradient of what came out.

    y = W x + b,    δ_ns = ∂(Σ_n ℓ_n)/∂y_ns,    ∂ℓ_n/∂W = Σ_s δ_ns x_nsᵀ,    ∂ℓ_n/∂b = Σ_s δ_ns

Axes: N samples, S tokens, I/O input and output features, D_l gradient coordinates of the layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

# CUDA's product of 16-bit numbers with a result in float32, of newer torch.
_HAS_WIDE_BMM = "dtype" in torch.ops.aten.bmm.overloads()


def module_gradients(
    inputs: Float[Tensor, "N S I"], output_gradients: Float[Tensor, "N S O"], *, bias: bool = False
) -> Float[Tensor, "N D_l"]:
    """Sample gradients of one linear layer, weight first (row-major O×I), then bias.

    Args:
        inputs (`torch.Tensor` of shape `(N, S, I)`):
            The layer's input x.
        output_gradients (`torch.Tensor` of shape `(N, S, O)`):
            Gradient δ of the summed losses with respect to the layer's output.
        bias (`bool`, *optional*, defaults to `False`):
            Whether the layer's bias is trainable too.

    Returns:
        `torch.Tensor` of shape `(N, O·I)`, or `(N, O·I + O)` with a bias, in float32.
    """
    # float32 products whatever the training precision: a Gram matrix of rounded gradients would not be one. An
    # autocast around the backward reaches the hooks too, and would round the product to bfloat16.
    with torch.autocast(inputs.device.type, enabled=False):
        weight = _float32_bmm(output_gradients.transpose(1, 2), inputs).flatten(1)
        return torch.cat([weight, output_gradients.sum(1, dtype=torch.float32)], dim=1) if bias else weight


def trainable_size(module: nn.Linear) -> int:
    """Number of gradient coordinates of a hooked linear layer, known before any wrapper shards its weight."""
    return module.out_features * (module.in_features + (1 if trainable_bias(module) else 0))


def trainable_bias(module: nn.Linear) -> bool:
    """Whether the layer has a bias that trains (PEFT's `lora_bias=True`)."""
    return module.bias is not None and module.bias.requires_grad


def _float32_bmm(left: Float[Tensor, "N O S"], right: Float[Tensor, "N S I"]) -> Float[Tensor, "N O I"]:
    """Products summed and kept in float32."""
    half = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    if half and _HAS_WIDE_BMM and left.is_cuda:
        # The same numbers, as products of two 16-bit numbers are exact in float32, at the speed of 16-bit products.
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
