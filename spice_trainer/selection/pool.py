"""What was picked, and what the picks look like: from one pool's scores to its selection and its diagnosis.

The strategy picks; for a pool with Gram matrix K and picks S this adds what the records and the log tell beside the
selection: F of the |S| candidates of largest raw gradient norm, their share in S, the picks that λ = 0 would not have
made, and how long the picked answers are beside the pool's. What the strategy did not compute stays unknown.

Axes: N candidates, K picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spice_trainer.config import Information, SpiceConfig
from spice_trainer.scoring.measure import PoolScores
from spice_trainer.scoring.prefilter import WholePool
from spice_trainer.scoring.row_scores import RowScores
from spice_trainer.selection.gram import scaled_alpha
from spice_trainer.selection.greedy import Selection
from spice_trainer.selection.information import InformationMeasure, build_information
from spice_trainer.selection.strategies.inputs import StrategyInputs
from spice_trainer.selection.strategies.registry import select_by_strategy
from spice_trainer.strategy_options import BY_INFORMATION, StrategyName


@dataclass(frozen=True)
class PoolSelection:
    """One pool's picks.

    Args:
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        selection ([`Selection`]): Picks as positions in the pool, in the order of picking.
        gradient_norms (`tuple[float | None, ...]`): Raw gradient norm of each pick, where gradients were computed.
        label_tokens (`tuple[int, ...]`): Label tokens of each pick.
        num_tokens (`tuple[int, ...]`): Tokens of each pick.
        alpha (`float`, *optional*): The α that was used, where there is a Gram matrix.
        information_gains (`tuple[float, ...]`, *optional*): What each pick adds to F, where there is a Gram matrix.
        top_norm (`tuple[int, ...]`, *optional*): Positions of as many candidates of largest raw gradient norm,
            largest first, where gradients were computed.
        top_norm_gains (`tuple[float, ...]`, *optional*): Their gains, added in that order, where there is a Gram
            matrix.
        without_conflict (`tuple[int, ...]`, *optional*): Positions that λ = 0 would have picked, in order, for
            strategies that pick by information.
        tokens_pool (`float`): Mean label tokens of the pool.
        num_tokens_pool (`int`): Tokens of all candidates, what scoring had to read; 0 where the model read nothing.
        nonfinite (`tuple[int, ...]`): Dataset rows whose gradient, or loss, is not finite.
        zero (`tuple[int, ...]`): Dataset rows whose gradient is zero; where none was computed, rows without labels.
        out_of_memory (`tuple[int, ...]`): Dataset rows that did not fit into memory alone, of which nothing is known.
        filtered (`tuple[int, ...]`): Dataset rows that were dropped by their loss, whose gradient is unknown.
    """

    candidates: tuple[int, ...]
    selection: Selection
    gradient_norms: tuple[float | None, ...]
    label_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    alpha: float | None
    information_gains: tuple[float, ...] | None
    top_norm: tuple[int, ...] | None
    top_norm_gains: tuple[float, ...] | None
    without_conflict: tuple[int, ...] | None
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
    def information(self) -> float | None:
        """F of the picks, or `None` without a Gram matrix."""
        return None if math.isnan(self.selection.information) else self.selection.information

    @property
    def information_top_norm(self) -> float | None:
        """F of as many candidates of largest gradient norm, or `None` without a Gram matrix."""
        return None if self.top_norm_gains is None else sum(self.top_norm_gains)

    @property
    def overlap_top_norm(self) -> float | None:
        """Share of the picks among the candidates of largest gradient norm; `None` without picks or norms."""
        picked = self.selection.indices
        return len(set(picked) & set(self.top_norm)) / len(picked) if picked and self.top_norm is not None else None

    @property
    def changed_by_conflict(self) -> int | None:
        """Picks that λ = 0 would not have made, or `None` for strategies that have no λ."""
        if self.without_conflict is None:
            return None
        return len(set(self.selection.indices) - set(self.without_conflict))

    @property
    def tokens_selected(self) -> float | None:
        """Mean label tokens of the picks, or `None` without picks."""
        return sum(self.label_tokens) / len(self.label_tokens) if self.label_tokens else None


def select_pool(
    scores: PoolScores | RowScores,
    num_selected: int,
    config: SpiceConfig,
    *,
    seed: int | None = None,
    step: int | None = None,
) -> PoolSelection:
    """Picks from one scored pool and describes the picks.

    Args:
        scores ([`PoolScores`] or [`RowScores`]): What is known
            of the pool: what the strategy needs.
        num_selected (`int`): Picks at most, K.
        config ([`SpiceConfig`]): The strategy, and for its picks the measure, its α, the conflict penalty and the
            stopping rules.
        seed (`int`, *optional*): Seed of the run, for `random`.
        step (`int`, *optional*): Optimizer updates done before, for `random`.

    Returns:
        [`PoolSelection`]
    """
    alpha, new_measure = None, None
    if isinstance(scores, PoolScores):
        alpha = scaled_alpha(
            scores.gram, scores.finite, fisher_alpha=config.fisher_alpha, alpha_scaling=config.alpha_scaling
        )
        new_measure = _measure_of(scores, alpha, config.information)
    inputs = _inputs_of(scores, seed, step)

    def pick(name: StrategyName) -> Selection:
        by_information = name in BY_INFORMATION
        return select_by_strategy(
            name,
            inputs,
            num_selected,
            fisher_alpha=config.fisher_alpha if alpha is None else alpha,
            conflict_penalty=config.conflict_penalty,
            conflict_reference=config.conflict_reference,
            stop_ratio=config.stop_ratio,
            min_gain=config.min_gain,
            tie_tolerance=config.tie_tolerance,
            measure=new_measure() if by_information and new_measure is not None else None,
        )

    selection = pick(config.strategy)
    if config.strategy == "random":
        unknown = (math.nan,) * len(selection.indices)
        selection = replace(selection, gains=unknown, scores=unknown)
    without_conflict = None
    if config.strategy in BY_INFORMATION:
        has_conflict = config.strategy == "spice" and config.conflict_penalty > 0
        without_conflict = (pick("fisher") if has_conflict else selection).indices
    picked = selection.indices
    norms, top_norm, top_norm_gains, information_gains = scores.gradient_norms, None, None, None
    if norms is not None:
        # A stable sort: candidates of equal norm go by pool position, as ties in the selection do.
        order = torch.argsort(norms.masked_fill(~scores.nonzero, -1.0), descending=True, stable=True)
        top_norm = tuple(order[: len(picked)].tolist())
    if new_measure is not None and top_norm is not None:
        top_norm_gains = _gains_in_order(new_measure(), top_norm)
        is_information = config.strategy in BY_INFORMATION
        information_gains = selection.gains if is_information else _gains_in_order(new_measure(), picked)
    pool = PoolSelection(
        candidates=scores.candidates,
        selection=selection,
        gradient_norms=tuple(None if norms is None else float(norms[position]) for position in picked),
        label_tokens=tuple(scores.label_tokens[position] for position in picked),
        num_tokens=tuple(scores.num_tokens[position] for position in picked),
        alpha=alpha,
        information_gains=information_gains,
        top_norm=top_norm,
        top_norm_gains=top_norm_gains,
        without_conflict=without_conflict,
        tokens_pool=sum(scores.label_tokens) / len(scores.label_tokens),
        num_tokens_pool=sum(scores.num_tokens) - scores.num_dropped_tokens if config.strategy != "random" else 0,
        nonfinite=_rows(scores, ~scores.finite & ~scores.out_of_memory),
        zero=_rows(scores, scores.finite & ~scores.nonzero),
        out_of_memory=_rows(scores, scores.out_of_memory),
    )
    return pool if scores.whole is None else _within(pool, scores.whole)


def _inputs_of(scores: PoolScores | RowScores, seed: int | None, step: int | None) -> StrategyInputs:
    known: dict[str, Any] = {
        "losses": scores.losses,
        "gradient_norms": scores.gradient_norms,
        "label_tokens": scores.label_tokens,
    }
    others: dict[str, Any] = (
        {"gram": scores.gram, "momentum_cosines": scores.momentum_cosines}
        if isinstance(scores, PoolScores)
        else {name: getattr(scores, name) for name in ("losses_without_instruction", "alignment", "reference_norm")}
    )
    return StrategyInputs(sound=scores.nonzero, seed=seed, step=step, pool=scores.pool, **known, **others)


def _measure_of(scores: PoolScores, alpha: float, information: Information) -> Callable[[], InformationMeasure]:
    """Builds measures of the sound candidates with nothing added."""
    sound = scores.nonzero
    gram = scores.gram.masked_fill(~(sound[:, None] & sound), 0.0)

    def new_measure() -> InformationMeasure:
        return build_information(
            information,
            gram=gram,
            gradients=scores.gradients,
            fisher_alpha=alpha,
            row_weights=scores.row_weights,
        )

    return new_measure


def _gains_in_order(measure: InformationMeasure, positions: Sequence[int]) -> tuple[float, ...]:
    """What each candidate adds beside those before it."""
    return tuple(measure.add(position) for position in positions)


def _within(part: PoolSelection, whole: WholePool) -> PoolSelection:
    """The same picks as those of the pool that the scored candidates were left of."""
    places = whole.kept
    picked = replace(part.selection, indices=tuple(places[position] for position in part.selection.indices))
    return replace(
        part,
        candidates=whole.candidates,
        selection=picked,
        top_norm=_places(places, part.top_norm),
        without_conflict=_places(places, part.without_conflict),
        tokens_pool=sum(whole.label_tokens) / len(whole.label_tokens),
        num_tokens_pool=sum(whole.num_tokens),
        nonfinite=_in_pool_order(whole, part.nonfinite, whole.nonfinite),
        zero=_in_pool_order(whole, part.zero, whole.zero),
        out_of_memory=_in_pool_order(whole, part.out_of_memory, whole.out_of_memory),
        filtered=whole.filtered,
    )


def _places(places: Sequence[int], positions: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if positions is None else tuple(places[position] for position in positions)


def _in_pool_order(whole: WholePool, *groups: tuple[int, ...]) -> tuple[int, ...]:
    rows = {row for group in groups for row in group}
    return tuple(row for row in whole.candidates if row in rows)


def _rows(scores: PoolScores | RowScores, mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(scores.candidates[position] for position in mask.nonzero().squeeze(1).tolist())
