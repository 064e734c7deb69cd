"""Takes the place of a model's head while it is scored, so that logits exist at label positions alone, in chunks.

    z_p = W h_p + b  →  ℓ_p, ∂ℓ_p/∂h_p  →  z_p dropped        (module `label_losses`)

A hook on the head does it within the model's own forward, where its weights are there also if they are sharded, and
lets the head itself see one position a sample. Models that change logits behind their head (soft caps, scales, hooks)
show by logits that are not W h + b: one forward finds that out before the first pass, and is not repeated.

Axes: N samples, S tokens, P label positions of all samples, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.label_losses import chunk_tokens, mean_of_samples, token_losses

# Heads whose product is known to be the model's logits, or known not to be. A model's code does not change in a run.
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class LabelHead:
    """Stands in for a model's head.

    Args:
        head (`torch.nn.Linear`): The model's head.

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

    def __init__(self, head: nn.Linear) -> None:
        self._head = head
        self._targets: Tensor | None = None
        self._mask: Tensor | None = None
        self._losses: Tensor | None = None
        self._product: Tensor | None = None
        self._is_observing = False
        self._num_calls = 0

    @classmethod
    def of(cls, model: nn.Module) -> LabelHead | None:
        """The stand-in for a model whose head can have one, or `None`.

        Args:
            model (`torch.nn.Module`): A causal language model.
        """
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        # Not a subclass: those of quantised weights, LoRA or tensor parallelism compute something else.
        return cls(head) if type(head) is nn.Linear else None

    @property
    def is_plain(self) -> bool | None:
        """Whether the head's product is what the model returns; `None` before a forward was looked at."""
        return _known.get(self._head)

    @property
    def chunk(self) -> tuple[int, int]:
        """Label positions whose logits are held at a time, and how many logits each has."""
        return chunk_tokens(self._head.out_features), self._head.out_features

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks the head; removing the handles undoes it."""
        return [self._head.register_forward_pre_hook(self._before_head)]

    @contextmanager
    def expecting(self, targets: Int[Tensor, "N S"], mask: Tensor) -> Iterator[None]:
        """Context of one forward whose losses the head takes. Lets go of everything at its end.

        Args:
            targets (`torch.Tensor` of shape `(N, S)`): Token ids, where position s of the hidden states predicts
                `targets[:, s]`; the hidden states may have more positions.
            mask (`torch.Tensor` of shape `(N, S)`, boolean): Which positions carry a label.
        """
        self._targets, self._mask, self._losses, self._num_calls = targets, mask, None, 0
        try:
            yield
        finally:
            self._targets, self._mask, self._losses = None, None, None

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Context of one ordinary forward, whose logits [`LabelHead.judge`] is given in it."""
        self._is_observing, self._product, self._num_calls = True, None, 0
        try:
            yield
        finally:
            self._is_observing, self._product = False, None

    def judge(self, logits: Float[Tensor, "N S V"]) -> None:
        """Finds out whether the head's product is what the model returned.

        Args:
            logits (`torch.Tensor` of shape `(N, S, V)`): What it returned.
        """
        product = self._product
        is_plain = self._num_calls == 1 and product is not None and product.shape == logits.shape
        if is_plain and product is not None:
            # Numbers that are not finite tell nothing.
            tells = product.isfinite()
            is_plain = bool(((product == logits) | ~tells).all() & tells.any())
        _known[self._head] = is_plain

    def losses(self) -> Float[Tensor, "N"]:
        """Mean loss of each sample's labels, 0 without any, of the forward in [`LabelHead.expecting`].

        Raises:
            RuntimeError: If the forward did not call the head once, as it did when it was looked at.
        """
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
        of_tokens = token_losses(hidden[:, : mask.shape[1]][mask], weight.detach(), bias, targets[mask])
        self._losses = mean_of_samples(of_tokens, mask)
        # Whoever looks at the logits finds some, of one position; nothing is taken of them.
        return (_not_a_view(hidden[:, :1].detach()), *args[1:])


def _not_a_view(hidden: Tensor) -> Tensor:
    """Some positions as a tensor of their own.

    For a view of them torch 2.13 copies a frozen weight for each sample (bfloat16, CPU), in a third of scoring's time.
    """
    return hidden.contiguous()
