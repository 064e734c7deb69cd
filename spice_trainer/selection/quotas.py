"""How many picks each range of answer lengths gets, so that what a rule picks is not told by length alone.

    quota of a bin = K × its share of the reference rows, by largest remainder

The reference are the pool's own candidates, cut into strata of equal size, or rows that the user wants to do well on,
cut at the quantiles of their answer lengths.

Axes: N candidates of a pool, K picked, m reference rows, b bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

# Remainders this near to each other are equal: shares are sums of floating point weights.
_EQUAL = 1e-9


@dataclass(frozen=True, eq=False)
class LengthQuotas:
    """The bin of each candidate, and how many picks each bin gets, K in all."""

    bins: Int64[Tensor, " N"]
    sizes: tuple[int, ...]


class QuotaRoom:
    """Tells a greedy rule among which candidates its next pick may be."""

    def __init__(self, quotas: LengthQuotas | None) -> None:
        self._bins = None if quotas is None else quotas.bins
        self._left = torch.tensor(() if quotas is None else quotas.sizes, dtype=torch.int64)

    def among(self, remaining: Bool[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Those of bins with quota left; where these have no candidate any more, all that remain."""
        if self._bins is None:
            return remaining
        found = remaining & (self._left[self._bins] > 0)
        return found if bool(found.any()) else remaining

    def take(self, index: int) -> None:
        """Takes a pick from its bin's quota."""
        if self._bins is not None:
            self._left[self._bins[index]] -= 1


def quotas_by_pool(
    lengths: Sequence[int], eligible: Bool[Tensor, " N"], num_selected: int, *, num_bins: int
) -> LengthQuotas:
    """Strata of the pool: its candidates that may be picked, by length, in parts of equal size; ties by position."""
    positions: list[int] = eligible.nonzero().flatten().tolist()
    positions.sort(key=lambda position: (lengths[position], position))
    bins = torch.zeros(len(lengths), dtype=torch.int64)
    for place, position in enumerate(positions):
        bins[position] = place * num_bins // len(positions)
    counts = torch.bincount(bins[eligible], minlength=num_bins).to(torch.float64)
    return LengthQuotas(bins, largest_remainders(counts, num_selected))


def quotas_by_reference(
    lengths: Sequence[int],
    reference_lengths: Sequence[int],
    reference_weights: Float64[Tensor, " m"],
    num_selected: int,
    *,
    num_bins: int,
) -> LengthQuotas:
    """Bins at the quantiles of the reference rows' lengths, where a row counts by its weight; a bin has its edge."""
    order = sorted(range(len(reference_lengths)), key=lambda row: reference_lengths[row])
    cumulated = reference_weights[order].cumsum(0) / reference_weights.sum()
    edges = []
    for number in range(1, num_bins):
        place = int((cumulated < number / num_bins - _EQUAL).sum())
        edges.append(reference_lengths[order[min(place, len(order) - 1)]])
    boundaries = torch.tensor(edges, dtype=torch.int64)

    def bins_of(values: Sequence[int]) -> Int64[Tensor, " N"]:
        return torch.bucketize(torch.tensor(list(values), dtype=torch.int64), boundaries)

    shares = torch.zeros(num_bins, dtype=torch.float64)
    shares.index_add_(0, bins_of(reference_lengths), reference_weights.to(torch.float64))
    return LengthQuotas(bins_of(lengths), largest_remainders(shares, num_selected))


def without_quotas(num_candidates: int, num_selected: int) -> LengthQuotas:
    """One bin for all."""
    return LengthQuotas(torch.zeros(num_candidates, dtype=torch.int64), (num_selected,))


def largest_remainders(shares: Float64[Tensor, " b"], total: int) -> tuple[int, ...]:
    """Whole numbers in the proportions of `shares` that sum to `total`; the earlier of two equal remainders first."""
    if not bool((shares > 0).any()):
        return (total, *[0] * (len(shares) - 1))
    exact = shares / shares.sum() * total
    whole = (exact + _EQUAL).floor()
    remainders = ((exact - whole) / _EQUAL).round()
    order = torch.argsort(remainders, descending=True, stable=True)
    whole[order[: total - int(whole.sum())]] += 1
    return tuple(int(number) for number in whole)
