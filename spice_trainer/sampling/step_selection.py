"""What one optimizer step trains on: its pools' picks put together, and rounded where micro-batches must be equal.

Axes: T pools of a step, K picks of a pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from spice_trainer.proxy.transfer import PoolTransfer
from spice_trainer.selection.pool import PoolSelection

T = TypeVar("T")


@dataclass(frozen=True)
class StepSelection:
    """What one optimizer step trains on.

    Args:
        step (`int`): Optimizer updates done before it.
        epoch (`int`): Epoch, from 0.
        indices (`tuple[int, ...]`): Dataset rows the step trains on, in order.
        pools (`tuple[PoolSelection, ...]`): The pools they came from; empty in a replayed epoch.
        num_fillers (`int`): Micro-batches over all ranks that hold a neutral filler.
        filler (`int`, *optional*): The row that stands there, where one is known to be sound.
        seconds_scoring (`float`): Collating, forward, backward, features, Gram. Where the forward and backward ran
            beside the step before, only what was waited for.
        seconds_selecting (`float`): α, greedy, conflict, stopping, diagnosis.
        seconds_learning (`float`): A proxy's own update on the picks.
        seconds_checking (`float`): Scoring with the target too, to compare.
        seconds_ahead (`float`): Scoring beside the step before.
        transfers (`tuple[PoolTransfer, ...]`): How the proxy's scores of the first pools compare with the target's.
    """

    step: int
    epoch: int
    indices: tuple[int, ...]
    pools: tuple[PoolSelection, ...] = ()
    num_fillers: int = 0
    filler: int | None = None
    seconds_scoring: float = 0.0
    seconds_selecting: float = 0.0
    seconds_learning: float = 0.0
    seconds_checking: float = 0.0
    seconds_ahead: float = 0.0
    transfers: tuple[PoolTransfer, ...] = ()


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
