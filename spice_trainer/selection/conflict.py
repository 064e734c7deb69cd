"""Conflict of a candidate with a direction: how far its gradient points against it.

    c(x) = max(0, −cos(g_x, ḡ)),      cos = g_x·ḡ / (‖g_x‖‖ḡ‖ + 1e-8)

ḡ is the mean gradient of some candidates, and the Gram matrix K has all that it takes; or it is a gradient that is no
mean of candidates (the optimizer's momentum), and its cosines are given.

Axes: N candidates of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float, Float64
from torch import Tensor

_COSINE_EPSILON = 1e-8


def mean_cosines(gram: Float64[Tensor, "N N"], reference: Sequence[int]) -> Float64[Tensor, " N"]:
    """Returns cos(g, ḡ) in [−1, 1], ḡ being the mean of `reference`: at least one row, all finite in K."""
    members = list(reference)
    products = gram[:, members].mean(dim=1)
    mean_norm = products[members].mean().clamp_min(0.0).sqrt()
    return (products / (gram.diagonal().sqrt() * mean_norm + _COSINE_EPSILON)).clamp(-1.0, 1.0)


def conflicts_with_mean(gram: Float64[Tensor, "N N"], reference: Sequence[int]) -> list[float]:
    """Returns every candidate's conflict with the mean gradient of `reference`; 0 where that is empty."""
    return _opposition(mean_cosines(gram, reference)) if reference else [0.0] * gram.shape[0]


def conflicts_of_cosines(cosines: Float[Tensor, " N"], sound: Bool[Tensor, " N"]) -> list[float]:
    """Returns every candidate's conflict with a gradient of given cosines, which unsound candidates need not have."""
    if not isinstance(cosines, Tensor) or not cosines.is_floating_point() or cosines.shape != sound.shape:
        got = f"{cosines.dtype} of shape {tuple(cosines.shape)}" if isinstance(cosines, Tensor) else type(cosines)
        raise ValueError(
            f"reference_cosines must be a floating point torch.Tensor with one cosine for each of the {len(sound)} "
            f"candidates of gram, got {got}."
        )
    cosines = cosines.detach().to("cpu").double()
    if not bool(cosines[sound].isfinite().all()):
        raise ValueError("reference_cosines must be finite for every candidate whose row of gram is.")
    return _opposition(cosines)


def _opposition(cosines: Float64[Tensor, " N"]) -> list[float]:
    # Adding 0 turns -0.0 into 0.0.
    conflicts: list[float] = ((-cosines).clamp(0.0, 1.0) + 0.0).tolist()
    return conflicts
