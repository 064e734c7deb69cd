"""Floating-point operations that scoring rows needs, and the share of a card's peak that they come to.

    FLOPs = Σ_rows  4 P_layers S  +  4 P_head L  +  12 n_layers n_heads d_head · pairs(S)
    utilisation = FLOPs / (seconds · peak)

for a row of S tokens with L labels. Each weight of a matrix takes a multiplication and an addition in the forward and
as many in the gradient toward its input; no weight has a gradient. Attention does, for each layer, head and pair of a
query and a key that it may see, 4 d_head operations in the forward (QKᵀ, AV) and 8 d_head in the backward (toward A,
V, Q and K): all four products are of activations. A causal row has pairs(S) = S (S + 1) / 2.

Counted is what a row needs, whatever an implementation does: no padding, no recomputation, no LoRA, the head at label
positions alone (`all_positions` where it is computed at all of them). P_layers counts the matrices of the layers,
neither norms nor biases nor the input embedding, whose look-up multiplies nothing. A tied head counts as a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Dense bf16 with fp32 accumulation, operations a second, from the makers' data sheets (half of what they give "with
# sparsity"). The first entry whose words are all in the device's name is the device's.
PEAK_BF16: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),  # SXM, which calls itself "NVIDIA H100 80GB HBM3"
    ("H20", 148e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
)


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder of attention and gated MLP layers (Llama, Mistral, Qwen2, Qwen3, ...)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        num_heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=num_heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
        )

    @property
    def layer_parameters(self) -> int:
        """P_layers: weights of all layers' matrices."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_key_value_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """P_head: weights of the matrix that makes the logits."""
        return self.vocab_size * self.hidden_size


def num_pairs(num_tokens: int, *, causal: bool = True) -> int:
    """Pairs of a query and a key that it sees, in a row. Not causal is what kernels that mask afterwards compute."""
    return num_tokens * (num_tokens + 1) // 2 if causal else num_tokens**2


def forward_flops(
    shape: DecoderShape,
    num_tokens: Sequence[int],
    num_labels: Sequence[int],
    *,
    all_positions: bool = False,
    causal: bool = True,
) -> int:
    """Operations of the forward alone, of rows of `num_tokens` tokens with `num_labels` labels after the shift."""
    head_positions = sum(num_tokens) if all_positions else sum(num_labels)
    pairs = sum(num_pairs(number, causal=causal) for number in num_tokens)
    weights = shape.layer_parameters * sum(num_tokens) + shape.head_parameters * head_positions
    return 2 * weights + 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs


def scoring_flops(
    shape: DecoderShape,
    num_tokens: Sequence[int],
    num_labels: Sequence[int],
    *,
    all_positions: bool = False,
    causal: bool = True,
) -> int:
    """Operations of the forward and of the backward toward the embedding's output, the module's equation."""
    pairs = sum(num_pairs(number, causal=causal) for number in num_tokens)
    # The backward does for the weights what the forward does, and for attention twice that.
    forward = forward_flops(shape, num_tokens, num_labels, all_positions=all_positions, causal=causal)
    return 2 * forward + 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of `torch.cuda.get_device_name()`, or nothing for a device that the table lacks."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_BF16:
        if all(word in words for word in name.split()):
            return peak
    return None


def utilisation(flops: float, seconds: float, peak: float) -> float:
    """Share of the peak."""
    return flops / (seconds * peak)
