"""The run that one process and several processes do alike: rows, adapter, settings.

41 rows in pools of 10, two pools a step: steps of 20, 20 and 1 candidates, so every epoch ends with fewer candidates
than processes and fewer picks than micro-batches. One row is three times as long as any other, so that one process
has nothing but long rows to score.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

from spice_trainer import (
    PickOptions,
    Picks,
    PoolScores,
    ProxyModel,
    SpiceConfig,
    Strategy,
    attach_spice,
    register_strategy,
)
from spice_trainer.selection import pick_largest
from tests.support.models import add_lora, tiny_model
from tests.support.trainers import collate, tiny_rows, training_options

# Far more seconds than a run takes on a loaded machine, far fewer than gloo's collective time-out of 30 minutes.
TIMEOUT = 240.0
NUM_ROWS = 41
LONG_ROW = 7
# Fewer than two processes can share evenly.
NUM_VALIDATION = 5
STEPS_PER_EPOCH = 3
NUM_STEPS = 2 * STEPS_PER_EPOCH
# Within an epoch, before its short last step.
SAVED_STEP = 2
# Samples of a step over all processes and micro-batches.
SAMPLES_PER_STEP = 8
ACCUMULATION = 2
SETTINGS: dict[str, Any] = {
    "pool_size": 10,
    "num_selected": 4,
    "gradient_normalization": "sqrt_tokens",
    "scoring_tokens_per_batch": 48,
}


def dataset() -> Dataset:
    """Rows of 4 to 20 tokens, and one of 60."""
    rows = tiny_rows(NUM_ROWS, seed=3)
    input_ids = (rows[LONG_ROW]["input_ids"] * 15)[:60]
    rows[LONG_ROW] = {"input_ids": input_ids, "attention_mask": [1] * 60, "labels": [-100] * 5 + input_ids[5:]}
    return Dataset.from_list(rows)


def validation_rows() -> list[dict[str, list[int]]]:
    """Fewer rows than two processes can share evenly, of other tokens and longer answers than most training rows."""
    generator = torch.Generator().manual_seed(9)
    rows = []
    for length in (34, 39, 37, 43, 32):
        ids = torch.randint(50, 53, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100, -100, *ids[2:]]})
    return rows


def stream() -> IterableDataset:
    """The same as a stream behind a shuffle buffer, of shards that the stock loader deals out to the processes."""
    return dataset().to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=8)


class OtherStream(torch.utils.data.IterableDataset[Any]):
    """The rows, of which those behind the first step's come in another order, end, or break off."""

    def __init__(self, kind: str) -> None:
        self.rows = list(dataset())
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        yield from self.rows[:20]
        if self.kind == "broken":
            raise OSError("the connection was closed")
        rest = self.rows[20:] if self.kind != "ended" else []
        yield from rest[::-1] if self.kind == "reversed" else rest


def save_model(
    folder: Path,
    *,
    architecture: str = "llama",
    lora_dropout: float = 0.3,
    randomize: bool = True,
    hidden_size: int = 32,
    **lora: Any,
) -> Path:
    """Writes the base model and its adapter, which every process loads; `randomize` as in `add_lora`."""
    base = tiny_model(architecture, hidden_size=hidden_size, intermediate_size=2 * hidden_size)
    model = add_lora(base, lora_dropout=lora_dropout, randomize=randomize, **lora)
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    return folder


def save_full_model(folder: Path) -> Path:
    """Writes a model that trains in full, its head tied to its embedding."""
    tiny_model(tie_word_embeddings=True).save_pretrained(folder / "base")
    return folder


def pick_hardest_of_the_long(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """A rule of a user's own, on numbers of two kinds: gradients for the one, losses that come with them."""
    values = scores.values("losses") * scores.values("gradient_norms")
    return pick_largest(values, scores.eligible(values), num_selected, options.tie_tolerance)


OWN_STRATEGY = Strategy("hardest", ("gradient_norms", "losses"), pick_hardest_of_the_long)


class Freeze(TrainerCallback):
    """Freezes the upper layer's adapter after the second step (gradual freezing)."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            for name, parameter in model.named_parameters():
                if "layers.1." in name:
                    parameter.requires_grad_(False)


def load_model(folder: Path, *, quantized: bool = False) -> nn.Module:
    """Loads them, the base in 4 bits if asked, and under ZeRO-3 in shards, if the `TrainingArguments` exist."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    if not (folder / "adapter").exists():
        return model
    return PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)


def load_proxy(folder: Path, *, seed: int) -> ProxyModel:
    """A proxy whose fresh adapter depends on the seed, which a user's script may well set by process."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return ProxyModel(add_lora(model, seed=seed), learning_rate=1e-2)


def arguments(output_dir: Path, *, world_size: int, **overrides: Any) -> TrainingArguments:
    """Two short epochs at the same effective batch size whatever the number of processes."""
    values = {
        "per_device_train_batch_size": SAMPLES_PER_STEP // ACCUMULATION // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": SAVED_STEP,
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**training_options(os.fspath(output_dir), **values | overrides))


def make_trainer(
    model: nn.Module,
    args: TrainingArguments,
    *,
    spice: dict[str, Any] | None = None,
    proxy: ProxyModel | None = None,
    data_collator: Any = collate,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """A Trainer with SPICE attached; `spice` goes over [`SETTINGS`]."""
    if spice and spice.get("strategy") == OWN_STRATEGY.name:
        register_strategy(OWN_STRATEGY)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset(),
        eval_dataset=Dataset.from_list(tiny_rows(NUM_VALIDATION + 2, seed=9)),
        data_collator=data_collator,
        callbacks=callbacks,
    )
    config = SpiceConfig(**(SETTINGS | (spice or {})))
    aims = config.takes_validation and not config.takes_alignment
    attach_spice(trainer, config, proxy=proxy, validation_dataset=validation_rows() if aims else None)
    return trainer


def single_trainer(
    folder: Path,
    output_dir: Path,
    *,
    spice: dict[str, Any] | None = None,
    proxy: ProxyModel | None = None,
    quantized: bool = False,
    **options: Any,
) -> Trainer:
    """The same run in this process alone."""
    args = arguments(output_dir, world_size=1, **options)
    return make_trainer(load_model(folder, quantized=quantized), args, spice=spice, proxy=proxy)
