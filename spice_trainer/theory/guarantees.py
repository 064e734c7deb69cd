"""How far greedy picks can be from the best ones of their number.

    c = 1 − min_x Δ(x | V∖x) / Δ(x | ∅)        total curvature of the pool V, in [0, 1]
    F(greedy) >= (1 − 1/e) F(best)             F is monotone and submodular
    F(greedy) >= (1 − e^−c) / c · F(best)      with curvature (Conforti and Cornuéjols, 1984)
    F(best)   <= min_t F(S_t) + the K largest Δ(x|S_t)

The paper's text was not at hand; its Theorem 3 and Corollary 1 are taken to be the second and third line, which are
classical. The last line holds for any picks S_1, S_2, ...: F(best) <= F(S_t ∪ best), and what `best` adds to S_t is at
most the sum of what its members add alone, by submodularity. It makes a certificate of the data itself.

The guarantees are of picks by gain alone. With a conflict penalty each pick's gain is at most δ below the largest, and
the usual induction (F(best) − F(S_t) <= K (Δ_t+1 + δ)) gives F(picks) >= (1 − (1 − 1/K)^K) (F(best) − K δ). δ, the
shortfall, is measured; it is at most λ and what the tie tolerance adds.

Axes: N candidates, K picked.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from spice_trainer.selection.checks import check_alpha, check_gram, sound_rows
from spice_trainer.selection.cholesky import FLOAT64_LIMIT
from spice_trainer.selection.information import ExactInformation

GREEDY_RATIO = 1.0 - math.exp(-1.0)

# Subsets whose determinants are computed together.
_BATCH = 4096


@dataclass(frozen=True)
class Guarantees:
    """How far a pool's picks can be from the best ones.

    Args:
        curvature (`float`, *optional*): c of the pool; `None` where no row is sound.
        curvature_ratio (`float`, *optional*): (1 − e^−c) / c, what greedy picks reach at least; never below 1 − 1/e.
        certified_ratio (`float`, *optional*): F(picks) over the upper bound of F(best); `None` without picks.
        shortfall (`float`): δ, the most by which a pick's gain was below the largest gain of its step.
        optimum_ratio (`float`, *optional*): F(picks) / F(best) by trying all subsets, where they are few enough.
    """

    curvature: float | None
    curvature_ratio: float | None
    certified_ratio: float | None
    shortfall: float
    optimum_ratio: float | None


def leave_one_out_gains(gram: Float[Tensor, "N N"], *, fisher_alpha: float = 1.0) -> Float64[Tensor, " N"]:
    """Δ(x | V∖x) of every candidate: what it adds to all others; 0 for rows that cannot be picked.

    Divide and conquer over the same incremental factor as the greedy pass's: half of the candidates are added before
    descending into the other half. O(N³ log N), and as exact as the gains themselves at any scale.
    """
    measure = ExactInformation(gram, fisher_alpha=fisher_alpha)
    gains = torch.zeros(measure.num_candidates, dtype=torch.float64)

    def descend(measure: ExactInformation, rows: list[int]) -> None:
        if len(rows) == 1:
            gains[rows[0]] = measure.gains(rows)[0]
            return
        halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        for inside, outside in (halves, halves[::-1]):
            fuller = copy.deepcopy(measure)
            for row in outside:
                fuller.add(row)
            descend(fuller, inside)

    sound = sound_rows(check_gram(gram)).nonzero().flatten().tolist()
    if sound:
        descend(measure, sound)
    return gains


def total_curvature(gram: Float[Tensor, "N N"], *, fisher_alpha: float = 1.0) -> float | None:
    """The pool's curvature c = 1 − min_x Δ(x | V∖x) / Δ(x | ∅) over the sound rows; `None` where no row is sound.

    In [0, 1]: 0 for gradients at right angles, towards 1 where some row is all but a copy of others.
    """
    alone = ExactInformation(gram, fisher_alpha=fisher_alpha).gains()
    last = leave_one_out_gains(gram, fisher_alpha=fisher_alpha)
    informative = alone > 0
    if not bool(informative.any()):
        return None
    return min(max(1.0 - float((last[informative] / alone[informative]).min()), 0.0), 1.0)


def curvature_ratio(curvature: float) -> float:
    """(1 − e^−c) / c for a curvature c in [0, 1]: 1 for c = 0, 1 − 1/e for c = 1."""
    if not 0.0 <= curvature <= 1.0:
        raise ValueError(f"A total curvature lies in [0, 1], got {curvature}.")
    return -math.expm1(-curvature) / curvature if curvature > 0 else 1.0


def best_subset(
    gram: Float[Tensor, "N N"], num_selected: int, *, fisher_alpha: float = 1.0, max_subsets: int = 20_000
) -> tuple[tuple[int, ...], float] | None:
    """The best subset of `num_selected` sound rows, or of all if those are fewer, and its F, by trying all of them.

    `None` where there are more than `max_subsets`, or where α K_xx passes 1e8 and float64 determinants could not tell
    them apart.
    """
    check_alpha(fisher_alpha)
    gram = check_gram(gram)
    rows = sound_rows(gram).nonzero().flatten().tolist()
    size = min(num_selected, len(rows))
    if size == 0 or math.comb(len(rows), size) > max_subsets:
        return None
    scaled = fisher_alpha * gram
    if float(scaled.diagonal()[rows].max()) > FLOAT64_LIMIT:
        return None
    best: tuple[tuple[int, ...], float] = ((), -math.inf)
    subsets = itertools.combinations(rows, size)
    while batch := list(itertools.islice(subsets, _BATCH)):
        members = torch.tensor(batch)
        matrices = torch.eye(size, dtype=torch.float64) + scaled[members[:, :, None], members[:, None, :]]
        values = torch.linalg.slogdet(matrices)[1]
        place = int(values.argmax())
        if float(values[place]) > best[1]:
            best = batch[place], float(values[place])
    return best


def measure_guarantees(
    gram: Float[Tensor, "N N"], indices: Sequence[int], *, fisher_alpha: float = 1.0, max_subsets: int = 20_000
) -> Guarantees:
    """Measures how far picks, distinct sound rows in order, can be from the best ones of their number."""
    picks = list(indices)
    curvature = total_curvature(gram, fisher_alpha=fisher_alpha)
    measure = ExactInformation(gram, fisher_alpha=fisher_alpha)
    # Those of picks are set to 0, which is what they would add once more to F(best) at most: nothing.
    open_rows = torch.ones(measure.num_candidates, dtype=torch.bool)
    bound, shortfall = math.inf, 0.0
    for place in range(len(picks) + 1):
        gains = measure.gains().masked_fill(~open_rows, 0.0)
        bound = min(bound, measure.information + float(gains.topk(min(len(picks), len(gains))).values.sum()))
        if place < len(picks):
            shortfall = max(shortfall, float(gains.max() - gains[picks[place]]))
            measure.add(picks[place])
            open_rows[picks[place]] = False
    best = best_subset(gram, len(picks), fisher_alpha=fisher_alpha, max_subsets=max_subsets) if picks else None
    return Guarantees(
        curvature=curvature,
        curvature_ratio=None if curvature is None else curvature_ratio(curvature),
        certified_ratio=min(measure.information / bound, 1.0) if picks else None,
        shortfall=shortfall,
        optimum_ratio=None if best is None else min(measure.information / best[1], 1.0),
    )
