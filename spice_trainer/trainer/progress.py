"""How far scoring is: on the trainer's own progress bar, or in the log where there is none."""

from __future__ import annotations

import time
from typing import Any

from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.utils.logging import logger

SECONDS_BETWEEN_BAR_UPDATES = 0.5
SECONDS_BETWEEN_LOG_LINES = 30.0


class ScoringProgress:
    """Reports scoring to the user, on the trainer's bar where there is one: a second one would garble it."""

    def __init__(self, trainer: Any, sampler: SpiceSampler) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self._last_report = 0.0

    def report(self, done: int, total: int) -> None:
        """Shows that `done` of `total` candidates of the step are scored."""
        bar = next(
            (
                item.training_bar
                for item in self.trainer.callback_handler.callbacks
                if getattr(item, "training_bar", None)
            ),
            None,
        )
        now = time.monotonic()
        if bar is not None and hasattr(bar, "set_postfix_str"):
            if done == total or now - self._last_report >= SECONDS_BETWEEN_BAR_UPDATES:
                bar.set_postfix_str("" if done == total else f"scoring {done}/{total}", refresh=True)
                self._last_report = now
        elif now - self._last_report >= SECONDS_BETWEEN_LOG_LINES:
            if self._last_report:
                logger.info("SPICE: scored %d of %d candidates of step %d.", done, total, self.sampler.run.global_step)
            self._last_report = now
