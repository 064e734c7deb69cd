"""One optimizer step's picks: its pools scored, each pool decided once, the same decision on every process.

    pools of step t ─ scores at θ_t, shared by all processes (module `scoring`)
      └ each pool's owner picks (module `picks`) ─ process 0 puts the step together ─ everyone gets that
          └ a proxy learns from the picks (module `learning`), and may begin with step t+1 (module `ahead`)

What is picked never depends on the number of processes: a pool's candidates, budget and gradients don't.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.proxy.ahead import ScoringAhead
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.proxy.transfer import compare_pools
from spice_trainer.sampling.schedule import StepPools
from spice_trainer.sampling.step_shape import StepShape
from spice_trainer.scoring.measure import PoolScores
from spice_trainer.scoring.out_of_memory import MemoryReport
from spice_trainer.scoring.row_scores import RowScores
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.strategy_scoring import score_for_strategy
from spice_trainer.scoring.validation import ValidationRows
from spice_trainer.selection.pool import round_down_picks, select_pool
from spice_trainer.selection.results import PoolSelection, PoolTransfer, StepSelection, StepTimes
from spice_trainer.utils.saved import saved_whole_number


class StepSelector:
    """Scores each step's pools at the current weights and picks from them.

    Args:
        scorer ([`GradientScorer`]):
            The target's scorer, or a proxy's.
        config ([`SpiceConfig`]):
            How to pick.
        shape ([`StepShape`]):
            Micro-batches of a step, and whether they must be equal.
        learner ([`AdapterLearner`], *optional*):
            Trains the proxy on its picks.
        update_every (`int`, *optional*, defaults to `1`):
            Steps between its updates.
        validation ([`ValidationRows`], *optional*):
            What the strategy `less` compares candidates with.
        target_scorer ([`GradientScorer`], *optional*):
            The target's scorer, with which a proxy's first `config.proxy_check_pools` pools are compared.
    """

    def __init__(
        self,
        scorer: GradientScorer,
        config: SpiceConfig,
        *,
        shape: StepShape,
        learner: AdapterLearner | None = None,
        update_every: int = 1,
        validation: ValidationRows | None = None,
        target_scorer: GradientScorer | None = None,
    ) -> None:
        self.scorer = scorer
        self.config = config
        self.shape = shape
        self.learner = learner
        self.update_every = update_every
        self.validation = validation
        self.target_scorer = target_scorer
        self._num_checked = 0
        self._ahead: ScoringAhead | None = None
        self._memory_report = MemoryReport()

    def select(
        self,
        plan: StepPools,
        *,
        step: int,
        next_plan: StepPools | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> StepSelection:
        """Selects for one step. A collective of the scorer's processes.

        Args:
            plan ([`StepPools`]): The step's pools and their budgets.
            step (`int`): Optimizer updates done before.
            next_plan ([`StepPools`], *optional*): The next step's, if it will be scored.
            progress (`Callable[[int, int], None]`, *optional*): Told how many candidates are done, of how many.

        Returns:
            [`StepSelection`]: The same on every process, clock readings included.

        Raises:
            RuntimeError: If too few rows could be picked for equal micro-batches.
        """
        started = time.perf_counter()
        seconds_selecting = 0.0
        processes = self.scorer.processes
        num_checked = min(self.config.proxy_check_pools - self._num_checked, len(plan.pools))
        num_checked = num_checked if self.target_scorer is not None else 0
        decided: dict[int, PoolSelection] = {}
        checked: dict[int, PoolScores] = {}
        seconds_ahead = 0.0
        # With sharded weights an error may come within a forward, where the others don't hear of it.
        with nullcontext() if processes.lockstep else processes.failing_together("selecting"):
            scores_of_pools, seconds_ahead = self._score(plan, progress)
            for scores in scores_of_pools:
                pool_started = time.perf_counter()
                decided[scores.pool] = select_pool(
                    scores, plan.budgets[scores.pool], self.config, seed=self.scorer.seed, step=step
                )
                if scores.pool < num_checked and isinstance(scores, PoolScores):
                    checked[scores.pool] = scores
                seconds_selecting += time.perf_counter() - pool_started
                # It may hold the features, which must be gone before those of the next pools come.
                del scores
        # What the last learning found out about the memory has waited for a message to go with.
        learning = None if self.learner is None else self.learner.budget.take_notice()
        parts = processes.gather((decided, self.scorer.budget.take_notice(), learning))
        self._memory_report.tell([notice for _, _, notice in parts], doing="letting the proxy learn from")
        self._memory_report.tell([notice for _, notice, _ in parts])
        everyones = {pool: selection for part, _, _ in parts for pool, selection in part.items()}
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
                times=StepTimes(
                    scoring=time.perf_counter() - started - seconds_selecting,
                    selecting=seconds_selecting,
                    ahead=seconds_ahead,
                ),
            )
        )
        if num_checked > 0:
            selection = self._check_transfer(selection, plan, checked, num_checked)
        return self._learn(selection, next_plan)

    def _score(
        self, plan: StepPools, progress: Callable[[int, int], None] | None
    ) -> tuple[Iterator[PoolScores | RowScores], float]:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.pools != tuple(map(tuple, plan.pools)):
            if ahead is not None:
                ahead.join()
            scores = score_for_strategy(
                self.scorer, self.config, plan.pools, validation=self.validation, progress=progress
            )
            return scores, 0.0
        with self.scorer.processes.failing_together("scoring candidates"):
            shared, buffer = ahead.take()
        return self.scorer.measure(shared, buffer), ahead.seconds

    def _learn(self, selection: StepSelection, next_plan: StepPools | None) -> StepSelection:
        """The proxy's own update on the picks, and the start of the next step's scoring."""
        started = time.perf_counter()
        # Where nothing is scored there is nothing to learn for.
        is_due = self.config.strategy != "random" and (selection.step + 1) % self.update_every == 0
        if self.learner is not None and is_due:
            self.learner.learn(self.scorer.collate_alone(selection.indices))
            selection = _with_times(selection, StepTimes(learning=time.perf_counter() - started))
        if self.config.overlap_scoring and next_plan is not None:
            started = time.perf_counter()
            self._ahead = ScoringAhead(self.scorer, next_plan.pools)
            selection = _with_times(selection, StepTimes(scoring=time.perf_counter() - started))
        return selection

    def _check_transfer(
        self, selection: StepSelection, plan: StepPools, ours: Mapping[int, PoolScores], num_checked: int
    ) -> StepSelection:
        """Scores the step's first pools with the target too, and compares."""
        assert self.target_scorer is not None
        started = time.perf_counter()
        found: dict[int, PoolTransfer] = {}
        for theirs in self.target_scorer.score(plan.pools[:num_checked]):
            budget = plan.budgets[theirs.pool]
            found[theirs.pool] = compare_pools(theirs, ours[theirs.pool], budget, self.config)
            del theirs
        gathered = self.scorer.processes.gather((found, self.target_scorer.budget.take_notice()))
        self._memory_report.tell([notice for _, notice in gathered])
        everyones = {pool: part for parts, _ in gathered for pool, part in parts.items()}
        self._num_checked += num_checked
        selection = replace(selection, transfers=tuple(everyones[pool] for pool in range(num_checked)))
        return _with_times(selection, StepTimes(checking=time.perf_counter() - started))

    def close(self) -> None:
        """Waits for scoring that has begun and that nobody will ask for."""
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None

    # What resuming needs

    def state_dict(self) -> dict[str, Any]:
        """Pools compared with the target so far."""
        return {"num_checked": self._num_checked}

    def tensors(self) -> dict[str, Tensor]:
        """The proxy's adapter and optimizer."""
        return self.learner.state_dict() if self.learner is not None else {}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores [`StepSelector.state_dict`] and [`StepSelector.tensors`].

        Raises:
            ValueError: If the checkpoint has no proxy and this run has, the other way round, or another one.
        """
        self.close()
        self._num_checked = saved_whole_number(state["num_checked"])
        if bool(tensors) != (self.learner is not None):
            was, fix = ("with", "with the same `proxy`") if tensors else ("without", "without `proxy`")
            raise ValueError(
                f"The checkpoint was written by a run that selected {was} a proxy, and this one is set up the other "
                f"way. Resume {fix}, or start a new run."
            )
        if self.learner is not None:
            self.learner.load_state_dict(tensors)


def _with_times(selection: StepSelection, more: StepTimes) -> StepSelection:
    return replace(selection, times=selection.times + more)
