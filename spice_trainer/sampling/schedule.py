"""The schedule's arithmetic: which rows are candidates when, and how many of them each step picks.

    epoch e: a permutation of the rows, seeded by (seed, e), cut into pools of N = pool_size
     └ step t: T pools with budgets k_0 … k_{T-1} ─ picks ─ dealt over world size × gradient accumulation slots

B samples a step. Without a given T: T = max(1, round_half_up(B / K)), Σ k_p = B, and |k_p - k_q| <= 1. With a given T:
k_p = K. A short last pool of n rows has budget ceil(k_p · n / N). Everything is whole numbers.

Everything is a function of (rows, settings, seed, epoch): no weights, no global random state, and, except for
`equal_slots`, no number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from spice_trainer.config import SpiceConfig


@dataclass(frozen=True)
class StepShape:
    """What one full optimizer step draws and picks, the same for every step but the last of an epoch.

    `samples_per_step` is B, what the Trainer's batch settings give a step; `num_slots` the micro-batches over which
    its picks are dealt (world size × gradient accumulation steps), with `equal_slots` equally many to each; `budgets`
    the picks of each of the T = `pools_per_step` pools; `effective_share` Σ budgets / (T · pool_size), the share of
    the candidates that is really picked, and `requested_share` num_selected / pool_size.
    """

    samples_per_step: int
    num_slots: int
    pools_per_step: int
    budgets: tuple[int, ...]
    effective_share: float
    requested_share: float
    equal_slots: bool


def plan_step(
    *,
    pool_size: int,
    num_selected: int,
    pools_per_step: int | None,
    samples_per_step: int,
    num_slots: int,
    adaptive: bool = False,
    equal_slots: bool = False,
) -> StepShape:
    """Works out the pools and budgets of an optimizer step; the error of numbers that do not fit holds some that do.

    Without a given T = `pools_per_step`: T = max(1, round_half_up(B / K)) with B = `samples_per_step` spread evenly,
    the earlier pools getting one more; where a pool would have to give more than it holds, T = ceil(B / N). A given T
    makes every budget K. `adaptive` pools may stop before their budget. With `equal_slots`, for losses that are not
    normalised by `num_items_in_batch` over all devices, the picks are rounded down to a multiple of `num_slots`.
    """
    given = {
        "pool_size": pool_size,
        "num_selected": num_selected,
        "pools_per_step": 1 if pools_per_step is None else pools_per_step,
        "samples_per_step": samples_per_step,
        "num_slots": num_slots,
    }
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if num_selected > pool_size:
        raise ValueError(
            f"num_selected={num_selected} is more than pool_size={pool_size}: a pool cannot give more samples than it "
            f"has candidates. Lower num_selected to at most {pool_size}."
        )
    if samples_per_step < num_slots:
        raise ValueError(
            f"A step of {samples_per_step} samples cannot fill {num_slots} micro-batches (number of processes × "
            "gradient_accumulation_steps). samples_per_step must be per_device_train_batch_size × "
            f"gradient_accumulation_steps × number of processes, here a multiple of {num_slots}."
        )
    if adaptive and pools_per_step is None:
        raise ValueError(
            "Adaptive stopping (stop_ratio or min_gain) needs pools_per_step: num_selected is then only a cap, so the "
            "number of pools of a step cannot follow from the batch size. Set pools_per_step, for example "
            f"pools_per_step={max(1, samples_per_step // num_selected)}."
        )
    if adaptive and equal_slots:
        raise ValueError(
            "Adaptive stopping (stop_ratio or min_gain) cannot be used here: this model's or trainer's loss is not "
            "normalised by num_items_in_batch over all devices, so every micro-batch must hold the same number of "
            "samples, and adaptive stopping gives any number. Use a fixed num_selected, or a trainer and model that "
            "normalise by num_items_in_batch (average_tokens_across_devices=True)."
        )

    total = samples_per_step
    if pools_per_step is None:
        if equal_slots:
            total = total // num_slots * num_slots
        num_pools = max(1, (2 * total + num_selected) // (2 * num_selected))  # total / num_selected, half up
        num_pools = max(num_pools, ceil_divide(total, pool_size))
    else:
        num_pools = pools_per_step
        total = num_pools * num_selected
        _check_explicit(num_pools, num_selected, pool_size, samples_per_step, num_slots)
        if equal_slots:
            total = total // num_slots * num_slots
            if total < num_pools:
                raise ValueError(
                    f"pools_per_step × num_selected = {num_pools} × {num_selected} picks must be rounded down to "
                    f"{total} here, a multiple of the {num_slots} micro-batches of a step (number of processes × "
                    f"gradient_accumulation_steps), which leaves {num_pools - total} pools with nothing to give. Set "
                    f"pools_per_step={total}, or num_selected to at least 2."
                )

    return StepShape(
        samples_per_step=samples_per_step,
        num_slots=num_slots,
        pools_per_step=num_pools,
        budgets=spread(total, num_pools),
        effective_share=total / (num_pools * pool_size),
        requested_share=num_selected / pool_size,
        equal_slots=equal_slots,
    )


def _check_explicit(num_pools: int, num_selected: int, pool_size: int, samples_per_step: int, num_slots: int) -> None:
    total = num_pools * num_selected
    arithmetic = f"pools_per_step × num_selected = {num_pools} × {num_selected} = {total} samples"
    if total > samples_per_step:
        fixes = [f"raise per_device_train_batch_size to {ceil_divide(total, num_slots)}"]
        if samples_per_step >= num_selected:
            fixes.append(f"lower pools_per_step to {samples_per_step // num_selected}")
        if samples_per_step >= num_pools:
            fixes.append(f"lower num_selected to {samples_per_step // num_pools}")
        raise ValueError(
            f"{arithmetic}, more than the {samples_per_step} of an optimizer step (per_device_train_batch_size × "
            f"gradient_accumulation_steps × number of processes). To fix it, {', or '.join(fixes)}, or leave "
            "pools_per_step unset to fill the step whatever its size."
        )
    if total < num_slots:
        fixes = [f"raise pools_per_step to {ceil_divide(num_slots, num_selected)}"]
        if ceil_divide(num_slots, num_pools) <= pool_size:
            fixes.append(f"raise num_selected to {ceil_divide(num_slots, num_pools)}")
        raise ValueError(
            f"{arithmetic}, fewer than the {num_slots} micro-batches of an optimizer step (number of processes × "
            f"gradient_accumulation_steps), so some would be empty in every step. To fix it, {', or '.join(fixes)}, "
            f"or lower gradient_accumulation_steps until there are at most {total} micro-batches."
        )


def ceil_divide(a: int, b: int) -> int:
    """Divides whole numbers, rounding up."""
    return -(-a // b)


def spread(total: int, parts: int) -> tuple[int, ...]:
    """Splits `total` into `parts` whole numbers that differ by at most one, the larger ones first."""
    size, extra = divmod(total, parts)
    return (size + 1,) * extra + (size,) * (parts - extra)


@dataclass(frozen=True)
class StepPools:
    """One optimizer step's pools: rows of each one's candidates, in order, and how many each may give at most."""

    epoch: int
    step_in_epoch: int
    pools: tuple[tuple[int, ...], ...]
    budgets: tuple[int, ...]


class PoolSchedule:
    """The pools of every step of every epoch; no row is a candidate twice in an epoch.

    An epoch is a seeded permutation of the rows cut into pools of `pool_size`. Its last step takes the pools that are
    left (or is left out, with `drop_last`), and a short last pool of n rows with budget k gives ceil(k · n /
    pool_size). With `shape.equal_slots` the last step's picks are rounded down to a multiple of `shape.num_slots`,
    taken from its last pools first; a pool left with nothing to give, and a last step with fewer picks than slots,
    are left out.
    """

    # An epoch ends where its rows do, which only reading them tells.
    has_open_end = False

    def __init__(self, num_rows: int, shape: StepShape, *, pool_size: int, seed: int, drop_last: bool = False) -> None:
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
        self._orders: dict[int, Tensor] = {}

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
        """A step's pools, a function of the settings, the epoch and the step within it, each from 0."""
        if epoch < 0:
            raise ValueError(f"epoch={epoch} must be at least 0.")
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise ValueError(
                f"step_in_epoch={step_in_epoch} is outside this epoch of {self.steps_per_epoch} steps, 0 to "
                f"{self.steps_per_epoch - 1}. Later steps belong to the next epoch."
            )
        if epoch not in self._orders:
            # Two, since the first pools of the next epoch may be asked for beside this one's.
            self._orders = dict(list(self._orders.items())[-1:])
            self._orders[epoch] = _seeded_permutation("pools", self.seed, epoch, self.num_rows)
        is_full = step_in_epoch < self._num_full_steps
        budgets = self.shape.budgets if is_full else self._last_budgets
        start = step_in_epoch * self.shape.pools_per_step * self.pool_size
        rows: list[int] = self._orders[epoch][start : start + len(budgets) * self.pool_size].tolist()
        return self._cut(rows, epoch, step_in_epoch, budgets)

    def has_step(self, epoch: int, step_in_epoch: int) -> bool:
        """Whether an epoch has such a step."""
        return step_in_epoch < self.steps_per_epoch

    def held_pools(self, epoch: int, step_in_epoch: int) -> StepPools:
        """What a look at a step sees, so that nothing moves."""
        return self.pools(epoch, step_in_epoch)

    def describe(self, plan: StepPools) -> str | None:
        """What processes must see alike in a step, beside the rows' numbers."""
        return None

    def restart(self) -> None:
        """Begins anew, of rows that are read one after another."""

    def finish_step(self, epoch: int, step_in_epoch: int, *, keep: int | None) -> None:
        """Says that a step was trained; rows before the step of row `keep` may go."""

    def holds(self, row: int | None) -> bool:
        """Whether a row that was trained can still be read."""
        return True

    def state(self, epoch: int) -> dict[str, Any]:
        """What resuming needs to read on, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it; nothing is read yet."""

    def read_on(self, epoch: int, *, is_within: bool) -> None:
        """Brings the rows of a resumed run to where it stands, within an epoch or at the beginning of one."""

    def _cut(self, rows: Sequence[int], epoch: int, step_in_epoch: int, budgets: tuple[int, ...]) -> StepPools:
        sizes = [self.pool_size] * len(budgets)
        return StepPools(epoch=epoch, step_in_epoch=step_in_epoch, pools=cut(rows, sizes), budgets=budgets)

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
    build: Callable[..., PoolSchedule] = PoolSchedule,
) -> PoolSchedule:
    """Builds the schedule of a run from its settings and batch size; raises a `ValueError` if they don't fit.

    With `token_normalized` micro-batches of unequal size are weighted by their label tokens. `seed` is the pools',
    unless `config.pool_seed` is set. `build` makes the schedule.
    """
    # A field may have been set since it was created.
    config.__post_init__()
    if config.pack_picks and not token_normalized:
        raise ValueError(
            "SpiceConfig: pack_picks=True makes micro-batches of about equally many tokens and any number of rows. "
            "This model's or trainer's loss is not normalised by num_items_in_batch over all devices, so each must "
            "hold the same number of rows. Fix: set pack_picks=False, or use a trainer and model that normalise by "
            "num_items_in_batch (average_tokens_across_devices=True)."
        )
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
    return build(num_rows, shape, pool_size=config.pool_size, seed=pool_seed, drop_last=drop_last)


class EpochReplay:
    """The picks of the last selecting epoch, permuted by (seed, epoch) and dealt anew over the steps of a later epoch.

    Each step gets evenly many, earlier ones one more. With `equal_slots` each gets a multiple of `num_slots`: the last
    few of the permuted picks are then left out, other ones each epoch. Steps are empty only if there are fewer picks
    (or multiples) than steps.
    """

    def __init__(
        self, indices: Int64[Tensor, " P"], *, num_steps: int, seed: int, epoch: int, num_slots: int, equal_slots: bool
    ) -> None:
        for name, value in (("num_steps", num_steps), ("num_slots", num_slots)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.num_steps = num_steps
        self._unit = num_slots if equal_slots else 1
        self._size, self._num_longer = divmod(len(indices) // self._unit, num_steps)
        self._dealt = indices[_seeded_permutation("replay", seed, epoch, len(indices))]

    def step(self, step_in_epoch: int) -> tuple[int, ...]:
        """The rows of a step."""
        start, stop = (
            self._unit * (step * self._size + min(step, self._num_longer))
            for step in (step_in_epoch, step_in_epoch + 1)
        )
        return tuple(self._dealt[start:stop].tolist())


def cut(items: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Cuts items into parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(items[start : start + size]))
        start += size
    return tuple(parts)


def _seeded_permutation(purpose: str, seed: int, epoch: int, length: int) -> Tensor:
    """Permutes `range(length)`, with a generator of its own so that the training's random state is not touched."""
    # A hash, because neighbouring seeds and epochs (seed + epoch) would otherwise share permutations.
    digest = hashlib.sha256(f"spice_trainer/{purpose}/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(length, generator=generator)
