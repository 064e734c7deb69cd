"""The arithmetic of an optimizer step: how many pools it draws and how many picks each gives.

B = samples per step. Without a given T: T = max(1, round_half_up(B / K)), Σ k_p = B, and |k_p - k_q| <= 1. With a
given T: k_p = K. Everything is whole numbers.

Axes: N candidates of a pool, K picks of a pool, T pools of a step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepShape:
    """What one full optimizer step draws and picks, the same for every step but the last of an epoch.

    Args:
        samples_per_step (`int`):
            B, the samples that the Trainer's batch settings give a step.
        num_slots (`int`):
            World size × gradient accumulation steps: the micro-batches over which a step's picks are dealt.
        pools_per_step (`int`):
            T, the pools of a step.
        budgets (`tuple[int, ...]`):
            The picks of each pool of a step, T of them, each at least 1.
        effective_share (`float`):
            Σ budgets / (T · pool_size), the share of the candidates that is really picked.
        requested_share (`float`):
            num_selected / pool_size.
        equal_slots (`bool`):
            Whether every slot must hold the same number of picks.
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
    """Work out the pools and budgets of an optimizer step.

    Args:
        pool_size (`int`):
            N, the candidates of a pool.
        num_selected (`int`):
            K, the picks of a pool.
        pools_per_step (`int` or `None`):
            T. `None` takes T = max(1, round_half_up(B / K)) and spreads B evenly, the earlier pools getting one
            more; where a pool would have to give more than it holds, T = ceil(B / N). A given T makes every budget K.
        samples_per_step (`int`):
            B = per_device_train_batch_size × gradient_accumulation_steps × world size.
        num_slots (`int`):
            World size × gradient_accumulation_steps.
        adaptive (`bool`, *optional*, defaults to `False`):
            Whether a pool may stop before its budget.
        equal_slots (`bool`, *optional*, defaults to `False`):
            Round the picks of a step down to a multiple of `num_slots`, for losses that are not normalised by
            `num_items_in_batch` over all devices.

    Returns:
        [`StepShape`]: The step's shape.

    Raises:
        `ValueError`: If the numbers do not fit together; the message holds the arithmetic and numbers that fit.
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
    """Divide whole numbers, rounding up."""
    return -(-a // b)


def spread(total: int, parts: int) -> tuple[int, ...]:
    """Split `total` into `parts` whole numbers that differ by at most one, the larger ones first."""
    size, extra = divmod(total, parts)
    return (size + 1,) * extra + (size,) * (parts - extra)
