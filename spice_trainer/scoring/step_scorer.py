"""What selects for a step asks of whoever scores: the target itself, or something that stands in for it.

Axes: N candidates of a pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from spice_trainer.distributed import Processes
from spice_trainer.scoring.out_of_memory import MemoryNotice, MemoryReport
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.results import PoolSelection, StepSelection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.utils.saved import saved_whole_number


class StepScorer:
    """Scores each step with the model that trains, which needs nothing done between steps."""

    def __init__(self, gradient_scorer: GradientScorer) -> None:
        self.gradient_scorer = gradient_scorer
        self.target_scorer: GradientScorer | None = None
        self.memory_report = MemoryReport()

    @property
    def processes(self) -> Processes:
        """Those that score together."""
        return self.gradient_scorer.processes

    @property
    def seed(self) -> int:
        """Of the run's own draws."""
        return self.gradient_scorer.runtime.seed

    def start(self) -> None:
        """Begins a run."""

    def keep_in(self, folder: Path) -> None:
        """Hears where files of the run go."""

    def is_warming_up(self, step: int) -> bool:
        """Whether a step's rows are drawn at random, before anything is scored."""
        return False

    def account(self, pool: PoolSelection) -> PoolSelection:
        """A pool's selection with the tokens that were read for it."""
        return pool

    def score(
        self,
        pools: Sequence[Sequence[int]],
        *,
        step: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[PoolScores]:
        """Scores a step's pools; see [`GradientScorer.score`]."""
        return self.gradient_scorer.score(pools, progress=progress)

    def after_step(
        self,
        selection: StepSelection,
        pools: Sequence[Sequence[int]],
        budgets: Sequence[int],
        next_pools: Sequence[Sequence[int]] | None,
    ) -> StepSelection:
        """Hears what was picked from which pools with which budgets, and which come next, if this run scores them.

        Returns the selection with what was found and took time. A collective.
        """
        if self.gradient_scorer.past is not None:
            self.gradient_scorer.past.remember(selection.indices)
        return selection

    def take_notices(self) -> dict[str, MemoryNotice | None]:
        """What was found out about this process's memory since the last call, by what was done."""
        return {"scoring": self.gradient_scorer.budget.take_notice()}

    def close(self) -> None:
        """Waits for what runs beside the training."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON values."""
        return {"num_checked": 0} | self._kept_state()

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors."""
        return self._kept_tensors()

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both; raises a `ValueError` if the checkpoint is of a run that selected with a proxy."""
        saved_whole_number(state["num_checked"])
        if self._load_kept(state, tensors):
            raise ValueError(
                "The checkpoint was written by a run that selected with a proxy, and this one is set up the other "
                "way. Resume with the same `proxy`, or start a new run."
            )

    # What is kept over steps: of the validation rows, and of how often rows were picked

    def _kept_state(self) -> dict[str, Any]:
        target = self.gradient_scorer.target
        return {} if target is None else target.state_dict()

    def _kept_tensors(self) -> dict[str, Tensor]:
        target, limit = self.gradient_scorer.target, self.gradient_scorer.limit
        of_target = {} if target is None else target.tensors()
        of_limit = {} if limit is None else limit.tensors()
        past = self.gradient_scorer.past
        of_past = {} if past is None else past.tensors()
        return _named(_VALIDATION, of_target) | _named(_REPEATS, of_limit) | _named(_PAST, of_past)

    def _load_kept(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Restores it; returns the tensors that are of something else."""
        target, limit = self.gradient_scorer.target, self.gradient_scorer.limit
        if target is not None:
            target.load_state_dict(state, _part(_VALIDATION, tensors))
        if limit is not None:
            limit.load(_part(_REPEATS, tensors))
        if self.gradient_scorer.past is not None:
            self.gradient_scorer.past.load(_part(_PAST, tensors))
        return {name: value for name, value in tensors.items() if not name.startswith(_KEPT)}


_VALIDATION, _REPEATS, _PAST = _KEPT = ("validation.", "repeats.", "past.")


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
