"""What SPICE adds to one Trainer: five methods bound on the instance, each calling the original.

    get_train_dataloader   the trainer's own dataset and collator, with the rows SPICE picks
    get_batch_samples      a step without label tokens must not divide by zero
    log                    SPICE's averages join the training log's dict
    save_model             SPICE's state goes into every checkpoint
    _inner_training_loop   learns which checkpoint is resumed, before the loader is built

Everything else of the trainer is as it was, and removal puts these back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from spice_trainer.assembly import build_selector
from spice_trainer.attachment import check_proxy, check_run, describe_rows, num_parameters, verify_run
from spice_trainer.callback import SpiceCallback
from spice_trainer.compatibility import check_agreement, is_token_normalized
from spice_trainer.loading import SlotCollator, build_dataloader
from spice_trainer.logs import logger
from spice_trainer.pools import PoolSchedule, build_schedule
from spice_trainer.processes import Processes
from spice_trainer.progress import ScoringProgress
from spice_trainer.random_states import preserved_random_state
from spice_trainer.rows import CandidateRow, sample_rows
from spice_trainer.sampler import SpiceSampler
from spice_trainer.scoring import GradientScorer
from spice_trainer.steps import StepSelector
from spice_trainer.summary import RunPlan

HOOKED_METHODS = ("get_train_dataloader", "get_batch_samples", "log", "save_model", "_inner_training_loop")


class SpiceHooks:
    """What SPICE adds to one trainer."""

    callback: SpiceCallback

    def __init__(self, trainer: Any, sampler: SpiceSampler) -> None:
        self.trainer = trainer
        self.sampler = sampler
        self._is_installed = False
        self._verify_later: Callable[[], None] | None = None
        self._replaced: dict[str, Any] = {}
        self._bound: dict[str, Any] = {}

    def install(self) -> None:
        """Binds the hooked methods and adds the callback."""
        self.callback = SpiceCallback(self.sampler)
        self.callback.verify = self._verify_later
        for name in HOOKED_METHODS:
            # An attribute a user bound on the instance is kept, called, and put back on removal.
            self._replaced[name] = vars(self.trainer).get(name)
            hook = getattr(self, f"on_{name.removeprefix('_')}")
            self._bound[name] = partial(self._call, hook, getattr(self.trainer, name))
            setattr(self.trainer, name, self._bound[name])
        self.trainer.add_callback(self.callback)
        self.trainer._spice = self
        self.sampler.progress = ScoringProgress(self.trainer, self.sampler).report
        self._is_installed = True

    def remove(self) -> None:
        """Puts everything back."""
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

    def _call(self, hook: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a hook, or only the original once SPICE is detached (a user's wrapper may still hold the hook)."""
        return hook(original, *args, **kwargs) if self._is_installed else original(*args, **kwargs)

    def check(self, *, verify: bool) -> None:
        """Checks settings, model, collator, memory and gradients without leaving a trace."""
        processes = Processes.of(self.trainer.accelerator)
        with processes.failing_together("attaching SPICE"):
            dataset, collate = self._training_rows(self.trainer.get_train_dataloader)
            schedule = self._build_schedule(dataset)
            selector = self._build_selector(dataset, collate, schedule)
            scorer = selector.scorer
            rows = self._sample_rows(scorer.dataset, scorer.collate)
            check_run(self.trainer.args, schedule, scorer, rows, config=self.sampler.config)
            if self.sampler.proxy is not None:
                check_proxy(self.sampler.proxy, self.trainer.model, device=self.trainer.args.device, rows=rows)
        check_agreement(
            processes,
            {
                "the number of rows": len(dataset),
                "the number of tokens of some rows": [row.num_tokens for row in rows],
                "the SPICE configuration": self.sampler.config,
                "the seed of the pools": schedule.seed,
                "the number of optimizer steps of an epoch": schedule.steps_per_epoch,
                "the number of LoRA layers": len(scorer.modules),
            },
        )
        if verify:
            self._verify_later = verify_run(self.trainer, scorer, rows)
            if selector.target_scorer is not None:
                target_rows = self._sample_rows(dataset, collate)
                self._verify_later = verify_run(self.trainer, selector.target_scorer, target_rows)

    # The hooked methods

    def on_get_train_dataloader(self, original: Callable[[], DataLoader[Any]]) -> DataLoader[Any]:
        """The loader of the trainer, with the rows SPICE picks instead of its sampler's."""
        dataset, collate = self._training_rows(original)
        schedule = self._build_schedule(dataset)
        selector = self._build_selector(dataset, collate, schedule)
        args, processes = self.trainer.args, selector.scorer.processes
        plan = self._plan_run(dataset, collate, schedule, selector.scorer)
        self.sampler.prepare(schedule, selector, total_steps=plan.total_steps)
        loader = build_dataloader(
            self.sampler,
            dataset,
            collate=collate,
            device=args.device,
            rank=processes.rank,
            world_size=processes.world_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
        )
        self.callback.processes = processes
        self.callback.collator = loader.collate_fn if isinstance(loader.collate_fn, SlotCollator) else None
        self.callback.plan = plan
        return loader

    def on_get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """A step whose rows are all fillers has no label token; its zero loss must not be divided by zero."""
        batch_samples, num_items_in_batch = original(*args, **kwargs)
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        elif num_items_in_batch == 0:
            num_items_in_batch = 1
        return batch_samples, num_items_in_batch

    def on_log(self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """SPICE's averages join the dict of a training log, the only one every reporter and `log_history` see."""
        if "loss" in logs:
            logs.update(self.callback.take_metrics())
        elif logs.get("train_runtime") and "train_samples_per_second" in logs:
            # The trainer assumes that every row of the dataset was trained on.
            trained = self.callback.totals.num_trained - self.callback.num_trained_before
            logs["train_samples_per_second"] = round(trained / logs["train_runtime"], 3)
        return original(logs, *args, **kwargs)

    def on_save_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A checkpoint gets SPICE's state before it is pushed, rotated, or marked complete by the trainer's state."""
        result = original(*args, **kwargs)
        output_dir = kwargs.get("output_dir", args[0] if args else None)
        if output_dir is None or not self.trainer.is_in_train:
            return result
        if os.path.basename(output_dir).startswith(f"{PREFIX_CHECKPOINT_DIR}-") and self.trainer.args.should_save:
            self.callback.save_state(output_dir)
        return result

    def on_inner_training_loop(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Tells the callback which checkpoint is resumed, before the loader is built."""
        self.callback.resume_from = kwargs.get("resume_from_checkpoint")
        try:
            return original(*args, **kwargs)
        finally:
            # Also after an exception; and a loader that is iterated outside a run must not append to its records.
            self.callback.close_records()
            self.sampler.close()

    # Parts

    def _training_rows(self, get_loader: Callable[[], DataLoader[Any]]) -> tuple[Any, Callable[..., Any]]:
        """Dataset and collator of the trainer's own loader: unused columns removed, subclass overrides respected."""
        trainer = self.trainer
        loaders = trainer.accelerator._dataloaders
        num_loaders = len(loaders)
        signature_columns = getattr(trainer, "_signature_columns", None)
        try:
            with preserved_random_state(trainer.args.device):
                loader = get_loader()
        finally:
            # The accelerator keeps every loader it prepared, though this one is never iterated, and the trainer the
            # columns it found the model to take.
            del loaders[num_loaders:]
            trainer._signature_columns = signature_columns
        return loader.dataset, loader.collate_fn

    def _build_schedule(self, dataset: Any) -> PoolSchedule:
        args = self.trainer.args
        return build_schedule(
            self.sampler.config,
            len(dataset),
            per_device_train_batch_size=self.trainer._train_batch_size,
            num_slots=args.world_size * args.gradient_accumulation_steps,
            token_normalized=is_token_normalized(self.trainer),
            drop_last=args.dataloader_drop_last,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

    def _build_selector(self, dataset: Any, collate: Callable[..., Any], schedule: PoolSchedule) -> StepSelector:
        def get_model() -> nn.Module:
            model: nn.Module = self.trainer.model
            return model

        return build_selector(
            self.sampler.config,
            schedule,
            get_model=get_model,
            rows=describe_rows(self.trainer, dataset, collate),
            proxy=self.sampler.proxy,
            autocast=self.trainer.accelerator.autocast,
            processes=Processes.of(self.trainer.accelerator),
        )

    def _sample_rows(self, dataset: Any, collate: Callable[..., Any]) -> list[CandidateRow]:
        return sample_rows(dataset, collate, device=self.trainer.args.device)

    def _plan_run(
        self, dataset: Any, collate: Callable[..., Any], schedule: PoolSchedule, scorer: GradientScorer
    ) -> RunPlan:
        args, proxy = self.trainer.args, self.sampler.proxy
        rows = self._sample_rows(dataset, collate)
        candidates = rows if proxy is None else self._sample_rows(scorer.dataset, scorer.collate)
        total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * schedule.steps_per_epoch)
        pool_size = min(schedule.pool_size, schedule.num_rows)
        num_pools = scorer.pools_at_once(schedule.shape.pools_per_step, pool_size)
        return RunPlan(
            num_rows=schedule.num_rows,
            total_steps=total,
            dimension=scorer.dimension,
            num_features=scorer.num_features,
            feature_bytes=scorer.feature_bytes(num_pools, num_pools * pool_size),
            num_processes=scorer.processes.world_size,
            mean_row_tokens=sum(row.num_tokens for row in rows) / len(rows),
            mean_candidate_tokens=sum(row.num_tokens for row in candidates) / len(candidates),
            num_proxy_parameters=None if proxy is None else num_parameters(proxy.model),
            token_normalized=not schedule.shape.equal_slots,
        )
