"""What `attach_spice` returns: what is known of the run, and the way back."""

from __future__ import annotations

from collections.abc import Callable

from spice_trainer.recording.metrics import RunTotals
from spice_trainer.recording.summary import RunPlan
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.trainer.callback import SpiceCallback


class SpiceHandle:
    """SPICE on one trainer, as [`attach_spice`] returns it.

    Args:
        sampler ([`SpiceSampler`]):
            Picks the rows of the trainer's steps; `sampler.config` are the settings.
        callback ([`SpiceCallback`]):
            Holds the run's plan and totals.
        remove (`Callable`):
            Takes SPICE off the trainer.

    Example:
    ```python
    >>> spice = attach_spice(trainer, SpiceConfig())
    >>> spice.plan.total_steps
    >>> trainer.train()
    >>> spice.totals.num_selected
    >>> spice.detach()
    ```
    """

    def __init__(self, sampler: SpiceSampler, callback: SpiceCallback, remove: Callable[[], None]) -> None:
        self.sampler = sampler
        self._callback = callback
        self._remove = remove

    @property
    def plan(self) -> RunPlan:
        """What is known before training: `num_rows`, `total_steps`, `dimension` and `feature_bytes` among others."""
        plan = self._callback.plan
        assert plan is not None, "set by attach_spice"
        return plan

    @property
    def totals(self) -> RunTotals:
        """Sums over the current run, or the latest: `num_selected`, `tokens_scored` and what else the summary says."""
        return self._callback.totals

    def detach(self) -> None:
        """Does what [`detach_spice`] does.

        Raises:
            ValueError: If it was detached before.
            RuntimeError: If the trainer trains.
        """
        self._remove()
