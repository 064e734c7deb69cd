"""Trainers of a tiny Llama with LoRA on a few rows of random tokens, in one process, on the CPU."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from spice_trainer import SpiceConfig, attach_spice
from tests.support.models import VOCAB_SIZE, tiny_lora_model

# An epoch is six steps at a batch of 4, each picking 4 of 10; the last 2 of half a pool.
NUM_ROWS = 55
POOL_SIZE = 10
BATCH_SIZE = 4
# Under raw gradients the picks are the largest norms; under this the weights of the moment matter more.
SETTINGS: dict[str, Any] = {
    "pool_size": POOL_SIZE,
    "num_selected": BATCH_SIZE,
    "gradient_normalization": "sqrt_tokens",
}


def tiny_rows(num_rows: int = NUM_ROWS, *, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of 4 to 20 random tokens, a prompt of at least one token masked, one label token or more."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        length = generator.randint(4, 20)
        prompt = generator.randint(1, length - 1)
        input_ids = [generator.randint(3, VOCAB_SIZE - 1) for _ in range(length)]
        labels = [-100] * prompt + input_ids[prompt:]
        rows.append({"input_ids": input_ids, "attention_mask": [1] * length, "labels": labels})
    return rows


def tiny_dataset(num_rows: int = NUM_ROWS, *, seed: int = 0) -> Dataset:
    """[`tiny_rows`] as a `datasets.Dataset`."""
    return Dataset.from_list(tiny_rows(num_rows, seed=seed))


def collate(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """Right-pads rows; labels with −100."""
    length = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([list(row[key]) + [value] * (length - len(row[key])) for row in rows])
        for key, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }


def training_options(output_dir: str | os.PathLike[str], **overrides: Any) -> dict[str, Any]:
    """Arguments of a short, quiet run whose learning rate moves the weights visibly in every step."""
    return {
        "output_dir": os.fspath(output_dir),
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | overrides


def checkpointing_options(*, use_reentrant: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name that this transformers gives it."""
    fields = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


def make_trainer(
    output_dir: str | os.PathLike[str],
    *,
    spice: SpiceConfig | Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    data_collator: Any = collate,
    trainer_class: type[Trainer] = Trainer,
    callbacks: list[Any] | None = None,
    compute_loss_func: Any = None,
    lora_dropout: float = 0.0,
    verify: bool = False,
    validation_dataset: Any = None,
    **arguments: Any,
) -> Trainer:
    """A Trainer; with `spice` (settings, or a dict of them over [`SETTINGS`]) SPICE is attached."""
    trainer = trainer_class(
        model=tiny_lora_model(lora_dropout=lora_dropout) if model is None else model,
        args=TrainingArguments(**training_options(output_dir, **arguments)),
        train_dataset=tiny_dataset() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        compute_loss_func=compute_loss_func,
        callbacks=callbacks,
    )
    attach(trainer, spice, verify=verify, validation_dataset=validation_dataset)
    return trainer


def make_sft_trainer(
    output_dir: str | os.PathLike[str],
    *,
    spice: SpiceConfig | Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    train_dataset: Any = None,
    callbacks: list[Any] | None = None,
    lora_dropout: float = 0.0,
    verify: bool = False,
    **arguments: Any,
) -> Any:
    """A `trl.SFTTrainer` on the same rows, tokenised beforehand, prompts masked by a `completion_mask`."""
    from trl import SFTConfig, SFTTrainer

    if train_dataset is None:
        rows = tiny_rows()
        train_dataset = Dataset.from_list(
            [
                {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
                for row in rows
            ]
        )
    trainer = SFTTrainer(
        model=tiny_lora_model(lora_dropout=lora_dropout) if model is None else model,
        args=SFTConfig(**training_options(output_dir, bf16=False, **({"completion_only_loss": True} | arguments))),
        train_dataset=train_dataset,
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    )
    attach(trainer, spice, verify=verify)
    return trainer


def attach(
    trainer: Any,
    spice: SpiceConfig | Mapping[str, Any] | None,
    *,
    verify: bool = False,
    validation_dataset: Any = None,
) -> None:
    """Attaches SPICE with these settings, or not at all for `None`."""
    if spice is None:
        return
    if not isinstance(spice, SpiceConfig):
        spice = SpiceConfig(**(SETTINGS | dict(spice)))
    attach_spice(trainer, spice, verify=verify, validation_dataset=validation_dataset)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the tiny models' vocabulary, in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def read_records(output_dir: str | os.PathLike[str], name: str) -> list[dict[str, Any]]:
    """The lines of `<output_dir>/spice/<name>.jsonl`."""
    text = (Path(output_dir) / "spice" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def trained_indices(output_dir: str | os.PathLike[str]) -> list[list[int]]:
    """What each step trained on."""
    return [line["indices"] for line in read_records(output_dir, "trained")]


def trainable_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights that train."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
