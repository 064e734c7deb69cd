"""The trainer's arguments and processes: what rules SPICE out, and what fits badly."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

import spice_trainer.scoring.memory
from tests.bad_input.scene import ATTACHING, BadInput, Scene
from tests.support.trainers import tiny_dataset
from tests.support.versions import before

GROUP_BY_LENGTH = (
    {"group_by_length": True} if before("transformers", "5") else {"train_sampling_strategy": "group_by_length"}
)


def _arguments(**arguments: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        built = {name: value() if callable(value) else value for name, value in arguments.items()}
        return scene.attach(**{"report_to": "none"} | built)

    return prepare


def _patched(
    owner: Callable[[Any], type], name: str, value: Any, **options: Any
) -> Callable[[Scene], Callable[[], Any]]:
    """What this machine has not: GPUs, processes, other parallelism."""

    def prepare(scene: Scene) -> Callable[[], Any]:
        attach = scene.attach(**options)
        scene.patch.setattr(owner(scene.trainer), name, property(lambda self: value))
        return attach

    return prepare


def _args(trainer: Trainer) -> type:
    return TrainingArguments


def _accelerator(trainer: Trainer) -> type:
    return type(trainer.accelerator)


def _searching(scene: Scene) -> Callable[[], Any]:
    attach = scene.attach()
    scene.trainer.hp_search_backend = "optuna"
    return attach


def _apart(scene: Scene) -> Callable[[], Any]:
    attach = scene.attach()
    scene.patch.setenv("WORLD_SIZE", "2")
    return attach


def _little_memory(**settings: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        scene.patch.setattr(spice_trainer.scoring.memory, "free_memory", lambda device: 100_000)
        return scene.attach({"sketch_dim": 0} | settings)

    return prepare


def _steps(name: str, wrong: str, *says: str, **arguments: Any) -> BadInput:
    """An epoch of 55 rows has 6 steps instead of 14."""
    return BadInput(name, wrong, ATTACHING, None, says, _arguments(**arguments))


ROWS = (
    BadInput(
        "data_parallel",
        "several GPUs in one process (`DataParallel`)",
        ATTACHING,
        ValueError,
        ("torch.nn.DataParallel over 2 GPUs", "`CUDA_VISIBLE_DEVICES=0`"),
        _patched(_args, "n_gpu", 2),
    ),
    BadInput(
        "split_batches",
        "`split_batches` with several processes",
        ATTACHING,
        ValueError,
        ("split_batches=True", "set split_batches=False", "each of the 4 processes gets"),
        _patched(_args, "world_size", 4, accelerator_config={"split_batches": True}),
    ),
    BadInput(
        "tensor_parallel",
        "tensor, context or sequence parallelism",
        ATTACHING,
        ValueError,
        ("uses tensor parallelism (tp_size=2)", "Set tp_size=1 and shard the model with FSDP"),
        _patched(_accelerator, "parallelism_config", SimpleNamespace(tp_size=2)),
    ),
    BadInput(
        "megatron",
        "Megatron-LM",
        ATTACHING,
        ValueError,
        ("uses Megatron-LM", "use DDP, FSDP or DeepSpeed ZeRO"),
        _patched(_accelerator, "distributed_type", DistributedType.MEGATRON_LM),
    ),
    BadInput(
        "tpu",
        "TPUs",
        ATTACHING,
        ValueError,
        ("uses TPUs", "Run on GPUs or CPUs"),
        _patched(_accelerator, "distributed_type", DistributedType.XLA),
    ),
    BadInput(
        "searching",
        "attaching within a hyperparameter search",
        ATTACHING,
        ValueError,
        ("cannot be attached during a hyperparameter search", "Attach it to a single run"),
        _searching,
    ),
    BadInput(
        "little_memory",
        "exact gradients that don't fit into memory",
        ATTACHING,
        ValueError,
        ("a pool of 10 candidates with 3,712 gradient numbers", "free", "set sketch_dim=512, which fits"),
        _little_memory(),
    ),
    BadInput(
        "little_memory_diagonal",
        'the same with `information="diagonal"`',
        ATTACHING,
        ValueError,
        ("gradient numbers", 'set a pool_size of at most 3, or information="exact"'),
        _little_memory(information="diagonal"),
    ),
    _steps(
        "save_steps",
        "`save_steps` for an epoch of all rows",
        "save_steps=7 exceeds the run of 6 optimizer steps (an epoch has 6 steps instead of 14). Use save_steps=3",
        save_strategy="steps",
        save_steps=7,
    ),
    _steps(
        "eval_steps",
        "`eval_steps` for an epoch of all rows",
        "eval_steps=14 exceeds the run of 6 optimizer steps",
        "Use eval_steps=6",
        eval_strategy="steps",
        eval_steps=14,
        eval_dataset=lambda: tiny_dataset(4),
    ),
    _steps(
        "logging_steps",
        "`logging_steps` for an epoch of all rows",
        "logging_steps=500 exceeds the run of 6 optimizer steps",
        "Use logging_steps=6",
        logging_steps=500,
    ),
    _steps(
        "warmup_steps",
        "`warmup_steps` for an epoch of all rows",
        "warmup_steps=14 exceeds the run of 12 optimizer steps",
        "Use warmup_steps=6",
        warmup_steps=14,
        num_train_epochs=2,
    ),
    _steps(
        "max_steps",
        "`max_steps` for an epoch of all rows",
        "max_steps=14 goes 2.33 times through the training samples",
        "Use max_steps=6 for one epoch",
        max_steps=14,
    ),
    _steps("workers", "`dataloader_num_workers`", "dataloader_num_workers=1 has no effect", dataloader_num_workers=1),
    _steps("group_by_length", "`group_by_length`", "has no effect. SPICE decides which rows", **GROUP_BY_LENGTH),
    BadInput(
        "fell_apart",
        "a launch whose processes train alone",
        ATTACHING,
        None,
        ("2 processes were launched, but this one trains alone", "set use_cpu=True in TrainingArguments"),
        _apart,
    ),
)
