"""The count of operations: by hand, and by torch's own counter on a model's real forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.flops import DecoderShape, forward_flops, num_pairs, peak_flops, scoring_flops, utilisation
from tests.support.models import VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.slow

# hidden 32, 4 heads of 8, 2 key-value heads, MLP 48, 2 layers: per layer q and o 32·32 each, k and v 32·16 each, three
# of 32·48, hence 3072 + 4608.
LAYER_PARAMETERS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
HEAD_PARAMETERS = VOCAB_SIZE * 32


def shape() -> DecoderShape:
    return DecoderShape.from_config(tiny_model("qwen2").config)


def test_by_hand() -> None:
    assert (shape().layer_parameters, shape().head_parameters) == (LAYER_PARAMETERS, HEAD_PARAMETERS) == (15360, 1952)
    assert [num_pairs(3), num_pairs(3, causal=False)] == [1 + 2 + 3, 9]
    # Rows of 3 and 5 tokens with 2 and 1 labels; 6 + 15 pairs of 32 numbers, in 2 layers.
    attention = 2 * 32 * (6 + 15)
    assert scoring_flops(shape(), [3, 5], [2, 1]) == 4 * 15360 * 8 + 4 * 1952 * 3 + 12 * attention
    assert scoring_flops(shape(), [3, 5], [2, 1], all_positions=True) == 4 * (15360 + 1952) * 8 + 12 * attention
    assert forward_flops(shape(), [3, 5], [2, 1]) == 2 * 15360 * 8 + 2 * 1952 * 3 + 4 * attention


def test_rows_add_up() -> None:
    rows = [(3, 2), (17, 9), (40, 1)]
    together = scoring_flops(shape(), *zip(*rows, strict=True))
    assert together == sum(scoring_flops(shape(), [tokens], [labels]) for tokens, labels in rows)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_parameters_are_the_model_s_matrices(architecture: str) -> None:
    model = tiny_model(architecture)
    head = model.get_output_embeddings()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    found = DecoderShape.from_config(model.config)
    assert found.layer_parameters == sum(weight.numel() for weight in weights)
    assert found.head_parameters == head.weight.numel()


@pytest.mark.parametrize("all_positions", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_torch_counts_the_same(architecture: str, all_positions: bool) -> None:
    """Eager attention multiplies every query by every key, which is what is not causal here."""
    model = tiny_model(architecture, attn_implementation="eager").requires_grad_(False).eval()
    num_rows, num_tokens, num_labels = 2, 13, 5
    embedded = model.get_input_embeddings()(torch.randint(3, VOCAB_SIZE, (num_rows, num_tokens))).requires_grad_(True)
    keep = {} if all_positions else {"logits_to_keep": torch.arange(4, 4 + num_labels)}
    with FlopCounterMode(display=False) as forward:
        logits = model(inputs_embeds=embedded, use_cache=False, **keep).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()

    found = DecoderShape.from_config(model.config)
    rows = [num_tokens] * num_rows, [num_labels] * num_rows
    one_way = forward_flops(found, *rows, all_positions=all_positions, causal=False)
    both_ways = scoring_flops(found, *rows, all_positions=all_positions, causal=False)
    # Some versions of transformers make the rotary angles, frequencies times positions, by a product of matrices too.
    rotary = forward.get_total_flops() - one_way
    assert rotary in (0, 2 * num_tokens * found.head_dim // 2)
    assert forward.get_total_flops() + backward.get_total_flops() == both_ways + rotary


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA L40", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_utilisation() -> None:
    assert utilisation(4e15, 2.0, 1e16) == 0.2
