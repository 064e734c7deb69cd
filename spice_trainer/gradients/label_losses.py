r"""Losses at label positions straight from the hidden states that the head reads, a chunk of positions at a time.

For the hidden state h_p before a label y_p and a plain head z = W h (+ b) over V tokens,

    ℓ_p = log Σ_v exp z_v − z_{y_p},      ∂ℓ_p/∂h_p = Wᵀ (softmax(z) − e_{y_p})

Logits of a chunk are turned into losses and gradients at once and dropped, so that neither they nor their gradients
are ever held for a whole micro-batch (N × S × V numbers: the largest tensor by far of a small model), and positions
without a label cost nothing.

[`sample_losses`] is the plain computation from logits that are there already.

Axes: N samples, S tokens, P label positions of all samples, d hidden features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK_NUMBERS = 2**25
"""Logits of a chunk: 128 MB in float32."""


def chunk_tokens(num_tokens_in_vocabulary: int) -> int:
    """Label positions of a chunk.

    Args:
        num_tokens_in_vocabulary (`int`): V.
    """
    return max(1, CHUNK_NUMBERS // num_tokens_in_vocabulary)


class _TokenLosses(torch.autograd.Function):
    """Losses of label positions; their gradients are formed in the forward, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        gradients = torch.empty_like(hidden)
        losses = _in_chunks(hidden, weight, bias, targets, gradients)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * output_gradients[0][:, None].to(gradients.dtype), None, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, gradients: Tensor | None = None
) -> Tensor:
    """Losses; writes their gradients toward the hidden states, if there is where."""
    if torch.is_autocast_enabled(hidden.device.type):
        # Once, not for every chunk.
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
    losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    size = chunk_tokens(len(weight))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        written = None if gradients is None else gradients[part]
        _fill(hidden[part], weight, bias, targets[part], losses[part], written)
    return losses


def _fill(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, losses: Tensor, gradients: Tensor | None
) -> None:
    """One chunk. Its logits are gone before those of the next come."""
    logits = nn.functional.linear(hidden, weight, bias)
    dtype, logits = logits.dtype, logits.float()
    largest, places = logits.amax(dim=-1, keepdim=True), targets[:, None]
    picked = logits.gather(1, places) - largest
    # In place throughout, one buffer of logits: `logsumexp` would take another inside.
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses.copy_((sums.log() - picked).squeeze(1))
    if gradients is None:
        return
    errors = exponentials.div_(sums)
    errors.scatter_add_(1, places, torch.full_like(sums, -1.0))
    gradients.copy_(errors.to(dtype) @ weight.to(dtype))


def token_losses(
    hidden: Float[Tensor, "P d"], weight: Float[Tensor, "V d"], bias: Tensor | None, targets: Int[Tensor, "P"]
) -> Float[Tensor, "P"]:
    """Negative log-likelihood of each label, differentiable with respect to the hidden states.

    Args:
        hidden (`torch.Tensor` of shape `(P, d)`): What the head reads before each label.
        weight (`torch.Tensor` of shape `(V, d)`): The head's weight.
        bias (`torch.Tensor` of shape `(V,)`, *optional*): Its bias.
        targets (`torch.Tensor` of shape `(P,)`): The labels.

    Returns:
        `torch.Tensor` of shape `(P,)`, in float32.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return _in_chunks(hidden, weight, bias, targets)
    losses: Tensor = _TokenLosses.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return losses


def sample_losses(logits: Float[Tensor, "N S V"], targets: Int[Tensor, "N S"], mask: Tensor) -> Float[Tensor, "N"]:
    """Mean negative log-likelihood of each sample's label tokens, in float32.

    Args:
        logits (`torch.Tensor` of shape `(N, S, V)`):
            Logits, where position s predicts `targets[:, s]`.
        targets (`torch.Tensor` of shape `(N, S)`):
            Token ids, already shifted.
        mask (`torch.Tensor` of shape `(N, S)`, boolean):
            Which positions carry a label.

    Returns:
        `torch.Tensor` of shape `(N,)`; 0 for a sample without labels.
    """
    # Not `cross_entropy`, which Liger can replace by a kernel that writes into the logits. The numbers are the same.
    log_probabilities = torch.log_softmax(logits[mask].float(), dim=-1)
    return mean_of_samples(nn.functional.nll_loss(log_probabilities, targets[mask], reduction="none"), mask)


def mean_of_samples(losses: Float[Tensor, "P"], mask: Tensor) -> Float[Tensor, "N"]:
    """Mean of each sample's token losses, 0 for a sample without any.

    Args:
        losses (`torch.Tensor` of shape `(P,)`): Losses where `mask` is set, row by row.
        mask (`torch.Tensor` of shape `(N, S)`, boolean): Which positions carry a label.
    """
    totals = losses.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], losses)
    return totals / mask.sum(1).clamp(min=1)
