"""The sampler: from an epoch's pools to the rows each optimizer step trains on.

    epoch ─ pools ─ scores at θ_t ─ picks ─ rows of step t

A step's pools are scored when its first row is asked for, so the weights are those of its beginning.
[`SpiceSampler`] serves the Trainer (through `attach_spice`) and a hand-written loop (through [`SpiceSampler.bind`]).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Sampler

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import check_dataset, configured_vocabulary_size
from spice_trainer.data.fingerprints import fingerprint_rows
from spice_trainer.data.rows import DataCollator, TargetRows
from spice_trainer.data.sample import RowSample
from spice_trainer.data.validation_sets import checked_sets, named_sets
from spice_trainer.distributed import Processes, check_agreement, wait_for_all, without_wrapper
from spice_trainer.proxy.model import ProxyModel, resolve_proxy
from spice_trainer.sampling.build import build_selector, check_optimizer
from spice_trainer.sampling.loader import Slots, build_dataloader
from spice_trainer.sampling.run import SelectionRun
from spice_trainer.sampling.schedule import PoolSchedule, build_schedule
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.results import StepSelection
from spice_trainer.utils.random import preserved_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator


class SpiceSampler(Sampler[int]):
    """Yields the dataset rows that SPICE picks, step by step, at the current weights.

    Pass it to [`SpiceTrainer`] or [`attach_spice`], or bind it by hand in an Accelerate loop.

    Args:
        config ([`SpiceConfig`], *optional*):
            Settings. Defaults to `SpiceConfig()`.
        proxy ([`ProxyModel`], *optional*):
            Scores instead of the model that trains.

    Example:
    ```python
    >>> sampler = SpiceSampler(SpiceConfig(pool_size=120, num_selected=12))
    >>> loader = sampler.bind(model, dataset, data_collator=collator, accelerator=accelerator,
    ...                       per_device_train_batch_size=4, gradient_accumulation_steps=4)
    >>> for batch in loader:  # one epoch; exactly 4 batches per optimizer step
    ...     ...
    ```
    """

    def __init__(self, config: SpiceConfig | None = None, proxy: ProxyModel | None = None) -> None:
        self.config = config if config is not None else SpiceConfig()
        if not isinstance(self.config, SpiceConfig):
            raise TypeError(f"config must be a SpiceConfig, got {type(self.config).__name__}.")
        if not isinstance(proxy, ProxyModel | None):
            raise TypeError(f"proxy must be a ProxyModel, got {type(proxy).__name__}. Write `ProxyModel(model)`.")
        self.proxy = proxy
        self.progress: Callable[[int, int], None] | None = None
        self._listeners: list[Callable[[StepSelection], None]] = []
        self._run: SelectionRun | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A run holds the model's hooks and threads; a copy is bound anew when its training starts.
        return vars(self) | {"_run": None}

    def prepare(self, schedule: PoolSchedule, selector: StepSelector, **options: Any) -> SelectionRun:
        """Begins a run, of the options of [`SelectionRun`]."""
        self.close()
        self._run = SelectionRun(
            self.config, schedule, selector, listeners=self._listeners, progress=self.progress, **options
        )
        return self._run

    def close(self) -> None:
        """Waits for scoring that runs beside the training, at the end of a run."""
        if self._run is not None:
            self._run.close()

    def bind(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        data_collator: DataCollator,
        per_device_train_batch_size: int,
        gradient_accumulation_steps: int = 1,
        accelerator: Accelerator | None = None,
        token_normalized: bool = True,
        drop_last: bool = False,
        seed: int = 42,
        processing_class: Any = None,
        validation_dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> DataLoader[Any]:
        """Binds the sampler by hand and returns the loader to train from.

        Iterate it to train, an epoch an iteration: asking for the batch after a step's last says that the step is
        trained, and a new iteration that the epoch is over, unless none of its steps was trained. To look at rows in
        the middle of an epoch, read the dataset.

        Rows are scored by the cross-entropy of their label tokens, whatever loss your loop takes of them: a smoothed
        or weighted one is not seen here, as [`attach_spice`] sees a Trainer's.

        `accelerator.prepare` gives the loader back as it is. What fetches batches ahead, a prefetcher of your own say,
        would have a step's pools scored before the previous update, and is warned about.

        Args:
            model (`torch.nn.Module`): Model that trains, with an adapter or in full, on its device; in a run of
                several processes as `accelerator.prepare` returned it.
            dataset (`datasets.Dataset` or `torch.utils.data.Dataset`): Tokenised rows, with random access.
            data_collator (`Callable`): Makes `input_ids` and `labels` from a list of rows.
            per_device_train_batch_size (`int`): Rows of a micro-batch.
            gradient_accumulation_steps (`int`, *optional*, defaults to `1`): Micro-batches of an optimizer step.
            accelerator (`accelerate.Accelerator`, *optional*): Gives device, precision and processes. Without one: the
                model's device, this process.
            token_normalized (`bool`, *optional*, defaults to `True`):
                Whether your loss is summed over the step's micro-batches and divided by the step's label tokens. If it
                is a mean per micro-batch, set this to `False`: every micro-batch then gets equally many rows.
            drop_last (`bool`, *optional*, defaults to `False`): Drop an epoch's last step if its pools aren't full.
            seed (`int`, *optional*, defaults to `42`):
                Seed of the pools, unless the configuration sets `pool_seed`.
            processing_class (`PreTrainedTokenizerBase`, *optional*): The tokenizer of `dataset`, to tell whether a
                proxy shares it.
            validation_dataset (`datasets.Dataset` or `dict[str, datasets.Dataset]`, *optional*): Rows like those of
                `dataset` that the model shall do well on, in one set or several, for rules that aim.
            optimizer (`torch.optim.Optimizer`, *optional*): The loop's optimizer, prepared or not, for
                `gradient_preconditioning="adam"` and `conflict_reference="momentum"`.

        Returns:
            `torch.utils.data.DataLoader`: An epoch an iteration, `gradient_accumulation_steps` batches a step.

        Raises:
            ValueError: If settings, dataset and batch size don't fit, or nothing trains.
        """
        if self.progress is not None:
            raise ValueError(
                "This SpiceSampler is attached to a trainer, which binds it itself when training starts. Build "
                "another one for a loop of your own, or call detach_spice(trainer) first."
            )
        check_dataset(dataset)
        processes = Processes() if accelerator is None else Processes.of(accelerator)
        model = without_wrapper(model)
        wait_for_all(processes, "bind", "SpiceSampler.bind was called", _FIX_BINDING)
        schedule = build_schedule(
            self.config,
            len(dataset),
            per_device_train_batch_size=per_device_train_batch_size,
            num_slots=processes.world_size * gradient_accumulation_steps,
            token_normalized=token_normalized,
            drop_last=drop_last,
            seed=seed,
        )
        device = next(model.parameters()).device if accelerator is None else accelerator.device
        self.proxy = resolve_proxy(self.proxy, self.config, device=device, seed=seed)
        if self.proxy is None or self.config.proxy_check_pools > 0:
            check_optimizer(optimizer, self.config)
        rows = TargetRows(
            dataset, data_collator, processing_class=processing_class, vocab_size=configured_vocabulary_size(model)
        )
        validation: dict[str, TargetRows] | None = None
        if validation_dataset is not None:
            sets = {name: replace(rows, dataset=given) for name, given in named_sets(validation_dataset).items()}
            with preserved_random_state(device):
                validation = checked_sets(sets, dataset, self.config.validation_rows)
        selector = build_selector(
            self.config,
            schedule,
            Runtime(
                get_model=lambda: model,
                seed=schedule.seed,
                processes=processes,
                autocast=nullcontext if accelerator is None else accelerator.autocast,
                get_optimizer=lambda: optimizer,
            ),
            rows,
            proxy=self.proxy,
            validation=validation,
        )
        selector.gradient_scorer.check_validation()
        if processes.world_size > 1:
            with processes.failing_together("reading some rows"):
                fingerprint = fingerprint_rows(RowSample.read(dataset, device=device))
            seen = {
                "the number of rows": len(dataset),
                "the fingerprint of the rows' content": fingerprint,
                "what is known of the validation rows": selector.gradient_scorer.describe_validation(),
            }
            check_agreement(processes, seen | {"the settings": self.config, "the seed": schedule.seed})
        run = self.prepare(schedule, selector, dataset=dataset)
        _watch_updates(run, model)
        slots = Slots(processes.rank, processes.world_size, gradient_accumulation_steps)
        return build_dataloader(run, dataset, collate=data_collator, device=device, slots=slots)

    @property
    def run(self) -> SelectionRun:
        """The run that the sampler is bound to, or was last."""
        if self._run is None:
            raise RuntimeError(_NOT_BOUND)
        return self._run

    @property
    def schedule(self) -> PoolSchedule:
        """The bound schedule."""
        return self.run.schedule

    @property
    def selector(self) -> StepSelector:
        """The bound selector."""
        return self.run.selector

    @property
    def scorer(self) -> GradientScorer:
        """What runs the model that scores: the target's scorer, or the proxy's."""
        return self.selector.gradient_scorer

    def add_listener(self, listener: Callable[[StepSelection], None]) -> None:
        """Calls `listener` with every step's picks before it trains."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[StepSelection], None]) -> None:
        """Stops calling `listener`."""
        self._listeners.remove(listener)

    def __len__(self) -> int:
        """Rows of an epoch, at most."""
        return self.schedule.samples_per_epoch

    def __iter__(self) -> Iterator[int]:
        """Yields the rows of one epoch, scoring each step's pools when its first row is asked for."""
        for selection in self.run.steps() if self.run.is_drawing else self.run.preview():
            yield from selection.indices


def _watch_updates(run: SelectionRun, model: nn.Module) -> None:
    """Lets a run hear when an optimizer has updated a weight of its model, as long as the run is there."""
    weights = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    updates = run.updates

    def note(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(id(parameter) in weights for group in optimizer.param_groups for parameter in group["params"]):
            updates.is_seen = True
        else:
            updates.is_foreign = True

    finalize(run, register_optimizer_step_post_hook(note).remove)


_FIX_BINDING = (
    "Likely cause: a condition such as `if accelerator.is_main_process:` around it, or an error there, with its "
    "traceback in that process's output. Fix: call it on every process."
)
_NOT_BOUND = (
    "This SpiceSampler has no model and dataset yet. Pass it to SpiceTrainer or attach_spice, which bind it when "
    "training starts, or call `sampler.bind(model, dataset, ...)` in a loop of your own."
)
