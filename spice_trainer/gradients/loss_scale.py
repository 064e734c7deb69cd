"""A scale of the losses where a forward computes in float16.

    g_n = ∇(s ℓ_n) / s,    s = 2¹⁰,    and s = 1 for a sample whose gradient overflows under 2¹⁰

Activation gradients of a mean over tokens are often below float16's smallest number (6e-8) and would vanish; under the
scale those above 64 would be infinite instead. A training run's own scaler goes down when that happens, and so does
this one, for the samples alone that need it: their batch mates might vanish.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# A power of two, so that multiplying the losses and dividing the gradients rounds nothing.
FLOAT16_LOSS_SCALE = 2.0**10


class LossScale:
    """The scale of one batch's losses, and which samples' gradients overflowed under it."""

    def __init__(self) -> None:
        self.value = 1.0
        self._overflowed: Tensor | None = None

    def start(self, logits: Tensor, *, repeats: bool) -> None:
        """Sets the scale of a backward from what the forward gave, still under its autocast."""
        self.value = FLOAT16_LOSS_SCALE if _computes_in_float16(logits) and not repeats else 1.0
        self._overflowed = None

    def watch(self, output_gradients: Float[Tensor, "N *_"]) -> None:
        """Looks at what reached one layer; waits for nothing."""
        if self.value == 1.0:
            return
        found = ~output_gradients.isfinite().flatten(1).all(1)
        self._overflowed = found if self._overflowed is None else self._overflowed | found.to(self._overflowed.device)

    def overflowed(self, losses: Float[Tensor, "N"]) -> list[int]:
        """Samples whose gradient is not finite although their loss is, so that the scale may be what broke it."""
        if self._overflowed is None:
            return []
        rows: list[int] = (self._overflowed & losses.isfinite().to(self._overflowed.device)).nonzero()[:, 0].tolist()
        return rows


def _computes_in_float16(logits: Tensor) -> bool:
    kind = logits.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return autocast or logits.dtype == torch.float16
