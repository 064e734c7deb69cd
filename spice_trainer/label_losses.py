r"""Losses at label positions straight from the hidden states that the head reads, a chunk of positions at a time.

For the hidden state h_p before a label y_p and a plain head z = W h (+ b) over V tokens,

    ℓ_p = log Σ_v exp z_v − z_{y_p},      ∂ℓ_p/∂h_p = Wᵀ (softmax(z) − e_{y_p})

Logits of a chunk are turned into losses and gradients at once and dropped, so that neither they nor their gradients
are ever held for a whole micro-batch (N × S × V numbers: the largest tensor by far of a small model), and positions
without a label cost nothing.

A hook on the head does it within the model's own forward, where its weights are there also if they are sharded, and
lets the head itself see one position a sample. Models that change logits behind their head (soft caps, scales) show by
logits that are not the head's output; for them the full computation is used.

Axes: N samples, S tokens, P label positions of all samples, d hidden features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK_NUMBERS = 2**25
"""Logits of a chunk: 128 MB in float32."""


class _TokenLosses(torch.autograd.Function):
    """Losses of label positions; their gradients are formed in the forward, while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradients = torch.empty_like(hidden)
        size = max(1, CHUNK_NUMBERS // len(weight))
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            logits = nn.functional.linear(hidden[chunk], weight, bias)
            dtype, logits = logits.dtype, logits.float()
            norms = torch.logsumexp(logits, dim=-1, keepdim=True)
            places = targets[chunk, None]
            losses[chunk] = (norms - logits.gather(1, places)).squeeze(1)
            # In place: logits become softmax − one-hot.
            errors = logits.sub_(norms).exp_()
            errors.scatter_add_(1, places, torch.full_like(norms, -1.0))
            gradients[chunk] = errors.to(dtype) @ weight.to(dtype)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * output_gradients[0][:, None].to(gradients.dtype), None, None, None


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
    losses: Tensor = _TokenLosses.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    return losses


class LabelHead:
    """Takes the place of a model's head while it is scored.

    Args:
        head (`torch.nn.Linear`): The model's head.

    Example:
    ```python
    >>> head = LabelHead(model.get_output_embeddings())
    >>> head.expect(targets, mask)
    >>> outputs = model(input_ids)
    >>> losses = head.losses(outputs.logits)
    ```
    """

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._targets: Tensor | None = None
        self._mask: Tensor | None = None
        self._losses: Tensor | None = None
        self._output: Tensor | None = None
        self._num_calls = 0

    @classmethod
    def of(cls, model: nn.Module) -> LabelHead | None:
        """The head of a model that has a plain one, or `None`.

        Args:
            model (`torch.nn.Module`): A causal language model.
        """
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        # Not a subclass: those of quantised weights, LoRA or tensor parallelism compute something else.
        return cls(head) if type(head) is nn.Linear else None

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks the head; removing the handles undoes it."""
        return [
            self._head.register_forward_pre_hook(self._take_losses),
            self._head.register_forward_hook(self._keep_output),
        ]

    def expect(self, targets: Int[Tensor, "N S"], mask: Tensor) -> None:
        """Announces the labels of the next forward.

        Args:
            targets (`torch.Tensor` of shape `(N, S)`): Token ids, where position s of the hidden states predicts
                `targets[:, s]`; the hidden states may have more positions.
            mask (`torch.Tensor` of shape `(N, S)`, boolean): Which positions carry a label.
        """
        self._targets, self._mask = targets, mask
        self._losses, self._output, self._num_calls = None, None, 0

    def losses(self, logits: Tensor) -> Float[Tensor, "N"] | None:
        """Mean loss of each sample's labels, 0 without any; `None` if the model's logits are not the head's output.

        Args:
            logits (`torch.Tensor` of shape `(N, 1, V)`): What the model returned.
        """
        losses, output = self._losses, self._output
        self.release()
        if losses is None or output is None or self._num_calls != 1 or output.shape != logits.shape:
            return None
        same = torch.isclose(output.float(), logits.float(), rtol=0.0, atol=0.0, equal_nan=True)
        return losses if bool(same.all()) else None

    def release(self) -> None:
        """Lets go of everything of a forward."""
        self._targets, self._mask, self._losses, self._output = None, None, None, None

    def _take_losses(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._num_calls += 1
        if self._targets is None or self._mask is None or self._num_calls > 1:
            return None
        hidden = args[0]
        if hidden.dim() != 3 or hidden.shape[1] < self._mask.shape[1]:
            return None
        mask, targets = self._mask.to(hidden.device), self._targets.to(hidden.device)
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        of_tokens = token_losses(hidden[:, : mask.shape[1]][mask], weight.detach(), bias, targets[mask])
        totals = of_tokens.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], of_tokens)
        self._losses = totals / mask.sum(1).clamp(min=1)
        return (hidden[:, :1].detach(), *args[1:])

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._output = output.detach()
