"""Binding a sampler to a loop of one's own: what a Trainer would tell it, from arguments and an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import DataLoader

from spice_trainer.data.checks import vocabulary_size
from spice_trainer.data.rows import TargetRows
from spice_trainer.distributed import Processes, without_wrapper
from spice_trainer.proxy.model import resolve_proxy
from spice_trainer.sampling.build import build_selector, check_optimizer
from spice_trainer.sampling.loader import build_dataloader
from spice_trainer.sampling.schedule import build_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spice_trainer.sampling.sampler import SpiceSampler


def bind_sampler(
    sampler: SpiceSampler,
    model: nn.Module,
    dataset: Any,
    *,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    per_device_train_batch_size: int,
    gradient_accumulation_steps: int,
    accelerator: Accelerator | None,
    token_normalized: bool,
    drop_last: bool,
    seed: int,
    processing_class: Any,
    validation_dataset: Any,
    optimizer: Any,
) -> DataLoader[Any]:
    """Does what [`SpiceSampler.bind`] says; its arguments and errors are described there.

    Returns:
        `torch.utils.data.DataLoader`: An epoch an iteration.
    """
    processes = Processes() if accelerator is None else Processes.of(accelerator)
    model = without_wrapper(model)
    schedule = build_schedule(
        sampler.config,
        len(dataset),
        per_device_train_batch_size=per_device_train_batch_size,
        num_slots=processes.world_size * gradient_accumulation_steps,
        token_normalized=token_normalized,
        drop_last=drop_last,
        seed=seed,
    )
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    sampler.proxy = resolve_proxy(sampler.proxy, sampler.config, device=device, seed=seed)
    if sampler.proxy is None or sampler.config.proxy_check_pools > 0:
        check_optimizer(optimizer, sampler.config)
    size = vocabulary_size(model)
    rows = TargetRows(dataset, collate, processing_class=processing_class, vocab_size=size)
    selector = build_selector(
        sampler.config,
        schedule,
        get_model=lambda: model,
        rows=rows,
        proxy=sampler.proxy,
        validation=None if validation_dataset is None else replace(rows, dataset=validation_dataset),
        autocast=None if accelerator is None else accelerator.autocast,
        processes=processes,
        get_optimizer=lambda: optimizer,
    )
    sampler.prepare(schedule, selector)
    return build_dataloader(
        sampler,
        dataset,
        collate=collate,
        device=device,
        rank=processes.rank,
        world_size=processes.world_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
