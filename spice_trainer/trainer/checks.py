"""Everything that can be checked of a Trainer before it trains with SPICE.

What cannot be right is refused with what, why and the fix; what fits badly is warned about with the value to use.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from spice_trainer.config import SpiceConfig
from spice_trainer.distributed import Processes, check_parallelism
from spice_trainer.utils.logging import logger


def check_trainer(trainer: Any) -> None:
    """Refuses trainers and arguments that SPICE cannot select for.

    Args:
        trainer (`transformers.Trainer`): The trainer to attach to.

    Raises:
        TypeError: If it is not a `transformers.Trainer`.
        ValueError: If its dataset, model or arguments rule SPICE out.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"attach_spice needs a transformers.Trainer or a subclass such as trl.SFTTrainer, got "
            f"{type(trainer).__name__}. In a loop of your own use `SpiceSampler(config).bind(model, dataset, ...)`."
        )
    check_objective(trainer)
    args = trainer.args
    check_dataset(trainer.train_dataset)
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


def check_dataset(dataset: Any) -> None:
    """Refuses what is no dataset with rows by number.

    Args:
        dataset (`Any`): The rows to select from.

    Raises:
        ValueError: If it is missing, streamed, empty, a dict of splits or a name.
    """
    if dataset is None:
        raise ValueError("The trainer has no train_dataset, so there is nothing to select from. Pass one to it.")
    if isinstance(dataset, str | os.PathLike):
        raise ValueError(
            f"The training dataset is a {type(dataset).__name__}, {os.fspath(dataset)!r}, and not its rows. Load it "
            'first, such as with `datasets.load_dataset("json", data_files=..., split="train")`.'
        )
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        raise ValueError(
            f"The training dataset ({type(dataset).__name__}) is a dict of splits or columns, {splits}, which has no "
            f"rows by number. Pass one of them, such as `dataset[{splits[0] if splits else 'train'!r}]`."
        )
    if isinstance(dataset, torch.utils.data.IterableDataset) or not has_length(dataset):
        raise ValueError(
            f"The training dataset ({type(dataset).__name__}) is streamed: it has no length and no random access. "
            "SPICE cuts pools from a permutation of all rows. Load it without `streaming=True`, or turn it into a "
            "`datasets.Dataset` first (`Dataset.from_generator`, or `.save_to_disk` and `load_from_disk`)."
        )
    if len(dataset) == 0:
        raise ValueError(
            "The training dataset has 0 rows, so there is nothing to select from. Check the filters and the split "
            "that made it."
        )


def check_objective(trainer: Any) -> None:
    """Refuses trainers that train something else than the likelihood of label tokens, which is what SPICE scores.

    Args:
        trainer (`transformers.Trainer`): The trainer to attach to.

    Raises:
        ValueError: If it is one of TRL's other trainers, a `Seq2SeqTrainer`, or its model is an encoder-decoder.
    """
    # The first one decides: trl's GKDTrainer, for one, is an SFTTrainer with another loss.
    theirs = (cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.split(".")[0] == "trl")
    other = next((name for name in theirs if name.endswith("Trainer")), "SFTTrainer")
    if other != "SFTTrainer":
        raise ValueError(
            f"SPICE scores samples by the likelihood of their label tokens, and {other} trains another objective "
            "(preferences, rewards or its own generations), for which these scores mean nothing. Use it with "
            "SFTTrainer or transformers.Trainer, or select beforehand with `select_subset` on the texts."
        )
    model = getattr(trainer, "model", None)
    if isinstance(trainer, Seq2SeqTrainer) or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(trainer).__name__} trains {type(model).__name__}, an encoder-decoder model. SPICE shifts labels "
            "by one as causal language models do, so its gradients would be others. Use a decoder-only model."
        )


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
    """Warns, with the value to use instead, of arguments in steps that were meant for an epoch of all samples.

    Args:
        args (`transformers.TrainingArguments`): The trainer's arguments.
        steps_per_epoch (`int`): Optimizer steps of an epoch with SPICE.
        num_rows (`int`): Rows of the training dataset.
        samples_per_step (`int`): Samples of an optimizer step.
    """
    plain = math.ceil(num_rows / samples_per_step)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
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


def is_token_normalized(trainer: Any) -> bool:
    """Whether the loss sums over a step's micro-batches and devices and divides by the step's label tokens.

    Only then do micro-batches of unequal size train exactly like one batch. Known to be so: the Trainer's own loss
    where the model takes `num_items_in_batch`, `compute_loss_func`, and SFTTrainer's. A `compute_loss` of the user's
    own is not relied upon, unless the trainer's `loss_is_scaled_for_ga` says so.

    Args:
        trainer (`transformers.Trainer`): The trainer.

    Returns:
        `bool`
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return bool(scaled)
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    if "compute_loss" in vars(trainer) or owner.__module__.split(".")[0] not in ("transformers", "trl"):
        return False
    if trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices:
        return False
    # LabelSmoother takes num_items_in_batch since transformers 5.15; before, it is a mean per micro-batch.
    if trainer.label_smoother is not None and Version(transformers.__version__) < Version("5.15.0"):
        return False
    return bool(trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None)


def check_agreement(processes: Processes, seen: Mapping[str, Any]) -> None:
    """Refuses processes that see different data or settings: they would pick, and wait, for different things.

    Args:
        processes ([`Processes`]): The processes of the run; each calls this.
        seen (`Mapping[str, Any]`): What must be the same on all of them, by name.

    Raises:
        ValueError: On every process, naming what differs.
    """
    everyones = processes.gather(dict(seen))
    differing = [
        f"{name} is {everyones[0][name]!r} on process 0 and {other[name]!r} on process {rank}"
        for rank, other in enumerate(everyones)
        for name in seen
        if other[name] != everyones[0][name]
    ]
    if differing:
        raise ValueError(
            f"The processes of this run don't see the same: {'; '.join(differing)}. They must build the same dataset "
            "and the same settings: give random filters and shuffles a seed, and let every process load the whole "
            "dataset rather than a part of it."
        )


def check_memory(
    feature_bytes: int, num_rows: int, *, num_features: int, dimension: int, device: torch.device, config: SpiceConfig
) -> None:
    """Refuses exact or sketched features that cannot fit in free memory.

    Args:
        feature_bytes (`int`): What a process needs to score one pool.
        num_rows (`int`): Candidates of a pool.
        num_features (`int`): Numbers kept per candidate.
        dimension (`int`): D.
        device (`torch.device`): Where they would live.
        config ([`SpiceConfig`]): The settings, for the message.

    Raises:
        ValueError: If one pool's features exceed free memory; names the `sketch_dim` that fits.
    """
    free = free_memory(device)
    if feature_bytes <= free:
        return
    # A quarter of what is free: activations, the optimizer and the data need room too.
    fitting = int(free / 4 / num_rows / 4)
    power = 2 ** max(4, fitting.bit_length() - 1)
    if config.information == "exact":
        fix = f"set sketch_dim={min(power, dimension)}, which fits, or a smaller pool_size"
    else:
        fix = (
            f'set a pool_size of at most {max(2, int(free / 2 / num_features / 4))}, or information="exact", which '
            "can be sketched"
        )
    raise ValueError(
        f"Scoring a pool of {num_rows} candidates with {num_features:,} gradient numbers each needs "
        f"{feature_bytes / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free. To fix it, {fix}."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    import psutil

    # The processes of a machine share its memory.
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
