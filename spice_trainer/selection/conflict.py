"""Conflict of a candidate with a direction: how far its gradient points against it.

    c(x) = max(0, −cos(g_x, ḡ)),      cos = g_x·ḡ / (‖g_x‖‖ḡ‖ + 1e-8)

ḡ is the mean gradient of some candidates, and the Gram matrix K has all that it takes; or it is a gradient that is no
mean of candidates (the optimizer's momentum), and its cosines are given.

Axes: N candidates of a pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

_COSINE_EPSILON = 1e-8

# A sum from which so much was taken that what is left is smaller than this, beside what it began with, begins anew.
_CANCELLED = 1e-3


def mean_cosines(gram: Float64[Tensor, "N N"], reference: Sequence[int]) -> Float64[Tensor, " N"]:
    """Returns cos(g, ḡ) in [−1, 1], ḡ being the mean of `reference`: at least one row, all finite in K."""
    members = list(reference)
    products = gram[:, members].mean(dim=1)
    mean_norm = products[members].mean().clamp_min(0.0).sqrt()
    return (products / (gram.diagonal().sqrt() * mean_norm + _COSINE_EPSILON)).clamp(-1.0, 1.0)


def conflicts_with_earlier(gram: Float64[Tensor, "K K"]) -> tuple[float, ...]:
    """Returns the conflict of each row of K with the mean of the rows before it; 0 for the first."""
    later = [float(-mean_cosines(gram[: row + 1, : row + 1], range(row))[row]) for row in range(1, gram.shape[0])]
    return tuple(max(0.0, conflict) for conflict in [0.0, *later][: gram.shape[0]])


class MeanConflicts:
    """Every candidate's conflict with the mean gradient of the picks, of what remains, or of the pool, from K.

    Σ_reference K_xs is kept as picks are made.
    """

    def __init__(self, gram: Float64[Tensor, "N N"], reference: str, sound: Bool[Tensor, " N"]) -> None:
        self._gram = gram
        self._reference = reference
        self._members = sound & (reference != "selected")
        self._lengths = gram.diagonal().sqrt()
        self._restart()

    def _restart(self) -> None:
        self._sums = torch.cat([rows[:, self._members].sum(dim=1) for rows in self._gram.split(256)])
        self._length = float(self._lengths[self._members].sum())

    def bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns the current conflicts, all of them known."""
        if self._reference == "candidates" and sums_cancel(self._length, self._lengths, self._members):
            self._restart()
        number = int(self._members.sum())
        products = self._sums / max(number, 1)
        mean_norm = float(products[self._members].mean().clamp_min(0.0).sqrt()) if number else 0.0
        return opposition(products, self._lengths, mean_norm), torch.ones_like(self._members)

    def of(self, indices: Int64[Tensor, " R"]) -> Float64[Tensor, " R"]:
        """Returns the current conflicts of some."""
        return self.bounds()[0][indices]

    def add(self, index: int) -> None:
        """Takes a pick."""
        if self._reference != "pool":
            self._members[index] = self._reference == "selected"
            self._sums += self._gram[:, index] * (1.0 if self._reference == "selected" else -1.0)


class GivenConflicts:
    """Conflicts with a gradient of given cosines, which stay the same, and which unsound candidates need not have."""

    def __init__(self, cosines: Float[Tensor, " N"], sound: Bool[Tensor, " N"]) -> None:
        if not isinstance(cosines, Tensor) or not cosines.is_floating_point() or cosines.shape != sound.shape:
            got = f"{cosines.dtype} of shape {tuple(cosines.shape)}" if isinstance(cosines, Tensor) else type(cosines)
            raise ValueError(
                "reference_cosines must be a floating point torch.Tensor with one cosine for each of the "
                f"{len(sound)} candidates of gram, got {got}."
            )
        cosines = cosines.detach().to("cpu").double()
        if not bool(cosines[sound].isfinite().all()):
            raise ValueError("reference_cosines must be finite for every candidate whose row of gram is.")
        self._conflicts = (-cosines).clamp(0.0, 1.0) + 0.0

    def bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns the conflicts, all of them known."""
        return self._conflicts, torch.ones_like(self._conflicts, dtype=torch.bool)

    def of(self, indices: Int64[Tensor, " R"]) -> Float64[Tensor, " R"]:
        """Returns the conflicts of some."""
        return self._conflicts[indices]

    def add(self, index: int) -> None:
        """Takes a pick, which changes nothing."""


def opposition(
    products: Float64[Tensor, " R"], lengths: Float64[Tensor, " R"], mean_norm: float
) -> Float64[Tensor, " R"]:
    """Returns max(0, −cos(g, ḡ)) from g·ḡ, ‖g‖ and ‖ḡ‖."""
    # Adding 0 turns -0.0 into 0.0.
    return (-(products / (lengths * mean_norm + _COSINE_EPSILON))).clamp(0.0, 1.0) + 0.0


def sums_cancel(length: float, lengths: Float64[Tensor, " N"], members: Bool[Tensor, " N"]) -> bool:
    """Whether rounding of what left a sum could show in what is left of it."""
    return bool(members.any()) and float(lengths[members].sum()) < _CANCELLED * length
