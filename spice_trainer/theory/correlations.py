"""Whether conflict goes with low gain and with large ε, candidate by candidate.

Spearman's rank correlation over the candidates of each step, then the mean over the steps, so that gains falling from
step to step make no correlation. Beside conflict (with the sign of the cosine, and clipped at 0) stands |cos|, which F
cannot tell from it: where |cos| goes with ε and conflict does not, it is overlap that costs information, not conflict.

Axes: P pairs of a step and a candidate, M candidates of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spice_trainer.theory.decay import GROUP_NAMES, GroupName
from spice_trainer.theory.decomposition import Decomposition
from spice_trainer.utils.statistics import all_equal, spearman


@dataclass(frozen=True)
class ConflictCorrelations:
    """Spearman correlations over a pool's candidates, each the mean over the steps that have one.

    Args:
        num_steps (`int`): Steps with something picked before them and candidates left.
        num_steps_with_conflict (`int`): Those of them where candidates differ in their conflict.
        conflict_gain (`float`, *optional*): Of c(x|S) with Δ(x|S). Clipped at 0, so agreeing candidates are all tied.
        conflict_epsilon (`float`, *optional*): Of c(x|S) with ε(x|S).
        opposition_gain (`float`, *optional*): Of −cos with Δ(x|S): conflict before it is clipped.
        opposition_epsilon (`float`, *optional*): Of −cos with ε(x|S).
        alignment_epsilon (`float`, *optional*): Of |cos| with ε(x|S).
        conflict_loss (`float`, *optional*): Of c(x|S) with ε(x|S) / Δ(x|∅), in which norms matter less.
        alignment_loss (`float`, *optional*): Of |cos| with ε(x|S) / Δ(x|∅).
    """

    num_steps: int
    num_steps_with_conflict: int
    conflict_gain: float | None
    conflict_epsilon: float | None
    opposition_gain: float | None
    opposition_epsilon: float | None
    alignment_epsilon: float | None
    conflict_loss: float | None
    alignment_loss: float | None


@dataclass(frozen=True)
class ConflictGroup:
    """A third of a pool's pairs by conflict: means over its `size` pairs.

    `mean_cosine` is with the reference's mean gradient; `mean_decay` is of ε(x|S) / Δ(x|∅), the share of the base gain
    that is lost.
    """

    group: GroupName
    size: int
    mean_conflict: float
    mean_cosine: float
    mean_gain: float
    mean_epsilon: float
    mean_decay: float


def correlate(decomposition: Decomposition) -> ConflictCorrelations:
    """Correlates conflict with gain and ε over the candidates of each step."""
    steps = [decomposition.pair_picks == num_picks for num_picks in decomposition.pair_picks.unique()]
    cosines, conflicts = decomposition.pair_cosines, decomposition.pair_conflicts
    gains, epsilons = decomposition.pair_gains, decomposition.pair_epsilons
    losses = epsilons / decomposition.pair_base_gains

    def mean(first: Tensor, second: Tensor) -> float | None:
        found = [value for step in steps if (value := spearman(first[step], second[step])) is not None]
        return sum(found) / len(found) if found else None

    return ConflictCorrelations(
        num_steps=len(steps),
        num_steps_with_conflict=sum(not all_equal(conflicts[step]) for step in steps),
        conflict_gain=mean(conflicts, gains),
        conflict_epsilon=mean(conflicts, epsilons),
        opposition_gain=mean(-cosines, gains),
        opposition_epsilon=mean(-cosines, epsilons),
        alignment_epsilon=mean(cosines.abs(), epsilons),
        conflict_loss=mean(conflicts, losses),
        alignment_loss=mean(cosines.abs(), losses),
    )


def conflict_groups(decomposition: Decomposition) -> tuple[ConflictGroup, ...]:
    """Puts the pairs in thirds by conflict: low, medium, high; nothing with fewer than 3 pairs.

    Ranked by −cos, whose positive part the conflict is, so that there are thirds also where most conflicts are 0.
    """
    if decomposition.pair_cosines.numel() < 3:
        return ()
    order = torch.argsort(decomposition.pair_cosines, descending=True, stable=True)
    losses = decomposition.pair_epsilons / decomposition.pair_base_gains
    return tuple(
        ConflictGroup(
            group=name,
            size=len(third),
            mean_conflict=float(decomposition.pair_conflicts[third].mean()),
            mean_cosine=float(decomposition.pair_cosines[third].mean()),
            mean_gain=float(decomposition.pair_gains[third].mean()),
            mean_epsilon=float(decomposition.pair_epsilons[third].mean()),
            mean_decay=float(losses[third].mean()),
        )
        for name, third in zip(GROUP_NAMES, order.tensor_split(3), strict=True)
    )
