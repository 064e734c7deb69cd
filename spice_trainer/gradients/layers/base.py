"""What a kind of layer must give so that its sample gradients can be taken, and the table of kinds by module class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor, nn

LAYER_KINDS: dict[type[nn.Module], type[ScoredLayer]] = {}


class ScoredLayer(ABC):
    """A layer whose sample gradients are taken, and what of it trained when this was made.

    A sample's gradient has D_l coordinates: those of each trained parameter, row-major, one parameter after another.
    The name is the module's full name in the model, for messages. A kind whose calls do not tell a sample's gradient
    `takes_autograd`: rows are scored one at a time, and its parameters' gradients are a row's. Others override all.
    """

    takes_autograd = False

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """The trained parameters, in the order of the gradient's coordinates; empty or flat where they are sharded."""

    @property
    @abstractmethod
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Their whole shapes, known also where a wrapper has sharded them."""

    def by_sample(self, inputs: Tensor, num_samples: int, num_tokens: int) -> Tensor | None:
        """A call's input with axes of samples and positions in front, or `None` if it cannot be told apart.

        The samples are padded to `num_tokens` tokens.
        """
        raise NotImplementedError

    def sample_gradients(self, inputs: Tensor, output_gradients: Tensor) -> Float[Tensor, "N D_l"]:
        """Sample gradients in float32, from one call's input by sample and ∂(Σ_n ℓ_n)/∂output with the same axes.

        A sample that the call did not use has gradient 0. An autocast may be in force.
        """
        raise NotImplementedError

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The part of the output that these numbers in place of the trained parameters make; linear in them."""
        raise NotImplementedError

    @property
    def num_coordinates(self) -> int:
        """D_l, known also where a wrapper has sharded the parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


def register_layer(*classes: type[nn.Module]) -> Callable[[type[ScoredLayer]], type[ScoredLayer]]:
    """Class decorator: modules of these classes, and of subclasses without a kind of their own, are scored by it.

    Example:
    ```python
    >>> @register_layer(MyLinear)
    ... class MyLinearLayer(ScoredLayer): ...
    ```
    """

    def register(kind: type[ScoredLayer]) -> type[ScoredLayer]:
        for cls in classes:
            if cls in LAYER_KINDS:
                raise ValueError(f"{cls.__name__} is scored by {LAYER_KINDS[cls].__name__} already.")
            LAYER_KINDS[cls] = kind
        return kind

    return register
