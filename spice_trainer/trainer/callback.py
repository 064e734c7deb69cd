"""The callback: metrics, records, checkpoint state and what SPICE says of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spice_trainer.distributed import Processes, check_agreement
from spice_trainer.proxy.transfer import TransferTotals, describe_transfer
from spice_trainer.recording.checkpoint import (
    RECORDS_COPY,
    check_same_step,
    describe_schedule,
    load_state,
    save_state,
)
from spice_trainer.recording.ledger import CostLedger
from spice_trainer.recording.metrics import MetricWindow, RunTotals, clock_metrics, step_metrics, transfer_metrics
from spice_trainer.recording.records import RECORDS_FOLDER, RecordWriter
from spice_trainer.recording.summary import (
    WARN_AFTER_POOLS,
    RunPlan,
    describe_peak,
    describe_run,
    print_summary,
    warn_of_first_pools,
    warn_of_share,
)
from spice_trainer.sampling.loader import SlotCollator
from spice_trainer.sampling.position import RunPosition
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.scoring.memory import MemoryUse, memory_use
from spice_trainer.selection.results import StepSelection
from spice_trainer.trainer.checks import check_adapter_is_saved
from spice_trainer.utils.logging import logger, warning_of_failure
from spice_trainer.utils.saved import reading_saved


class SpiceCallback(TrainerCallback):
    """Records what a [`SpiceSampler`] picks during a Trainer's run.

    [`attach_spice`] adds it; it is of no use on its own. It writes `<output_dir>/spice/*.jsonl`, keeps the averages
    that join the Trainer's logs, puts SPICE's state into every checkpoint, restores it on resume, and prints a summary
    at the end.

    Args:
        sampler ([`SpiceSampler`]):
            The sampler of the run.
    """

    def __init__(self, sampler: SpiceSampler) -> None:
        self.sampler = sampler
        self.totals = RunTotals()
        self.transfers = TransferTotals()
        self.num_trained_before = 0
        self.collator: SlotCollator | None = None
        self.processes = Processes()
        self.verify: Callable[[], None] | None = None
        self.plan: RunPlan | None = None
        self.resume_from: str | None = None
        self.saved: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None
        self.run_dir: str | None = None
        self.dataset_fingerprint: str | None = None
        self.seen: dict[str, Any] = {}
        self.find_changed_row: Callable[[], int | None] | None = None
        self._num_verifications = 0
        self._window = MetricWindow()
        self._records: RecordWriter | None = None
        self._epoch = 0
        self._num_substeps = 0
        self._trained: StepSelection | None = None
        self._peak: str | None = None
        self._memory_before: MemoryUse | None = None
        self._training_started = 0.0
        self._device = torch.device("cpu")
        sampler.add_listener(self.on_selection)

    def __getstate__(self) -> dict[str, Any]:
        # They hold the model's scorer and the run's open files; a copy of a trainer goes without them.
        return vars(self) | {"verify": None, "_records": None, "saved": None, "find_changed_row": None}

    def close(self) -> None:
        """Stops listening and closes the record files."""
        self.sampler.remove_listener(self.on_selection)
        self.close_records()

    def close_records(self) -> None:
        """Closes the record files. What is picked from here on, until the next run begins, is not recorded."""
        if self._records is not None:
            self._records.close()
        self._records = None

    def discard_records(self) -> None:
        """Removes the records of an attempt that the trainer repeats with another batch size."""
        if self._records is not None:
            self._records.discard()
        self._records = None

    # The Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins or resumes records, metrics and the sampler's position, and says what will happen."""
        if kwargs.get("model") is not None:
            check_adapter_is_saved(kwargs["model"], is_resumed=self.resume_from is not None)
        # The dataset may be another than when SPICE was attached.
        check_agreement(self.processes, self.seen)
        self._device = args.device
        self._window, self.totals, self.transfers = MetricWindow(), RunTotals(), TransferTotals()
        self._records = None
        run_dir = self.run_dir if self.run_dir is not None else args.output_dir
        if self.processes.is_main and run_dir is not None:
            about = self.sampler.scorer.describe_validation()
            self._records = RecordWriter(Path(run_dir) / RECORDS_FOLDER, validation=about)
            self.sampler.selector.scorer.keep_in(Path(run_dir) / RECORDS_FOLDER)
        with self.processes.failing_together("opening the run's records"):
            if self.resume_from is not None:
                self._restore(self.resume_from, args, state)
            elif self._records is not None:
                self._records.start()
        # Without a batch the trainer's epochs would go round in vain.
        control.should_training_stop = control.should_training_stop or self.sampler.run.is_over
        self.num_trained_before = self.totals.num_trained
        if self.plan is not None:
            logger.info("%s", describe_run(self.plan, self.sampler.schedule, self.sampler.config))
            share = warn_of_share(self.sampler.schedule, self.sampler.config)
            if share is not None:
                logger.warning("%s", share)
        # While B of a fresh adapter is zero the gradients of A are too: look again once it is not.
        self._num_verifications = 2
        self._verify()
        self._peak, self._memory_before = None, memory_use(self.sampler.scorer.device)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the epoch that the Trainer begins."""
        self._epoch = self.sampler.run.position.epoch
        self._num_substeps = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes sure that what is about to train was picked."""
        _ = self.sampler.run.pending

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts the micro-batches of a step before its last."""
        self._num_substeps += 1

    def on_selection(self, selection: StepSelection) -> None:
        """Hears of a step's picks before it trains."""
        self._report_memory(selection)
        self._training_started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the step as trained, with its seconds and tokens."""
        if self._device.type == "cuda":
            # The next scoring needs the updated weights anyway; without this its clock would count the update.
            torch.cuda.synchronize(self._device)
        # Before the records are written, which is no training.
        seconds = time.perf_counter() - self._training_started
        self._num_substeps = 0
        self.catch_up(state)
        if self._trained is None and self.sampler.run.is_pending:
            # Somebody has put the Trainer's number back.
            self._finish_step(state)
        selection, self._trained = self._trained, None
        if selection is None:
            # Somebody else has called the event.
            return
        num_tokens = self.collator.take_num_tokens() if self.collator is not None else 0
        num_tokens = sum(self.processes.gather(num_tokens))
        self.totals.add_training(seconds, num_tokens)
        if selection.pools:
            self._window.add(clock_metrics(selection, seconds))
        if self._records is not None:
            self._records.write_costs(
                {
                    "step": selection.step,
                    "epoch": selection.epoch,
                    **replace(selection.times, training=seconds).to_dict(),
                    "tokens_scored": sum(pool.num_tokens_pool for pool in selection.pools),
                    "tokens_trained": num_tokens,
                }
            )
        self._verify()

    def catch_up(self, state: TrainerState) -> None:
        """Moves the run's position to the Trainer's once that has counted the step, and records its picks.

        Another callback's `on_step_end` may save a checkpoint before this one's. No collective: it may do so on one
        process alone.
        """
        if self.sampler.run.global_step < state.global_step:
            self._finish_step(state)

    def _finish_step(self, state: TrainerState) -> None:
        run = self.sampler.run
        self._trained = selection = run.finish_step()
        if run.global_step != state.global_step:
            logger.warning(
                "SPICE: a callback changed `state.global_step` from %d to %d, the number that the "
                "records go on with. Fix: to train fewer steps, set `control.should_training_stop`.",
                run.global_step,
                state.global_step,
            )
            run.position.steps_trained = state.global_step
        self._add_to_totals(selection)
        self._window.add(step_metrics(selection) | transfer_metrics(selection))
        if self._records is not None:
            self._records.write_selection(selection)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on to the next epoch where this one was ended early; where training was, the run can go on in it."""
        if self._is_within_epoch and (control.should_epoch_stop or not control.should_training_stop):
            if self._num_substeps and not control.should_training_stop:
                logger.warning(
                    "SPICE: epoch %d was ended after %d of the %d micro-batches of a step: the Trainer adds their "
                    "gradients to those of the next step, whose records do not name their rows. Likely cause: a "
                    "callback that sets should_epoch_stop in on_substep_end. Fix: set it in on_step_end.",
                    self._epoch,
                    self._num_substeps,
                    args.gradient_accumulation_steps,
                )
            self.sampler.run.finish_epoch()
        if self.find_changed_row is not None and (row := self.find_changed_row()) is not None:
            self.find_changed_row = None
            logger.warning(
                "SPICE: row %d of the training dataset is another than when the run began, so numbers in the records "
                "mean different rows before and after, and a row may have been a candidate twice. Likely cause: "
                "something in this process shuffles or edits it. Fix: leave it as it is until the run has ended, or "
                "give the trainer a copy.",
                row,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prints the summary and closes the record files."""
        if self._records is not None and self.totals.num_steps:
            ledger: CostLedger | None = None
            with warning_of_failure("writing what the run cost"):
                ledger = self._ledger()
                self._records.write_ledger(ledger.to_dict())
            with warning_of_failure("printing the summary"):
                print_summary(self.totals, os.fspath(self._records.directory), ledger, peak=self._peak)
        self.close_records()

    def _report_memory(self, selection: StepSelection) -> None:
        """Says once, after the first step that was scored, what that took."""
        before, self._memory_before = self._memory_before, None
        if before is None or not selection.pools or not self.sampler.config.takes_model:
            return
        after = memory_use(self.sampler.scorer.device)
        if after is not None:
            self._peak = describe_peak(before, after)
            logger.info("SPICE: peak memory while scoring the first step: %s.", self._peak)

    @property
    def _is_within_epoch(self) -> bool:
        """Whether the epoch that the Trainer is in has steps left; after the last one the position is in the next."""
        return self.sampler.run.position.epoch == self._epoch

    def _add_to_totals(self, selection: StepSelection) -> None:
        warned = self.totals.num_pools >= WARN_AFTER_POOLS
        self.totals.add_selection(selection)
        if not warned and self.totals.num_pools >= WARN_AFTER_POOLS:
            for warning in warn_of_first_pools(self.totals, self.sampler.config):
                logger.warning("%s", warning)
        if selection.transfers:
            for transfer in selection.transfers:
                self.transfers.add(transfer)
            if len(self.transfers.transfers) == self.sampler.config.proxy_check_pools:
                logger.info("%s", describe_transfer(self.transfers))

    def _verify(self) -> None:
        if self.verify is not None and self._num_verifications > 0:
            self._num_verifications -= 1
            self.verify()

    # What the Trainer's log and checkpoints get

    def take_metrics(self) -> dict[str, float]:
        """Averages since the last training log."""
        return self._window.take()

    def save_state(self, checkpoint: str, control: TrainerControl) -> None:
        """Writes SPICE's state into a checkpoint."""
        position = replace(self.sampler.run.position)
        if control.should_epoch_stop and self._is_within_epoch:
            # The Trainer saves first, and then leaves the epoch.
            position.finish_epoch()
        records = self._records.save(Path(checkpoint) / RECORDS_COPY) if self._records is not None else None
        save_state(
            checkpoint,
            {
                "position": position.state_dict(),
                "schedule": self._describe_schedule(),
                "config": self.sampler.config.to_dict(),
                "sampler": self.sampler.run.state_dict(),
                "window": self._window.state_dict(),
                "totals": self.totals.state_dict(),
                "transfers": self.transfers.state_dict(),
                "records_sha256": records,
            },
            self.sampler.run.tensors(),
        )

    def load_position(self, args: TrainingArguments) -> RunPosition | None:
        """Puts the sampler where the run that is resumed stands, by the checkpoint; `None` if none is."""
        if self.resume_from is None:
            return None
        if self.saved is None:
            self.saved = load_state(
                self.resume_from, schedule=self._describe_schedule(), config=self.sampler.config.to_dict()
            )
            with reading_saved(self.resume_from):
                self.sampler.run.resume(self.saved[0]["position"], skip_data=not args.ignore_data_skip)
        return self.sampler.run.position

    def _restore(self, checkpoint: str, args: TrainingArguments, state: TrainerState) -> None:
        position = self.load_position(args)
        assert self.saved is not None and position is not None
        (saved, tensors), self.saved = self.saved, None
        check_same_step(checkpoint, position.steps_trained, state.global_step)
        with reading_saved(checkpoint):
            self.sampler.run.load_state_dict(saved["sampler"], tensors)
            self._window.load_state_dict(saved["window"])
            self.totals.load_state_dict(saved["totals"])
            self.transfers.load_state_dict(saved["transfers"])
        self.sampler.run.read_on()
        if self._records is not None:
            self._records.resume(Path(checkpoint) / RECORDS_COPY, saved.get("records_sha256"))

    def _describe_schedule(self) -> dict[str, Any]:
        return describe_schedule(self.sampler.schedule, dataset_fingerprint=self.dataset_fingerprint)

    def _ledger(self) -> CostLedger:
        # A proxy counts the candidates' tokens with its own tokenizer, rows may be scored in part, or not at all.
        config = self.sampler.config
        is_counted = self.sampler.proxy is None and config.takes_model and config.scoring_max_tokens is None
        mean_row_tokens = None if is_counted or self.plan is None else self.plan.mean_row_tokens
        schedule = self.sampler.schedule
        return CostLedger.from_totals(
            self.totals,
            num_rows=schedule.num_rows,
            steps_per_epoch=schedule.steps_per_epoch,
            mean_row_tokens=mean_row_tokens,
        )
