"""Small causal language models with LoRA, built in memory from their configurations.

They have random weights and train nothing useful; every architecture's forward is the real one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 61

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | {"head_dim": 8},
    "mistral": _LLAMA_LIKE | {"head_dim": 8},
    "gemma": _LLAMA_LIKE | {"head_dim": 8},
    # Soft caps small enough to bend logits and attention scores of a random model.
    "gemma2": _LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
    "phi3": _LLAMA_LIKE,
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _LLAMA_LIKE,
    "opt": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}
ARCHITECTURES = tuple(_CONFIGS)
_CONFIGS["falcon"] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Attention in one layer of two, a state space in the other.
_CONFIGS["jamba"] = _LLAMA_LIKE | {
    "num_experts": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
# Models that scale their logits behind the head.
_CONFIGS["granite"] = _LLAMA_LIKE | {"logits_scaling": 4.0}
_CONFIGS["cohere"] = _LLAMA_LIKE | {"logit_scale": 0.25}
# Mixtures of experts, whose experts are fed tokens of all rows in an order of their own.
_SMALL_EXPERTS = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CONFIGS["mixtral"] = _LLAMA_LIKE | {"head_dim": 8, "num_local_experts": 4}
_CONFIGS["qwen2_moe"] = _LLAMA_LIKE | _SMALL_EXPERTS | {"shared_expert_intermediate_size": 24}
_CONFIGS["qwen3_moe"] = _LLAMA_LIKE | _SMALL_EXPERTS
_CONFIGS["olmoe"] = _LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
_CONFIGS["glm4_moe"] = _LLAMA_LIKE | {
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_CONFIGS["gpt_oss"] = _LLAMA_LIKE | {
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_CONFIGS["jetmoe"] = {
    **_LLAMA_LIKE,
    "num_key_value_heads": 2,
    "kv_channels": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "gpt_oss", "jetmoe")


def tiny_model(architecture: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A two-layer model of an architecture, in float32, weights large enough that every layer matters."""
    values = _CONFIGS[architecture] | overrides
    config = AutoConfig.for_model(architecture, **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.15)
    return model


def add_lora(model: nn.Module, *, seed: int = 0, randomize: bool = True, **overrides: Any) -> PeftModel:
    """Adds LoRA r 4 on every linear layer. With `randomize`, B is not zero, so that A has a gradient."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | overrides
    if getattr(model.config, "model_type", "") == "gpt2":
        values["fan_in_fan_out"] = True  # GPT-2's Conv1D keeps its weight transposed; PEFT warns without it
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, LoraConfig(**values))
        if randomize:
            with torch.no_grad():
                for name, parameter in peft_model.named_parameters():
                    if "lora_B" in name:
                        nn.init.normal_(parameter, std=0.1)
    return peft_model


def tiny_lora_model(architecture: str = "llama", *, seed: int = 0, **lora: Any) -> PeftModel:
    """`add_lora(tiny_model(architecture))`."""
    return add_lora(tiny_model(architecture, seed=seed), seed=seed, **lora)


def enable_checkpointing(model: PeftModel, *, use_reentrant: bool) -> None:
    """Gradient checkpointing as the Trainer switches it on, under the name this transformers gives it."""
    base = model.get_base_model()
    arguments = {"use_reentrant": use_reentrant}
    if hasattr(base, "activation_checkpointing_enable"):
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    base.enable_input_require_grads()


class _PlainConfig(SimpleNamespace):
    """No `PretrainedConfig` either, but PEFT 0.17 to 0.19 read every configuration as a dict."""

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


class PlainLanguageModel(nn.Module):
    """A causal language model that is no `PreTrainedModel`: no `logits_to_keep`, no cache, a dict as output."""

    def __init__(self, hidden_size: int = 16) -> None:
        super().__init__()
        self.config = _PlainConfig(model_type="plain", tie_word_embeddings=False)
        self.embedding = nn.Embedding(VOCAB_SIZE, hidden_size)
        self.mix = nn.Linear(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, VOCAB_SIZE)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        # Causal: position s sees the mean of what came before it and itself.
        means = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None, :, None]
        return {"logits": self.head(torch.tanh(self.mix(means)))}


class ConvolutionModel(nn.Module):
    """Layers that LoRA can adapt but that are not linear: a convolution, and attention with a fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.config = _PlainConfig(model_type="convolution", tie_word_embeddings=False)
        self.embedding = nn.Embedding(VOCAB_SIZE, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        hidden = self.conv(self.embedding(input_ids).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.attention(hidden, hidden, hidden)[0]}
