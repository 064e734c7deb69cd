"""Everything that can be checked of a Trainer before it trains with SPICE.

What cannot be right is refused with what, why and the fix; what fits badly is warned about with the value to use.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainingArguments

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import check_dataset, embedding_size
from spice_trainer.data.rows import CandidateRow
from spice_trainer.distributed import Processes, check_parallelism
from spice_trainer.gradients.backends import (
    changes_when_training_begins,
    is_sharded,
    must_score_alone,
    num_values,
    score_unpadded,
    warn_of_quantization,
)
from spice_trainer.gradients.forward import base_model, forward_parameters
from spice_trainer.gradients.hidden_states import states_are_alone
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.unscored import unscored_share
from spice_trainer.gradients.verification import verify_directions, verify_gradients
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.sampling.schedule import PoolSchedule
from spice_trainer.scoring.memory import check_memory
from spice_trainer.scoring.passes import input_device
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.trainer.objective import check_objective
from spice_trainer.utils.logging import logger

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def check_trainer(trainer: Any) -> None:
    """Refuses trainers and arguments that SPICE cannot select for."""
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"attach_spice needs a transformers.Trainer or a subclass such as trl.SFTTrainer, got "
            f"{type(trainer).__name__}. In a loop of your own use `SpiceSampler(config).bind(model, dataset, ...)`."
        )
    check_objective(trainer)
    args = trainer.args
    check_dataset(trainer.train_dataset, may_be_stream=True)
    if args.n_gpu > 1:
        raise ValueError(
            f"The trainer would run torch.nn.DataParallel over {args.n_gpu} GPUs, whose replicas bypass the hooks "
            "that SPICE reads gradients with. Make a single GPU visible with `CUDA_VISIBLE_DEVICES=0`."
        )
    check_parallelism(trainer.accelerator)
    if args.world_size > 1 and args.accelerator_config.split_batches:
        raise ValueError(
            "accelerator_config has split_batches=True, under which a batch is cut into parts for the processes. "
            "SPICE deals its picks to them itself: set split_batches=False, and per_device_train_batch_size to what "
            f"each of the {args.world_size} processes gets."
        )
    if getattr(trainer, "hp_search_backend", None) is not None:
        raise ValueError("SPICE cannot be attached during a hyperparameter search. Attach it to a single run.")


def is_training(trainer: Any) -> bool:
    """Whether this is called from within the trainer's `train()`.

    Its own `is_in_train` stays set after a run that was interrupted, and is reset before the last callbacks.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_inner_training_loop" and frame.f_locals.get("self") is trainer:
            return True
        frame = frame.f_back
    return False


def warn_of_arguments(args: TrainingArguments) -> None:
    """Warns of data loading arguments that have no effect with SPICE, and of a launch that fell apart."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and args.world_size == 1:
        # accelerate 1.15 and transformers 5.23 do so without a word on machines without a GPU.
        logger.warning(
            "SPICE: %d processes were launched, but this one trains alone, and so does each of the others. On CPUs "
            "set use_cpu=True in TrainingArguments, or ACCELERATE_USE_CPU=true, to train together.",
            launched,
        )
    if args.dataloader_num_workers > 0:
        logger.warning(
            "SPICE: dataloader_num_workers=%d has no effect. A step's rows are known only when it begins, so they are "
            "loaded in the main process.",
            args.dataloader_num_workers,
        )
    strategy = getattr(args, "train_sampling_strategy", "random")
    if strategy != "random" or getattr(args, "group_by_length", False):
        logger.warning(
            "SPICE: %s has no effect. SPICE decides which rows a step trains on.",
            "group_by_length" if getattr(args, "group_by_length", False) else f"train_sampling_strategy={strategy!r}",
        )


def warn_of_schedule(args: TrainingArguments, *, steps_per_epoch: int, num_rows: int, samples_per_step: int) -> None:
    """Warns, with the value to use instead, of arguments in steps that were meant for an epoch of all samples."""
    plain, total = math.ceil(num_rows / samples_per_step), count_steps(args, steps_per_epoch)
    if args.max_steps > 0 and args.max_steps > math.ceil(args.num_train_epochs * steps_per_epoch):
        epochs, plain_epochs = args.max_steps / steps_per_epoch, args.max_steps / plain
        logger.warning(
            "SPICE: max_steps=%d goes %.3g times through the training samples as candidates, where without SPICE it "
            "goes %.3g times: an epoch has %d steps instead of %d. Use max_steps=%d for one epoch.",
            args.max_steps, epochs, plain_epochs, steps_per_epoch, plain, steps_per_epoch,
        )  # fmt: skip
    for name, value, used in (
        ("save_steps", args.save_steps, args.save_strategy == "steps"),
        ("eval_steps", args.eval_steps, args.eval_strategy == "steps"),
        ("logging_steps", args.logging_steps, args.logging_strategy == "steps"),
        ("warmup_steps", args.warmup_steps, True),
    ):
        # Values below 1 are shares of the run, which follow its length.
        if not used or value is None or value < 1 or value <= total:
            continue
        fitting = max(1, min(total, round(value * steps_per_epoch / plain)))
        logger.warning(
            "SPICE: %s=%d exceeds the run of %d optimizer steps (an epoch has %d steps instead of %d). Use %s=%d.",
            name, value, total, steps_per_epoch, plain, name, fitting,
        )  # fmt: skip


def count_steps(args: TrainingArguments, steps_per_epoch: int) -> int:
    """Optimizer steps of a run whose epochs have so many."""
    return int(args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch))


def check_run(
    args: TrainingArguments,
    schedule: PoolSchedule,
    scorer: GradientScorer,
    rows: Sequence[CandidateRow],
    *,
    config: SpiceConfig,
) -> None:
    """Warns of what fits badly, and refuses a run without memory for a pool or without labels."""
    warn_of_arguments(args)
    warn_of_quantization(scorer.get_model())
    # A stream's run has the steps it would have without SPICE.
    if not schedule.has_open_end:
        warn_of_schedule(
            args,
            steps_per_epoch=schedule.steps_per_epoch,
            num_rows=schedule.num_rows,
            samples_per_step=schedule.shape.samples_per_step,
        )
    check_repeats(args, schedule, config)
    check_memory(scorer, min(schedule.pool_size, schedule.num_rows), config)
    check_kinds(rows, scorer.processes)
    if not any(row.num_label_tokens > 0 for row in rows):
        raise ValueError(
            f"None of {len(rows)} rows looked at has a label token (all labels are -100), so nothing could be trained "
            "or scored. Look at the prompt masking and at `max_length`."
        )


def check_kinds(rows: Sequence[CandidateRow], processes: Processes) -> None:
    """Refuses rows with and without images where every process must call the same modules."""
    by_kind = {row.other_inputs: row.index for row in rows}
    if len(by_kind) < 2 or () not in by_kind or not (processes.lockstep and processes.world_size > 1):
        return
    named, index = next((", ".join(names), index) for names, index in by_kind.items() if names)
    raise ValueError(
        f"Row {index} of the training dataset has {named} and row {by_kind[()]} has not, and FSDP or ZeRO-3 shards "
        "the weights: a process with the first gathers a vision tower's from all others, which wait for something "
        "else, and none goes on. Fix: give rows of text a blank image, train on rows of one kind, or use DDP."
    )


def check_repeats(args: TrainingArguments, schedule: PoolSchedule, config: SpiceConfig) -> None:
    """Refuses a run that needs more picks than `max_repeats` leaves it."""
    if config.max_repeats is None or schedule.has_open_end or config.is_adaptive:
        return
    steps = count_steps(args, schedule.steps_per_epoch)
    if config.selection_epochs is not None:
        steps = min(steps, config.selection_epochs * schedule.steps_per_epoch)
    num_picks, num_rows = steps / schedule.steps_per_epoch * schedule.samples_per_epoch, schedule.num_rows
    if num_picks > (1 + config.max_repeats) * num_rows:
        raise ValueError(
            f"SpiceConfig: max_repeats={config.max_repeats} lets {num_rows:,} rows be picked "
            f"{(1 + config.max_repeats) * num_rows:,} times, and {steps:,} steps pick {num_picks:,.0f}. Fix: set "
            f"max_repeats to at least {math.ceil(num_picks / num_rows) - 1}, or train fewer epochs."
        )


def verify_run(trainer: Any, scorer: GradientScorer, rows: Sequence[CandidateRow]) -> Callable[[], None] | None:
    """Compares sample gradients with autograd's, now and, where that tells too little, when training begins.

    Returned is what to call then, on every process: where weights are partitioned or not on their device yet, or the
    trainer replaces layers as it begins.
    """
    model, accelerator, processes = scorer.get_model(), trainer.accelerator, scorer.processes
    settings: dict[str, Any] = {"autocast": accelerator.autocast, "label_loss": scorer.runtime.label_loss}
    is_target, shortest = model is trainer.model, _shortest(rows)

    def verify_when_wrapped() -> None:
        scorer.follow(is_told=False)
        error = verify_directions(scorer.get_model(), scorer.modules, shortest, device=scorer.device, **settings)
        logger.debug("SPICE: sample gradients agree with autograd to %.2g.", error)

    is_ready = _is_ready(trainer, scorer)
    if is_ready:
        with processes.failing_together("verifying the sample gradients"):
            if processes.is_main:
                error = verify_gradients(model, scorer.modules, shortest, device=input_device(model), **settings)
                logger.debug("SPICE: sample gradients agree with autograd to %.2g.", error)
        if processes.broadcast(must_score_alone(model)) and not must_score_alone(model):
            score_unpadded(model)
    changes = is_target and changes_when_training_begins(trainer.args)
    return verify_when_wrapped if not is_ready or changes else None


def check_hidden_states(trainer: Any, scorer: GradientScorer, rows: Sequence[CandidateRow]) -> None:
    """Looks at two rows' hidden states, where the main process can run the model by itself. A collective."""
    model, processes, is_alone = scorer.get_model(), scorer.processes, True
    if scorer.hidden is None or not _is_ready(trainer, scorer):
        return
    with processes.failing_together("looking at hidden states"), trainer.accelerator.autocast():
        if processes.is_main:
            is_alone = states_are_alone(model, scorer.hidden.layer, _shortest(rows)[:2], input_device(model))
    if not processes.broadcast(is_alone) and not must_score_alone(model):
        score_unpadded(model, "hidden states")


def _shortest(rows: Sequence[CandidateRow]) -> list[CandidateRow]:
    """Of each kind of rows the two shortest with labels."""
    kinds: dict[tuple[str, ...], list[CandidateRow]] = {}
    for row in sorted((row for row in rows if row.num_label_tokens > 0), key=lambda row: row.num_tokens):
        kinds.setdefault(row.shape.keys, []).append(row)
    return [row for of_kind in kinds.values() for row in of_kind[:2]]


def _is_ready(trainer: Any, scorer: GradientScorer) -> bool:
    """Whether the main process can run the model by itself. A collective."""
    model = scorer.get_model()
    # Of a model that will be sharded only the main process may have the weights yet. A forward there alone would also
    # leave it another model: transformers adds hooks when hidden states are first asked for, before ZeRO-3's or after.
    if scorer.processes.lockstep:
        return False
    # FSDP moves a model to its device as it shards it; until then only the main process may have its weights.
    is_there = model is not trainer.model or input_device(model).type == trainer.accelerator.device.type
    return scorer.processes.broadcast(not is_sharded(model) and is_there)


def warn_of_unscored(trainer: Any, scorer: GradientScorer, rows: Sequence[CandidateRow]) -> None:
    """Says what trains and does not score under `scoring_parameters="lora"`, and how much of the gradient that is.

    A collective.
    """
    if scorer.config.scoring_parameters != "lora":
        return
    model, scored = scorer.get_model(), scorer.trained.modules
    trained = find_trained_modules(model)
    left_out = [name for name in trained if name not in scored]
    if not left_out:
        return
    share = "of a share of the gradient that is not known where weights are sharded"
    is_ready = _is_ready(trainer, scorer)
    with scorer.processes.failing_together("measuring what is left out of the score"):
        if is_ready and scorer.processes.is_main:
            measured = unscored_share(
                model,
                trained,
                scored,
                _shortest(rows),
                device=input_device(model),
                autocast=trainer.accelerator.autocast,
                label_loss=scorer.runtime.label_loss,
            )
            share = f"with {measured:.1%} of a row's squared gradient norm at these weights"
    logger.warning(
        'SPICE: scoring_parameters="lora" leaves %d modules that train out of the score (%s), %s. '
        'scoring_parameters="all" takes them in.',
        len(left_out),
        ", ".join(left_out[:3]) + (" ..." if len(left_out) > 3 else ""),
        share,
    )


def check_proxy(proxy: ProxyModel, target: nn.Module, *, device: torch.device, rows: Sequence[CandidateRow]) -> None:
    """Refuses a proxy that cannot read the rows, and warns of one that hardly pays."""
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
    takes, named = forward_parameters(proxy.model), sorted({name for row in rows for name in row.other_inputs})
    if "input_ids" in takes and not takes.keys() >= set(named):
        raise ValueError(
            f"The training rows have {', '.join(named)}, and the proxy ({type(base_model(proxy.model)).__name__}) "
            "reads token ids alone: it would take the tokens that stand for images for words. Fix: a proxy that reads "
            "images, such as a smaller model of the target's family, or `ProxyModel(..., processing_class=...)` with "
            "another tokenizer of its own, by which it reads the rows' text alone."
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
    """Weights of a model."""
    return sum(num_values(parameter) for parameter in model.parameters())


def check_adapter_is_saved(model: nn.Module, *, is_resumed: bool) -> None:
    """Warns before training that checkpoints will lack the adapter, and refuses to resume from one that does.

    With PEFT 0.21 they lack it under FSDP1: PEFT looks in the full state dict for names that it makes from the model's
    modules, and every layer that FSDP1 wraps adds `_fsdp_wrapped_module` to them. The adapter file is then written
    empty, and resuming goes on from the weights the run began with, both without a word.
    """
    # By name: torch builds without distributed support have no such class.
    if type(model).__name__ != "FullyShardedDataParallel" or finds_adapter(model):
        return
    problem = (
        f"PEFT {peft.__version__} does not find the adapter in a model that FSDP1 has wrapped, so a checkpoint's "
        "adapter file is empty"
    )
    fix = 'Use FSDP2: `fsdp_version: 2` in the accelerate configuration, or `fsdp_config={"version": 2}`'
    if is_resumed:
        raise ValueError(
            f"This run cannot be resumed: {problem} and nothing of it is loaded. Training would go on from the "
            f"adapter's initial weights with the optimizer's later state. {fix}, and start anew."
        )
    logger.warning("SPICE: %s, and so will be what is saved at the end. %s.", problem, fix)


def finds_adapter(model: nn.Module) -> bool:
    """Whether PEFT finds adapter weights among a wrapped model's names, as they stand in its full state dict.

    PEFT itself is asked, with names alone, so that a release that finds them needs no change here.
    """
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if peft_model is None:
        return True
    prefix = next(name for name, module in model.named_modules() if module is peft_model)
    names = [name.removeprefix(f"{prefix}.") for name, _ in model.named_parameters()]
    state_dict = {_plain(name): torch.empty(0, device="meta") for name in names}
    return bool(get_peft_model_state_dict(peft_model, state_dict=state_dict))


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
