"""What is checked when SPICE is attached: that this run can be scored, and that its sample gradients are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainingArguments

from spice_trainer.compatibility import check_memory, warn_of_arguments, warn_of_schedule
from spice_trainer.config import SpiceConfig
from spice_trainer.kernels import changes_when_training_begins, warn_of_quantization
from spice_trainer.logs import logger
from spice_trainer.pools import PoolSchedule
from spice_trainer.rows import CandidateRow
from spice_trainer.scoring import GradientScorer, input_device
from spice_trainer.sharded_verification import verify_directions
from spice_trainer.verification import has_whole_weights, verify_gradients


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
        schedule ([`~spice_trainer.pools.PoolSchedule`]): Candidates of every step.
        scorer ([`~spice_trainer.scoring.GradientScorer`]): Scores them.
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
        scorer ([`~spice_trainer.scoring.GradientScorer`]): Its processes all call this.
        rows (`Sequence[CandidateRow]`): Some rows; the two shortest with labels are used.

    Returns:
        `Callable`, *optional*: What to call when training has begun, on every process: where weights are partitioned,
        are not on their device yet, or the trainer replaces layers as it begins.

    Raises:
        GradientMismatchError: If gradients are wrong.
    """
    shortest = sorted((row for row in rows if row.num_label_tokens > 0), key=lambda row: row.num_tokens)[:2]
    model, accelerator, processes = trainer.model, trainer.accelerator, scorer.processes

    def verify_when_wrapped() -> None:
        error = verify_directions(
            trainer.model, scorer.modules, shortest, device=scorer.device, autocast=accelerator.autocast
        )
        logger.debug("SPICE: sample gradients agree with autograd to %.2g.", error)

    # FSDP moves a model to its device as it shards it; until then only the main process may have its weights.
    is_ready = has_whole_weights(model) and input_device(model).type == accelerator.device.type
    is_ready = processes.broadcast(is_ready)
    if is_ready:
        with processes.failing_together("verifying the sample gradients"):
            if processes.is_main:
                error = verify_gradients(
                    model, scorer.modules, shortest, device=input_device(model), autocast=accelerator.autocast
                )
                logger.debug("SPICE: sample gradients agree with autograd to %.2g.", error)
    return verify_when_wrapped if not is_ready or changes_when_training_begins(trainer.args) else None
