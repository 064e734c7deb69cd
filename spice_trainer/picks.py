"""What was picked, and what the picks look like: from one pool's scores to its selection and its diagnosis.

For a pool with Gram matrix K and picks S this adds what the records and the log tell beside the selection: F of the
|S| candidates of largest raw gradient norm, their share in S, the picks that λ = 0 would not have made, and how long
the picked answers are beside the pool's.

Axes: N candidates, K picked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spice_trainer.config import SpiceConfig
from spice_trainer.fisher import InformationMeasure, build_information
from spice_trainer.gram import scaled_alpha
from spice_trainer.pool_scores import PoolScores
from spice_trainer.prefilter import WholePool
from spice_trainer.selection import Selection, greedy


@dataclass(frozen=True)
class PoolSelection:
    """One pool's picks.

    Args:
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        selection ([`~spice_trainer.selection.Selection`]): Picks as positions in the pool, in the order of picking.
        gradient_norms (`tuple[float, ...]`): Raw gradient norm of each pick.
        label_tokens (`tuple[int, ...]`): Label tokens of each pick.
        num_tokens (`tuple[int, ...]`): Tokens of each pick.
        alpha (`float`): The α that was used.
        top_norm (`tuple[int, ...]`): Positions of as many candidates of largest raw gradient norm, largest first.
        top_norm_gains (`tuple[float, ...]`): Their gains, added in that order.
        without_conflict (`tuple[int, ...]`): Positions that λ = 0 would have picked, in order.
        tokens_pool (`float`): Mean label tokens of the pool.
        num_tokens_pool (`int`): Tokens of all candidates, what scoring had to read.
        nonfinite (`tuple[int, ...]`): Dataset rows whose gradient is not finite.
        zero (`tuple[int, ...]`): Dataset rows whose gradient is zero.
        out_of_memory (`tuple[int, ...]`): Dataset rows that did not fit into memory alone, whose gradient is unknown.
        filtered (`tuple[int, ...]`): Dataset rows that were dropped by their loss, whose gradient is unknown.
    """

    candidates: tuple[int, ...]
    selection: Selection
    gradient_norms: tuple[float, ...]
    label_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    alpha: float
    top_norm: tuple[int, ...]
    top_norm_gains: tuple[float, ...]
    without_conflict: tuple[int, ...]
    tokens_pool: float
    num_tokens_pool: int
    nonfinite: tuple[int, ...]
    zero: tuple[int, ...]
    out_of_memory: tuple[int, ...] = ()
    filtered: tuple[int, ...] = ()

    @property
    def indices(self) -> tuple[int, ...]:
        """Dataset rows of the picks, in the order of picking."""
        return tuple(self.candidates[position] for position in self.selection.indices)

    @property
    def information_top_norm(self) -> float:
        """F of as many candidates of largest gradient norm."""
        return sum(self.top_norm_gains)

    @property
    def overlap_top_norm(self) -> float | None:
        """Share of the picks among the candidates of largest gradient norm, or `None` without picks."""
        picked = self.selection.indices
        return len(set(picked) & set(self.top_norm)) / len(picked) if picked else None

    @property
    def changed_by_conflict(self) -> int:
        """Picks that λ = 0 would not have made."""
        return len(set(self.selection.indices) - set(self.without_conflict))

    @property
    def tokens_selected(self) -> float | None:
        """Mean label tokens of the picks, or `None` without picks."""
        return sum(self.label_tokens) / len(self.label_tokens) if self.label_tokens else None


def select_pool(scores: PoolScores, num_selected: int, config: SpiceConfig) -> PoolSelection:
    """Picks from one scored pool and describes the picks.

    Args:
        scores ([`~spice_trainer.scoring.PoolScores`]): The pool's scores.
        num_selected (`int`): Picks at most, K.
        config ([`SpiceConfig`]): The measure, its α, the conflict penalty and the stopping rules.

    Returns:
        [`PoolSelection`]
    """
    alpha = scaled_alpha(
        scores.gram, scores.finite, fisher_alpha=config.fisher_alpha, alpha_scaling=config.alpha_scaling
    )
    gram = scores.gram.clone()
    unsound = ~scores.nonzero
    gram[unsound] = 0.0
    gram[:, unsound] = 0.0

    def measure() -> InformationMeasure:
        return build_information(
            config.information,
            gram=gram,
            gradients=scores.gradients,
            fisher_alpha=alpha,
            row_weights=scores.row_weights,
        )

    def pick(conflict_penalty: float) -> Selection:
        return greedy(
            measure(),
            gram,
            num_selected,
            conflict_penalty=conflict_penalty,
            conflict_reference=config.conflict_reference,
            stop_ratio=config.stop_ratio,
            min_gain=config.min_gain,
            tie_tolerance=config.tie_tolerance,
        )

    selection = pick(config.conflict_penalty)
    without_conflict = pick(0.0) if config.conflict_penalty > 0 else selection
    picked = selection.indices
    norms = scores.gradient_norms.masked_fill(unsound, -1.0)
    # A stable sort: candidates of equal norm go by pool position, as ties in the selection do.
    top_norm = torch.argsort(norms, descending=True, stable=True)[: len(picked)].tolist()
    top_norm_measure = measure()
    pool = PoolSelection(
        candidates=scores.candidates,
        selection=selection,
        gradient_norms=tuple(float(scores.gradient_norms[position]) for position in picked),
        label_tokens=tuple(scores.label_tokens[position] for position in picked),
        num_tokens=tuple(scores.num_tokens[position] for position in picked),
        alpha=alpha,
        top_norm=tuple(top_norm),
        top_norm_gains=tuple(top_norm_measure.add(position) for position in top_norm),
        without_conflict=without_conflict.indices,
        tokens_pool=sum(scores.label_tokens) / len(scores.label_tokens),
        num_tokens_pool=sum(scores.num_tokens),
        nonfinite=_rows(scores, ~scores.finite & ~scores.out_of_memory),
        zero=_rows(scores, scores.finite & ~scores.nonzero),
        out_of_memory=_rows(scores, scores.out_of_memory),
    )
    return pool if scores.whole is None else _within(pool, scores.whole)


def _within(part: PoolSelection, whole: WholePool) -> PoolSelection:
    """The same picks as those of the pool that the scored candidates were left of."""
    places = whole.kept
    picked = replace(part.selection, indices=tuple(places[position] for position in part.selection.indices))
    return replace(
        part,
        candidates=whole.candidates,
        selection=picked,
        top_norm=tuple(places[position] for position in part.top_norm),
        without_conflict=tuple(places[position] for position in part.without_conflict),
        tokens_pool=sum(whole.label_tokens) / len(whole.label_tokens),
        num_tokens_pool=sum(whole.num_tokens),
        nonfinite=_in_pool_order(whole, part.nonfinite, whole.nonfinite),
        zero=_in_pool_order(whole, part.zero, whole.zero),
        out_of_memory=_in_pool_order(whole, part.out_of_memory, whole.out_of_memory),
        filtered=whole.filtered,
    )


def _in_pool_order(whole: WholePool, *groups: tuple[int, ...]) -> tuple[int, ...]:
    rows = {row for group in groups for row in group}
    return tuple(row for row in whole.candidates if row in rows)


def _rows(scores: PoolScores, mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(scores.candidates[position] for position in mask.nonzero().squeeze(1).tolist())
