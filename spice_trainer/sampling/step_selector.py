"""One optimizer step's picks: its pools scored, each pool decided once, the same decision on every process.

    pools of step t ─ scores at θ_t, shared by all processes
      └ each pool's owner picks ─ process 0 puts the step together ─ everyone gets that
          └ the scorer hears of it: a proxy learns from the picks, and may begin with step t+1

What is picked never depends on the number of processes: a pool's candidates, budget and gradients don't.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

from spice_trainer.config import SpiceConfig
from spice_trainer.sampling.schedule import StepPools, StepShape
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.step_scorer import StepScorer
from spice_trainer.selection.pool import round_down_picks, select_pool
from spice_trainer.selection.results import PoolSelection, StepSelection, StepTimes
from spice_trainer.selection.strategies.registry import find_strategy


class StepSelector:
    """Scores each step's pools at the current weights, with the target or a proxy, and picks from them."""

    def __init__(self, scorer: StepScorer, config: SpiceConfig, *, shape: StepShape) -> None:
        self.scorer = scorer
        self.config = config
        self.shape = shape

    @property
    def gradient_scorer(self) -> GradientScorer:
        """What runs the model that scores: the target's scorer, or the proxy's."""
        return self.scorer.gradient_scorer

    def note_trained(self, selection: StepSelection) -> None:
        """Hears that a step has trained on its picks."""
        if self.gradient_scorer.limit is not None:
            picks = [pick for pool in selection.pools for pick in pool.picks]
            self.gradient_scorer.limit.count((pick.index, pick.token_hash) for pick in picks)

    def select(
        self,
        plan: StepPools,
        *,
        step: int,
        next_plan: StepPools | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> StepSelection:
        """Selects for one step, whose `step` is the number of optimizer updates done before. A collective.

        `next_plan` holds the next step's pools, if it will be scored; `progress` is told how many candidates are done,
        of how many. The selection is the same on every process, its clock readings those of scoring and selecting.
        """
        started, seconds_selecting = time.perf_counter(), 0.0
        processes, decided = self.scorer.processes, dict[int, PoolSelection]()
        if self.gradient_scorer.limit is not None:
            self.gradient_scorer.limit.begin_step()
        # With sharded weights an error may come within a forward, where the others don't hear of it.
        with nullcontext() if processes.lockstep else processes.failing_together("selecting"):
            rule = find_strategy("random") if self.scorer.is_warming_up(step) else None
            for scores in self.scorer.score(plan.pools, step=step, progress=progress):
                pool_started, pool = time.perf_counter(), scores.pool
                assert pool is not None
                budget, seed = plan.budgets[pool], self.scorer.seed
                picked = select_pool(scores, budget, self.config, seed=seed, step=step, rule=rule)
                decided[pool] = self.scorer.account(picked)
                seconds_selecting += time.perf_counter() - pool_started
                # It may hold the features, which must be gone before those of the next pools come.
                del scores
        parts = processes.gather((decided, self.scorer.take_notices()))
        for doing in parts[0][1]:
            self.scorer.memory_report.tell([notices[doing] for _, notices in parts], doing=doing)
        everyones = {pool: selection for part, _ in parts for pool, selection in part.items()}
        pools = [everyones[pool] for pool in range(len(plan.pools))]
        if self.shape.equal_slots:
            pools = round_down_picks(pools, self.shape.num_slots, step=step)
        indices = tuple(index for pool in pools for index in pool.indices)
        selection = processes.broadcast(
            StepSelection(
                step=step,
                epoch=plan.epoch,
                indices=indices,
                pools=tuple(pools),
                num_fillers=max(0, self.shape.num_slots - len(indices)),
                num_tokens=tuple(tokens for pool in pools for tokens in pool.num_tokens)
                if self.config.pack_picks
                else (),
                times=StepTimes(
                    scoring=time.perf_counter() - started - seconds_selecting, selecting=seconds_selecting
                ),
            )
        )
        next_pools = None if next_plan is None else next_plan.pools
        return self.scorer.after_step(selection, plan.pools, plan.budgets, next_pools)
