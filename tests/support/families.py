"""A tiny model of every causal family of the installed transformers, and what becomes of it.

    python -m tests.support.families      plays them all and writes their part of docs/support.md

A family is built from its configuration class with small sizes. Plain PyTorch takes a step as the stock Trainer does;
then SPICE checks the model as it does when it is attached, and its sample gradients are compared with autograd's.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.backends import must_score_alone
from spice_trainer.gradients.forward import without_cache
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import UnsupportedModelError, find_trained_modules
from spice_trainer.gradients.verification import GradientMismatchError, verify_gradients
from tests.support.gradient_loop import batched_gradients, collate, example_rows, looped_gradients, relative_error
from tests.support.models import VOCAB_SIZE, add_lora
from tests.support.trainers import collate as collate_plain

SUPPORT = Path(__file__).parents[2] / "docs" / "support.md"
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TRAINED = ("lora", "full")
TOLERANCE = 1e-5

# What of a family stock itself does not train, by words of the error that it meets, and why.
_DRAFTS = ("producing a cache", "drafts for another model; transformers fails to build it by itself")
_NOT_BUILT = ("'dropout'", "`AutoModelForCausalLM` does not build it from its configuration")
UNTRAINED: dict[tuple[str, str], tuple[str, str]] = {
    **{("gemma3n", trained): ("timm", "needs timm; its `gemma3n_text` works") for trained in TRAINED},
    **{("gemma4_assistant", trained): _DRAFTS for trained in TRAINED},
    **{("gemma4_unified_assistant", trained): _DRAFTS for trained in TRAINED},
    **{("git", trained): ("batch_size", "reads no text without an image") for trained in TRAINED},
    **{("musicgen", trained): _NOT_BUILT for trained in TRAINED},
    **{("musicgen_melody", trained): _NOT_BUILT for trained in TRAINED},
    ("reformer", "lora"): ("does not require grad", "its reversible layers take no gradient over frozen embeddings"),
}
# What SPICE refuses of what stock trains, by words of the error, and why.
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("reformer", "full"): ("reversible layers", "its backward needs dropout and random hashes"),
}
# Layers that LoRA leaves out, for "all-linear" does not train with PEFT there.
NOT_ADAPTED = {
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("out_proj", "conv1d")),
    **dict.fromkeys(("llama4", "llama4_text", "phimoe"), ("router",)),
    "deepseek_v4": ("o_a_proj",),
}

# Sizes by the names of configurations' fields, the first that fits.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size\w*|\w*_vocab_size|ngram_vocab_size_base|encoder_hash_byte_group_vocab", VOCAB_SIZE),
    (r"pad_token_id", 0),
    (r"(bos|decoder_start)_token_id", 1),
    (r"(eos|sep)_token_id", 2),
    (
        r"hidden_size(_global)?|d_model|n_embd|dim|emb(ed)?_dim|embedding_size|word_embed_proj_dim|dim_model|lru_width"
        r"|input_embedding_size|output_embedding_size",
        32,
    ),
    (r"attention_hidden_size", 64),
    (r"\w*intermediate_size|\w*ffn_dim|d_ff|d_inner|n_inner|ffn_hidden_size|dim_ff|dff|feed_forward_size", 48),
    (r"expert_ffn_hidden_size", 16),
    (r"num_hidden_layers|n_layers?|(num_)?(en|de)?(coder_)?layers|depth|num_blocks", 2),
    (r"\w*num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads", 2),
    (r"\w*num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|linear_num_(key|value)_heads", 4),
    (r"mamba_n_heads|n_mamba_heads", 8),
    (r"\w*head_dim|head_size|attention_key_size|kv_channels|dim_head|d_kv|mamba_d_head|mamba_headdim|rotary_dim", 8),
    (r"mamba_d_state|state_size|\w*_lora_rank|hidden_size_per_layer_input", 8),
    (r"num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_routed_experts", 4),
    (r"num_experts_per_tok\w*|moe_topk|moe_k|top_k_experts|moe_top_k|zero_expert_num", 2),
    (r"n_groups?|topk_group|n_shared_experts|mamba_n_?groups|first_k_dense_replace|num_dense_layers", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions", 64),
)
# Set although they have no number by default.
_UNSET = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "head_dim", "num_experts")
_GEMMA4 = {"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
_SLIDING = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 16}
_DOTS3 = {f"swa_{key}": value for key, value in (_SLIDING | {"qk_nope_head_dim": 8, "v_head_dim": 8}).items()}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 8, "budget": 8, "compress_ratio": 2}
_QWEN4 = {f"indexer_{key}": value for key, value in _INDEXER.items()}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What else a family needs: sizes that depend on each other, lists with an entry a layer.
_VALUES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {
            "mlp_layer_types": ["dense", "sparse"],
            "per_layer_config": {},
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.5, 0.0],
        "laurel_rank": 4,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"hidden_size": 64, "chunk_size": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
    | {"attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": {"attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
# Configurations whose defaults contradict each other.
_ASSISTANT = {
    **_GEMMA4,
    **{"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_shared_layers": 2},
}
_WITHOUT_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": _ASSISTANT | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_assistant": {"text_config": _ASSISTANT},
}


def small_values(config: PretrainedConfig) -> dict[str, Any]:
    """Small numbers for the sizes that a configuration has."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            found[key] = small_values(value)
        elif type(value) is int or (value is None and key in _UNSET) or (type(value) is list and "token_id" in key):
            found.update([(key, size) for pattern, size in _SIZES if re.fullmatch(pattern, key)][:1])
    if "kv_lora_rank" in found:
        # Every head has keys of its own, made from what is common.
        found["num_key_value_heads"] = 4
    types = getattr(config, "layer_types", None)
    name = config.attribute_map.get("layer_types", "layer_types")
    if isinstance(types, list) and not isinstance(inspect.getattr_static(type(config), name, None), property):
        # Each kind of layer once.
        kinds = list(dict.fromkeys(types))
        found[name] = kinds if len(kinds) > 1 else kinds * 2
        found["num_hidden_layers"] = len(found[name])
    return found


def _merge(values: dict[str, Any], others: dict[str, Any]) -> None:
    for key, value in others.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def family_model(family: str, trained: str = "full", *, seed: int = 0) -> nn.Module:
    """A tiny model of a family in float32, weights large enough that every layer matters."""
    config_class = CONFIG_MAPPING[family]
    if family in _WITHOUT_DEFAULTS:
        values = _WITHOUT_DEFAULTS[family]
    else:
        config = config_class()
        values = small_values(config)
        if getattr(config, "is_decoder", None) is False:
            values["is_decoder"] = True
        _merge(values, _VALUES.get(family, {}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=0.15)
    return add_lora(model, exclude_modules=list(NOT_ADAPTED.get(family, ()))) if trained == "lora" else model


@dataclass(frozen=True)
class Outcome:
    """What became of a family: scored in batches or row by row, refused, or not trained by stock."""

    state: Literal["batches", "rows", "refused", "untrained"]
    # The text of the error.
    text: str = ""
    # The largest relative difference to autograd.
    error: float = 0.0


@cache
def play(family: str, trained: str) -> Outcome:
    """Trains a family, all of it or LoRA, and scores it."""
    return play_model(lambda: family_model(family, trained))


def play_model(build: Callable[[], nn.Module]) -> Outcome:
    """Trains a model, and scores it."""
    rows = example_rows()[:4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build()
            inputs, labels = collate(rows)
            model.train()
            model(**inputs, labels=labels, **without_cache(model)).loss.backward()
        except Exception as error:
            return Outcome("untrained", f"{type(error).__name__}: {error}")
        model.zero_grad(set_to_none=True)
        candidates = [
            collate_row(number, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, collate_plain)
            for number, (ids, labels) in enumerate(rows[:2])
        ]
        try:
            modules = find_trained_modules(model)
            verify_gradients(model, modules, candidates, device=torch.device("cpu"))
        except (UnsupportedModelError, GradientMismatchError) as error:
            return Outcome("refused", str(error))
        layers = scored_layers(modules)
        trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        assert sum(layer.num_coordinates for layer in layers) == trainable
        losses, found = batched_gradients(model, rows, extra_padding=2)
        expected_losses, expected = looped_gradients(model, rows, allow_unused=True)
    is_alone = must_score_alone(model, [layer.module for layer in layers if layer.takes_autograd])
    torch.testing.assert_close(losses, expected_losses, rtol=TOLERANCE, atol=0)
    return Outcome("rows" if is_alone else "batches", error=relative_error(found, expected))


def as_markdown() -> str:
    """The families' part of docs/support.md."""
    release = f"transformers {transformers.__version__}"
    lines = [
        f"Each of the {len(FAMILIES)} causal families of {release} is built tiny, on a CPU",
        "in fp32. Plain PyTorch takes a step; then SPICE's sample gradients are autograd's within 1e-5, or the model",
        'is refused when SPICE is attached. LoRA is on "all-linear", which takes in experts.',
        "",
        "| | LoRA | in full |",
        "|---|---|---|",
    ]
    outcomes = {(family, trained): play(family, trained) for family in FAMILIES for trained in TRAINED}
    titles = {
        "batches": "in batches",
        "rows": "row by row: some layer has no rule of its own or takes the tokens of all rows together, or padding "
        "changes a row's loss",
        "refused": "refused",
        "untrained": "not trained by stock here either",
    }
    for state, title in titles.items():
        cells = []
        for trained in TRAINED:
            names = [family for family in FAMILIES if outcomes[family, trained].state == state]
            reasons = {"refused": REFUSED, "untrained": UNTRAINED}.get(state, {})
            by_reason: dict[str, list[str]] = {}
            for name in names:
                by_reason.setdefault(reasons.get((name, trained), ("", ""))[1], []).append(name)
            listed = [", ".join(named) + (f" ({reason})" if reason else "") for reason, named in by_reason.items()]
            cells.append(f"{len(names)}: {'; '.join(listed)}" if names else "none")
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    by_layers: dict[str, list[str]] = {}
    for family, layers in NOT_ADAPTED.items():
        by_layers.setdefault(", ".join(f"`{layer}`" for layer in layers), []).append(family)
    left_out = "; ".join(f"{layers} in {', '.join(families)}" for layers, families in by_layers.items())
    return "\n".join([*lines, "", f"LoRA leaves out what does not train with PEFT there: {left_out}.", ""])


_BEGIN = "<!-- Written by `python -m {}`; a test compares. -->\n"
_END = "<!-- End of what it writes. -->\n"


def parts_of_the_docs(module: str = "tests.support.families") -> tuple[str, str, str]:
    """docs/support.md before, between and behind the two comments of a module that writes there."""
    begin = _BEGIN.format(module)
    before, rest = SUPPORT.read_text(encoding="utf-8").split(begin)
    between, behind = rest.split(_END, 1)
    return before + begin, between, _END + behind


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    before, _, behind = parts_of_the_docs()
    SUPPORT.write_text(before + as_markdown() + behind, encoding="utf-8")
