"""What else trains beside plain LoRA, on models that differ in structure, and what becomes of each pair.

python -m tests.support.adapters      plays them all and writes their part of docs/support.md
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.support.families import SUPPORT, Outcome, family_model, parts_of_the_docs, play_model
from tests.support.models import add_lora

# Of each family an embedding, a linear layer of the attention (or of the state space), and a norm.
PARTS: dict[str, tuple[str, str, str]] = {
    "llama": ("embed_tokens", "q_proj", "norm"),
    "gpt2": ("wte", "c_attn", "ln_f"),
    "opt": ("embed_tokens", "q_proj", "final_layer_norm"),
    "gemma3_text": ("embed_tokens", "q_proj", "norm"),
    "qwen3_moe": ("embed_tokens", "q_proj", "norm"),
    "mamba": ("embeddings", "in_proj", "norm_f"),
    "falcon": ("word_embeddings", "query_key_value", "ln_f"),
    "phi": ("embed_tokens", "q_proj", "final_layernorm"),
}
FAMILIES = tuple(PARTS)


def _lora(family: str, **options: Any) -> PeftModel:
    model = family_model(family)
    return add_lora(model, **{"target_modules": _linear(model)} | options)


def _linear(model: nn.Module) -> list[str]:
    """Names of the linear layers that are called, the head aside: "all-linear" adapts experts by their weights."""
    named = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    return sorted(named - {"lm_head", "out_proj" if model.config.model_type == "mamba" else ""})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _adalora(family: str) -> PeftModel:
    model = family_model(family)
    return get_peft_model(
        model, AdaLoraConfig(target_modules=[PARTS[family][1]], total_step=10, task_type="CAUSAL_LM")
    )


def _norms(family: str) -> PeftModel:
    model = _lora(family)
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.requires_grad_(True)
    return model


ADAPTERS: dict[str, Callable[[str], nn.Module]] = {
    "rsLoRA": lambda family: _lora(family, use_rslora=True),
    "DoRA": lambda family: _lora(family, use_dora=True),
    "`lora_bias`": lambda family: _lora(family, lora_bias=True),
    '`bias="all"`': lambda family: _lora(family, bias="all"),
    "AdaLoRA": _adalora,
    "LoRA on embeddings": lambda family: _lora(family, target_modules=list(PARTS[family][:2])),
    "`modules_to_save`: head and a norm": lambda family: _lora(family, modules_to_save=["lm_head", PARTS[family][2]]),
    "`modules_to_save`: embeddings": lambda family: _lora(family, modules_to_save=[PARTS[family][0]]),
    "`trainable_token_indices`": lambda family: _lora(family, trainable_token_indices={PARTS[family][0]: [3, 4, 9]}),
    "trainable norms": _norms,
}


@cache
def play_adapter(adapter: str, family: str) -> Outcome:
    """Trains a family with an adapter, and scores it."""

    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = ADAPTERS[adapter](family)
            with torch.no_grad():
                # Adapters begin with zeros, of which nothing has a gradient.
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn_like(parameter)
        return model

    return play_model(build)


def as_markdown() -> str:
    """The adapters' part of docs/support.md."""
    titles = {"batches": "in batches", "rows": "row by row", "refused": "refused", "untrained": "not by stock either"}
    lines = [
        "Some adapters on tiny models of families that differ in structure, played as the families below: sample",
        "gradients of all that trains are autograd's within 1e-5. LoRA is on every linear layer but the head.",
        "",
        f"| | {' | '.join(FAMILIES)} |",
        f"|---|{'---|' * len(FAMILIES)}",
    ]
    for adapter in ADAPTERS:
        cells = [titles[play_adapter(adapter, family).state] for family in FAMILIES]
        lines.append(f"| {adapter} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    before, _, behind = parts_of_the_docs("tests.support.adapters")
    SUPPORT.write_text(before + as_markdown() + behind, encoding="utf-8")
