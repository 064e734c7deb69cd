"""Incremental Cholesky factor of I + α K_SS, kept for every candidate x at once.

For picks S in order, with A = α K, the residual of candidate x is what is left of its gradient beside the picks:

    e_x = A_xx − A_xS (I + A_SS)⁻¹ A_Sx          log det(I + A_{S∪x}) − log det(I + A_SS) = log1p(e_x)

Adding pick s appends one column: c_x = (A_xs − Σ_k c_xk c_sk) / √(1 + e_s), then e_x ← e_x − c_x². A pass costs
O(N K²). Keeping e rather than 1 + e keeps gains of 1e-60 exact; since K is positive semi-definite, e_x >= 0 and
(A_xs − Σ_k c_xk c_sk)² <= e_x e_s, and both are enforced so that rounding in K can neither make a gain negative nor
invent one.

The subtraction cancels once α K_xx passes about 1e8 (a second copy of such a row has e = 1). From there the same
recurrence runs in `decimal` with as many digits as the pool's range needs.

Axes: N candidates, K picked.
"""

from __future__ import annotations

import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext

import torch
from jaxtyping import Float64
from torch import Tensor

# Above this α·max K_xx the cancellation in float64 could show in a gain.
FLOAT64_LIMIT = 1e8

# Columns of the factor for which there is room at first.
_WIDTH = 1024

# Digits kept beside those that cancel: 17 for a float64 result, the rest for accumulated rounding.
_GUARD_DIGITS = 40


class Float64Cholesky:
    """The recurrence in float64 for a finite K, right while α·max K_xx <= 1e8."""

    def __init__(self, gram: Float64[Tensor, "N N"], alpha: float) -> None:
        self._gram = gram
        self._alpha = alpha
        self._residuals = alpha * gram.diagonal()
        # As wide as needed, but never by the number of picks that are asked for: BLAS may round otherwise for another
        # width, and the first picks of more must be the same.
        self._factor = torch.empty(len(gram), min(len(gram), _WIDTH), dtype=torch.float64)
        self._num_added = 0

    def gains(self) -> Float64[Tensor, " N"]:
        """Returns log1p(e_x) for every candidate, shape (N,)."""
        return torch.log1p(self._residuals)

    def add(self, index: int) -> None:
        """Appends pick `index`."""
        if self._num_added == self._factor.shape[1]:
            self._factor = torch.cat([self._factor, torch.empty_like(self._factor)], dim=1)
        residual = self._residuals[index]
        previous = self._factor[:, : self._num_added]
        column = self._alpha * self._gram[:, index] - previous @ previous[index]
        bound = self._residuals.sqrt() * residual.sqrt()
        column = torch.minimum(torch.maximum(column, -bound), bound) / (1.0 + residual).sqrt()
        self._factor[:, self._num_added] = column
        self._num_added += 1
        self._residuals = (self._residuals - column.square()).clamp_min(0.0)


class DecimalCholesky:
    """The recurrence in decimal, for a finite K of any scale (gradients of 1e+31 beside 1e-30, copies included)."""

    def __init__(self, gram: Float64[Tensor, "N N"], alpha: float) -> None:
        self._gram = gram
        self._columns: list[list[Decimal]] = []
        with localcontext(_context(_GUARD_DIGITS)):
            trace = sum(map(Decimal, gram.diagonal().tolist()), Decimal(0))
            # A residual is at least A_xx / (1 + trace A): so many digits can cancel, in each of two factors.
            digits = _GUARD_DIGITS + 2 * max(0, (1 + Decimal(alpha) * trace).adjusted() + 1)
        self._context = _context(digits)
        with localcontext(self._context):
            self._alpha = Decimal(alpha)
            self._residuals = [self._alpha * Decimal(value) for value in gram.diagonal().tolist()]

    def gains(self) -> Float64[Tensor, " N"]:
        """Returns log1p(e_x) for every candidate, shape (N,)."""
        return torch.tensor([_log1p(residual) for residual in self._residuals], dtype=torch.float64)

    def add(self, index: int) -> None:
        """Appends pick `index`."""
        with localcontext(self._context):
            residual = self._residuals[index]
            diagonal = (1 + residual).sqrt()
            column = [self._alpha * Decimal(value) for value in self._gram[:, index].tolist()]
            for previous in self._columns:
                factor = previous[index]
                column = [entry - factor * other for entry, other in zip(column, previous, strict=True)]
            for row, entry in enumerate(column):
                largest_square = self._residuals[row] * residual
                if entry * entry > largest_square:
                    entry = largest_square.sqrt().copy_sign(entry)
                entry /= diagonal
                column[row] = entry
                self._residuals[row] = max(self._residuals[row] - entry * entry, Decimal(0))
            self._columns.append(column)


def conditional_factor(gram: Float64[Tensor, "N N"], alpha: float) -> Float64Cholesky | DecimalCholesky:
    """Returns the cheapest factor that is right for this finite K and α, with nothing added yet."""
    if alpha * float(gram.diagonal().max()) <= FLOAT64_LIMIT:
        return Float64Cholesky(gram, alpha)
    return DecimalCholesky(gram, alpha)


def _context(digits: int) -> Context:
    return Context(prec=digits, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


def _log1p(value: Decimal) -> float:
    exponent = value.adjusted() if value else 0
    if exponent < 300:
        return math.log1p(float(value))
    # The 1 is lost beside 1e300, and float(value) could overflow.
    return math.log(float(value.scaleb(-exponent, _context(25)))) + exponent * math.log(10.0)
