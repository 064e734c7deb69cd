"""What bounds ε, and what does not: inequalities held against every pair of a step and a candidate.

With ρ the overlap, G_max the largest gradient norm, G_S the picks' largest, k = |S| and ḡ the picks' mean gradient:

    overlap      ε(x|S) <= C ρ²(x|S) G_max²,  C = α                                                     proved
    coherence    ε(x|S) <= −log(1 − min(α² k m² K_xx G_S², α K_xx) / (1 + α K_xx)),  m = max_s |cos(x, s)|    proved
    mean_floor   ε(x|S) >= −log(1 − α (g_x·ḡ)² / (‖ḡ‖² + 1/(α k)) / (1 + α K_xx))                        proved
    conflict     ε(x|S) <= C c(x|S) G_max²                                                              no theorem
    alignment    ε(x|S) <= C |cos(x, ḡ)| G_max²                                                         no theorem

The paper's text was not at hand. "overlap" is the statement in the form of its Theorem 4 (ρ, G_max, C) that is proved
here, and "conflict" the same form with the conflict in ρ's place. Proofs, where q = α K_xx ρ², so that
ε = −log(1 − q / (1 + α K_xx)):

- overlap: −log(1 − t) <= t / (1 − t), which is q / (1 + α K_xx − q) <= q, since q <= α K_xx; and K_xx <= G_max².
- coherence: (I + α K_SS)⁻¹ is at most I, so q <= α² ‖K_xS‖² <= α² k m² K_xx G_S²; and q <= α K_xx.
- mean_floor: q / α = max_β 2 βᵀK_Sx − βᵀ(K_SS + I/α)β, of which β = t (1, ..., 1) / k is a case; the best t gives it.

ρ is at most the cosine between g_x and the picks' span, so "overlap" holds with that cosine too.

No theorem can bound ε by the conflict alone: turning one gradient around changes conflicts but neither F nor ε. A
candidate that agrees with the picks has conflict 0, and the better it agrees the more the picks already say of it; one
at right angles to ḡ may be a copy of a single pick. So the last two are measured, not assumed.

Axes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spice_trainer.theory.decomposition import Decomposition

BoundName = Literal["overlap", "coherence", "mean_floor", "conflict", "alignment"]

# What rounding in K can do to a proved inequality: a share of its larger side, and of the base gain where that is 0.
_ROUNDING = 1e-6
_NOTHING = 1e-12


@dataclass(frozen=True)
class BoundCheck:
    """One inequality over all pairs of a pool.

    Args:
        name (`str`): "overlap", "coherence", "mean_floor", "conflict" or "alignment"; see the module's table.
        proved (`bool`): Whether it holds for every Gram matrix. A violation then means that K is none.
        num_pairs (`int`): Pairs it was held against.
        violation_rate (`float`, *optional*): Share of pairs where it fails by more than 1e-6 of its larger side.
        tightness (`float`, *optional*): Sum of the smaller side over the sum of the larger: 1 says all, 0 nothing. May
            exceed 1 where the inequality fails.
        constant (`float`, *optional*): The smallest C with which it holds for every pair, where it has a C. `None`
            also where none does: a pair with ε > 0 and nothing on the other side.
    """

    name: BoundName
    proved: bool
    num_pairs: int
    violation_rate: float | None
    tightness: float | None
    constant: float | None


def check_bounds(decomposition: Decomposition) -> tuple[BoundCheck, ...]:
    """Holds each inequality of the module's table against every pair, in the table's order."""
    epsilons, base = decomposition.pair_epsilons, decomposition.pair_base_gains
    largest_square = decomposition.largest_norm**2

    def hold(
        name: BoundName, smaller: Tensor, larger: Tensor, *, proved: bool, constant: float | None = None
    ) -> BoundCheck:
        if smaller.numel() == 0:
            return BoundCheck(name, proved, 0, None, None, None)
        violated = smaller > (1.0 + _ROUNDING) * larger + _NOTHING * base
        total = float(larger.sum())
        return BoundCheck(
            name=name,
            proved=proved,
            num_pairs=smaller.numel(),
            violation_rate=float(torch.mean(violated, dtype=torch.float64)),
            tightness=float(smaller.sum()) / total if total > 0 else None,
            constant=constant,
        )

    def hold_with_constant(name: BoundName, shares: Tensor, *, proved: bool) -> BoundCheck:
        statistics = shares * largest_square
        counts = epsilons > _NOTHING * base
        constant = None
        if epsilons.numel() and bool((statistics[counts] > 0).all()):
            constant = float((epsilons[counts] / statistics[counts]).max()) if bool(counts.any()) else 0.0
        return hold(name, epsilons, decomposition.fisher_alpha * statistics, proved=proved, constant=constant)

    return (
        hold_with_constant("overlap", decomposition.pair_overlaps.square(), proved=True),
        hold("coherence", epsilons, decomposition.pair_epsilon_ceilings, proved=True),
        hold("mean_floor", decomposition.pair_epsilon_floors, epsilons, proved=True),
        hold_with_constant("conflict", decomposition.pair_conflicts, proved=False),
        hold_with_constant("alignment", decomposition.pair_cosines.abs(), proved=False),
    )
