"""One run of a sampler: what is picked for each of its steps, and where it stands.

    position ─ pools ─ scores at θ_t ─ picks (pending) ─ trained ─ position of the next step

Picks are made when they are asked for by whoever trains, once a step. Anybody else gets a preview.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from spice_trainer.config import SpiceConfig
from spice_trainer.distributed import check_agreement
from spice_trainer.sampling.empty_steps import EmptyStepWatch, FillerRow, find_broken_weight
from spice_trainer.sampling.loader import preview_step
from spice_trainer.sampling.position import RunPosition
from spice_trainer.sampling.replay import PickReplay
from spice_trainer.sampling.schedule import PoolSchedule, StepPools
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.selection.results import StepSelection
from spice_trainer.utils.logging import logger

Listeners = Sequence[Callable[[StepSelection], None]]
Progress = Callable[[int, int], None]


@dataclass
class WeightUpdates:
    """Whether an optimizer has updated the weights since the latest step was picked, where somebody tells it."""

    is_seen: bool = False
    is_foreign: bool = False
    """Whether one stepped that may hold the weights in another form."""


class SelectionRun:
    """A run of `total_steps` optimizer steps, or of an epoch at a time, on the rows of `dataset`.

    Where it `follows_trainer`, whoever trains calls [`SelectionRun.finish_step`], and only what asks for rows within
    [`SelectionRun.drawing`] gets picks. Else asking for what comes after a step's rows says that it is trained.
    `listeners` hear of a step's picks before it trains, `progress` how far scoring is.
    """

    def __init__(
        self,
        config: SpiceConfig,
        schedule: PoolSchedule,
        selector: StepSelector,
        *,
        dataset: Any = None,
        total_steps: int | None = None,
        follows_trainer: bool = False,
        listeners: Listeners = (),
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self._settings = config.to_dict()
        self.schedule = schedule
        self.selector = selector
        self.position = RunPosition(schedule.steps_per_epoch, has_open_end=schedule.has_open_end)
        # As accelerate's loader does (1.15), for datasets whose rows change from epoch to epoch.
        self._set_epoch = getattr(dataset, "set_epoch", None)
        self._total_steps = total_steps
        self._follows_trainer = follows_trainer
        self._listeners = listeners
        self._progress = progress
        self._pending: StepSelection | None = None
        self.updates = WeightUpdates()
        self._watches_updates = True
        self._drawing_thread: int | None = None
        self._steps_to_skip = self._first_step = self._iteration = 0
        self._empty_steps = EmptyStepWatch(config.min_gain)
        self._filler = FillerRow()
        self._replay = PickReplay(config.selection_epochs)
        selector.scorer.start()
        hidden = selector.gradient_scorer.hidden
        if hidden is not None:
            hidden.keeps = self._scores_again()

    def _scores_again(self) -> bool:
        """Whether a row may be a candidate in more than one epoch."""
        is_once = self._total_steps is not None and self._total_steps <= self.schedule.steps_per_epoch
        return not (is_once or self.schedule.has_open_end or self.config.selection_epochs == 1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, as of a loader that is pickled, only previews.
        only_here = {"selector": None, "_listeners": (), "_progress": None, "_set_epoch": None}
        return vars(self) | only_here | {"_follows_trainer": True, "_drawing_thread": None}

    def close(self) -> None:
        """Waits for scoring that runs beside the training, at the end of a run."""
        self.selector.scorer.close()

    @property
    def global_step(self) -> int:
        """Optimizer steps trained so far."""
        return self.position.steps_trained

    def resume(self, position: Mapping[str, Any], *, skip_data: bool = True) -> None:
        """Continues at a saved position; without `skip_data` its epoch begins anew.

        With a trainer, its `skip_first_batches` then walks the steps of that epoch that were trained before.
        """
        self.position.load_state_dict(position)
        if not skip_data:
            self.position.step_in_epoch = 0
        self._first_step = self.position.step_in_epoch
        self._steps_to_skip = self._first_step if self._follows_trainer else 0

    @property
    def is_over(self) -> bool:
        """Whether the run has done all its steps: resumed at its very end, it has nothing left to pick."""
        return self._total_steps is not None and self.global_step >= self._total_steps

    @property
    def is_drawing(self) -> bool:
        """Whether rows that are asked for now are trained on, so that they must be picked."""
        return not self._follows_trainer or self._drawing_thread == threading.get_ident()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it a trainer asks for the rows of its next step."""
        # A loader that another thread walks meanwhile is a preview all the same.
        self._drawing_thread = threading.get_ident()
        try:
            yield
        finally:
            self._drawing_thread = None

    def take_steps_to_skip(self) -> int:
        """Steps of the resumed epoch that the trainer is about to walk past; 0 from then on."""
        num_steps, self._steps_to_skip = self._steps_to_skip, 0
        # At its end a run on a stream is, to the Trainer, at the beginning of another epoch.
        return 0 if self.is_over else num_steps

    def steps(self) -> Iterator[StepSelection]:
        """Yields the picks of the steps that are left of an epoch, each when the step before it has been trained."""
        position = self.position
        if not self._follows_trainer:
            # An iteration that was left early: its last step is trained if the weights were updated since.
            if self.updates.is_seen and self._pending is not None:
                self.finish_step()
            # An epoch an iteration; but one in which no step was finished has only been looked at.
            if position.step_in_epoch > self._first_step:
                self.finish_epoch()
            self._first_step = position.step_in_epoch
        self._iteration = iteration = self._iteration + 1
        epoch = position.epoch
        if self._set_epoch is not None:
            self._set_epoch(epoch)
        # transformers (5.23) would train a run that is resumed at its last step one step further.
        while position.epoch == epoch and not self.is_over and self._has_step(epoch, position.step_in_epoch):
            selection = self.select_step()
            yield selection
            if not self._follows_trainer:
                if self._iteration != iteration:
                    raise RuntimeError(_ITERATED_ANEW)
                self._warn_of_looking_ahead(selection.step)
                self.finish_step()
            elif self._pending is selection:
                raise RuntimeError(_NOT_TRAINED.format(step=selection.step))

    def _warn_of_looking_ahead(self, step: int) -> None:
        """Says once where a loop of one's own asks for what comes after a step before it has updated the weights."""
        if self._watches_updates and not (self.updates.is_seen or self.updates.is_foreign):
            self._watches_updates = False
            logger.warning("%s", _AHEAD.format(step=step))

    def _has_step(self, epoch: int, step_in_epoch: int) -> bool:
        """Whether an epoch has such a step.

        Of a stream a collective: it is read by each process, and may break, end or go another way on one alone.
        """
        if not self.schedule.has_open_end:
            return self.schedule.has_step(epoch, step_in_epoch)
        processes = self.selector.scorer.processes
        with processes.failing_together("reading the training stream"):
            plan = self.schedule.pools(epoch, step_in_epoch)
        if processes.world_size > 1:
            check_agreement(processes, {"what the training stream gives next": self.schedule.describe(plan)})
        return bool(plan.budgets)

    def preview(self) -> Iterator[StepSelection]:
        """Yields an epoch's steps without picking: of a step that has no picks, the first candidates of its pools.

        Of a stream, whose next rows are not read for a look, one step.
        """
        epoch = self.position.epoch
        if self.schedule.has_open_end:
            selection = self._pending or preview_step(self.schedule.held_pools(epoch, self.position.step_in_epoch))
            yield from [selection] if selection.indices or selection.filler is not None else []
            return
        for step_in_epoch in range(self.schedule.steps_per_epoch):
            if self._pending is not None and step_in_epoch == self.position.step_in_epoch:
                yield self._pending
            elif self._replay.replays(epoch):
                selection = self._replay.step(self.schedule, epoch, step_in_epoch, global_step=self.global_step)
                yield self._with_filler(selection, epoch, step_in_epoch)
            else:
                yield preview_step(self.schedule.pools(epoch, step_in_epoch))

    def select_step(self) -> StepSelection:
        """Scores the next step's pools at the current weights and picks from them, or replays earlier picks.

        Asked again before the step is finished, it gives the same picks. A `RuntimeError` if more than 2 of the last
        20 steps had no row with a finite, non-zero gradient.
        """
        if self._pending is None:
            self._warn_of_other_settings()
            epoch, step_in_epoch = self.position.epoch, self.position.step_in_epoch
            if self._replay.replays(epoch):
                selection = self._replay.step(self.schedule, epoch, step_in_epoch, global_step=self.global_step)
            else:
                selection = self._score_step(epoch, step_in_epoch)
            self._pending = self._with_filler(self._filler.provide(selection), epoch, step_in_epoch)
            self.updates.is_seen = False
            for listener in self._listeners:
                listener(self._pending)
        return self._pending

    def _warn_of_other_settings(self) -> None:
        """Says so where somebody wrote into the settings since the run began."""
        before, now = self._settings, self.config.to_dict()
        if now != before:
            self._settings = now
            changed = [f"{name} was {before[name]} and is {now[name]}" for name in now if now[name] != before[name]]
            logger.warning(
                "SPICE: settings were changed in mid-run: %s. Picks from step %d on use what is read for each pool; "
                "pools, their sizes and the layers to score by stay as they were when the run began. Fix: leave the "
                "SpiceConfig as it is, or begin a run with another.",
                "; ".join(changed),
                self.global_step,
            )

    @property
    def is_pending(self) -> bool:
        """Whether picks were asked for whose step is not finished."""
        return self._pending is not None

    @property
    def pending(self) -> StepSelection:
        """The picks of the step that trains now; a `RuntimeError` if nobody has asked for them."""
        if self._pending is None:
            raise RuntimeError(_NOT_PICKED.format(step=self.global_step))
        return self._pending

    def finish_step(self) -> StepSelection:
        """Says that the step whose picks were asked for has been trained, and returns them; the position moves on."""
        selection, self._pending, self.updates.is_seen = self.pending, None, False
        position = self.position
        self.selector.note_trained(selection)
        if not self._replay.replays(position.epoch):
            self._replay.remember(position.epoch, position.step_in_epoch, selection.indices, selection.num_tokens)
        self.schedule.finish_step(position.epoch, position.step_in_epoch, keep=self._filler.row)
        position.finish_step()
        return selection

    def finish_epoch(self) -> None:
        """Says that the epoch has ended, though it may have steps left."""
        self._pending = None
        self.position.finish_epoch()

    def _with_filler(self, selection: StepSelection, epoch: int, step_in_epoch: int) -> StepSelection:
        """Gives a step without picks something to fill its micro-batches, where no sound row is known yet."""
        if selection.filler is not None or selection.indices:
            return selection
        # Of the next step: this one's own rows broke the forward.
        next_step = step_in_epoch + 1 if self._has_step(epoch, step_in_epoch + 1) else 0
        if self.schedule.has_open_end and next_step == 0:
            next_step = step_in_epoch
        return replace(selection, filler=self.schedule.pools(epoch, next_step).pools[0][0])

    def _score_step(self, epoch: int, step_in_epoch: int) -> StepSelection:
        selection = self.selector.select(
            self.schedule.pools(epoch, step_in_epoch),
            step=self.global_step,
            next_plan=self._next_pools(epoch, step_in_epoch) if self.config.overlap_scoring else None,
            progress=self._progress,
        )
        scorer = self.selector.gradient_scorer
        self._empty_steps.note(
            self.global_step,
            selection.pools,
            broken_weight=lambda: find_broken_weight(scorer.get_model(), scorer.processes),
        )
        return selection

    def _next_pools(self, epoch: int, step_in_epoch: int) -> StepPools | None:
        """The pools of the step after this one, if this run will score them."""
        step_in_epoch += 1
        if not self._has_step(epoch, step_in_epoch):
            epoch, step_in_epoch = epoch + 1, 0
        is_over = step_in_epoch == 0 if self._total_steps is None else self.global_step + 1 >= self._total_steps
        if is_over or self._replay.replays(epoch) or not self._has_step(epoch, step_in_epoch):
            return None
        return self.schedule.pools(epoch, step_in_epoch)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the position, as JSON values."""
        return {
            "replay": self._replay.state_dict(),
            "empty_steps": self._empty_steps.state_dict(),
            "filler": self._filler.state_dict(),
            "selector": self.selector.scorer.state_dict(),
        } | self.schedule.state(self.position.epoch)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same as tensors: replayed picks, and the proxy's adapter and optimizer."""
        proxy = {f"{_PROXY}{name}": value for name, value in self.selector.scorer.tensors().items()}
        return self._replay.tensors() | proxy

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores both; raises a `ValueError` if the checkpoint's proxy is not this run's."""
        proxy = {name.removeprefix(_PROXY): value for name, value in tensors.items() if name.startswith(_PROXY)}
        self.selector.scorer.load_state_dict(state["selector"], proxy)
        self._empty_steps.load_state_dict(state["empty_steps"])
        self._filler.load_state_dict(state.get("filler"), num_rows=self.schedule.num_rows)
        self._replay.load_state_dict(state["replay"], tensors, num_rows=self.schedule.num_rows)
        self.schedule.load_state_dict(state)

    def read_on(self) -> None:
        """Brings the stream of a resumed run to where the run stands."""
        self.schedule.read_on(self.position.epoch, is_within=self.position.step_in_epoch > 0)
        if not self.schedule.holds(self._filler.row):
            self._filler = FillerRow()


_PROXY = "proxy."
_ITERATED_ANEW = (
    "The loader was iterated anew before this iteration of it had ended, which goes on with another step. Likely "
    "cause: a look at a batch (`next(iter(loader))`) in the middle of an epoch. Fix: read rows from the dataset."
)
_AHEAD = (
    "SPICE: the rows after those of step {step} were asked for, and no optimizer has updated the weights since these "
    "were picked, so the next are picked at the same weights. That is right where a loss scaler skipped the update "
    "or nothing trains. Likely cause otherwise: something that fetches batches ahead, such as a prefetcher around "
    "the loader. Fix: iterate the loader itself."
)
_NOT_TRAINED = (
    "The rows of the step after step {step} were asked for before the Trainer had finished step {step}, and SPICE "
    "picks them at the weights that it leaves. Likely cause: a get_batch_samples of your own fetches ahead. Fix: ask "
    "for one step at a time, or call detach_spice(trainer) to train without SPICE."
)
_NOT_PICKED = (
    "Step {step} would train on rows that SPICE did not pick: the trainer's get_batch_samples, which asks for them, "
    "was replaced after attach_spice by one that does not call the one before it, or the training loop is another "
    "one. Call attach_spice after your own changes to the trainer, or detach_spice(trainer) to train without SPICE."
)
