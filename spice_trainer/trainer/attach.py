"""SPICE in a Hugging Face Trainer: `attach_spice`, `detach_spice`, and classes for people who own theirs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from spice_trainer.config import SpiceConfig
from spice_trainer.distributed import Processes, wait_for_all
from spice_trainer.proxy.model import ProxyModel, resolve_proxy
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.trainer.checks import check_trainer, is_training
from spice_trainer.trainer.handle import SpiceHandle
from spice_trainer.trainer.hooks import NOT_ATTACHED, SpiceHooks
from spice_trainer.utils.logging import logger, show_messages

_FIX_ATTACHING = (
    "Likely cause: a condition such as `if trainer.is_world_process_zero():` around it, or an error there, with its "
    "traceback in that process's output. Fix: call attach_spice on every process."
)


def attach_spice(
    trainer: Any,
    config_or_sampler: SpiceConfig | SpiceSampler | None = None,
    *,
    proxy: ProxyModel | None = None,
    validation_dataset: Any = None,
    verify: bool = True,
) -> SpiceHandle:
    """Makes a trainer train each step on what SPICE picks. Call it after building the trainer, before `train()`.

    Everything that can be checked is checked here: the settings against the batch size and dataset, what of the
    model trains, the collator, the memory, and (with `verify`) the sample gradients against plain autograd.

    Args:
        trainer (`transformers.Trainer`):
            A trainer of a causal language model, with an adapter or in full; `trl.SFTTrainer` and other subclasses
            too.
        config_or_sampler ([`SpiceConfig`] or [`SpiceSampler`], *optional*):
            Settings, or a sampler with settings. Defaults to `SpiceConfig()`. Attaching again with the same settings
            does nothing and returns the same handle.
        proxy ([`ProxyModel`], *optional*):
            A small model that scores instead of the trainer's. Without one, `config.proxy_model_name_or_path` is
            loaded, if it is set.
        validation_dataset (`datasets.Dataset`, `list` or `dict` of these, *optional*):
            Rows like those that the model shall do well on, in one set or several named ones, prepared as the trainer
            prepares its own. For rules that aim at them; the first `config.validation_rows` of each set are read, and
            never trained on. `"less"` takes the trainer's `eval_dataset` where there is none.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to compare the batched sample gradients of two short rows with autograd's first.

    Returns:
        [`SpiceHandle`]: The plan of the run, the sampler and its totals, and `detach()`.

    Raises:
        TypeError: If the trainer or the settings are of another type.
        ValueError: If something rules SPICE out; the message says what and how to fix it.
        RuntimeError: If the trainer trains already, or not every process attaches.
        GradientMismatchError: If `verify` finds that gradients would be wrong on this model.

    Example:
    ```python
    >>> trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, peft_config=LoraConfig())
    >>> attach_spice(trainer, SpiceConfig())
    >>> trainer.train()
    ```
    """
    if config_or_sampler is None:
        config_or_sampler = SpiceConfig()
    if not isinstance(config_or_sampler, SpiceConfig | SpiceSampler):
        raise TypeError(
            f"attach_spice needs a SpiceConfig or a SpiceSampler, got {type(config_or_sampler).__name__}. Write "
            "`attach_spice(trainer, SpiceConfig(pool_size=..., num_selected=...))`."
        )
    if isinstance(config_or_sampler, SpiceSampler) and proxy is not None:
        raise ValueError(
            "A SpiceSampler brings its own proxy: pass it there, `SpiceSampler(config, proxy)`, and not to "
            "attach_spice."
        )
    check_trainer(trainer)
    attached = getattr(trainer, "_spice", None)
    if isinstance(attached, SpiceHooks):
        _check_same(attached, config_or_sampler, proxy, validation_dataset)
        return attached.handle
    if is_training(trainer):
        raise RuntimeError(
            "attach_spice was called while the trainer trains, such as in a callback's on_train_begin: its loader is "
            "made already, and would go on without SPICE. Fix: attach after building the trainer, before `train()`."
        )
    wait_for_all(Processes.of(trainer.accelerator), "attach", "attach_spice was called", _FIX_ATTACHING)
    sampler = config_or_sampler
    if isinstance(sampler, SpiceConfig):
        sampler = SpiceSampler(sampler, proxy)
    show_messages(is_main=trainer.is_world_process_zero())
    if sampler.progress is not None:
        raise ValueError(
            "This SpiceSampler is attached to another trainer, whose picks it follows. Build a SpiceSampler for each "
            "trainer, or call detach_spice on the other one first."
        )
    sampler.proxy = resolve_proxy(sampler.proxy, sampler.config, device=trainer.args.device, seed=trainer.args.seed)
    hooks = SpiceHooks(trainer, sampler, validation_dataset)
    hooks.check(verify=verify)
    hooks.install()
    return hooks.handle


def _check_same(
    hooks: SpiceHooks, wanted: SpiceConfig | SpiceSampler, proxy: ProxyModel | None, validation_dataset: Any
) -> None:
    """Attaching again is nothing new with the same settings, as when a notebook's cell runs twice; else an error."""
    attached, is_same_target = hooks.sampler, validation_dataset is hooks.validation_dataset
    config = wanted.config if isinstance(wanted, SpiceSampler) else wanted
    wanted_proxy = wanted.proxy if isinstance(wanted, SpiceSampler) else proxy
    # One that the settings name was loaded when they were attached.
    is_same_proxy = wanted_proxy is attached.proxy or (wanted_proxy is None and config.proxy_model_name_or_path)
    if config == attached.config and is_same_proxy and is_same_target:
        logger.info("SPICE: attached to this trainer already, with the same settings.")
        return
    differing = [
        f"{name} is {value} and would be {getattr(config, name)}"
        for name, value in attached.config.to_dict().items()
        if getattr(config, name) != value
    ] or ["the proxy would be another" if is_same_target else "the validation_dataset would be another"]
    raise ValueError(
        f"SPICE is attached to this trainer already, with other settings: {'; '.join(differing)}. Call "
        "detach_spice(trainer) first."
    )


def detach_spice(trainer: Any) -> None:
    """Undoes [`attach_spice`]: every attribute of the trainer is as before.

    Args:
        trainer (`transformers.Trainer`): A trainer with SPICE attached.

    Raises:
        ValueError: If SPICE is not attached.
        RuntimeError: If the trainer trains.
    """
    hooks = getattr(trainer, "_spice", None)
    if not isinstance(hooks, SpiceHooks):
        raise ValueError(NOT_ATTACHED)
    hooks.remove()


class SpiceTrainerMixin:
    """Adds SPICE to a trainer class: `class MyTrainer(SpiceTrainerMixin, SFTTrainer)`.

    Args:
        sampler ([`SpiceSampler`] or [`SpiceConfig`], *optional*):
            Picks the rows. Defaults to `SpiceSampler(SpiceConfig())`.
        validation_dataset (*optional*):
            As in [`attach_spice`].
        args and kwargs:
            As the trainer class takes them.
    """

    def __init__(
        self,
        *args: Any,
        sampler: SpiceSampler | SpiceConfig | None = None,
        validation_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        attach_spice(self, sampler, validation_dataset=validation_dataset)


class SpiceTrainer(SpiceTrainerMixin, Trainer):
    """`Trainer` that trains each step on what SPICE picks: `SpiceTrainer(..., sampler=SpiceSampler())`."""
