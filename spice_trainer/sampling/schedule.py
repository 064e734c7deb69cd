"""The schedule's arithmetic: which rows are candidates when, and how many of them each step picks.

    epoch e: a permutation of the rows, seeded by (seed, e), cut into pools of N = pool_size
     └ step t: T pools with budgets k_0 … k_{T-1} ─ picks ─ dealt over world size × gradient accumulation slots

T and the budgets k_p come from module `step_shape`; a short last pool of n rows has budget ceil(k_p · n / N).
Everything is a function of (rows, settings, seed, epoch): no weights, no global random state, and, except for
`equal_slots`, no number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.sampling.step_shape import StepShape, ceil_divide, plan_step, spread


@dataclass(frozen=True)
class StepPools:
    """The candidate pools of one optimizer step.

    Args:
        epoch (`int`):
            The epoch, from 0.
        step_in_epoch (`int`):
            The step within the epoch, from 0.
        pools (`tuple[tuple[int, ...], ...]`):
            Row indices of each pool's candidates, in pool order.
        budgets (`tuple[int, ...]`):
            How many rows each pool may give at most, one number a pool, each at least 1.
    """

    epoch: int
    step_in_epoch: int
    pools: tuple[tuple[int, ...], ...]
    budgets: tuple[int, ...]


class PoolSchedule:
    """The pools of every step of every epoch; no row is a candidate twice in an epoch.

    An epoch is a seeded permutation of the rows cut into pools of `pool_size`. Its last step takes the pools that are
    left, and a short last pool of n rows with budget k gives ceil(k · n / pool_size). With `shape.equal_slots` the
    last step's picks are rounded down to a multiple of `shape.num_slots`, taken from its last pools first; a pool left
    with nothing to give, and a last step with fewer picks than slots, are left out.

    Args:
        num_rows (`int`):
            Rows of the training dataset.
        shape ([`StepShape`]):
            What a full step draws and picks.
        pool_size (`int`):
            N, the same as given to [`plan_step`].
        seed (`int`):
            Seed of the permutations.
        drop_last (`bool`, *optional*, defaults to `False`):
            Leave out a step that has fewer than `shape.pools_per_step` full pools.

    Raises:
        `ValueError`: If there are no rows, or not enough for a single step.
    """

    def __init__(self, num_rows: int, shape: StepShape, *, pool_size: int, seed: int, drop_last: bool = False) -> None:
        """Count the steps of an epoch, and check that there is one."""
        if num_rows < 1:
            raise ValueError(
                f"The training dataset has {num_rows} rows, so there is nothing to select from. Check the filters and "
                "the split that made it."
            )
        if max(shape.budgets) > pool_size:
            raise ValueError(
                f"A pool of pool_size={pool_size} cannot give the {max(shape.budgets)} picks that the step's shape "
                "asks for. Give PoolSchedule the pool_size that plan_step had."
            )
        self.num_rows = num_rows
        self.shape = shape
        self.pool_size = pool_size
        self.seed = seed
        self.drop_last = drop_last

        rows_per_step = shape.pools_per_step * pool_size
        num_full_steps, rows_left = divmod(num_rows, rows_per_step)
        self._last_budgets = () if drop_last else self._budgets_of_last_step(rows_left)
        self.steps_per_epoch = num_full_steps + bool(self._last_budgets)
        self.samples_per_epoch = num_full_steps * sum(shape.budgets) + sum(self._last_budgets)
        self._num_full_steps = num_full_steps
        self._cached_order: tuple[int, Tensor] | None = None

        if self.steps_per_epoch == 0 and drop_last:
            raise ValueError(
                f"The training dataset has {num_rows} rows, but a step draws {shape.pools_per_step} full pools of "
                f"{pool_size}, {rows_per_step} rows, and dataloader_drop_last=True leaves out smaller steps, so no "
                "step remains. Set dataloader_drop_last=False, or lower pool_size or pools_per_step (the batch size "
                "where pools_per_step is not set)."
            )
        if self.steps_per_epoch == 0:
            num_picks = sum(self._unrounded_budgets(rows_left))
            raise ValueError(
                f"The training dataset has {num_rows} rows, which give only {num_picks} picks, but each of the "
                f"{shape.num_slots} micro-batches of a step (number of processes × gradient_accumulation_steps) must "
                "hold the same number of them, so no step remains. Lower gradient_accumulation_steps until there are "
                f"at most {num_picks} micro-batches, raise num_selected, or use more rows."
            )

    def pools(self, epoch: int, step_in_epoch: int) -> StepPools:
        """Return the candidate pools of a step.

        Args:
            epoch (`int`):
                The epoch, from 0.
            step_in_epoch (`int`):
                The step within the epoch, from 0 to `steps_per_epoch - 1`.

        Returns:
            [`StepPools`]: Row indices and budgets of each pool; a function of the schedule's settings, the epoch and
            the step alone.

        Raises:
            `ValueError`: If there is no such epoch or step.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be at least 0.")
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise ValueError(
                f"step_in_epoch={step_in_epoch} is outside this epoch of {self.steps_per_epoch} steps, 0 to "
                f"{self.steps_per_epoch - 1}. Later steps belong to the next epoch."
            )
        if self._cached_order is None or self._cached_order[0] != epoch:
            self._cached_order = (epoch, _seeded_permutation("pools", self.seed, epoch, self.num_rows))
        is_full = step_in_epoch < self._num_full_steps
        budgets = self.shape.budgets if is_full else self._last_budgets
        start = step_in_epoch * self.shape.pools_per_step * self.pool_size
        rows: list[int] = self._cached_order[1][start : start + len(budgets) * self.pool_size].tolist()
        pools = tuple(tuple(rows[i : i + self.pool_size]) for i in range(0, len(rows), self.pool_size))
        return StepPools(epoch=epoch, step_in_epoch=step_in_epoch, pools=pools, budgets=budgets)

    def _unrounded_budgets(self, rows_left: int) -> tuple[int, ...]:
        num_pools = ceil_divide(rows_left, self.pool_size)
        sizes = [min(self.pool_size, rows_left - p * self.pool_size) for p in range(num_pools)]
        # Rounded up, so that no pool has budget 0.
        return tuple(
            ceil_divide(budget * size, self.pool_size) for budget, size in zip(self.shape.budgets, sizes, strict=False)
        )

    def _budgets_of_last_step(self, rows_left: int) -> tuple[int, ...]:
        budgets = list(self._unrounded_budgets(rows_left))
        surplus = sum(budgets) % self.shape.num_slots if self.shape.equal_slots else 0
        while surplus:
            taken = min(surplus, budgets[-1])
            surplus -= taken
            budgets[-1] -= taken
            if budgets[-1] == 0:
                budgets.pop()
        return tuple(budgets)


def build_schedule(
    config: SpiceConfig,
    num_rows: int,
    *,
    per_device_train_batch_size: int,
    num_slots: int,
    token_normalized: bool,
    drop_last: bool,
    seed: int,
) -> PoolSchedule:
    """Builds the schedule of a run from its settings and batch size.

    Args:
        config ([`SpiceConfig`]): The settings.
        num_rows (`int`): Rows of the training dataset.
        per_device_train_batch_size (`int`): Rows of a micro-batch.
        num_slots (`int`): World size × gradient accumulation steps.
        token_normalized (`bool`): Whether micro-batches of unequal size are weighted by their label tokens.
        drop_last (`bool`): Whether an epoch's last step is dropped if its pools are not all full.
        seed (`int`): Seed of the pools, unless `config.pool_seed` is set.

    Returns:
        [`PoolSchedule`]

    Raises:
        ValueError: If the numbers don't fit together.
    """
    # A field may have been set since it was created.
    config.__post_init__()
    shape = plan_step(
        pool_size=config.pool_size,
        num_selected=config.num_selected,
        pools_per_step=config.pools_per_step,
        samples_per_step=per_device_train_batch_size * num_slots,
        num_slots=num_slots,
        adaptive=config.is_adaptive,
        equal_slots=not token_normalized,
    )
    pool_seed = seed if config.pool_seed is None else config.pool_seed
    return PoolSchedule(num_rows, shape, pool_size=config.pool_size, seed=pool_seed, drop_last=drop_last)


def deal(indices: Sequence[int], num_slots: int) -> tuple[tuple[int, ...], ...]:
    """Cut picks into contiguous slots whose sizes differ by at most one, the longer ones first.

    Args:
        indices (`Sequence[int]`):
            The picks of a step, in order.
        num_slots (`int`):
            The number of slots; with fewer picks than slots the last ones are empty.

    Returns:
        `tuple[tuple[int, ...], ...]`: The picks of each slot, `num_slots` of them.

    Raises:
        `ValueError`: If `num_slots` is below 1.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots} must be at least 1.")
    return _cut(indices, spread(len(indices), num_slots))


def slot_index(rank: int, micro_batch: int, *, world_size: int) -> int:
    """Return the slot that a rank trains on in a micro-batch: micro_batch · world_size + rank, as Accelerate deals.

    Args:
        rank (`int`):
            The process, from 0 to `world_size - 1`.
        micro_batch (`int`):
            The micro-batch within the step, from 0.
        world_size (`int`):
            The number of processes.

    Returns:
        `int`: Position in the slots of [`deal`].

    Raises:
        `ValueError`: If there is no such rank or micro-batch.
    """
    if not 0 <= rank < world_size or micro_batch < 0:
        raise ValueError(
            f"rank={rank}, micro_batch={micro_batch}, world_size={world_size}: rank must be from 0 to world_size - 1 "
            "and micro_batch at least 0."
        )
    return micro_batch * world_size + rank


def replay_epoch(
    indices: Sequence[int], *, num_steps: int, seed: int, epoch: int, num_slots: int, equal_slots: bool
) -> tuple[tuple[int, ...], ...]:
    """Deal the picks of the last selecting epoch anew over the steps of a later epoch.

    Args:
        indices (`Sequence[int]`):
            All picks of the last selecting epoch, in the order in which they were made.
        num_steps (`int`):
            Steps of the epoch.
        seed (`int`):
            Seed of the permutation, together with `epoch`.
        epoch (`int`):
            The epoch that replays.
        num_slots (`int`):
            World size × gradient accumulation steps; it matters only with `equal_slots`.
        equal_slots (`bool`):
            Give every step a multiple of `num_slots` picks. The last few of the permuted picks are then left out,
            other ones each epoch.

    Returns:
        `tuple[tuple[int, ...], ...]`: The picks of each step, evenly many, earlier steps getting one (or one
        `num_slots`) more. Steps are empty only if there are fewer picks (or multiples) than steps.

    Raises:
        `ValueError`: If `num_steps` or `num_slots` is below 1.
    """
    for name, value in (("num_steps", num_steps), ("num_slots", num_slots)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    order: list[int] = _seeded_permutation("replay", seed, epoch, len(indices)).tolist()
    shuffled = [indices[position] for position in order]
    unit = num_slots if equal_slots else 1
    sizes = tuple(unit * size for size in spread(len(indices) // unit, num_steps))
    return _cut(shuffled, sizes)


def _cut(items: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(items[start : start + size]))
        start += size
    return tuple(parts)


def _seeded_permutation(purpose: str, seed: int, epoch: int, length: int) -> Tensor:
    """Permute `range(length)`, with a generator of its own so that the training's random state is not touched."""
    # A hash, because neighbouring seeds and epochs (seed + epoch) would otherwise share permutations.
    digest = hashlib.sha256(f"spice_trainer/{purpose}/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator)
