"""What SPICE takes from a trainer: its rows and collator, and from them the schedule, the selector and the plan.

trainer's own loader ─ dataset, collator ─ schedule of pools ─ selector (target or proxy) ─ plan of the run
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.training_args import OptimizerNames

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import configured_vocabulary_size
from spice_trainer.data.rows import CandidateRow, TargetRows
from spice_trainer.data.sample import SAMPLE_ROWS, RowSample
from spice_trainer.data.stream import StreamRows, is_stream
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import check_predicts_next_tokens
from spice_trainer.gradients.optimizer_state import MOMENTUM_SETTING as MOMENTUM
from spice_trainer.gradients.optimizer_state import PRECONDITIONING_SETTING as PRECONDITIONING
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.recording.summary import RunPlan
from spice_trainer.sampling.build import build_selector, check_optimizer
from spice_trainer.sampling.schedule import PoolSchedule, build_schedule
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.sampling.stream_schedule import StreamSchedule
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.trainer.checks import count_steps, num_parameters
from spice_trainer.trainer.normalization import is_token_normalized
from spice_trainer.trainer.objective import label_loss_of
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state

# Of a stream of validation rows.
MAX_VALIDATION_ROWS = 10_000


@dataclass(frozen=True)
class RunInputs:
    """What a run is made of: the trainer's own rows, and what selects from them."""

    dataset: Any
    collate: Callable[..., Any]
    schedule: PoolSchedule
    selector: StepSelector
    sample: RowSample
    """Some rows of the dataset, read once for all checks."""
    rows: list[CandidateRow]
    """The same as they are trained on."""
    candidates: list[CandidateRow]
    """The same as they are scored: a proxy may have another tokenizer."""


@dataclass(frozen=True)
class EarlierSample:
    """What is kept of the rows that were looked at before, so that they need not be read again."""

    digests: tuple[str | None, ...]
    candidates: list[CandidateRow]

    @classmethod
    def of(cls, inputs: RunInputs) -> EarlierSample:
        """Only where a proxy reads another dataset are its rows kept."""
        is_shared = inputs.selector.gradient_scorer.rows.dataset is inputs.dataset
        return cls(inputs.sample.digests, [] if is_shared else inputs.candidates)


def build_inputs(
    trainer: Any,
    config: SpiceConfig,
    get_loader: Callable[[], DataLoader[Any]],
    *,
    proxy: ProxyModel | None,
    validation: Mapping[str, TargetRows] | None = None,
    earlier: EarlierSample | None = None,
) -> RunInputs:
    """Takes the rows of the trainer's own loader, and builds the schedule and the selector for them."""
    if proxy is None:
        # First: the Trainer leaves the rows of a headless model without labels, which would be missed otherwise.
        check_predicts_next_tokens(trainer.model)
    dataset, collate = training_rows(trainer, get_loader)
    if isinstance(dataset, StreamRows) and proxy is not None and proxy.dataset is not None:
        raise ValueError(
            "The proxy has a dataset of its own, and the training dataset is a stream: row i of the one cannot be row "
            "i of the other. Fix: leave `dataset` out of ProxyModel; a proxy with another tokenizer reads the raw "
            "columns of the stream's rows, where they have them."
        )
    sample = RowSample.read(dataset, device=trainer.args.device)
    rows = sample.collate(collate)
    schedule = build_trainer_schedule(trainer, config, dataset, rows)
    selector = build_trainer_selector(
        trainer, config, schedule, dataset=dataset, collate=collate, proxy=proxy, validation=validation
    )
    scored = selector.gradient_scorer
    if scored.rows.dataset is dataset:
        scored.references.check(sample.rows[0])
    candidates = rows if proxy is None else _read_candidates(scored.rows, sample, earlier)
    return RunInputs(dataset, collate, schedule, selector, sample, rows, candidates)


def _read_candidates(scored: TargetRows, sample: RowSample, earlier: EarlierSample | None) -> list[CandidateRow]:
    """The sample as a proxy reads it."""
    if scored.dataset is sample.dataset:
        return sample.collate(scored.collate)
    if earlier is not None and earlier.candidates and earlier.digests == sample.digests:
        return earlier.candidates
    return RowSample.read(scored.dataset, device=sample.device).collate(scored.collate)


def describe_for_others(inputs: RunInputs, config: SpiceConfig, fingerprint: str | None) -> dict[str, Any]:
    """What all processes of a run must see alike, by name."""
    return {
        "the number of rows": len(inputs.dataset),
        "the number of tokens of some rows": [row.num_tokens for row in inputs.candidates],
        "the fingerprint of the rows' content": fingerprint,
        "the SPICE configuration": config,
        "the seed of the pools": inputs.schedule.seed,
        "the number of optimizer steps of an epoch": inputs.schedule.steps_per_epoch,
        "the number of layers that train": len(inputs.selector.gradient_scorer.modules),
        "what is known of the validation rows": inputs.selector.gradient_scorer.describe_validation(),
    }


def training_rows(
    trainer: Any, get_loader: Callable[[], DataLoader[Any]], *, name: str = "get_train_dataloader"
) -> tuple[Any, Callable[..., Any]]:
    """Dataset and collator of the trainer's own loader: unused columns removed, subclass overrides respected."""
    loaders, settings = trainer.accelerator._dataloaders, trainer.accelerator.dataloader_config
    num_loaders, dispatch_batches = len(loaders), settings.dispatch_batches
    signature_columns = getattr(trainer, "_signature_columns", None)
    # A loader whose workers persist is kept, and would be taken for another dataset's.
    kept = vars(trainer).pop("_eval_dataloaders", None)
    evaluated = trainer.eval_dataset.values() if isinstance(trainer.eval_dataset, dict) else [trainer.eval_dataset]
    if any(map(is_stream, (trainer.train_dataset, *evaluated))) and trainer.args.world_size > 1:
        # Else each process would have a part of the stream; now process 0 would read all of it, as each shall here.
        settings.dispatch_batches = True
    try:
        with preserved_random_state(trainer.args.device):
            loader = get_loader()
    finally:
        # The accelerator keeps every loader it prepared, though this one is never iterated, and the trainer the
        # columns it found the model to take.
        del loaders[num_loaders:]
        settings.dispatch_batches = dispatch_batches
        trainer._signature_columns = signature_columns
        vars(trainer).pop("_eval_dataloaders", None)
        if kept is not None:
            trainer._eval_dataloaders = kept
    dataset = getattr(loader, "dataset", None)
    if is_stream(dataset) and name == "get_train_dataloader":
        return open_stream(trainer, dataset), loader.collate_fn
    if is_stream(dataset):
        dataset = hold_stream(dataset)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not hasattr(loader, "collate_fn"):
        raise ValueError(
            f"The trainer's {name} gave a {type(loader).__name__} over a {type(dataset).__name__}, "
            "which has no rows by number for SPICE to choose from. Return a torch.utils.data.DataLoader over a "
            "dataset with a length and random access."
        )
    return dataset, loader.collate_fn


def open_stream(trainer: Any, dataset: Any) -> StreamRows:
    """The rows of a stream, of which the first are read."""
    if trainer.args.world_size > 1 and getattr(dataset, "_distributed", None) is not None:
        raise ValueError(
            f"The training dataset ({type(dataset).__name__}) was split over the processes by "
            "datasets.distributed.split_dataset_by_node. With SPICE each process reads the whole stream, so that "
            "picks do not depend on their number. Fix: give the trainer the stream as it was before."
        )
    rows = StreamRows(dataset)
    with preserved_random_state(trainer.args.device):
        if not rows.numbers(0, 0, SAMPLE_ROWS):
            raise ValueError(
                f"The training dataset ({type(dataset).__name__}) is a stream that gives no row, so there is nothing "
                "to select from. Check the filters, the split, and that it can be iterated more than once."
            )
    return rows


def hold_stream(dataset: Any) -> list[Any]:
    """The rows of a stream of validation rows, which every step compares with."""
    rows = list(islice(dataset, MAX_VALIDATION_ROWS + 1))
    if 0 < len(rows) <= MAX_VALIDATION_ROWS:
        return rows
    what = "gives no row" if not rows else f"has not ended after {MAX_VALIDATION_ROWS:,} rows"
    raise ValueError(
        f"The trainer's eval_dataset ({type(dataset).__name__}) is a stream that {what}, and this strategy compares "
        "candidates with all of its rows. Fix: give it some tens or hundreds of rows, such as `stream.take(256)`."
    )


def own_sampling(trainer: Any) -> str | None:
    """Name of the user's own method that orders the rows (in a subclass, or bound), which SPICE replaces."""
    for name in ("get_train_dataloader", "_get_train_sampler"):
        owner = next((cls for cls in type(trainer).__mro__ if name in vars(cls)), None)
        if name in vars(trainer):
            return f"trainer.{name}"
        if owner is not None and owner.__module__.split(".")[0] not in ("transformers", "trl"):
            return f"{owner.__name__}.{name}"
    return None


def warn_of_preparation(trainer: Any, rows: Sequence[CandidateRow]) -> None:
    """Says what TRL did to the rows it was given, where that makes the records' row numbers others than the user's."""
    args, dataset = trainer.args, trainer.train_dataset
    if is_stream(dataset) and not getattr(args, "packing", False):
        return
    is_prepared = any(cls.__module__.split(".")[0] == "trl" for cls in type(trainer).__mro__)
    if not is_prepared or (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
        return
    changes = []
    if getattr(args, "packing", False):
        changes.append("packed the rows")
        _warn_of_bins(args, rows)
    elif getattr(args, "max_length", None) is not None and (num_given := _num_given(dataset)) > len(dataset):
        dropped = f"{num_given - len(dataset):,} of {num_given:,} rows"
        changes.append(f"left out {dropped}, of which max_length={args.max_length} leaves no label token")
    if getattr(args, "shuffle_dataset", False):
        changes.append("shuffled the rows")
    if changes:
        logger.warning(
            "SPICE: the trainer %s, so that `index` in the records is the row of trainer.train_dataset, and not of "
            "the dataset that it was given. Look picks up there, or by `id` and `token_hash`; record_text_length=80 "
            "adds the beginning of each pick's text.",
            " and ".join(changes),
        )


def _warn_of_bins(args: Any, rows: Sequence[CandidateRow]) -> None:
    """Says what a pick is where TRL has packed the rows, and how to get rows."""
    tokens = sum(row.num_tokens for row in rows) / len(rows)
    # A bin tells its rows by positions that start anew; only the strategy "wrapped" has none.
    positions = [row.inputs["position_ids"] for row in rows if not row.can_be_padded and "position_ids" in row.inputs]
    if args.packing_strategy == "wrapped":
        what, size = "a block that rows begin and end anywhere in", "as many rows as a micro-batch shall hold"
    else:
        per_bin = (len(rows) - len(positions) + sum(int((p == 0).sum()) for p in positions)) / len(rows)
        what = f"a bin of about {per_bin:.3g} rows"
        size = f"{max(1, round(per_bin * args.per_device_train_batch_size))} (rows, as many as its bins hold now)"
    logger.warning(
        "SPICE: packing=True, so a candidate, and with it a pick, is %s (about %.0f tokens). To select rows, set "
        "packing=False, padding_free=True, max_length=None (with rows that are cut beforehand), "
        "per_device_train_batch_size=%s and SpiceConfig(pack_picks=True): each step's picks are then packed.",
        what, tokens, size,
    )  # fmt: skip


def _num_given(dataset: Any) -> int:
    # TRL's last step is a filter over a table that it has just written.
    return int(getattr(getattr(dataset, "data", None), "num_rows", len(dataset)))


def build_trainer_schedule(
    trainer: Any, config: SpiceConfig, dataset: Any, rows: Sequence[CandidateRow] = ()
) -> PoolSchedule:
    """The schedule of pools under the trainer's batch size, processes and seeds; its loss is tried on a row."""
    args = trainer.args
    stream = dataset if isinstance(dataset, StreamRows) else None
    if stream is not None and args.max_steps <= 0:
        raise ValueError(
            f"The training dataset ({type(stream.dataset).__name__}) is a stream, whose end is not known: "
            "TrainingArguments needs max_steps, the number of optimizer steps. Fix: set it."
        )
    if stream is not None and config.selection_epochs is not None:
        raise ValueError(
            f"SpiceConfig: selection_epochs={config.selection_epochs} trains on earlier picks again, and the rows of "
            "a stream are not kept. Fix: leave selection_epochs out, or load the dataset without streaming=True."
        )
    return build_schedule(
        config,
        len(dataset) if stream is None else args.max_steps,
        build=PoolSchedule if stream is None else partial(StreamSchedule, stream),
        per_device_train_batch_size=trainer._train_batch_size,
        num_slots=args.world_size * args.gradient_accumulation_steps,
        token_normalized=is_token_normalized(trainer, rows),
        drop_last=args.dataloader_drop_last,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )


def build_trainer_selector(
    trainer: Any,
    config: SpiceConfig,
    schedule: PoolSchedule,
    *,
    dataset: Any,
    collate: Callable[..., Any],
    proxy: ProxyModel | None,
    validation: Mapping[str, TargetRows] | None = None,
) -> StepSelector:
    """What selects for the trainer's steps."""

    def get_model() -> nn.Module:
        model: nn.Module = trainer.model
        return model

    if proxy is None or config.proxy_check_pools > 0:
        check_trainer_optimizer(trainer, config)
    return build_selector(
        config,
        schedule,
        Runtime(
            get_model=get_model,
            seed=schedule.seed,
            processes=Processes.of(trainer.accelerator),
            autocast=trainer.accelerator.autocast,
            get_optimizer=lambda: trainer.optimizer,
            label_loss=label_loss_of(trainer),
        ),
        # A stream's rows have their raw columns themselves.
        describe_rows(trainer, dataset, collate, None if isinstance(dataset, StreamRows) else trainer.train_dataset),
        proxy=proxy,
        validation=validation,
    )


def check_trainer_optimizer(trainer: Any, config: SpiceConfig) -> None:
    """Refuses optimizers whose state the settings need and that cannot be read, as far as is known before training.

    Most trainers make their optimizer only then.
    """
    takes = ((PRECONDITIONING, config.gradient_preconditioning == "adam"), (MOMENTUM, config.takes_momentum))
    setting = next((setting for setting, is_taken in takes if is_taken), None)
    if setting is None:
        return
    name = setting.partition("=")[0]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            f"SpiceConfig: {setting} needs the whole state of the optimizer on every process, "
            f"and {'FSDP' if trainer.is_fsdp_enabled else 'DeepSpeed'} partitions it. Fix: leave "
            f"{name} out, use DDP, or let a proxy score, which has an optimizer of its own."
        )
    if trainer.optimizer is not None:
        check_optimizer(trainer.optimizer, config)
        return
    makes_its_own = type(trainer).create_optimizer is not Trainer.create_optimizer or trainer.optimizer_cls_and_kwargs
    if not makes_its_own and trainer.args.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        raise ValueError(
            f"SpiceConfig: {setting} reads the state of PyTorch's AdamW, and TrainingArguments has "
            f"optim={OptimizerNames(trainer.args.optim).value!r}. Fix: set optim='adamw_torch_fused' or "
            f"'adamw_torch', or leave {name} out."
        )


def describe_rows(trainer: Any, dataset: Any, collate: Callable[..., Any], raw_dataset: Any) -> TargetRows:
    """Rows as the target reads them, with what a proxy of another tokenizer needs to read them itself.

    `dataset` lacks the columns that the trainer does not use; `raw_dataset` has all that it was given.
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
        vocab_size=configured_vocabulary_size(trainer.model),
    )


def plan_run(trainer: Any, inputs: RunInputs, proxy: ProxyModel | None) -> RunPlan:
    """What is known of the run before it starts."""
    args, schedule, scorer = trainer.args, inputs.schedule, inputs.selector.gradient_scorer
    pool_size = min(schedule.pool_size, schedule.num_rows)
    num_pools = scorer.pools_at_once(schedule.shape.pools_per_step, pool_size)
    candidate_tokens = [scorer.shorten(row).num_tokens for row in inputs.candidates]
    return RunPlan(
        num_rows=schedule.num_rows,
        total_steps=count_steps(args, schedule.steps_per_epoch),
        dimension=scorer.dimension,
        num_features=scorer.num_features,
        feature_bytes=scorer.feature_bytes(num_pools, num_pools * pool_size),
        num_processes=scorer.processes.world_size,
        mean_row_tokens=sum(row.num_tokens for row in inputs.rows) / len(inputs.rows),
        mean_candidate_tokens=sum(candidate_tokens) / len(candidate_tokens),
        num_proxy_parameters=None if proxy is None else num_parameters(proxy.model),
        token_normalized=not schedule.shape.equal_slots,
        aim=scorer.describe_aim(),
    )
