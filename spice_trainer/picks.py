"""What was picked, and what the picks look like: from one pool's scores to its selection and its diagnosis.

For a pool with Gram matrix K and picks S this adds what the records and the log tell beside the selection: F of the
|S| candidates of largest raw gradient norm, their share in S, the picks that λ = 0 would not have made, and how long
the picked answers are beside the pool's.

Axes: N candidates, K picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spice_trainer.config import SpiceConfig
from spice_trainer.fisher import InformationMeasure, build_information
from spice_trainer.gram import scaled_alpha
from spice_trainer.pool_scores import PoolScores
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


@dataclass(frozen=True)
class StepSelection:
    """What one optimizer step trains on.

    Args:
        step (`int`): Optimizer updates done before it.
        epoch (`int`): Epoch, from 0.
        indices (`tuple[int, ...]`): Dataset rows the step trains on, in order.
        pools (`tuple[PoolSelection, ...]`): The pools they came from; empty in a replayed epoch.
        num_fillers (`int`): Micro-batches over all ranks that hold a neutral filler.
        seconds_scoring (`float`): Collating, forward, backward, features, Gram.
        seconds_selecting (`float`): α, greedy, conflict, stopping, diagnosis.
    """

    step: int
    epoch: int
    indices: tuple[int, ...]
    pools: tuple[PoolSelection, ...] = ()
    num_fillers: int = 0
    seconds_scoring: float = 0.0
    seconds_selecting: float = 0.0


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
    return PoolSelection(
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
        nonfinite=_rows(scores, ~scores.finite),
        zero=_rows(scores, scores.finite & ~scores.nonzero),
    )


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
    # A greedy selection of K − 1 is the first K − 1 picks of one of K, so nothing is computed anew.
    selection = pool.selection
    kept = len(selection.indices) - 1
    shorter = replace(
        selection,
        indices=selection.indices[:kept],
        gains=selection.gains[:kept],
        conflicts=selection.conflicts[:kept],
        scores=selection.scores[:kept],
        information=sum(selection.gains[:kept]),
    )
    return replace(
        pool,
        selection=shorter,
        gradient_norms=pool.gradient_norms[:kept],
        label_tokens=pool.label_tokens[:kept],
        num_tokens=pool.num_tokens[:kept],
        top_norm=pool.top_norm[:kept],
        top_norm_gains=pool.top_norm_gains[:kept],
        without_conflict=pool.without_conflict[:kept],
    )


def _rows(scores: PoolScores, mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(scores.candidates[position] for position in mask.nonzero().squeeze(1).tolist())
