"""The schedule of a stream: a pool is its next rows, in its own order, and an epoch lasts as long as it gives rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from spice_trainer.data.stream import StreamRows, StreamState
from spice_trainer.sampling.schedule import PoolSchedule, StepPools, StepShape


class StreamSchedule(PoolSchedule):
    """The pools of every step of a run of `total_steps` steps on `rows`, which count as an epoch's.

    Where a pass ends within a step that one takes the rows that are left, as the last step of an epoch does, and the
    next step begins with the next pass.
    """

    has_open_end = True

    def __init__(
        self, rows: StreamRows, total_steps: int, shape: StepShape, *, pool_size: int, seed: int, drop_last: bool
    ) -> None:
        self._rows_per_step = shape.pools_per_step * pool_size
        num_rows = total_steps * self._rows_per_step
        super().__init__(num_rows, shape, pool_size=pool_size, seed=seed, drop_last=drop_last)
        self.rows = rows
        self._state: StreamState | None = None

    def has_step(self, epoch: int, step_in_epoch: int) -> bool:
        """Whether the pass has rows left for such a step; they are read now."""
        return bool(self.pools(epoch, step_in_epoch).budgets)

    def pools(self, epoch: int, step_in_epoch: int) -> StepPools:
        """A step's pools, none behind the last one of the pass."""
        numbers = self._numbers(epoch, step_in_epoch)
        budgets = self.shape.budgets
        if len(numbers) < self._rows_per_step:
            budgets = () if self.drop_last else self._budgets_of_last_step(len(numbers))
        if numbers and not budgets and step_in_epoch == 0:
            raise ValueError(
                f"The training stream ended after {len(numbers)} rows, too few for one step: it draws "
                f"{self.shape.pools_per_step} pools of {self.pool_size}, and "
                + (
                    "dataloader_drop_last=True leaves out smaller steps. Set dataloader_drop_last=False, or lower "
                    "pool_size or pools_per_step (the batch size where pools_per_step is not set)."
                    if self.drop_last
                    else f"each of the {self.shape.num_slots} micro-batches of a step must hold the same number of "
                    "picks. Lower gradient_accumulation_steps, raise num_selected, or use more rows."
                )
            )
        return self._cut(numbers, epoch, step_in_epoch, budgets)

    def finish_step(self, epoch: int, step_in_epoch: int, *, keep: int | None) -> None:
        """Says that a step was trained; rows before the step of row `keep` are let go."""
        self.rows.finish(epoch, self._numbers(epoch, step_in_epoch).stop, keep=keep)

    def held_pools(self, epoch: int, step_in_epoch: int) -> StepPools:
        """What a look at a step sees that is not read yet: the last rows that are held, so that nothing moves."""
        held = self.rows.held[-self._rows_per_step :]
        if not held:
            return self.pools(epoch, step_in_epoch)
        return self._cut(held, epoch, step_in_epoch, self._budgets_of_last_step(len(held)))

    def describe(self, plan: StepPools) -> str:
        """The numbers of its first and last row, and their content."""
        ends = [row for pool in (*plan.pools[:1], *plan.pools[-1:]) for row in (pool[0], pool[-1])]
        return f"rows {ends[0]} to {ends[-1]}, {self.rows.digest(ends)[:12]}" if ends else "its end"

    def restart(self) -> None:
        """Begins with the first pass."""
        self.rows.restart()

    def holds(self, row: int | None) -> bool:
        """Whether it is among those that were read last."""
        return row in self.rows

    def state(self, epoch: int) -> dict[str, Any]:
        """Where the stream is read on."""
        return {"stream": asdict(self.rows.state(epoch))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it; nothing is read yet."""
        self._state = StreamState.parse(state["stream"])

    def read_on(self, epoch: int, *, is_within: bool) -> None:
        """Reads the stream to where a resumed run stands."""
        if self._state is not None:
            self.rows.resume(self._state, epoch=epoch, is_within=is_within)

    def _numbers(self, epoch: int, step_in_epoch: int) -> range:
        return self.rows.numbers(epoch, step_in_epoch * self._rows_per_step, self._rows_per_step)
