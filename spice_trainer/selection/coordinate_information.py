"""Information measures that look at each gradient coordinate alone, and so need the N×D gradients.

    diagonal    F(S) = Σ_j log(1 + α Σ_S g_j²)
    adafisher   Δ(x|S) = log1p(α Σ_j g_xj² / D_j), D_j = 1 + α Σ_S g_j⁴

Both depend on the coordinate basis, so the gradients must not be sketched. As gains never rise, a gain known from an
earlier pick is an upper bound, and only candidates that could still win are evaluated: in float64, a chunk of columns
at a time, so that no float64 copy of the gradients exists.

Axes: N candidates, D gradient dimension, C columns of a chunk.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.selection.checks import check_alpha, check_matrix
from spice_trainer.selection.gram import float64_device

# Columns worked on at a time in float64: 1 MB, small enough for the cache.
_CHUNK_SIZE = 2**17

# Times a chunk is folded in half before its logarithms are taken: 16 times fewer of them.
_NUM_FOLDS = 4

# Relative slack on ‖g‖² summed in float32 over 65,536 columns at a time.
_NORM_CHUNK_SIZE = 2**16
_NORM_SLACK = 1e-3

# Relative slack on a cached gain, so that rounding never makes an upper bound too low.
_BOUND_SLACK = 1e-12


class _CoordinateInformation(ABC):
    """Measures that read the N×D gradients: chunks of columns in float64, gains evaluated only when asked for.

    The gradient of candidate i is `row_weights[i] * gradients[i]`; rows with a non-finite weight or entry have gain 0.
    """

    block_size = 1
    _has_fourth_powers = False

    def __init__(
        self,
        gradients: Float[Tensor, "N D"],
        *,
        fisher_alpha: float,
        row_weights: Float[Tensor, " N"] | None = None,
    ) -> None:
        check_alpha(fisher_alpha)
        check_matrix(gradients, "gradients")
        self.num_candidates, dimension = gradients.shape
        if row_weights is not None and row_weights.shape != (self.num_candidates,):
            raise ValueError(
                f"row_weights must have one entry per row of gradients, shape ({self.num_candidates},), "
                f"got {tuple(row_weights.shape)}."
            )
        weights = torch.ones(self.num_candidates) if row_weights is None else row_weights.to("cpu")
        self._gradients = gradients.detach()
        self._alpha = float(fisher_alpha)
        self._device = float64_device(gradients.device)
        self._columns = [slice(start, start + _CHUNK_SIZE) for start in range(0, dimension, _CHUNK_SIZE)]
        self._inverses = torch.ones(dimension, dtype=torch.float64, device=self._device)
        # Reused for every chunk: fresh memory would cost several times the arithmetic.
        self._scratch = torch.empty(min(dimension, _CHUNK_SIZE), dtype=torch.float64, device=self._device)
        self.information = 0.0

        squared_weights = weights.to(torch.float64).square()
        energies = self._largest_squared_norms() * squared_weights
        sound = torch.isfinite(energies)  # The gain of any other row is 0, and it never changes the denominators.
        self._squared_weights: list[float] = torch.where(sound, squared_weights, 0.0).tolist()
        energies = torch.where(sound, energies, 0.0)
        largest = float(energies.max())
        if not math.isfinite(self._alpha * largest * (largest if self._has_fourth_powers else 1.0)):
            raise ValueError(
                f"fisher_alpha={fisher_alpha:g} with gradients of squared norms up to {largest:.3g} is beyond float64 "
                'for information="diagonal" and "adafisher". Fix: lower fisher_alpha, set alpha_scaling="pool", or '
                'use information="exact", which has no such limit.'
            )
        self._bounds = torch.tensor([self._first_bound(energy) for energy in energies.tolist()], dtype=torch.float64)
        self._current = energies == 0

    def gain_bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns upper bounds on the current gains, and which of them are the gains themselves."""
        bounds = torch.where(self._current, self._bounds, self._bounds * (1.0 + _BOUND_SLACK))
        return bounds, self._current.clone()

    def gains(self, indices: Sequence[int] | None = None) -> Float64[Tensor, " M"]:
        """Returns the current gains of `indices`, or of all candidates. Costs O(D) for each that is not known yet."""
        wanted = list(range(self.num_candidates)) if indices is None else list(indices)
        for index in wanted:
            if not self._current[index]:
                self._bounds[index] = self._gain(index)
                self._current[index] = True
        return self._bounds[wanted]

    def add(self, index: int) -> float:
        """Adds candidate `index` to S and returns the gain it had."""
        gain = float(self.gains([index]))
        if self._squared_weights[index] != 0.0:
            for columns in self._columns:
                inverses = self._inverses[columns]
                inverses.div_(self._increment(self._squares(index, columns)).mul_(inverses).add_(1.0))
        self._current.copy_(self._bounds == 0)  # A gain of 0 stays 0.
        self.information += gain
        return gain

    def _squares(self, index: int, columns: slice) -> Float64[Tensor, " C"]:
        """Returns g_j² of one candidate in one chunk of columns, in the scratch memory that the next call reuses."""
        chunk = self._gradients[index, columns]
        squares = self._scratch[: chunk.shape[0]].copy_(chunk).square_()
        return squares.mul_(self._squared_weights[index])

    def _largest_squared_norms(self) -> Float64[Tensor, " N"]:
        """Returns an upper bound on ‖row‖² of every row, without weights; not finite for a row that is not."""
        dtype = torch.float64 if self._gradients.dtype == torch.float64 else torch.float32
        total = torch.zeros(self._gradients.shape[0], dtype=torch.float64)
        for start in range(0, self._gradients.shape[1], _NORM_CHUNK_SIZE):
            chunk = self._gradients[:, start : start + _NORM_CHUNK_SIZE]
            total += torch.linalg.vector_norm(chunk, dim=1, dtype=dtype).cpu().to(torch.float64).square()
        total *= 1.0 + _NORM_SLACK
        # float32 squares vanish or overflow outside this range; there the slow sum decides.
        for index in (~((total > 1e-30) & (total < 1e36))).nonzero().flatten().tolist():
            chunks = (self._gradients[index, columns] for columns in self._columns)
            total[index] = sum(float(chunk.to(self._device).to(torch.float64).square().sum()) for chunk in chunks)
        return total

    @abstractmethod
    def _first_bound(self, energy: float) -> float:
        """Returns an upper bound on the gain of a row with ‖g‖² = `energy` while S is empty."""

    @abstractmethod
    def _gain(self, index: int) -> float:
        """Returns the current gain of one candidate."""

    @abstractmethod
    def _increment(self, squares: Float64[Tensor, " C"]) -> Float64[Tensor, " C"]:
        """Returns what a pick with g_j² = `squares` adds to the denominators. May overwrite `squares`."""


class DiagonalInformation(_CoordinateInformation):
    """F(S) = Σ_j log(1 + α Σ_S g_j²): the diagonal of the Fisher matrix alone.

        Δ(x|S) = Σ_j log1p(α g_xj² / (1 + α Σ_S g_j²))

    Depends on the coordinate basis.
    """

    def _first_bound(self, energy: float) -> float:
        # Jensen: the sum of D logarithms is largest when α‖g‖² is spread evenly over them.
        dimension = self._gradients.shape[1]
        return dimension * math.log1p(self._alpha * energy / dimension)

    def _gain(self, index: int) -> float:
        total = 0.0
        for columns in self._columns:
            folded = float(_fold(self._ratios(index, columns)).log1p_().sum())
            # A product of 16 large values may overflow.
            total += folded if math.isfinite(folded) else float(self._ratios(index, columns).log1p_().sum())
        return total

    def _ratios(self, index: int, columns: slice) -> Float64[Tensor, " C"]:
        return self._squares(index, columns).mul_(self._inverses[columns]).mul_(self._alpha)

    def _increment(self, squares: Float64[Tensor, " C"]) -> Float64[Tensor, " C"]:
        return squares.mul_(self._alpha)


class AdaFisherInformation(_CoordinateInformation):
    """The measure of the released SPICE code, for parity with published numbers.

        Δ(x|S) = log1p(α Σ_j g_xj² / D_j),   D_j = 1 + α Σ_S g_j⁴

    It is numerically a top-K by gradient norm: gradient entries are far below 1, so their fourth powers leave D_j at 1
    and the gain at log1p(α‖g_x‖²), whatever was picked before. Its `information` is the sum of gains and not a set
    function. Use "exact" or "diagonal" unless parity is what you need.
    """

    _has_fourth_powers = True

    def _first_bound(self, energy: float) -> float:
        return math.log1p(self._alpha * energy)

    def _gain(self, index: int) -> float:
        total = 0.0
        for columns in self._columns:
            total += float(self._squares(index, columns) @ self._inverses[columns])
        return math.log1p(self._alpha * total)

    def _increment(self, squares: Float64[Tensor, " C"]) -> Float64[Tensor, " C"]:
        return squares.square_().mul_(self._alpha)


def _fold(values: Float64[Tensor, " C"]) -> Float64[Tensor, " C16"]:
    """Returns fewer values with the same Σ log1p(v), for v >= 0; overwrites `values`.

    log1p(a) + log1p(b) = log1p(a + b + ab) adds positive terms only, so nothing is lost by folding a chunk in half.
    """
    for _ in range(_NUM_FOLDS):
        half, odd = divmod(values.shape[0], 2)
        if odd:
            break
        first, second = values[:half], values[half:]
        second.addcmul_(first, second)
        values = first.add_(second)
    return values
