"""How much Fisher information a candidate adds to the samples already picked.

Each measure holds the state of a growing set S and answers with marginal gains Δ(x|S) = F(S ∪ {x}) − F(S):

    exact       F(S) = log det(I + α Σ_S g gᵀ)             from the Gram matrix K alone
    diagonal    F(S) = Σ_j log(1 + α Σ_S g_j²)             from the N×D gradients
    adafisher   Δ(x|S) = log1p(α Σ_j g_xj² / D_j), D_j = 1 + α Σ_S g_j⁴

For all three a gain never rises as S grows.

Axes: N candidates, D gradient dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.config import Information
from spice_trainer.selection.checks import check_alpha, check_choice, check_gram, masked, sound_rows
from spice_trainer.selection.cholesky import conditional_factor
from spice_trainer.selection.coordinate_information import AdaFisherInformation, DiagonalInformation
from spice_trainer.selection.large_pool import GramRows, LargePoolInformation, is_read_in_parts


class InformationMeasure(Protocol):
    """A growing set S of `num_candidates`, F(S) = `information`, and the marginal gain of every candidate."""

    num_candidates: int
    information: float
    block_size: int  # How many gains are asked for at a time.

    def gain_bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns upper bounds on the current gains, and which of them are the gains themselves."""

    def gains(self, indices: Sequence[int] | None = None) -> Float64[Tensor, " M"]:
        """Returns the current gains of `indices`, or of all candidates."""

    def add(self, index: int) -> float:
        """Adds candidate `index` to S and returns the gain it had."""


class ExactInformation:
    """F(S) = log det(I + α Σ_S g gᵀ) from the Gram matrix, by an incremental Cholesky factor in O(N K²) a pass.

        Δ(x|S) = log1p(α (K_xx − α K_xS (I + α K_SS)⁻¹ K_Sx))

    Computed in float64. Rows that cannot be picked (a non-finite or zero diagonal) have gain 0.
    """

    block_size = 1

    def __init__(self, gram: Float[Tensor, "N N"], *, fisher_alpha: float) -> None:
        check_alpha(fisher_alpha)
        gram = check_gram(gram)
        gram = masked(gram, sound_rows(gram))
        self._factor = conditional_factor(gram, fisher_alpha)
        self._gains = self._factor.gains()
        self.num_candidates = len(self._gains)
        self.information = 0.0

    def gain_bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns the current gains, all of them exact."""
        return self._gains, torch.ones_like(self._gains, dtype=torch.bool)

    def gains(self, indices: Sequence[int] | None = None) -> Float64[Tensor, " M"]:
        """Returns the current gains of `indices`, or of all candidates."""
        return self._gains.clone() if indices is None else self._gains[list(indices)]

    def add(self, index: int) -> float:
        """Adds candidate `index` to S and returns the gain it had."""
        gain = float(self._gains[index])
        self._factor.add(index)
        self._gains = self._factor.gains()
        self.information += gain
        return gain


def gains_in_order(new_measure: Callable[[], InformationMeasure], indices: Sequence[int]) -> tuple[float, ...]:
    """Returns what each of some candidates adds to those before it."""
    measure = new_measure()
    if isinstance(measure, LargePoolInformation):
        members = torch.tensor(indices, dtype=torch.int64)
        gram = measure.gram.block(members, members)
        measure, indices = ExactInformation(gram, fisher_alpha=measure.fisher_alpha), range(len(members))
    return tuple(map(measure.add, indices))


def build_information(
    kind: Information,
    *,
    gram: Float[Tensor, "N N"] | GramRows,
    gradients: Float[Tensor, "N D"] | None = None,
    fisher_alpha: float,
    row_weights: Float[Tensor, " N"] | None = None,
) -> InformationMeasure:
    """Builds a measure with nothing added; "diagonal" and "adafisher" read unsketched `gradients` × `row_weights`."""
    check_choice("information", kind, Information)
    if isinstance(gram, GramRows):
        check_alpha(fisher_alpha)
        if kind == "exact" and is_read_in_parts(gram, fisher_alpha):
            return LargePoolInformation(gram, fisher_alpha=fisher_alpha)
        gram = gram.whole
    if kind == "exact":
        return ExactInformation(gram, fisher_alpha=fisher_alpha)
    if gradients is None:
        raise ValueError(
            f'information="{kind}" reads the N×D gradients, because it depends on their coordinates, but gradients is '
            'None. Pass the unsketched gradients, or use information="exact", which needs the Gram matrix alone.'
        )
    if gradients.shape[0] != gram.shape[0]:
        raise ValueError(f"gradients has {gradients.shape[0]} rows but gram is for {gram.shape[0]} candidates.")
    measure = DiagonalInformation if kind == "diagonal" else AdaFisherInformation
    return measure(gradients, fisher_alpha=fisher_alpha, row_weights=row_weights)
