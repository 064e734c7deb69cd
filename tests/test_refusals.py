"""Bad input: what is refused, in which words, and that nothing of the trainer is altered by the attempt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import spice_trainer.compatibility
from spice_trainer import SpiceConfig, attach_spice
from spice_trainer.adapters import UnsupportedModelError
from spice_trainer.compatibility import warn_of_arguments
from spice_trainer.trainer_parts import build_trainer_schedule

from .models import tiny_lora_model, tiny_model
from .traces import trainer_state
from .trainers import collate, make_sft_trainer, make_trainer, tiny_dataset, tiny_rows
from .versions import before

Patch = pytest.MonkeyPatch


class OwnLoss(Trainer):
    """A trainer whose loss may be anything."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


def _no_labels(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {key: value for key, value in collate(rows).items() if key != "labels"}


def _not_token_normalized() -> nn.Module:
    model = tiny_lora_model()
    model.get_base_model().accepts_loss_kwargs = False
    return model


def _set(patch: Patch, name: str, value: Any) -> None:
    patch.setattr(TrainingArguments, name, property(lambda self: value))


def _on_trainer(**attributes: Any) -> Callable[[Patch, Trainer], None]:
    return lambda patch, trainer: [setattr(trainer, name, value) for name, value in attributes.items()]


def _on_accelerator(**attributes: Any) -> Callable[[Patch, Trainer], None]:
    return lambda patch, trainer: [
        patch.setattr(type(trainer.accelerator), name, property(lambda self, value=value: value))
        for name, value in attributes.items()
    ]


def _frozen() -> nn.Module:
    model = tiny_lora_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


ADAPTIVE = {"stop_ratio": 0.5, "pools_per_step": 1}

# Arguments of `make_trainer` (`model` builds one), settings over a pool of 10 and 4 picks, what is done to the
# trainer, words of the error.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Patch, Trainer], Any] | None, str]] = {
    "iterable": (
        {"train_dataset": Dataset.from_list(tiny_rows()).to_iterable_dataset(), "max_steps": 3},
        {},
        None,
        r"training dataset \(IterableDataset\) is streamed: .*no random access.*without `streaming=True`",
    ),
    "no_dataset": ({}, {}, _on_trainer(train_dataset=None), "has no train_dataset, so there is nothing to select"),
    "no_rows": ({}, {}, _on_trainer(train_dataset=Dataset.from_list([])), "training dataset has 0 rows"),
    "no_lora": (
        {"model": tiny_model},
        {},
        None,
        r"\(LlamaForCausalLM\) trains [\d,]+ parameters but has no trainable LoRA layer.*peft_config=LoraConfig",
    ),
    "frozen_lora": ({"model": _frozen}, {}, None, "has no trainable parameter and no trainable LoRA.*is_trainable=T"),
    "no_labels": ({"data_collator": _no_labels}, {}, None, r"\(_no_labels\) gave no tensor 'labels' for row 0 .*only"),
    "all_masked": (
        {"train_dataset": Dataset.from_list([row | {"labels": [-100] * len(row["labels"])} for row in tiny_rows()])},
        {},
        None,
        r"None of 32 rows looked at has a label token \(all labels are -100\).*prompt masking and at `max_length`",
    ),
    "data_parallel": (
        {},
        {},
        lambda patch, trainer: _set(patch, "n_gpu", 2),
        "DataParallel over 2 GPUs.*CUDA_VISIBLE_DEVICES=0",
    ),
    "split_batches": (
        {"accelerator_config": {"split_batches": True}},
        {},
        lambda patch, trainer: _set(patch, "world_size", 4),
        "split_batches=True, under which a batch is cut.*set split_batches=False.*each of the 4 processes gets",
    ),
    "tensor_parallel": (
        {},
        {},
        _on_accelerator(parallelism_config=SimpleNamespace(tp_size=2)),
        r"uses tensor parallelism \(tp_size=2\), whose processes share a batch.*Set tp_size=1 and shard.*ZeRO-3",
    ),
    "megatron": (
        {},
        {},
        _on_accelerator(distributed_type=DistributedType.MEGATRON_LM),
        "Megatron-LM, whose pipeline and tensor parallel processes share a batch.*use DDP, FSDP or DeepSpeed ZeRO",
    ),
    "tpu": ({}, {}, _on_accelerator(distributed_type=DistributedType.XLA), "TPU.*torch.distributed"),
    "search": ({}, {}, _on_trainer(hp_search_backend="optuna"), "during a hyperparameter search"),
    "too_many_picks": (
        {},
        {"pools_per_step": 3},
        None,
        "pools_per_step × num_selected = 3 × 4 = 12 samples, more than the 4 .*raise per_device_train_batch_size to "
        "12, or lower pools_per_step to 1, or lower num_selected to 1",
    ),
    "fewer_than_slots": (
        {"gradient_accumulation_steps": 4},
        {"pools_per_step": 1, "num_selected": 2},
        None,
        "1 × 2 = 2 samples, fewer than the 4 micro-batches.*raise pools_per_step to 2, or raise num_selected to 4",
    ),
    "adaptive_model": (
        {"model": _not_token_normalized},
        ADAPTIVE,
        None,
        "Adaptive stopping .* cannot be used here: .*not normalised by num_items_in_batch",
    ),
    "adaptive_own_loss": ({"trainer_class": OwnLoss}, ADAPTIVE, None, "Adaptive stopping .* cannot be used here"),
    "adaptive_bound_loss": (
        {},
        ADAPTIVE,
        lambda patch, trainer: setattr(trainer, "compute_loss", trainer.compute_loss),
        "Adaptive stopping .* cannot be used here",
    ),
    "drop_last": (
        {"dataloader_drop_last": True},
        {"pool_size": 60},
        None,
        "55 rows, but a step draws 1 full pools of 60.*Set dataloader_drop_last=False, or lower pool_size",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case: str, tmp_path: Path, monkeypatch: Patch) -> None:
    arguments, settings, prepare, words = REFUSED[case]
    if "model" in arguments:
        arguments = arguments | {"model": arguments["model"]()}
    trainer = make_trainer(tmp_path, **arguments)
    if prepare is not None:
        prepare(monkeypatch, trainer)
    before = trainer_state(trainer)
    with pytest.raises(ValueError, match=f"(?s){words}") as caught:
        attach_spice(trainer, SpiceConfig(**({"pool_size": 10, "num_selected": 4} | settings)))
    assert isinstance(caught.value, UnsupportedModelError) == ("lora" in case)
    assert trainer_state(trainer) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["adaptive_model", "adaptive_own_loss"])
def test_adaptive_stopping_is_taken_where_the_loss_counts_tokens(case: str, tmp_path: Path) -> None:
    """The refusals above are about the loss alone: the same settings attach where it is normalised."""
    trainer = make_trainer(tmp_path / "plain", spice=ADAPTIVE)
    assert not build_trainer_schedule(trainer, trainer._spice.sampler.config, tiny_rows()).shape.equal_slots
    trainer = make_sft_trainer(tmp_path / "sft", spice=ADAPTIVE)
    assert not build_trainer_schedule(trainer, trainer._spice.sampler.config, tiny_rows()).shape.equal_slots
    # A trainer that says that it scales its loss is believed.
    OwnLoss.loss_is_scaled_for_ga = True
    try:
        make_trainer(tmp_path / "own", spice=ADAPTIVE, trainer_class=OwnLoss)
    finally:
        del OwnLoss.loss_is_scaled_for_ga
    assert REFUSED[case][1] is ADAPTIVE


def test_too_little_memory_names_a_sketch_that_fits(tmp_path: Path, monkeypatch: Patch) -> None:
    trainer = make_trainer(tmp_path)
    before = trainer_state(trainer)
    monkeypatch.setattr(spice_trainer.compatibility, "free_memory", lambda device: 100_000)
    exact = {"pool_size": 10, "num_selected": 4, "sketch_dim": 0}
    with pytest.raises(ValueError, match=r"10 candidates with 3,712 gradient numbers .* GB on cpu") as caught:
        attach_spice(trainer, SpiceConfig(**exact))
    assert "set sketch_dim=512, which fits, or a smaller pool_size" in str(caught.value)
    assert trainer_state(trainer) == before
    with pytest.raises(ValueError, match='set a pool_size of at most 3, or information="exact"'):
        attach_spice(trainer, SpiceConfig(**exact | {"information": "diagonal"}))
    assert trainer_state(trainer) == before
    attach_spice(trainer, SpiceConfig(**exact | {"sketch_dim": 512}))


# An epoch of 55 rows has 6 steps instead of 14.
WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "save_steps": (
        {"save_strategy": "steps", "save_steps": 7},
        "SPICE: save_steps=7 exceeds the run of 6 optimizer steps (an epoch has 6 steps instead of 14). Use "
        "save_steps=3.",
    ),
    "eval_steps": (
        {"eval_strategy": "steps", "eval_steps": 14, "eval_dataset": tiny_dataset(4)},
        "SPICE: eval_steps=14 exceeds the run of 6 optimizer steps (an epoch has 6 steps instead of 14). Use "
        "eval_steps=6.",
    ),
    "logging_steps": (
        {"logging_steps": 500},
        "SPICE: logging_steps=500 exceeds the run of 6 optimizer steps (an epoch has 6 steps instead of 14). Use "
        "logging_steps=6.",
    ),
    "warmup_steps": (
        {"warmup_steps": 14, "num_train_epochs": 2},
        "SPICE: warmup_steps=14 exceeds the run of 12 optimizer steps (an epoch has 6 steps instead of 14). Use "
        "warmup_steps=6.",
    ),
    "max_steps": (
        {"max_steps": 14},
        "SPICE: max_steps=14 goes 2.33 times through the training samples as candidates, where without SPICE it goes "
        "1 times: an epoch has 6 steps instead of 14. Use max_steps=6 for one epoch.",
    ),
    "workers": ({"dataloader_num_workers": 1}, "SPICE: dataloader_num_workers=1 has no effect."),
    "strategy": (
        {"train_sampling_strategy": "group_by_length"},
        "SPICE: train_sampling_strategy='group_by_length' has no effect.",
    )
    if not before("transformers", "5")
    else ({"group_by_length": True}, "SPICE: group_by_length has no effect."),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_fits_badly_is_warned_about(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments, text = WARNINGS[case]
    make_trainer(tmp_path, spice={}, **arguments)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith(text)


def test_a_launch_that_fell_apart_is_warned_about(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    args = make_trainer(tmp_path).args
    warn_of_arguments(args)
    assert not caplog.records
    monkeypatch.setenv("WORLD_SIZE", "2")
    warn_of_arguments(args)
    assert caplog.messages[0].startswith("SPICE: 2 processes were launched, but this one trains alone")
    assert "set use_cpu=True in TrainingArguments" in caplog.messages[0]


def test_shares_of_a_run_and_unused_arguments_are_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(
        tmp_path,
        spice={},
        save_strategy="epoch",
        save_steps=500,
        eval_steps=500,
        logging_strategy="steps",
        logging_steps=0.5,
        **{"warmup_ratio" if before("transformers", "5") else "warmup_steps": 0.1},
        max_steps=6,
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("num_selected", "batch_size", "warned"), [(4, 5, False), (4, 6, True), (4, 2, True)])
def test_a_share_far_from_the_one_asked_for(
    num_selected: int, batch_size: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path, spice={"num_selected": num_selected}, per_device_train_batch_size=batch_size, max_steps=1
    )
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = {
        6: "SPICE: a step of 6 samples picks 30.0% of 2 pool(s) of 10, where num_selected=4 asks for 40.0%. Set "
        "pool_size=8 with num_selected=3 for the share asked for, or a batch size that is a multiple of 4.",
        2: "SPICE: a step of 2 samples picks 20.0% of 1 pool(s) of 10, where num_selected=4 asks for 40.0%. Set "
        "pool_size=5 with num_selected=2 for the share asked for, or a batch size that is a multiple of 4.",
    }
    assert warnings == ([expected[batch_size]] if warned else [])
