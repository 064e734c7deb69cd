"""What was picked, and what the picks look like: from one pool's scores to its selection and its diagnosis.

The strategy picks; for a pool with Gram matrix K and picks S this adds what the records and the log tell beside the
selection: F of the |S| candidates of largest raw gradient norm, their share in S, the picks that λ = 0 would not have
made, and how long the picked answers are beside the pool's. What the strategy did not compute stays unknown.

Axes: N candidates, K picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from spice_trainer.config import BY_INFORMATION, Information, SpiceConfig, StrategyName
from spice_trainer.scoring.measure import PoolScores
from spice_trainer.scoring.prefilter import WholePool
from spice_trainer.scoring.row_scores import RowScores
from spice_trainer.selection.gram import scaled_alpha
from spice_trainer.selection.information import InformationMeasure, build_information
from spice_trainer.selection.results import PoolSelection, Selection
from spice_trainer.selection.strategies.inputs import StrategyInputs
from spice_trainer.selection.strategies.registry import select_by_strategy

T = TypeVar("T")


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


def round_down_picks(pools: Sequence[PoolSelection], num_slots: int, *, step: int) -> list[PoolSelection]:
    """Rounds a step's picks down to a multiple of its micro-batches, for losses that need equal ones.

    The schedule's budgets are multiples already; only rows that could not be picked make this necessary. The longest
    pool loses its last pick first, the later one of two as long.

    Args:
        pools (`Sequence[PoolSelection]`): The step's pools.
        num_slots (`int`): World size × gradient accumulation steps.
        step (`int`): For the message.

    Returns:
        `list[PoolSelection]`

    Raises:
        RuntimeError: If there are fewer picks than slots.
    """
    rounded = list(pools)
    num_picks = sum(len(pool.indices) for pool in rounded)
    if num_picks < num_slots:
        raise too_few_picks(step, num_slots)
    for _ in range(num_picks % num_slots):
        longest = max(range(len(rounded)), key=lambda position: (len(rounded[position].indices), position))
        rounded[longest] = _drop_last_pick(rounded[longest])
    return rounded


def too_few_picks(step: int, num_slots: int) -> RuntimeError:
    """The error of a step with fewer picks than micro-batches, where a filler would not be neutral."""
    return RuntimeError(
        f"SPICE could pick too few samples for step {step}: this model's loss is a mean per micro-batch (it does not "
        f"use `num_items_in_batch`), so each of the {num_slots} micro-batches of a step needs at least one. Lower "
        "`gradient_accumulation_steps`, or look for rows whose gradients are zero or not finite."
    )


def _drop_last_pick(pool: PoolSelection) -> PoolSelection:
    # Whatever the strategy, a selection of K − 1 is the first K − 1 picks of one of K, so nothing is computed anew.
    selection = pool.selection
    kept = len(selection.indices) - 1

    def keep(values: tuple[T, ...] | None) -> tuple[T, ...] | None:
        return None if values is None else values[:kept]

    gains = keep(pool.information_gains)
    shorter = replace(
        selection,
        indices=selection.indices[:kept],
        gains=selection.gains[:kept],
        conflicts=selection.conflicts[:kept],
        scores=selection.scores[:kept],
        information=math.nan if gains is None else sum(gains),
    )
    return replace(
        pool,
        selection=shorter,
        gradient_norms=pool.gradient_norms[:kept],
        label_tokens=pool.label_tokens[:kept],
        num_tokens=pool.num_tokens[:kept],
        information_gains=gains,
        top_norm=keep(pool.top_norm),
        top_norm_gains=keep(pool.top_norm_gains),
        without_conflict=keep(pool.without_conflict),
    )
