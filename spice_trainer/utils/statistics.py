"""Spearman's rank correlation of two lists of numbers.

    ρ = cov(rank x, rank y) / (σ(rank x) σ(rank y)),    ties have their mean rank

Axes: M values.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def spearman(
    first: Float64[Tensor, " M"], second: Float64[Tensor, " M"], *, equal_share: float = 1e-12
) -> float | None:
    """Correlates the ranks of M pairs of values; `None` with fewer than 3, or where all of one side are equal.

    Values that all lie within `equal_share` of the largest magnitude are equal but for rounding.
    """
    if first.numel() < 3 or any(all_equal(values, equal_share) for values in (first, second)):
        return None
    one, other = (ranks - ranks.mean() for ranks in (_mean_ranks(first), _mean_ranks(second)))
    return min(max(float(one @ other / ((one @ one) * (other @ other)).sqrt()), -1.0), 1.0)


def all_equal(values: Float64[Tensor, " M"], equal_share: float = 1e-12) -> bool:
    """Whether values lie within a share of the largest magnitude of each other."""
    return values.numel() == 0 or float(values.max() - values.min()) <= equal_share * float(values.abs().max())


def _mean_ranks(values: Float64[Tensor, " M"]) -> Float64[Tensor, " M"]:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    ranks: Tensor = last - (counts - 1) / 2
    return ranks[places]
