"""Where a run stands. It moves when a step has been trained or an epoch has ended, and by nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from spice_trainer.utils.saved import saved_whole_number


@dataclass
class RunPosition:
    """The step that is trained next, `step_in_epoch` of `epoch`, and the `steps_trained` before it, each from 0.

    An epoch with an open end, a pass of a stream, lasts until it is ended, and counts as one of so many steps. An
    epoch that is ended early makes `steps_trained` fewer than the two others tell, one begun anew makes it more.
    """

    steps_per_epoch: int
    epoch: int = 0
    step_in_epoch: int = 0
    steps_trained: int = 0
    has_open_end: bool = False

    def finish_step(self) -> None:
        """Goes on to the next step, after the last one of an epoch to the next epoch."""
        self.steps_trained += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == self.steps_per_epoch and not self.has_open_end:
            self.finish_epoch()

    def finish_epoch(self) -> None:
        """Goes on to the next epoch, whatever is left of this one."""
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    @property
    def steps_of_whole_epochs(self) -> int:
        """The steps before it if no epoch had been ended early: what tells the epoch and the step within it."""
        return self.epoch * self.steps_per_epoch + self.step_in_epoch

    def state_dict(self) -> dict[str, int]:
        """Its numbers."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores [`RunPosition.state_dict`]; raises an `IndexError` if an epoch has no such step."""
        numbers = {name: saved_whole_number(state[name]) for name in ("epoch", "step_in_epoch", "steps_trained")}
        is_behind = numbers["step_in_epoch"] >= self.steps_per_epoch and not self.has_open_end
        if min(numbers.values()) < 0 or is_behind:
            raise IndexError(f"the position {numbers} is outside epochs of {self.steps_per_epoch} steps")
        vars(self).update(numbers)
