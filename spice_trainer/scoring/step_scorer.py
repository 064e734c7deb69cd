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
from spice_trainer.utils.logging import logger
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

    # What is kept over steps: of the validation rows, of hidden states, and of earlier picks

    def _kept_state(self) -> dict[str, Any]:
        scorer = self.gradient_scorer
        known = {} if scorer.target is None else scorer.target.state_dict()
        return {"validation": scorer.describe_validation()} | known

    def _kept_tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prefix, keeper in self._keepers().items():
            found |= {f"{prefix}{name}": tensor for name, tensor in keeper.tensors().items()}
        return found

    def _keepers(self) -> dict[str, Any]:
        scorer = self.gradient_scorer
        keepers = zip(_KEPT, (scorer.target, scorer.hidden, scorer.limit, scorer.past), strict=True)
        return {prefix: keeper for prefix, keeper in keepers if keeper is not None}

    def _load_kept(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Restores it; returns the tensors that are of something else."""
        if "validation" in state:
            _check_aim(state["validation"], self.gradient_scorer.describe_validation())
        for prefix, keeper in self._keepers().items():
            part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            if prefix == _VALIDATION:
                keeper.load_state_dict(state, part)
            else:
                keeper.load(part)
        return {name: value for name, value in tensors.items() if not name.startswith(_KEPT)}


_VALIDATION = "validation."
_KEPT = (_VALIDATION, "hidden.", "repeats.", "past.")


def _check_aim(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Refuses other validation rows than those of the run that is resumed; says where only one of the two has some."""
    if saved is None and now is None:
        return
    if saved is None or now is None:
        before, after = ("no", "some") if saved is None else (f"{sum(saved['rows'].values())}", "none")
        logger.warning(
            "SPICE: the run of the checkpoint compared candidates with %s validation rows, and this one has %s: from "
            "here on its picks aim at something else. To go on as before resume with the validation_dataset of then.",
            before, after,
        )  # fmt: skip
        return
    known = saved["rows"] == now["rows"] and None in (saved["fingerprint"], now["fingerprint"])
    if saved != now and not known:
        raise ValueError(
            f"The checkpoint is of a run that aimed at other validation rows ({_describe_aim(saved)}; now "
            f"{_describe_aim(now)}), so this would be another run from here on. Fix: resume with the "
            "validation_dataset and validation_rows of then, or begin a new run."
        )


def _describe_aim(aim: Mapping[str, Any]) -> str:
    sets = ", ".join(f"{number} of {name!r}" for name, number in aim["rows"].items())
    return f"{sets}, fingerprint {str(aim['fingerprint'])[:12]}"
