"""What a pass allocates, seen operation by operation, and what a larger pass would: its peak without running it.

The same pass, run at two small shapes, makes the same tensors in the same order. A tensor that grew from shape A to
shape B as n·S did has n·S entries times something; so every tensor's size is known at any shape, and

    peak(shape) = max over time of Σ sizes(shape) of the tensors alive

follows from the order in which tensors came and went. Workspaces inside a kernel are not seen.

Axes: n rows of a pass, S tokens of the longest, C columns with a label, P label tokens.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass(frozen=True)
class PassShape:
    """What the memory of a pass depends on.

    Args:
        num_rows (`int`): n.
        num_tokens (`int`): S, padding included.
        num_columns (`int`): C, positions at which any row has a label.
        num_label_tokens (`int`): P, of all rows.
    """

    num_rows: int
    num_tokens: int
    num_columns: int
    num_label_tokens: int

    def quantities(self) -> tuple[int, ...]:
        """What a tensor's size may be proportional to: 1, n, S, S², C, nS, nS², nC, P."""
        n, s, c, p = self.num_rows, self.num_tokens, self.num_columns, self.num_label_tokens
        return (1, n, s, s * s, c, n * s, n * s * s, n * c, p)


# Where n·S and P are among the quantities, and what stands behind them: P, as far as a chunk goes.
_PER_TOKEN, _PER_LABEL, _PER_CHUNK = 5, 8, 9


@dataclass(frozen=True)
class LabelChunk:
    """Label tokens whose logits are held together.

    Args:
        num_tokens (`int`): How many.
        num_logits (`int`): V, logits of each.
    """

    num_tokens: int
    num_logits: int


class AllocationTrace(TorchDispatchMode):
    """Notes every storage that operations allocate on one kind of device, and when it is freed.

    Args:
        device_type (`str`): Such as `"cuda"`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        """The operation that made each storage."""
        self.sizes: list[int] = []
        """Its bytes."""
        self.events: list[tuple[int, bool]] = []
        """Number of a storage, and whether it came or went."""
        self._device_type = device_type
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and looks at what it was given and what it made."""
        kwargs = kwargs or {}
        # Weights and whatever else was there before: what is made from them may be a view.
        for storage in self._storages((args, kwargs)):
            self._known[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata))
        outputs = func(*args, **kwargs)
        for storage in self._storages(outputs):
            number = len(self.sizes)
            self.names.append(str(func))
            self.sizes.append(storage.nbytes())
            self.events.append((number, True))
            self._known[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata, number))
        return outputs

    def _storages(self, values: Any) -> Iterator[torch.UntypedStorage]:
        """Storages that are not known yet."""
        for value in tree_iter(values):
            if isinstance(value, Tensor) and value.device.type == self._device_type and value.layout == torch.strided:
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    yield storage

    def _forget(self, key: int, number_or_reference: Any, reference: Any = None) -> None:
        del self._known[key]
        if reference is not None:
            self.events.append((number_or_reference, False))

    def peak(self, sizes: Sequence[float] | None = None) -> float:
        """Most bytes alive at a time.

        Args:
            sizes (`Sequence[float]`, *optional*): Other sizes of the storages than they had.
        """
        sizes = self.sizes if sizes is None else sizes
        alive = most = 0.0
        for number, came in self.events:
            alive += sizes[number] if came else -sizes[number]
            most = max(most, alive)
        return most


class PassMemory:
    """Predicts the peak of a pass of any shape from two that were traced.

    Args:
        shapes (`Sequence[PassShape]`): Shapes of the two, the smaller first. No two of their quantities may have grown
            alike.
        traces (`Sequence[AllocationTrace]`): What was seen.
        chunk ([`LabelChunk`], *optional*): Where logits are held of some label tokens at a time.
    """

    def __init__(
        self, shapes: Sequence[PassShape], traces: Sequence[AllocationTrace], *, chunk: LabelChunk | None = None
    ) -> None:
        (small, large), (first, second) = shapes, traces
        self._quantities, self._trace, self._chunk_tokens = large.quantities(), second, 0
        growths = [math.log(b / a) for a, b in zip(small.quantities(), self._quantities, strict=True)]
        # Where the model took another path (experts), most of what it makes has n·S entries.
        self._kinds = [_PER_TOKEN] * len(second.sizes)
        for number, counterpart in _common_ends(first.names, second.names):
            here, there = first.sizes[number], second.sizes[counterpart]
            grown = math.log(there / here) if here and there else 0.0
            self._kinds[counterpart] = min(range(len(growths)), key=lambda kind: abs(growths[kind] - grown))

        if chunk is not None:
            # The probes have fewer label tokens than a chunk.
            least = 2 * chunk.num_logits * self._quantities[_PER_LABEL]
            self._chunk_tokens = chunk.num_tokens
            for number, size in enumerate(second.sizes):
                if self._kinds[number] == _PER_LABEL and size >= least:
                    self._kinds[number] = _PER_CHUNK

    def peak(self, shape: PassShape) -> int:
        """Bytes at the peak of a pass, beyond what was there before."""
        ratios = [there / here for there, here in zip(shape.quantities(), self._quantities, strict=True)]
        num_together = min(shape.num_label_tokens, self._chunk_tokens)
        ratios.append(num_together / self._quantities[_PER_LABEL])
        sizes = [size * ratios[kind] for size, kind in zip(self._trace.sizes, self._kinds, strict=True)]
        return round(self._trace.peak(sizes))


def _common_ends(first: Sequence[str], second: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of what two sequences have in common at their beginnings and ends."""
    shorter = min(len(first), len(second))
    start = next((number for number in range(shorter) if first[number] != second[number]), shorter)
    rest = shorter - start
    stop = next((number for number in range(rest) if first[-1 - number] != second[-1 - number]), rest)
    ends = ((len(first) - 1 - number, len(second) - 1 - number) for number in range(stop))
    return [(number, number) for number in range(start)] + list(ends)
