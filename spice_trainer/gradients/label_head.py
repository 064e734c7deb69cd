r"""Losses at label positions straight from the hidden states that a head reads, a chunk of positions at a time.

For the hidden state h_p before a label y_p and a plain head z = W h (+ b) over V tokens,

    ℓ_p = log Σ_v exp z_v − z_{y_p},      ∂ℓ_p/∂h_p = Wᵀ (softmax(z) − e_{y_p})

These are the losses that are returned, always; their gradients may be those of another loss of the labels, the one
that trains.

Logits of a chunk are turned into losses and gradients at once and dropped, so that neither they nor their gradients
are ever held for a whole micro-batch (N × S × V numbers: the largest tensor by far of a small model), and positions
without a label cost nothing.

A hook on the head does it within the model's own forward, where its weights are there also if they are sharded, and
lets the head itself see one position a sample. Models that change logits behind their head (soft caps, scales, hooks)
show by logits that are not W h + b: one forward finds that out before the first pass, and is not repeated.

Axes: N samples, S tokens, P label positions of all samples, d hidden features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Logits of a chunk: 128 MB in float32.
CHUNK_NUMBERS = 2**25


@dataclass(frozen=True)
class LabelLoss:
    """What a label token contributes to the loss that trains; ℓ is its negative log-likelihood.

    nll    (1 − ε) ℓ − ε/V Σ_v log p_v     with ε = `smoothing`, as transformers' LabelSmoother
    dft    exp(−ℓ) ℓ, the first constant   as TRL's loss_type="dft"
    """

    kind: Literal["nll", "dft"] = "nll"
    smoothing: float = 0.0

    def of(self, log_probabilities: Float[Tensor, "P V"], targets: Int[Tensor, "P"]) -> Float[Tensor, "P"]:
        """The labels' ℓ, with the gradient of what trains."""
        plain = nn.functional.nll_loss(log_probabilities, targets, reduction="none")
        if self.kind == "dft":
            trained = torch.exp(-plain.detach()) * plain
        elif self.smoothing:
            trained = (1 - self.smoothing) * plain - self.smoothing * log_probabilities.mean(-1)
        else:
            return plain
        return plain.detach() + (trained - trained.detach())

    def errors(
        self, probabilities: Float[Tensor, "P V"], targets: Int[Tensor, "P"], losses: Float[Tensor, "P"]
    ) -> Float[Tensor, "P V"]:
        """The gradient of what trains toward the logits, written over their softmax."""
        if self.smoothing and self.kind == "nll":
            probabilities -= self.smoothing / probabilities.shape[1]
            at_label = self.smoothing - 1.0
        else:
            at_label = -1.0
        places = targets[:, None]
        errors = probabilities.scatter_add_(1, places, probabilities.new_full(places.shape, at_label))
        return errors.mul_(torch.exp(-losses)[:, None]) if self.kind == "dft" else errors


PLAIN = LabelLoss()


def chunk_tokens(num_tokens_in_vocabulary: int) -> int:
    """Label positions of a chunk."""
    return max(1, CHUNK_NUMBERS // num_tokens_in_vocabulary)


def sample_losses(
    logits: Float[Tensor, "N S V"],
    targets: Int[Tensor, "N S"],
    mask: Bool[Tensor, "N S"],
    label_loss: LabelLoss = PLAIN,
) -> Float[Tensor, "N"]:
    """Mean negative log-likelihood of each sample's labels in float32, 0 without any, from logits that are there.

    Position s of the logits predicts `targets[:, s]`, and `mask` says which positions carry a label.
    """
    # Not `cross_entropy`, which Liger can replace by a kernel that writes into the logits. The numbers are the same.
    log_probabilities = torch.log_softmax(logits[mask].float(), dim=-1)
    return mean_of_samples(label_loss.of(log_probabilities, targets[mask]), mask)


def mean_of_samples(losses: Float[Tensor, "P"], mask: Bool[Tensor, "N S"]) -> Float[Tensor, "N"]:
    """Mean of each sample's token losses, given where `mask` is set, row by row; 0 for a sample without any."""
    totals = losses.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], losses)
    return totals / mask.sum(1).clamp(min=1)


def token_losses(
    hidden: Float[Tensor, "P d"],
    weight: Float[Tensor, "V d"],
    bias: Tensor | None,
    targets: Int[Tensor, "P"],
    label_loss: LabelLoss = PLAIN,
) -> Float[Tensor, "P"]:
    """Negative log-likelihood of each label in float32, differentiable with respect to the hidden states."""
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return _in_chunks(hidden, weight, bias, targets, label_loss)
    losses: Tensor = _TokenLosses.apply(hidden, weight, bias, targets, label_loss)  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(torch.autograd.Function):
    """Losses of label positions; their gradients are formed in the forward, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_loss: LabelLoss
    ) -> Tensor:
        gradients = torch.empty_like(hidden)
        losses = _in_chunks(hidden, weight, bias, targets, label_loss, gradients)
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *output_gradients: Any) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * output_gradients[0][:, None].to(gradients.dtype), None, None, None, None


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_loss: LabelLoss,
    gradients: Tensor | None = None,
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
        _fill(hidden[part], weight, bias, targets[part], label_loss, losses[part], written)
    return losses


def _fill(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_loss: LabelLoss,
    losses: Tensor,
    gradients: Tensor | None,
) -> None:
    """One chunk. Its logits are gone before those of the next come."""
    logits = nn.functional.linear(hidden, weight, bias)
    dtype, logits = logits.dtype, logits.float()
    largest = logits.amax(dim=-1, keepdim=True)
    picked = logits.gather(1, targets[:, None]) - largest
    # In place throughout, one buffer of logits: `logsumexp` would take another inside.
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(dim=-1, keepdim=True)
    losses.copy_((sums.log() - picked).squeeze(1))
    if gradients is None:
        return
    errors = label_loss.errors(exponentials.div_(sums), targets, losses)
    gradients.copy_(errors.to(dtype) @ weight.to(dtype))


# Heads whose product is known to be the model's logits, or known not to be. A model's code does not change in a run.
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class LabelHead:
    """Stands in for a model's head.

    Example:
    ```python
    >>> head = LabelHead.of(model)
    >>> handles = head.attach()
    >>> if head.is_plain:
    ...     with head.expecting(targets, mask):
    ...         model(input_ids)
    ...         losses = head.losses()
    ```
    """

    def __init__(self, head: nn.Linear, label_loss: LabelLoss = PLAIN) -> None:
        self._head = head
        self._label_loss = label_loss
        self._targets: Tensor | None = None
        self._mask: Tensor | None = None
        self._losses: Tensor | None = None
        self._product: Tensor | None = None
        self._is_observing = False
        self._num_calls = 0

    @classmethod
    def of(cls, model: nn.Module, label_loss: LabelLoss = PLAIN) -> LabelHead | None:
        """The stand-in for a model whose head can have one, or `None`."""
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        # Not a subclass: those of quantised weights, LoRA or tensor parallelism compute something else.
        return cls(head, label_loss) if type(head) is nn.Linear else None

    @property
    def is_plain(self) -> bool | None:
        """Whether the head's product is what the model returns; `None` before a forward was looked at."""
        return _known.get(self._head)

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks the head; removing the handles undoes it."""
        return [self._head.register_forward_pre_hook(self._before_head)]

    @contextmanager
    def expecting(self, targets: Int[Tensor, "N S"], mask: Bool[Tensor, "N S"]) -> Iterator[None]:
        """Context of one forward whose losses the head takes. Lets go of everything at its end.

        Position s of the hidden states, which may have more positions, predicts `targets[:, s]` where `mask` is set.
        """
        self._targets, self._mask, self._losses, self._num_calls = targets, mask, None, 0
        try:
            yield
        finally:
            self._targets, self._mask, self._losses = None, None, None

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Context of one ordinary forward, whose logits `judge` is given in it."""
        self._is_observing, self._product, self._num_calls = True, None, 0
        try:
            yield
        finally:
            self._is_observing, self._product = False, None

    def judge(self, logits: Float[Tensor, "N S V"]) -> None:
        """Finds out whether the head's product is what the model returned."""
        product = self._product
        is_plain = self._num_calls == 1 and product is not None and product.shape == logits.shape
        if is_plain and product is not None:
            # Numbers that are not finite tell nothing.
            tells = product.isfinite()
            is_plain = bool(((product == logits) | ~tells).all() & tells.any())
        _known[self._head] = is_plain

    def losses(self) -> Float[Tensor, "N"]:
        """Mean loss of each sample's labels, 0 without any, of the forward in `expecting`."""
        if self._losses is None or self._num_calls != 1:
            raise RuntimeError(
                f"The model's head ({type(self._head).__name__}) was called {self._num_calls} times in a forward, "
                "where it had been called once before, so the losses of its labels are not known. Score with a model "
                "whose forward does the same each time."
            )
        return self._losses

    def _before_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        self._num_calls += 1
        if self._num_calls > 1:
            return None
        hidden = args[0]
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        if self._targets is None or self._mask is None:
            # Offloaded weights come only within the head's own forward.
            if not self._is_observing or weight.device != hidden.device:
                return None
            hidden = _not_a_view(hidden)
            self._product = nn.functional.linear(hidden, weight, bias)
            return (hidden, *args[1:])
        mask, targets = self._mask.to(hidden.device), self._targets.to(hidden.device)
        hidden_before = hidden[:, : mask.shape[1]][mask]
        of_tokens = token_losses(hidden_before, weight.detach(), bias, targets[mask], self._label_loss)
        self._losses = mean_of_samples(of_tokens, mask)
        # Whoever looks at the logits finds some, of one position; nothing is taken of them.
        return (_not_a_view(hidden[:, :1].detach()), *args[1:])


def _not_a_view(hidden: Tensor) -> Tensor:
    """Some positions as a tensor of their own.

    For a view of them torch 2.13 copies a frozen weight for each sample (bfloat16, CPU), in a third of scoring's time.
    """
    return hidden.contiguous()
