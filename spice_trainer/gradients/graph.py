"""What autograd's graph tells of a loss: which weights and which calls of layers it was computed from.

A layer that a forward does not use (a vision tower without an image, a skipped cross-attention) has gradient 0; one
that a fused kernel bypasses has a gradient, which no hook sees. Neither is called, but the second one's weight is in
the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class LossGraph:
    """The nodes that a loss was computed through. They can be read after the backward, too, while the loss lives."""

    def __init__(self, loss: Tensor) -> None:
        self._nodes: set[Any] = set()
        self._leaves: dict[int, Tensor] = {}
        waiting: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node in self._nodes:
                continue
            self._nodes.add(node)
            if hasattr(node, "variable"):
                self._leaves[id(node.variable)] = node.variable
            waiting += [following for following, _ in node.next_functions if following is not None]

    def has_node(self, node: Any) -> bool:
        """Whether the loss was computed through this `grad_fn`."""
        return node in self._nodes

    def has_weight(self, weight: Tensor) -> bool:
        """Whether the loss depends on this weight by autograd; of one that FSDP sharded nothing is known."""
        return id(weight) in self._leaves

    def other_leaves(self, known: Iterable[Tensor]) -> list[Tensor]:
        """Tensors, no weights, that were made to require a gradient by something else than what is known."""
        known_ids = set(map(id, known))
        return [leaf for key, leaf in self._leaves.items() if key not in known_ids and type(leaf) is Tensor]
