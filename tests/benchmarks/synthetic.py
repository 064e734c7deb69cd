"""Rows and models for timing without a download: lengths drawn to the paper's data, Qwen2 shapes with random weights.

Lengths are a lognormal cut off at 16 and 2,048 tokens,

    log S ~ Normal(μ, σ),    16 ≤ S ≤ 2,048,    median 250, mean 360

with μ and σ solved for that median and mean after the cut. One length is drawn from each of N slices of equal
probability and the whole is shuffled, so that already a pool of 120 rows has the distribution's median, mean and tail.
Token ids are uniform; of each row a share is prompt, without labels.
"""

from __future__ import annotations

import math
import random
from statistics import NormalDist
from typing import Any

import torch
from torch import nn

from tests.benchmarks.real_model import Row

SHORTEST, LONGEST = 16, 2048
LOG_MEAN, LOG_DEVIATION = 5.534881, 0.939146
# The published configurations of the base models.
QWEN2_SIZES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}


def draw_lengths(num_rows: int, *, seed: int) -> list[int]:
    """Numbers of tokens, one from each of `num_rows` equally probable slices of the distribution, shuffled."""
    generator, normal = random.Random(seed), NormalDist(LOG_MEAN, LOG_DEVIATION)
    low, high = normal.cdf(math.log(SHORTEST)), normal.cdf(math.log(LONGEST))
    lengths = []
    for index in range(num_rows):
        share = (index + generator.random()) / num_rows
        length = round(math.exp(normal.inv_cdf(low + (high - low) * share)))
        lengths.append(min(max(length, SHORTEST), LONGEST))
    generator.shuffle(lengths)
    return lengths


def draw_rows(
    num_rows: int, *, seed: int, vocab_size: int, prompt_share: float = 0.4, spread: float = 0.3
) -> list[Row]:
    """Rows of random token ids whose first part is prompt.

    `prompt_share` of a row's tokens carry no label on average, each row its own share, uniform within `spread` to both
    sides. At least one token of a row is prompt and one has a label.
    """
    if not 0 <= prompt_share - spread <= prompt_share + spread <= 1:
        raise ValueError(f"prompt_share ± spread must be within [0, 1], but is {prompt_share} ± {spread}.")
    generator = random.Random(seed + 1)
    rows = []
    for index, length in enumerate(draw_lengths(num_rows, seed=seed)):
        input_ids = [generator.randrange(vocab_size) for _ in range(length)]
        share = generator.uniform(prompt_share - spread, prompt_share + spread)
        num_prompt = min(max(round(length * share), 1), length - 1)
        rows.append(Row(index, input_ids, [-100] * num_prompt + input_ids[num_prompt:]))
    return rows


def qwen2_config(size: str, **overrides: Any) -> Any:
    """The configuration of Qwen2 `"0.5B"` or `"7B"`."""
    from transformers import Qwen2Config

    if size not in QWEN2_SIZES:
        raise ValueError(f"No shape {size!r}: choose one of {', '.join(map(repr, QWEN2_SIZES))}.")
    shared = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
    return Qwen2Config(**(shared | QWEN2_SIZES[size] | overrides))


def build_model(
    config: Any, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> nn.Module:
    """The model with random weights, made on the device in its precision: 7B takes 15 GB there and none here."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
