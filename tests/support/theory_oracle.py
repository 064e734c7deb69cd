"""The theory's quantities by definition: determinants in D dimensions, all subsets, plain loops over pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def random_gradients(num_rows: int, dimension: int, *, seed: int, shared: float = 0.6) -> Tensor:
    """Gradients with a common direction and lengths that differ tenfold, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dimension, generator=generator, dtype=torch.float64)
    rows += shared * torch.randn(dimension, generator=generator, dtype=torch.float64)
    lengths = 10 ** (torch.rand(num_rows, 1, generator=generator, dtype=torch.float64) - 0.5)
    return rows * lengths / dimension**0.5


def information(gradients: Tensor, alpha: float, indices: Sequence[int]) -> float:
    """F(S) = log det(I + α Σ_S g gᵀ), D by D."""
    chosen = gradients[list(indices)]
    identity = torch.eye(gradients.shape[1], dtype=torch.float64)
    return float(torch.linalg.slogdet(identity + alpha * chosen.T @ chosen)[1])


def gain(gradients: Tensor, alpha: float, picks: Sequence[int], candidate: int) -> float:
    """Δ(x|S) = F(S ∪ x) − F(S)."""
    return information(gradients, alpha, [*picks, candidate]) - information(gradients, alpha, picks)


def squared_overlap(gradients: Tensor, alpha: float, picks: Sequence[int], candidate: int) -> float:
    """ρ²: the unit gradient's quadratic form with A (I + A)⁻¹, A = α Σ_S g gᵀ."""
    chosen = gradients[list(picks)]
    covered = alpha * chosen.T @ chosen
    direction = gradients[candidate] / gradients[candidate].norm()
    identity = torch.eye(gradients.shape[1], dtype=torch.float64)
    return float(direction @ covered @ torch.linalg.solve(identity + covered, direction))


def squared_span_cosine(gradients: Tensor, picks: Sequence[int], candidate: int) -> float:
    """The squared cosine between a gradient and the span of the picks'."""
    basis = torch.linalg.qr(gradients[list(picks)].T)[0]
    return float((basis.T @ gradients[candidate]).norm() / gradients[candidate].norm()) ** 2


def mean_cosine(gradients: Tensor, reference: Sequence[int], candidate: int) -> float:
    """Cosine of a gradient with the mean of others."""
    mean = gradients[list(reference)].mean(dim=0)
    row = gradients[candidate]
    return float(row @ mean / (row.norm() * mean.norm() + 1e-8))


def pairs(num_candidates: int, picks: Sequence[int]) -> list[tuple[tuple[int, ...], int]]:
    """Every non-empty proper beginning of the picks with every candidate outside it."""
    return [
        (tuple(picks[:size]), candidate)
        for size in range(1, len(picks))
        for candidate in range(num_candidates)
        if candidate not in picks[:size]
    ]


def best_information(gradients: Tensor, alpha: float, size: int) -> float:
    """The largest F of any subset of that size."""
    subsets = itertools.combinations(range(len(gradients)), size)
    return max(information(gradients, alpha, subset) for subset in subsets)


def curvature(gradients: Tensor, alpha: float) -> float:
    """1 − min_x Δ(x | V∖x) / Δ(x | ∅)."""
    everyone = range(len(gradients))
    shares = [
        gain(gradients, alpha, [other for other in everyone if other != x], x) / gain(gradients, alpha, [], x)
        for x in everyone
    ]
    return 1 - min(shares)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, with the rank of a value as the number of smaller ones plus half of those equal to it."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum((other < value) + 0.5 * (other == value) for other in values) for value in values]

    one, other = ranks(first), ranks(second)
    mean = sum(one) / len(one)
    products = sum((a - mean) * (b - mean) for a, b in zip(one, other, strict=True))
    return products / math.sqrt(sum((a - mean) ** 2 for a in one) * sum((b - mean) ** 2 for b in other))
