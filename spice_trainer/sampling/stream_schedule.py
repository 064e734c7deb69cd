"""The schedule of a stream: a pool is its next rows, in its own order, and an epoch lasts as long as it gives rows."""

from __future__ import annotations

from spice_trainer.data.stream import StreamRows
from spice_trainer.sampling.schedule import PoolSchedule, StepPools, StepShape


class StreamSchedule(PoolSchedule):
    """The pools of every step of a run of `total_steps` steps on `rows`, which count as an epoch's.

    Where a pass ends within a step that one takes the rows that are left, as the last step of an epoch does, and the
    next step begins with the next pass.
    """

    def __init__(
        self, rows: StreamRows, total_steps: int, shape: StepShape, *, pool_size: int, seed: int, drop_last: bool
    ) -> None:
        self._rows_per_step = shape.pools_per_step * pool_size
        num_rows = total_steps * self._rows_per_step
        super().__init__(num_rows, shape, pool_size=pool_size, seed=seed, drop_last=drop_last)
        self.rows = rows

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

    def _numbers(self, epoch: int, step_in_epoch: int) -> range:
        return self.rows.numbers(epoch, step_in_epoch * self._rows_per_step, self._rows_per_step)
