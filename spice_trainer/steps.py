"""One optimizer step's picks: its pools scored, each pool decided once, the same decision on every process.

    pools of step t ─ scores at θ_t, shared by all processes (module `scoring`)
      └ each pool's owner picks (module `picks`) ─ process 0 puts the step together ─ everyone gets that

What is picked never depends on the number of processes: a pool's candidates, budget and gradients don't.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

from spice_trainer.config import SpiceConfig
from spice_trainer.picks import PoolSelection, StepSelection, round_down_picks, select_pool
from spice_trainer.pools import StepPools
from spice_trainer.scoring import GradientScorer
from spice_trainer.step_shape import StepShape


def score_step(
    plan: StepPools,
    scorer: GradientScorer,
    config: SpiceConfig,
    *,
    shape: StepShape,
    step: int,
    progress: Callable[[int, int], None] | None = None,
) -> StepSelection:
    """Scores a step's pools at the current weights and picks from them. A collective of the scorer's processes.

    Args:
        plan ([`~spice_trainer.pools.StepPools`]): The step's pools and their budgets.
        scorer ([`~spice_trainer.scoring.GradientScorer`]): Scores them.
        config ([`SpiceConfig`]): How to pick.
        shape ([`~spice_trainer.step_shape.StepShape`]): Micro-batches of a step, and whether they must be equal.
        step (`int`): Optimizer updates done before.
        progress (`Callable[[int, int], None]`, *optional*): Told how many candidates are done, of how many.

    Returns:
        [`~spice_trainer.picks.StepSelection`]: The same on every process, clock readings included.

    Raises:
        RuntimeError: If too few rows could be picked for equal micro-batches.
    """
    started = time.perf_counter()
    seconds_selecting = 0.0
    processes = scorer.processes
    decided: dict[int, PoolSelection] = {}
    # With sharded weights an error may come within a forward, where the others don't hear of it.
    with nullcontext() if processes.lockstep else processes.failing_together("selecting"):
        for scores in scorer.score(plan.pools, progress=progress):
            pool_started = time.perf_counter()
            decided[scores.pool] = select_pool(scores, plan.budgets[scores.pool], config)
            seconds_selecting += time.perf_counter() - pool_started
    everyones = {pool: selection for part in processes.gather(decided) for pool, selection in part.items()}
    pools = [everyones[pool] for pool in range(len(plan.pools))]
    if shape.equal_slots:
        pools = round_down_picks(pools, shape.num_slots, step=step)
    indices = tuple(index for pool in pools for index in pool.indices)
    selection = StepSelection(
        step=step,
        epoch=plan.epoch,
        indices=indices,
        pools=tuple(pools),
        num_fillers=max(0, shape.num_slots - len(indices)),
        seconds_scoring=time.perf_counter() - started - seconds_selecting,
        seconds_selecting=seconds_selecting,
    )
    return processes.broadcast(selection)
