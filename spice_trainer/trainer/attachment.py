"""What is checked when SPICE is attached: that this run can be scored, and that its sample gradients are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import CandidateRow
from spice_trainer.gradients.backends import changes_when_training_begins, warn_of_quantization
from spice_trainer.gradients.verification import has_whole_weights, verify_directions, verify_gradients
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.proxy.rows import TargetRows, embedding_size, vocabulary_size
from spice_trainer.sampling.schedule import PoolSchedule
from spice_trainer.scoring.passes import input_device
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.trainer.checks import check_memory, warn_of_arguments, warn_of_schedule
from spice_trainer.utils.logging import logger


def check_run(
    args: TrainingArguments,
    schedule: PoolSchedule,
    scorer: GradientScorer,
    rows: Sequence[CandidateRow],
    *,
    config: SpiceConfig,
) -> None:
    """Warns of what fits badly, and refuses a run without memory for a pool or without labels.

    Args:
        args (`transformers.TrainingArguments`): The trainer's arguments.
        schedule ([`PoolSchedule`]): Candidates of every step.
        scorer ([`GradientScorer`]): Scores them.
        rows (`Sequence[CandidateRow]`): Some rows of the training dataset.
        config ([`SpiceConfig`]): The settings.

    Raises:
        ValueError: With the reason.
    """
    warn_of_arguments(args)
    warn_of_quantization(scorer.get_model())
    warn_of_schedule(
        args,
        steps_per_epoch=schedule.steps_per_epoch,
        num_rows=schedule.num_rows,
        samples_per_step=schedule.shape.samples_per_step,
    )
    num_candidates = min(schedule.pool_size, schedule.num_rows)
    check_memory(
        scorer.feature_bytes(1, num_candidates),
        num_candidates,
        num_features=scorer.num_features,
        dimension=scorer.dimension,
        device=scorer.device,
        config=config,
    )
    if not any(row.num_label_tokens > 0 for row in rows):
        raise ValueError(
            f"None of {len(rows)} rows looked at has a label token (all labels are -100), so nothing could be trained "
            "or scored. Look at the prompt masking and at `max_length`."
        )


def verify_run(trainer: Any, scorer: GradientScorer, rows: Sequence[CandidateRow]) -> Callable[[], None] | None:
    """Compares sample gradients with autograd's, now and, where that tells too little, when training begins.

    Args:
        trainer (`transformers.Trainer`): The trainer; `trainer.model` is what trains once training begins.
        scorer ([`GradientScorer`]): Its processes all call this.
        rows (`Sequence[CandidateRow]`): Some rows; the two shortest with labels are used.

    Returns:
        `Callable`, *optional*: What to call when training has begun, on every process: where weights are partitioned,
        are not on their device yet, or the trainer replaces layers as it begins.

    Raises:
        GradientMismatchError: If gradients are wrong.
    """
    shortest = sorted((row for row in rows if row.num_label_tokens > 0), key=lambda row: row.num_tokens)[:2]
    model, accelerator, processes = scorer.get_model(), trainer.accelerator, scorer.processes
    is_target = model is trainer.model

    def verify_when_wrapped() -> None:
        error = verify_directions(
            scorer.get_model(), scorer.modules, shortest, device=scorer.device, autocast=accelerator.autocast
        )
        logger.debug("SPICE: sample gradients agree with autograd to %.2g.", error)

    # FSDP moves a model to its device as it shards it; until then only the main process may have its weights.
    is_ready = has_whole_weights(model) and (not is_target or input_device(model).type == accelerator.device.type)
    is_ready = processes.broadcast(is_ready)
    if is_ready:
        with processes.failing_together("verifying the sample gradients"):
            if processes.is_main:
                error = verify_gradients(
                    model, scorer.modules, shortest, device=input_device(model), autocast=accelerator.autocast
                )
                logger.debug("SPICE: sample gradients agree with autograd to %.2g.", error)
    changes = is_target and changes_when_training_begins(trainer.args)
    return verify_when_wrapped if not is_ready or changes else None


def describe_rows(trainer: Any, dataset: Any, collate: Callable[..., Any], raw_dataset: Any) -> TargetRows:
    """Rows as the target reads them, with what a proxy of another tokenizer needs to read them itself.

    Args:
        trainer (`transformers.Trainer`): The trainer.
        dataset (`Any`): Its tokenised rows, unused columns removed.
        collate (`Callable`): Its collator.
        raw_dataset (`Any`): The same rows with all columns that the trainer was given.

    Returns:
        [`TargetRows`]
    """
    args, tokenizer = trainer.args, getattr(trainer, "processing_class", None)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokenization = {
        "max_length": getattr(args, "max_length", None),
        "truncation_mode": getattr(args, "truncation_mode", "keep_start"),
        "completion_only": getattr(args, "completion_only_loss", None),
        "assistant_only": bool(getattr(args, "assistant_only_loss", False)),
        "dataset_text_field": getattr(args, "dataset_text_field", "text"),
        # SFTTrainer writes it into plain texts.
        "target_eos_token": getattr(tokenizer, "eos_token", None),
    }
    return TargetRows(
        dataset,
        collate,
        processing_class=tokenizer,
        raw_dataset=raw_dataset,
        tokenization=tokenization,
        vocab_size=vocabulary_size(trainer.model),
    )


def check_proxy(proxy: ProxyModel, target: nn.Module, *, device: torch.device, rows: Sequence[CandidateRow]) -> None:
    """Refuses a proxy that cannot read the rows, and warns of one that hardly pays.

    Args:
        proxy ([`ProxyModel`]): The proxy.
        target (`torch.nn.Module`): The model that trains.
        device (`torch.device`): Where that is.
        rows (`Sequence[CandidateRow]`): Some rows as the proxy reads them.

    Raises:
        ValueError: If a token id is beyond the proxy's vocabulary.
    """
    trained = {id(parameter) for parameter in target.parameters() if parameter.requires_grad}
    if any(id(parameter) in trained for parameter in proxy.model.parameters() if parameter.requires_grad):
        raise ValueError(
            "The proxy trains weights of the very model that it scores for, so two optimizers would change them. Fix: "
            "leave the proxy out, which lets the model score itself, or give a ProxyModel of its own."
        )
    largest = max(int(row.inputs["input_ids"].max()) for row in rows)
    if largest >= embedding_size(proxy.model):
        raise ValueError(
            f"A training row holds the token id {largest:,}, and the proxy's vocabulary ends at "
            f"{embedding_size(proxy.model) - 1:,}. It was tokenised for another model: pass "
            "`ProxyModel(..., processing_class=...)` with the proxy's own tokenizer, or a dataset tokenised by it."
        )
    ours, theirs = num_parameters(proxy.model), num_parameters(target)
    if ours > theirs:
        logger.warning(
            "SPICE: the proxy has %s parameters, more than the %s of the model it scores for, so scoring costs more "
            "than without it. Leave the proxy out, or take a smaller one.",
            f"{ours:,}",
            f"{theirs:,}",
        )
    place = input_device(proxy.model)
    if place.type == "cpu" and device.type != "cpu":
        logger.warning(
            "SPICE: the proxy is on the CPU, where scoring is slow, and training runs on %s. Move it there with "
            "`.to(device)` before ProxyModel(...).",
            device,
        )


def num_parameters(model: nn.Module) -> int:
    """Weights of a model, also where they are partitioned (DeepSpeed) or packed two to a byte (bitsandbytes)."""
    return sum(
        int(getattr(parameter, "ds_numel", parameter.numel()))
        * (2 if type(parameter).__name__ == "Params4bit" and parameter.dtype == torch.uint8 else 1)
        for parameter in model.parameters()
    )
