"""One Trainer for each kind of arm: the same arguments, model and rows, another choice of what a step trains on.

What `full`, `pool` and `domain_random` train on is known beforehand; a plain Trainer reads their rows one after the
other, so that it resumes exactly. All others pick by a strategy of [`SpiceConfig`].
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler, SequentialSampler
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from comparison.frozen import StateEmbedding
from comparison.prepared import PreparedData, rows_per_step
from comparison.settings import Arm, Settings
from comparison.tokens import TokenRow
from spice_trainer import SpiceConfig, attach_spice
from spice_trainer.sampling.schedule import PoolSchedule, build_schedule


class OrderedTrainer(Trainer):
    """A Trainer that takes its rows in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


def arm_config(settings: Settings, arm: Arm) -> SpiceConfig:
    """The settings of an arm that selects; `random` is the strategy of that name."""
    config = settings.spice_config(arm)
    if arm.kind in ("random", "same_seconds"):
        config.strategy = "random"
    return config


def pools_of(settings: Settings, arm: Arm, num_rows: int, seed: int) -> PoolSchedule:
    """The pools that an arm picks from."""
    return build_schedule(
        settings.spice_config(arm),
        num_rows,
        per_device_train_batch_size=settings.micro_batch_size,
        num_slots=settings.batch_size_of(arm) // settings.micro_batch_size,
        token_normalized=True,
        drop_last=False,
        seed=seed,
    )


def check_arms(settings: Settings, num_rows: int, num_steps: int) -> None:
    """Check that every arm's epoch has the comparison's steps.

    Args:
        settings ([`Settings`]): The comparison.
        num_rows (`int`): Training rows.
        num_steps (`int`): Steps of the comparison, over all epochs.

    Raises:
        ValueError: Naming the arm that has fewer.
    """
    for arm in settings.arms:
        found = pools_of(settings, arm, num_rows, 0).steps_per_epoch
        if arm.kind != "full" and found < num_steps // settings.num_epochs:
            raise ValueError(
                f"An epoch of the arm {arm.name!r} has {found} steps, fewer than the comparison's "
                f"{num_steps // settings.num_epochs}: its fields {sorted(arm.fields)} make it draw more candidates a "
                "step. Give it the comparison's pool_size, num_selected and pools_per_step."
            )
        if batch_size(settings, arm) % settings.micro_batch_size:
            raise ValueError(
                f"The arm {arm.name!r} trains on {batch_size(settings, arm)} rows a step, no multiple of "
                f"micro_batch_size={settings.micro_batch_size}."
            )


def batch_size(settings: Settings, arm: Arm) -> int:
    """Rows that a step of an arm trains on."""
    return rows_per_step(settings) if arm.kind == "pool" else settings.batch_size_of(arm)


def row_order(num_rows: int, seed: int, epoch: int = 0) -> list[int]:
    """The order in which the arm `full` trains on all rows.

    Args:
        num_rows (`int`): Training rows.
        seed (`int`): The run's seed.
        epoch (`int`, *optional*, defaults to 0): From 0.
    """
    name = f"full {seed}" + (f" {epoch}" if epoch else "")
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:15], 16))
    return list(torch.randperm(num_rows, generator=generator).tolist())


def ordered_rows(settings: Settings, arm: Arm, data: PreparedData, seed: int, num_steps: int) -> list[int] | None:
    """The rows that an arm trains on, one after the other; `None` for an arm that picks as it goes.

    Args:
        settings ([`Settings`]): The comparison.
        arm ([`Arm`]): The arm.
        data ([`PreparedData`]): Its rows.
        seed (`int`): The run's seed.
        num_steps (`int`): Optimizer steps.
    """
    num_rows = len(data.train)
    if arm.kind == "full":
        return [row for epoch in range(settings.num_epochs) for row in row_order(num_rows, seed, epoch)]
    if arm.kind not in ("pool", "domain_random"):
        return None
    schedule = pools_of(settings, arm, num_rows, seed)
    rows: list[int] = []
    for number in range(num_steps):
        step = schedule.pools(*divmod(number, schedule.steps_per_epoch))
        generator = random.Random(f"{arm.kind} {seed} {number}")
        for pool, budget in zip(step.pools, step.budgets, strict=True):
            if arm.kind == "pool":
                rows += pool
                continue
            # In an order of chance, the wanted ones first.
            mixed = generator.sample(pool, len(pool))
            rows += sorted(mixed, key=lambda row: not data.train[row].wanted)[:budget]
    return rows


def build_trainer(
    settings: Settings,
    arm: Arm,
    model: PeftModel,
    tokenizer: Any,
    data: PreparedData,
    *,
    seed: int,
    learning_rate: float,
    num_steps: int,
    save_steps: int,
    folder: Path,
    clock: TrainerCallback,
) -> Trainer:
    """Build the trainer of a run.

    Args:
        settings ([`Settings`]): The comparison.
        arm ([`Arm`]): What tells this run from others.
        model (`PeftModel`): With a fresh adapter.
        tokenizer (`PreTrainedTokenizerBase`): Pads.
        data ([`PreparedData`]): Training rows, and those that rules are shown of the wanted ones.
        seed (`int`): Of dropout and of the pools.
        learning_rate (`float`): The highest of the run.
        num_steps (`int`): Optimizer steps.
        save_steps (`int`): Steps from one checkpoint to the next.
        folder (`Path`): Where the run writes.
        clock (`TrainerCallback`): Called before those of SPICE.

    Returns:
        `Trainer`

    Raises:
        ValueError: If the run would use several GPUs or processes, or if SPICE cannot be attached.
    """
    dataset, target = _dataset(data.train), _dataset(data.target) if data.target else None
    order = ordered_rows(settings, arm, data, seed, num_steps)
    if order is not None:
        dataset = dataset.select(order)
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": num_steps,
            "per_device_train_batch_size": settings.micro_batch_size,
            "gradient_accumulation_steps": batch_size(settings, arm) // settings.micro_batch_size,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "constant",
            "logging_strategy": "no",
            "save_strategy": "steps",
            "save_steps": save_steps,
            "save_total_limit": 2,
            "seed": seed,
            "data_seed": seed,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings.training,
        }
    )
    if args.n_gpu > 1 or args.world_size > 1:
        raise ValueError(
            f"A comparison runs in one process on one device, and here are {args.world_size} processes with "
            f"{args.n_gpu} GPUs. Set CUDA_VISIBLE_DEVICES=0; other arms can run on other GPUs with --arms."
        )
    trainer = (Trainer if order is None else OrderedTrainer)(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    if order is None:
        config = _in_its_layers(arm_config(settings, arm), model)
        attach_spice(trainer, config, validation_dataset=target if config.takes_validation else None)
    return trainer


def _in_its_layers(config: SpiceConfig, model: PeftModel) -> SpiceConfig:
    """The settings with `hidden_layer` as a model of its last layers counts; they count the whole model's."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, StateEmbedding) or not config.takes_hidden_states:
        return config
    first, layer = embedding.num_frozen, config.hidden_layer
    total = first + model.config.num_hidden_layers
    if layer is None:
        # As SpiceConfig has it for the whole model.
        layer = first if 2 * first >= total else total * 7 // 8
    if layer < first:
        raise ValueError(
            f"hidden_layer={layer} lies below the layers that are left of this model, {first} to {total - 1}. Set "
            "frozen_states: false, or another layer."
        )
    return replace(config, hidden_layer=layer - first)


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    return Dataset.from_list([row.features() for row in rows])
