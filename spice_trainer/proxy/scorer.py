"""A proxy in the place of the target's scorer: it scores, learns from the picks, may score ahead, and is compared.

    score(t) ─ picks of t ─ compared with the target's on the first pools ─ learns ─ begins with t+1, if it may

Axes: N candidates of a pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from spice_trainer.proxy.ahead import ScoringAhead
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.proxy.transfer import compare_pools
from spice_trainer.scoring.out_of_memory import MemoryNotice
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.step_scorer import StepScorer
from spice_trainer.selection.results import PoolTransfer, StepSelection, StepTimes
from spice_trainer.selection.scores import PoolScores
from spice_trainer.utils.saved import saved_whole_number


class ProxyScorer(StepScorer):
    """Scores each step with a proxy, which learns from its picks every `update_every` steps.

    The target scores the first `config.proxy_check_pools` pools too, to compare, if its scorer is given.
    """

    def __init__(
        self,
        gradient_scorer: GradientScorer,
        learner: AdapterLearner,
        *,
        update_every: int = 1,
        target_scorer: GradientScorer | None = None,
    ) -> None:
        super().__init__(gradient_scorer)
        self.learner = learner
        self.update_every = update_every
        self.target_scorer = target_scorer
        self._num_checked = 0
        self._to_check: dict[int, PoolScores] = {}
        self._ahead: ScoringAhead | None = None
        self._seconds_ahead = 0.0

    def start(self) -> None:
        """Begins a run with the same proxy on every process."""
        self.learner.synchronize()

    def score(
        self,
        pools: Sequence[Sequence[int]],
        *,
        step: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[PoolScores]:
        """Scores a step's pools, or takes what was scored ahead. A collective."""
        num_checked = self._num_to_check(len(pools))
        self._to_check = {}
        for scores in self._score(pools, progress):
            if scores.pool is not None and scores.pool < num_checked:
                self._to_check[scores.pool] = scores
            yield scores
            del scores

    def _score(
        self, pools: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None
    ) -> Iterator[PoolScores]:
        ahead, self._ahead, self._seconds_ahead = self._ahead, None, 0.0
        if ahead is None or ahead.pools != tuple(map(tuple, pools)):
            if ahead is not None:
                ahead.join()
            return self.gradient_scorer.score(pools, progress=progress)
        with self.processes.failing_together("scoring candidates"):
            shared, buffer = ahead.take()
        self._seconds_ahead = ahead.seconds
        return self.gradient_scorer.measure(shared, buffer)

    def _num_to_check(self, num_pools: int) -> int:
        if self.target_scorer is None:
            return 0
        return min(self.gradient_scorer.config.proxy_check_pools - self._num_checked, num_pools)

    def after_step(
        self,
        selection: StepSelection,
        pools: Sequence[Sequence[int]],
        budgets: Sequence[int],
        next_pools: Sequence[Sequence[int]] | None,
    ) -> StepSelection:
        """Compares with the target, learns from the picks, and begins with the next step's pools. A collective."""
        selection = super().after_step(selection, pools, budgets, next_pools)
        selection = selection.took(StepTimes(ahead=self._seconds_ahead))
        num_checked = self._num_to_check(len(pools))
        if num_checked > 0:
            selection = self._compare(selection, pools[:num_checked], budgets)
        config = self.gradient_scorer.config
        started = time.perf_counter()
        # Where nothing is scored there is nothing to learn for.
        if config.takes_model and (selection.step + 1) % self.update_every == 0:
            self.learner.learn(self.gradient_scorer.collate_alone(selection.indices))
            selection = selection.took(StepTimes(learning=time.perf_counter() - started))
        if config.overlap_scoring and next_pools is not None:
            started = time.perf_counter()
            self._ahead = ScoringAhead(self.gradient_scorer, next_pools)
            selection = selection.took(StepTimes(scoring=time.perf_counter() - started))
        return selection

    def _compare(
        self, selection: StepSelection, pools: Sequence[Sequence[int]], budgets: Sequence[int]
    ) -> StepSelection:
        """Scores some pools with the target too."""
        assert self.target_scorer is not None
        started = time.perf_counter()
        ours, self._to_check = self._to_check, {}
        found: dict[int, PoolTransfer] = {}
        for theirs in self.target_scorer.score(pools):
            assert theirs.pool is not None
            found[theirs.pool] = compare_pools(
                theirs, ours[theirs.pool], budgets[theirs.pool], self.gradient_scorer.config
            )
            del theirs
        gathered = self.processes.gather((found, self.target_scorer.budget.take_notice()))
        self.memory_report.tell([notice for _, notice in gathered])
        everyones = {pool: part for parts, _ in gathered for pool, part in parts.items()}
        self._num_checked += len(pools)
        selection = replace(selection, transfers=tuple(everyones[pool] for pool in range(len(pools))))
        return selection.took(StepTimes(checking=time.perf_counter() - started))

    def take_notices(self) -> dict[str, MemoryNotice | None]:
        """Adds what the last learning found out, which has waited for a message to go with."""
        return {"letting the proxy learn from": self.learner.budget.take_notice(), **super().take_notices()}

    def close(self) -> None:
        """Waits for scoring that has begun and that nobody will ask for."""
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Pools compared with the target so far."""
        return {"num_checked": self._num_checked} | self._kept_state()

    def tensors(self) -> dict[str, Tensor]:
        """The proxy's adapter and optimizer."""
        return self.learner.state_dict() | self._kept_tensors()

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both; raises a `ValueError` if the checkpoint has no proxy, or another one."""
        self.close()
        self._num_checked = saved_whole_number(state["num_checked"])
        tensors = self._load_kept(state, tensors)
        if not tensors:
            raise ValueError(
                "The checkpoint was written by a run that selected without a proxy, and this one is set up the other "
                "way. Resume without `proxy`, or start a new run."
            )
        self.learner.load_state_dict(tensors)
