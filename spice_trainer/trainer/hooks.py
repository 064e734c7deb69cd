"""What SPICE adds to one Trainer: eight methods bound on the instance, each calling the original.

    train                  resumes no checkpoint whose writing was interrupted
    _hp_search_setup       a trial's values of SPICE's settings are those of its run
    _inner_training_loop   learns which checkpoint is resumed and where the run writes, before the loader is built
    _load_callback_state   where the resumed run stands, which the number of its steps does not tell
    get_train_dataloader   the trainer's own dataset and collator, with the rows SPICE picks
    get_batch_samples      here the trainer asks for a step's rows; a step without label tokens must not divide by zero
    log                    SPICE's averages join the training log's dict
    save_model             SPICE's state goes into every checkpoint

Everything else of the trainer is as it was, and removal puts these back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import check_collator, check_dataset, check_token_ids, token_id_limits
from spice_trainer.data.fingerprints import fingerprint_rows
from spice_trainer.data.rows import TargetRows, name_unreadable
from spice_trainer.distributed import Processes, check_agreement, wait_for_all
from spice_trainer.recording.checkpoint import checkpoint_to_resume, mark_incomplete
from spice_trainer.recording.summary import RunPlan
from spice_trainer.sampling.loader import PickSource, ScheduledEpoch, SlotCollator, Slots, build_dataloader
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.trainer.callback import SpiceCallback
from spice_trainer.trainer.checks import (
    check_hidden_states,
    check_proxy,
    check_run,
    is_training,
    verify_run,
    warn_of_unscored,
)
from spice_trainer.trainer.handle import SpiceHandle
from spice_trainer.trainer.inputs import (
    EarlierSample,
    RunInputs,
    build_inputs,
    build_trainer_schedule,
    describe_for_others,
    own_sampling,
    plan_run,
    training_rows,
    warn_of_preparation,
)
from spice_trainer.trainer.objective import warn_of_objective
from spice_trainer.trainer.progress import ScoringProgress
from spice_trainer.trainer.search import SEARCHABLE, searched_config, warn_of_settings_in_arguments
from spice_trainer.trainer.validation import set_sizes, validation_sets
from spice_trainer.utils.logging import logger

HOOKED_METHODS = (
    "train",
    "_hp_search_setup",
    "_inner_training_loop",
    "_load_callback_state",
    "get_train_dataloader",
    "get_batch_samples",
    "log",
    "save_model",
)


_FIX_BEGINNING = (
    "Likely cause: SPICE was detached on some of the processes only, one of them does not train, or an error there, "
    "with its traceback in that process's output. Fix: call attach_spice, detach_spice and train() on every process."
)
NOT_ATTACHED = "SPICE is not attached to this trainer, so there is nothing to detach."


class HookedMethod:
    """A method bound on one trainer. An object, so that a trainer can be copied and pickled with it."""

    def __init__(self, hooks: SpiceHooks, name: str) -> None:
        self.hooks = hooks
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the hook, or only the original once SPICE is detached (a user's wrapper may still hold this)."""
        return self.hooks.call(self.name, *args, **kwargs)


class SpiceHooks:
    """What SPICE adds to one trainer."""

    callback: SpiceCallback
    handle: SpiceHandle

    def __init__(self, trainer: Any, sampler: SpiceSampler, validation_dataset: Any = None) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self.validation_dataset = validation_dataset
        self._validation: dict[str, TargetRows] | None = None
        self._is_installed = False
        self._build_loader: Callable[[], DataLoader[Any]] | None = None
        self._dataset: Any = None
        self._begins_run: int | None = None
        self._plan: RunPlan | None = None
        self._earlier: EarlierSample | None = None
        self._verify_later: Callable[[], None] | None = None
        self._replaced: dict[str, Any] = {}
        self._bound: dict[str, HookedMethod] = {}
        self._proxy_weights: dict[str, Tensor] = {}
        self._config_of_search: SpiceConfig | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_verify_later": None, "_build_loader": None, "_dataset": None}

    def install(self) -> None:
        """Binds the hooked methods and adds the callback."""
        self.callback = SpiceCallback(self.sampler)
        self.callback.verify, self.callback.plan = self._verify_later, self._plan
        self.handle = SpiceHandle(self.sampler, self.callback, self.remove)
        for name in HOOKED_METHODS:
            # An attribute a user bound on the instance is kept, called, and put back on removal.
            self._replaced[name] = vars(self.trainer).get(name)
            self._bound[name] = HookedMethod(self, name)
            setattr(self.trainer, name, self._bound[name])
        self.trainer.add_callback(self.callback)
        self.trainer._spice = self
        self.sampler.progress = ScoringProgress(self.trainer, self.sampler).report
        if self.sampler.proxy is not None and self.trainer.model_init is not None:
            # Every run begins with a new model then, and so must the proxy.
            self._proxy_weights = {
                name: value.detach().clone()
                for name, value in self.sampler.proxy.model.named_parameters()
                if value.requires_grad
            }
        self._is_installed = True

    def remove(self) -> None:
        """Puts everything back."""
        if not self._is_installed:
            raise ValueError(NOT_ATTACHED)
        if is_training(self.trainer):
            raise RuntimeError(
                "SPICE cannot be detached while the trainer trains: its loader deals out SPICE's picks until the run "
                "ends. Fix: detach after `train()`; to end it early, set `control.should_training_stop = True`."
            )
        self._is_installed = False
        for name, value in self._replaced.items():
            if vars(self.trainer).get(name) is not self._bound[name]:
                logger.warning(
                    "SPICE: trainer.%s was replaced after attach_spice and is left as it is.",
                    name,
                )
            elif value is None:
                delattr(self.trainer, name)
            else:
                setattr(self.trainer, name, value)
        self.trainer.remove_callback(self.callback)
        self.callback.close()
        self.sampler.progress = None
        del self.trainer._spice

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls the hook of a method, or the method alone once SPICE is detached."""
        if not self._is_installed:
            return self._original(name)(*args, **kwargs)
        return getattr(self, f"on_{name.removeprefix('_')}")(self._original(name), *args, **kwargs)

    def check(self, *, verify: bool) -> None:
        """Checks settings, model, collator, memory and gradients without leaving a trace."""
        processes, args = Processes.of(self.trainer.accelerator), self.trainer.args
        with processes.failing_together("reading the validation rows"):
            sizes = set_sizes(self.validation_dataset)
        # TRL's preparation waits for the other processes.
        check_agreement(processes, {"the number of rows of each validation set": sizes})
        with processes.failing_together("attaching SPICE"):
            self._validation = validation_sets(self.trainer, self.validation_dataset, self.sampler.config)
            inputs = self._build_inputs(self.trainer.get_train_dataloader)
            scorer, candidates = inputs.selector.gradient_scorer, inputs.candidates
            looked_at = [*candidates, *scorer.check_validation()]
            check_run(args, inputs.schedule, scorer, looked_at, config=self.sampler.config)
            if self.sampler.proxy is not None:
                check_proxy(self.sampler.proxy, self.trainer.model, device=args.device, rows=candidates)
            check_token_ids(candidates, scorer.vocabulary)
            check_collator(
                inputs.sample,
                inputs.collate,
                candidates,
                # A proxy that scores may have another vocabulary; the collator pads for the model that trains.
                token_id_limits(self.trainer.model),
                num_rows=args.train_batch_size,
            )
            fingerprint = fingerprint_rows(inputs.sample) if processes.world_size > 1 else None
            self._plan = plan_run(self.trainer, inputs, self.sampler.proxy)
            self._earlier = EarlierSample.of(inputs)
        warn_of_objective(self.trainer)
        warn_of_preparation(self.trainer, inputs.rows)
        replaced = own_sampling(self.trainer)
        if replaced is not None:
            logger.warning(
                "SPICE: %s keeps its dataset and collator, but the order of its rows is replaced by SPICE's picks.",
                replaced,
            )
        check_agreement(processes, describe_for_others(inputs, self.sampler.config, fingerprint))
        if verify:
            check_hidden_states(self.trainer, scorer, candidates)
        # Without a backward there is no gradient to verify.
        if verify and self.sampler.config.takes_gradients:
            self._verify_later = verify_run(self.trainer, scorer, candidates)
            warn_of_unscored(self.trainer, scorer, candidates)
            if inputs.selector.scorer.target_scorer is not None:
                self._verify_later = verify_run(self.trainer, inputs.selector.scorer.target_scorer, inputs.rows)

    # The hooked methods

    def on_train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer would resume a checkpoint whose writing was interrupted."""
        output_dir = self.trainer.args.output_dir
        if args:
            args = (checkpoint_to_resume(args[0], output_dir), *args[1:])
        elif "resume_from_checkpoint" in kwargs:
            kwargs["resume_from_checkpoint"] = checkpoint_to_resume(kwargs["resume_from_checkpoint"], output_dir)
        return original(*args, **kwargs)

    def on_hp_search_setup(self, original: Callable[..., Any], trial: Any) -> Any:
        """SPICE's settings of a trial are those of its run; the Trainer knows its own arguments alone.

        A search begins from the settings that were attached, and leaves them behind.
        """
        if self._config_of_search is not None:
            self.sampler.config, self._config_of_search = self._config_of_search, None
        if self.trainer.hp_search_backend is None or trial is None:
            return original(trial)
        hp_space, ours = self.trainer.hp_space, dict[str, Any]()

        def take(values: Mapping[str, Any]) -> dict[str, Any]:
            ours.update({name: value for name, value in values.items() if name in SEARCHABLE})
            return {name: value for name, value in values.items() if name not in ours}

        # Ray and W&B hand values over, Optuna something to draw them from.
        is_drawn = not isinstance(trial, Mapping)
        self.trainer.hp_space = lambda trial: take(hp_space(trial))
        try:
            original(trial if is_drawn else take(trial))
        finally:
            self.trainer.hp_space, self.trainer._trial = hp_space, trial
        self._config_of_search = self.sampler.config
        self.sampler.config = searched_config(self.sampler.config, ours)

    def on_inner_training_loop(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Tells the callback which checkpoint is resumed and where the run writes, before the loader is built."""
        if self._build_loader is not None:
            raise RuntimeError(
                "`train()` was called while this trainer trains, such as in a callback: the run within would take the "
                "records and the position of the one around it. Fix: train with another trainer and output_dir, or "
                "after this run has ended."
            )
        warn_of_settings_in_arguments(self.trainer.args, self.sampler.config)
        # Of this thread: another may ask for a loader meanwhile.
        self._begins_run, self._build_loader = threading.get_ident(), None
        self.callback.resume_from, self.callback.saved = kwargs.get("resume_from_checkpoint"), None
        # A trial of a hyperparameter search has a directory of its own.
        self.callback.run_dir = self.trainer._get_output_dir(kwargs.get("trial"))
        if self._proxy_weights and self.sampler.proxy is not None:
            with torch.no_grad():
                for name, parameter in self.sampler.proxy.model.named_parameters():
                    if name in self._proxy_weights:
                        parameter.copy_(self._proxy_weights[name])
        try:
            return original(*args, **kwargs)
        except Exception as error:
            if self.trainer.args.auto_find_batch_size and should_reduce_batch_size(error):
                self.callback.discard_records()
            raise
        finally:
            # Also after an exception.
            self._begins_run = self._build_loader = None
            self.callback.close_records()
            self.sampler.close()

    def on_load_callback_state(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Lets the trainer resume at the saved position: it divides `global_step` by the steps of an epoch.

        That is wrong once an epoch was ended early (transformers 5.23 and 4.56: with stock loaders too). The number is
        put right again by what the trainer calls after its division.
        """
        state, position = self.trainer.state, self.callback.load_position(self.trainer.args)
        if position is not None and position.steps_of_whole_epochs != state.global_step:
            global_step, init_training_references = state.global_step, state.init_training_references

            def put_right(*args: Any, **kwargs: Any) -> Any:
                del state.init_training_references
                state.global_step = global_step
                return init_training_references(*args, **kwargs)

            state.global_step, state.init_training_references = position.steps_of_whole_epochs, put_right
        return original(*args, **kwargs)

    def on_get_train_dataloader(self, original: Callable[[], DataLoader[Any]]) -> DataLoader[Any]:
        """The loader of the trainer, with the rows SPICE picks instead of its sampler's.

        The one that a run begins with; any other is a preview, which moves nothing and scores nothing.
        """
        if self._begins_run == threading.get_ident():
            self._begins_run = None
            processes = Processes.of(self.trainer.accelerator)
            wait_for_all(processes, "train", "The run with SPICE began", _FIX_BEGINNING)
            with processes.failing_together("building the run's loader"):
                self._build_loader = self.begin_run()
            loader = self._build_loader()
            self.callback.collator = loader.collate_fn if isinstance(loader.collate_fn, SlotCollator) else None
            return loader
        if self._build_loader is not None:
            return self._build_loader()
        dataset, collate = training_rows(self.trainer, original)
        schedule = build_trainer_schedule(self.trainer, self.sampler.config, dataset)
        return self._loader_of(ScheduledEpoch(schedule), dataset, collate)

    def begin_run(self) -> Callable[[], DataLoader[Any]]:
        """Binds the sampler to the trainer's rows and model; returns what builds loaders of them."""
        # It may be another one than when SPICE was attached.
        check_dataset(self.trainer.train_dataset, may_be_stream=True)
        inputs = self._build_inputs(self._original("get_train_dataloader"))
        plan = plan_run(self.trainer, inputs, self.sampler.proxy)
        run = self.sampler.prepare(
            inputs.schedule,
            inputs.selector,
            dataset=inputs.dataset,
            total_steps=plan.total_steps,
            follows_trainer=True,
        )
        self._dataset = inputs.dataset
        self.callback.processes = inputs.selector.scorer.processes
        self.callback.plan = plan
        fingerprint = fingerprint_rows(inputs.sample, self._earlier.digests if self._earlier is not None else None)
        self.callback.dataset_fingerprint = fingerprint
        # Rows that are random, or of their epoch, are others each time.
        is_fixed = fingerprint is not None and not hasattr(inputs.dataset, "set_epoch")
        self.callback.find_changed_row = inputs.sample.find_changed if is_fixed else None
        self.callback.seen = describe_for_others(inputs, self.sampler.config, fingerprint)
        self._earlier = EarlierSample.of(inputs)

        def build_loader() -> DataLoader[Any]:
            return self._loader_of(run, inputs.dataset, inputs.collate)

        return build_loader

    def on_get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Here the trainer asks for the rows of its next step, so these are picked.

        A step whose rows are all fillers has no label token; its zero loss must not be divided by zero.
        """
        if self._build_loader is None:
            # Between runs somebody looks at batches, of whatever loader.
            asked: tuple[list[Any], Any] = original(*args, **kwargs)
            return asked
        if self.callback not in self.trainer.callback_handler.callbacks:
            raise RuntimeError(
                "The SpiceCallback was taken from the trainer's callbacks, so nothing would tell SPICE which steps "
                "are trained. Leave it there, or call detach_spice(trainer) to train without SPICE."
            )
        settings = self.trainer.args
        before = self.sampler.schedule.shape.num_slots // settings.world_size
        if before != settings.gradient_accumulation_steps:
            raise RuntimeError(
                f"TrainingArguments.gradient_accumulation_steps was {before} when training began and is "
                f"{settings.gradient_accumulation_steps}: SPICE has dealt each step's rows for the first. Likely "
                "cause: a callback that schedules the batch size. Fix: keep it within a run, or resume from a "
                "checkpoint with the other value and a per_device_train_batch_size that keeps the samples of a step."
            )
        with self.sampler.run.drawing(), self._naming_rows():
            batch_samples, num_items_in_batch = original(*args, **kwargs)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        elif num_items_in_batch == 0:
            num_items_in_batch = 1
        return batch_samples, num_items_in_batch

    def on_log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """SPICE's averages join the dict of a training log, the only one every reporter and `log_history` see."""
        if "loss" in logs and self._is_training_log(logs):
            logs.update(self.callback.take_metrics())
        elif logs.get("train_runtime") and "train_samples_per_second" in logs:
            # The trainer assumes that every row of the dataset was trained on.
            trained = self.callback.totals.num_trained - self.callback.num_trained_before
            logs["train_samples_per_second"] = round(trained / logs["train_runtime"], 3)
        return original(logs, *args, **kwargs)

    def on_save_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A checkpoint gets SPICE's state before it is pushed, rotated, or marked complete by the trainer's state."""
        output_dir: str = kwargs.get("output_dir", args[0] if args else None) or ""
        is_checkpoint = (
            self.trainer.is_in_train
            and self.trainer.args.should_save
            and os.path.basename(output_dir) == f"{PREFIX_CHECKPOINT_DIR}-{self.trainer.state.global_step}"
        )
        # A folder that the user saves to loses nothing.
        if is_checkpoint and kwargs.get("_internal_call", args[1] if len(args) > 1 else False):
            mark_incomplete(output_dir)
        result = original(*args, **kwargs)
        if is_checkpoint:
            self.callback.catch_up(self.trainer.state)
            self.callback.save_state(output_dir, self.trainer.control)
        return result

    # Parts

    def _is_training_log(self, logs: Mapping[str, float]) -> bool:
        """Whether it is the trainer's own log, which takes the window, and not one of a callback or a loss."""
        step = self.trainer.state.global_step
        # The trainer notes the step before it logs; one that does not still logs its learning rate.
        return getattr(self.trainer, "_globalstep_last_logged", step) == step or "learning_rate" in logs

    @contextmanager
    def _naming_rows(self) -> Iterator[None]:
        """Adds to an error of the dataset which row of a micro-batch it is about."""
        try:
            yield
        except Exception as error:
            collator = self.callback.collator
            if collator is not None and collator.batch_sampler.latest.rows:
                name_unreadable(error, self._dataset, collator.batch_sampler.latest.rows)
            raise

    def _original(self, name: str) -> Callable[..., Any]:
        replaced: Callable[..., Any] | None = self._replaced[name]
        return MethodType(getattr(type(self.trainer), name), self.trainer) if replaced is None else replaced

    def _loader_of(self, source: PickSource, dataset: Any, collate: Callable[..., Any]) -> DataLoader[Any]:
        args, processes = self.trainer.args, Processes.of(self.trainer.accelerator)
        slots = Slots(processes.rank, processes.world_size, args.gradient_accumulation_steps)
        return build_dataloader(source, dataset, collate=collate, device=args.device, slots=slots)

    def _build_inputs(self, get_loader: Callable[[], DataLoader[Any]]) -> RunInputs:
        return build_inputs(
            self.trainer,
            self.sampler.config,
            get_loader,
            proxy=self.sampler.proxy,
            validation=self._validation,
            earlier=self._earlier,
        )
