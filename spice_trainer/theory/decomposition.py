"""The ε-decomposition: what a candidate would add alone, less what the picks already say of it.

    Δ(x|S) = Δ(x|∅) − ε(x|S)        Δ(x|∅) = log1p(α K_xx)
    ε(x|S) = −log(1 − α K_xx ρ²(x|S) / (1 + α K_xx)) >= 0
    ρ²(x|S) = α K_xS (I + α K_SS)⁻¹ K_Sx / K_xx
    F(S)   = Σ_k Δ(s_k|∅) − Σ_k ε(s_k | s_1 ... s_k−1)

The paper's text was not at hand; this is the statement proved here. Proof: the Schur complement of I + α K_SS in
I + α K_{S∪x} is 1 + α K_xx (1 − ρ²), and Δ(x|S) is its logarithm; divide it by 1 + α K_xx. The sum telescopes.

ρ(x|S), the overlap, is in [0, 1): on the picks' span α G_S (I + α K_SS)⁻¹ G_Sᵀ has an eigenvalue α μ / (1 + α μ) < 1
for every eigenvalue μ of K_SS. It is the cosine between g_x and the picks' span, strong directions of it counting in
full and weak ones less. So ε >= 0 (which is submodularity), and ε = 0 only at right angles to all picks.

F does not change if a gradient changes its sign, and conflict does: ε cannot be a function of conflict. Where that
matters, the statistics built on this come with the sign and without.

Axes: N candidates, K picked, P pairs of a step and a candidate not yet picked then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from spice_trainer.selection.checks import check_alpha, check_choice, check_gram, sound_rows
from spice_trainer.selection.cholesky import FLOAT64_LIMIT
from spice_trainer.selection.conflict import mean_cosines
from spice_trainer.selection.greedy import GramReference
from spice_trainer.selection.information import ExactInformation


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The picks of a pool, and every candidate beside every non-empty beginning of them.

    Pairs (S, x): S the first 1 to K − 1 picks, x each sound candidate that is not among them. They are what a greedy
    pass chooses from after its first pick, in the order of S and then of the pool.

    Args:
        indices (`tuple[int, ...]`): The picks in order, positions in the pool.
        fisher_alpha (`float`): α.
        gains (`tuple[float, ...]`): Δ of each pick when it was picked.
        base_gains (`tuple[float, ...]`): Δ(x|∅) of each pick.
        epsilons (`tuple[float, ...]`): ε of each pick when it was picked.
        largest_norm (`float`): G_max, the largest norm of a sound gradient; 0 without any.
        identity_residual (`float`, *optional*): Largest |Δ(x|∅) − ε(x|S) − Δ(x|S)| over pairs and picks, ε from the
            formula above and Δ(x|S) from the greedy pass's incremental factor. `None` above α K_xx = 1e8, where the
            formula cancels in float64 and ε is the difference of the gains instead.
        pair_picks (`Tensor`): |S| of each pair, shape (P,).
        pair_candidates (`Tensor`): x of each pair, shape (P,).
        pair_base_gains (`Tensor`): Δ(x|∅), shape (P,).
        pair_gains (`Tensor`): Δ(x|S), shape (P,).
        pair_epsilons (`Tensor`): ε(x|S), shape (P,).
        pair_cosines (`Tensor`): Cosine of g_x with the reference's mean gradient, shape (P,). Conflict is its negative
            part.
        pair_overlaps (`Tensor`): ρ(x|S), shape (P,).
        pair_epsilon_ceilings (`Tensor`): The most that ε can be by [`check_bounds`]'s "coherence", shape (P,).
        pair_epsilon_floors (`Tensor`): The least that ε can be by its "mean_floor", shape (P,).
    """

    indices: tuple[int, ...]
    fisher_alpha: float
    gains: tuple[float, ...]
    base_gains: tuple[float, ...]
    epsilons: tuple[float, ...]
    largest_norm: float
    identity_residual: float | None
    pair_picks: Int64[Tensor, " P"]
    pair_candidates: Int64[Tensor, " P"]
    pair_base_gains: Float64[Tensor, " P"]
    pair_gains: Float64[Tensor, " P"]
    pair_epsilons: Float64[Tensor, " P"]
    pair_cosines: Float64[Tensor, " P"]
    pair_overlaps: Float64[Tensor, " P"]
    pair_epsilon_ceilings: Float64[Tensor, " P"]
    pair_epsilon_floors: Float64[Tensor, " P"]

    @property
    def pair_conflicts(self) -> Float64[Tensor, " P"]:
        """c(x|S) = max(0, −cos) of each pair, shape (P,)."""
        # Adding 0 turns -0.0 into 0.0.
        return (-self.pair_cosines).clamp(0.0, 1.0) + 0.0

    @property
    def information(self) -> float:
        """F of the picks: the sum of their gains."""
        return sum(self.gains)


def decompose(
    gram: Float[Tensor, "N N"],
    indices: Sequence[int],
    *,
    fisher_alpha: float = 1.0,
    conflict_reference: GramReference = "selected",
) -> Decomposition:
    """Decomposes the gains of picks, and of what could have been picked, on a pool's Gram matrix.

    `gram` is K of any floating dtype; rows with a non-finite or zero diagonal take no part. `indices` are distinct
    sound rows in the order of picking, however they were chosen. Cosines are with the mean gradient of the picks
    ("selected"), of the sound candidates not yet picked ("candidates") or of all of those ("pool").
    """
    check_alpha(fisher_alpha)
    check_choice("conflict_reference", conflict_reference, GramReference)
    gram = check_gram(gram)
    picks = _check_picks(gram, indices)
    sound = sound_rows(gram)
    gram = torch.where(sound[:, None] & sound, gram, 0.0)
    sizes = fisher_alpha * gram.diagonal()
    base = torch.log1p(sizes)
    direct = float(sizes.max()) <= FLOAT64_LIMIT

    measure = ExactInformation(gram, fisher_alpha=fisher_alpha)
    remaining = sound.clone()
    gains, epsilons, residuals, columns = [], [], [0.0], []
    for order, pick in enumerate(picks):
        current = measure.gains()
        explained, epsilon = _explain(fisher_alpha * gram, picks[:order], current, direct=direct)
        residuals.append(float((base - epsilon - current)[remaining].abs().max()))
        gains.append(measure.add(pick))
        epsilons.append(float(epsilon[pick]))
        if order > 0:
            rows: Tensor = remaining.nonzero().flatten()
            members = {
                "selected": picks[:order],
                "candidates": rows.tolist(),
                "pool": sound.nonzero().flatten().tolist(),
            }
            ceilings, floors = _bound_epsilons(gram, picks[:order], fisher_alpha)
            values = (
                base,
                current,
                epsilon,
                mean_cosines(gram, members[conflict_reference]),
                (explained / sizes).clamp(0.0, 1.0).sqrt(),
                ceilings,
                floors,
            )
            columns.append((torch.full_like(rows, order), rows, *(value[rows] for value in values)))
        remaining[pick] = False

    integers, numbers = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    columns = columns or [(integers, integers, *[numbers] * 7)]
    return Decomposition(
        picks,
        fisher_alpha,
        tuple(gains),
        tuple(base[list(picks)].tolist()),
        tuple(epsilons),
        float(gram.diagonal().max().sqrt()),
        max(residuals) if direct else None,
        *(torch.cat(parts) for parts in zip(*columns, strict=True)),
    )


def _check_picks(gram: Float64[Tensor, "N N"], indices: Sequence[int]) -> tuple[int, ...]:
    picks = tuple(int(index) for index in indices)
    if len(set(picks)) != len(picks) or not all(0 <= pick < gram.shape[0] for pick in picks):
        raise ValueError(
            f"The picks must be distinct positions in the pool of {gram.shape[0]} candidates, got {list(picks)}. "
            "Dataset rows are no positions: look them up in the pool's `candidates`."
        )
    sound = sound_rows(gram)
    for pick in picks:
        if not sound[pick]:
            raise ValueError(
                f"Candidate {pick} is among the picks, but its row of the Gram matrix is zero or not finite, and such "
                "a row is never picked. The picks may belong to another pool, or to the same pool at other weights."
            )
    return picks


def _explain(
    scaled: Float64[Tensor, "N N"], picks: Sequence[int], gains: Float64[Tensor, " N"], *, direct: bool
) -> tuple[Float64[Tensor, " N"], Float64[Tensor, " N"]]:
    """α K_xx ρ²(x|S) and ε(x|S) of every candidate."""
    sizes = scaled.diagonal()
    chosen = list(picks)
    if not chosen:
        return torch.zeros_like(sizes), torch.zeros_like(sizes)
    if not direct:
        return (sizes - torch.expm1(gains)).clamp_min(0.0), (torch.log1p(sizes) - gains).clamp_min(0.0)
    factor = torch.linalg.cholesky(torch.eye(len(chosen), dtype=torch.float64) + scaled[chosen][:, chosen])
    explained = torch.linalg.solve_triangular(factor, scaled[chosen], upper=False).square().sum(dim=0)
    # Rounding in K must not explain more of a gradient than there is of it.
    explained = torch.minimum(explained, sizes)
    return explained, -torch.log1p(-explained / (1.0 + sizes))


def _bound_epsilons(
    gram: Float64[Tensor, "N N"], picks: Sequence[int], alpha: float
) -> tuple[Float64[Tensor, " N"], Float64[Tensor, " N"]]:
    """What the coherence with a pick lets every candidate's ε be at most, and the picks' mean makes it at least."""
    chosen = list(picks)
    squares = gram.diagonal()
    sizes = alpha * squares
    cosines = gram[:, chosen] / squares.sqrt()[:, None] / squares[chosen].sqrt()
    coherences = cosines.abs().amax(dim=1).clamp_max(1.0)
    most = alpha * len(chosen) * coherences.square() * sizes * float(squares[chosen].max())

    products = gram[:, chosen].mean(dim=1)
    mean_square = float(gram[chosen][:, chosen].mean())
    least = alpha * products.square() / (max(mean_square, 0.0) + 1.0 / (alpha * len(chosen)))
    ceilings, floors = (-torch.log1p(-torch.minimum(share, sizes) / (1.0 + sizes)) for share in (most, least))
    return ceilings, floors
