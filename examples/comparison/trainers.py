"""One Trainer for each kind of arm: the same arguments, model and rows, another choice of what a step trains on.

`full` and, until a pool's picks can be drawn at random by [`SpiceConfig`], `random` train on rows in an order that is
known beforehand; a plain Trainer reads them one after the other, so that it resumes exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler, SequentialSampler
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from comparison.prepared import TokenRow
from comparison.settings import Arm, Settings
from spice_trainer import SpiceConfig, attach_spice
from spice_trainer.sampling.schedule import PoolSchedule, build_schedule


class OrderedTrainer(Trainer):
    """A Trainer that takes its rows in their order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)


def arm_config(settings: Settings, arm: Arm) -> SpiceConfig:
    """The settings of an arm that selects; `random` is the strategy of that name."""
    config = settings.spice_config(arm)
    if arm.kind == "random":
        config.strategy = "random"
    return config


def pools_of(settings: Settings, arm: Arm, num_rows: int, seed: int) -> PoolSchedule:
    """The pools that an arm picks from."""
    return build_schedule(
        settings.spice_config(arm),
        num_rows,
        per_device_train_batch_size=settings.micro_batch_size,
        num_slots=settings.batch_size // settings.micro_batch_size,
        token_normalized=True,
        drop_last=False,
        seed=seed,
    )


def check_arms(settings: Settings, num_rows: int, num_steps: int) -> None:
    """Check that every arm's epoch has the comparison's steps.

    Raises:
        ValueError: Naming the arm that has fewer.
    """
    for arm in settings.arms:
        found = pools_of(settings, arm, num_rows, 0).steps_per_epoch
        if arm.kind != "full" and found < num_steps:
            raise ValueError(
                f"An epoch of the arm {arm.name!r} has {found} steps, fewer than the comparison's {num_steps}: its "
                f"fields {sorted(arm.fields)} make it draw more candidates a step. Give it the comparison's "
                "pool_size, num_selected and pools_per_step."
            )


def row_order(num_rows: int, seed: int) -> list[int]:
    """The order in which the arm `full` trains on all rows.

    Args:
        num_rows (`int`): Training rows.
        seed (`int`): The run's seed.
    """
    generator = torch.Generator().manual_seed(int(hashlib.sha256(f"full {seed}".encode()).hexdigest()[:15], 16))
    return list(torch.randperm(num_rows, generator=generator).tolist())


def build_trainer(
    settings: Settings,
    arm: Arm,
    model: PeftModel,
    tokenizer: Any,
    rows: Sequence[TokenRow],
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
        rows (`Sequence[TokenRow]`): Training rows.
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
    dataset = Dataset.from_list([row.features() for row in rows])
    selects = arm.kind != "full"
    if not selects:
        dataset = dataset.select(row_order(len(rows), seed))
    args = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": num_steps,
            "per_device_train_batch_size": settings.micro_batch_size,
            "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
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
    trainer = (Trainer if selects else OrderedTrainer)(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    if selects:
        attach_spice(trainer, arm_config(settings, arm))
    return trainer
