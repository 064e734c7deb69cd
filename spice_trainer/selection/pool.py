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
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.selection.gram import scaled_alpha
from spice_trainer.selection.greedy import PickOptions, check_options
from spice_trainer.selection.information import InformationMeasure, build_information, gains_in_order
from spice_trainer.selection.quotas import LengthQuotas, quotas_by_pool, quotas_by_reference, without_quotas
from spice_trainer.selection.results import Pick, PoolSelection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Strategy

T = TypeVar("T")


def select_pool(
    scores: PoolScores,
    num_selected: int,
    config: SpiceConfig,
    *,
    seed: int | None = None,
    step: int | None = None,
    rule: Strategy | None = None,
) -> PoolSelection:
    """Picks from one scored pool and describes the picks; the run's `seed` and `step` are for rules that draw.

    Another `rule` than the settings' picks without quotas.
    """
    scores = replace(scores, seed=seed, step=step)
    quotas = None
    if rule is None:
        rule = cast(Strategy, config.rule)
        quotas = _quotas(scores, num_selected, config, has_own=rule.has_own_quotas)
    alpha: float | None = None
    new_measure: Callable[[], InformationMeasure] | None = None
    if scores.gram is not None:
        alpha = scaled_alpha(
            scores.gram, scores.finite, fisher_alpha=config.fisher_alpha, alpha_scaling=config.alpha_scaling
        )
        new_measure = partial(
            build_information,
            config.information,
            gram=scores.sound_products(),
            gradients=scores.gradients,
            fisher_alpha=alpha,
            row_weights=scores.row_weights,
        )
    options = PickOptions(
        fisher_alpha=config.fisher_alpha if alpha is None else alpha,
        conflict_penalty=config.conflict_penalty,
        conflict_reference=config.conflict_reference,
        stop_ratio=config.stop_ratio,
        min_gain=config.min_gain,
        tie_tolerance=config.tie_tolerance,
        new_measure=new_measure if rule.maximizes_information else None,
        quotas=quotas,
        length_bins=config.length_bins,
    )
    check_options(num_selected, options)
    selection = rule.select(scores, num_selected, options)
    if not rule.has_gains:
        unknown = (math.nan,) * len(selection.indices)
        selection = replace(selection, gains=unknown, scores=unknown)
    without_conflict = None
    if rule.maximizes_information:
        unpenalized = replace(options, conflict_penalty=0.0)
        is_penalized = rule.has_conflict_penalty and config.conflict_penalty > 0
        without_conflict = rule.select(scores, num_selected, unpenalized) if is_penalized else selection
    picked = selection.indices
    norms, top_norm, top_norm_gains, information_gains = scores.gradient_norms, None, None, None
    if norms is not None:
        # A stable sort: candidates of equal norm go by pool position, as ties in the selection do.
        order = torch.argsort(norms.masked_fill(~scores.sound, -1.0), descending=True, stable=True)
        top_norm = tuple(order[: len(picked)].tolist())
    if new_measure is not None and top_norm is not None:
        # What each adds beside those before it.
        top_norm_gains = gains_in_order(new_measure, top_norm)
        information_gains = selection.gains if rule.maximizes_information else gains_in_order(new_measure, picked)
    whole = scores if scores.whole is None else scores.whole
    label_tokens, whole_label_tokens = scores.label_tokens or (), whole.label_tokens or ()
    return PoolSelection(
        candidates=whole.candidates,
        selection=replace(selection, indices=_places(scores, picked)),
        picks=tuple(
            Pick(
                pool=scores.pool or 0,
                order=place,
                index=scores.candidates[position],
                gain=_known(selection.gains[place]),
                conflict=_known(selection.conflicts[place]),
                score=_known(selection.scores[place]),
                gradient_norm=None if norms is None else float(norms[position]),
                label_tokens=label_tokens[position],
                **(vars(scores.references[position]) if scores.references else {}),
            )
            for place, position in enumerate(picked)
        ),
        num_tokens=tuple(scores.num_tokens[position] for position in picked),
        alpha=alpha,
        information_gains=information_gains,
        top_norm=None if top_norm is None else _places(scores, top_norm),
        top_norm_gains=top_norm_gains,
        without_conflict=None if without_conflict is None else _places(scores, without_conflict.indices),
        tokens_pool=sum(whole_label_tokens) / len(whole_label_tokens),
        num_tokens_pool=sum(whole.num_tokens) - whole.num_dropped_tokens if config.takes_model else 0,
        nonfinite=_rows(scores, lambda part: ~part.finite & ~part.out_of_memory),
        zero=_rows(scores, lambda part: part.finite & ~part.sound),
        out_of_memory=_rows(scores, lambda part: part.out_of_memory),
        filtered=_filtered(scores),
    )


def _quotas(scores: PoolScores, num_selected: int, config: SpiceConfig, *, has_own: bool) -> LengthQuotas | None:
    """Picks of each range of answer lengths, where the settings say how; `None` leaves it to the rule."""
    kind, lengths = config.length_quotas, scores.label_tokens or ()
    if kind == "auto" or (kind == "none" and not has_own):
        return None
    if kind == "none":
        return without_quotas(scores.num_candidates, num_selected)
    if kind == "pool":
        return quotas_by_pool(lengths, scores.eligible(), num_selected, num_bins=config.length_bins)
    target = scores.target
    if target is None:
        raise ValueError('length_quotas="validation" needs validation rows. Pass PoolScores(target=...).')
    if not any(target.label_tokens):
        # Each is a copy of one of these candidates.
        return quotas_by_pool(lengths, scores.eligible(), num_selected, num_bins=config.length_bins)
    weights = target.weights(torch.tensor(target.label_tokens) > 0)
    return quotas_by_reference(lengths, target.label_tokens, weights, num_selected, num_bins=config.length_bins)


def _known(number: float) -> float | None:
    """`None` for a number that the strategy did not compute."""
    return None if math.isnan(number) else number


def _places(scores: PoolScores, positions: Sequence[int]) -> tuple[int, ...]:
    """Positions in the whole pool, of which the scored candidates may be a part."""
    return tuple(positions) if scores.whole is None else tuple(scores.kept[position] for position in positions)


def _rows(scores: PoolScores, mask_of: Callable[[PoolScores], Tensor]) -> tuple[int, ...]:
    """Dataset rows of a kind, in pool order, whether it showed in the gradients or in the losses before."""
    parts = [scores] if scores.whole is None else [scores, scores.whole]
    found = {part.candidates[place] for part in parts for place in mask_of(part).nonzero().flatten().tolist()}
    return tuple(row for row in parts[-1].candidates if row in found)


def _filtered(scores: PoolScores) -> tuple[int, ...]:
    """Dataset rows that are sound by their loss and were dropped by it."""
    if scores.whole is None:
        return ()
    dropped = scores.whole.sound.clone()
    dropped[list(scores.kept)] = False
    return tuple(scores.whole.candidates[place] for place in dropped.nonzero().flatten().tolist())


def round_down_picks(pools: Sequence[PoolSelection], num_slots: int, *, step: int) -> list[PoolSelection]:
    """Rounds a step's picks down to a multiple of its micro-batches, for losses that need equal ones.

    The schedule's budgets are multiples already; only rows that could not be picked make this necessary. The longest
    pool loses its last pick first, the later one of two as long.
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
        picks=pool.picks[:kept],
        num_tokens=pool.num_tokens[:kept],
        information_gains=gains,
        top_norm=keep(pool.top_norm),
        top_norm_gains=keep(pool.top_norm_gains),
        without_conflict=keep(pool.without_conflict),
    )
