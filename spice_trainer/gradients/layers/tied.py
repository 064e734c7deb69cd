"""One weight that several layers use, as a model's head and its input embedding do: the sum of their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from spice_trainer.gradients.layers.base import ScoredLayer


class TiedLayer(ScoredLayer):
    """Layers whose trained parameters are the same, by the name of the first."""

    def __init__(self, parts: Sequence[ScoredLayer]) -> None:
        super().__init__(parts[0].name, parts[0].module)
        self._parts = parts

    @property
    def parts(self) -> Sequence[ScoredLayer]:
        """The layers."""
        return self._parts

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Theirs, once."""
        return self._parts[0].parameters

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Theirs, once."""
        return self._parts[0].shapes

    def cuts(self, max_numbers: int) -> Iterator[tuple[int, int]]:
        """Those of the first."""
        return self._parts[0].cuts(max_numbers)
