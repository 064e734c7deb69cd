"""What a kind of layer must give so that its sample gradients can be taken, and the table of kinds by module class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# By class, or by the full name of one whose library need not be there.
LAYER_KINDS: dict[type[nn.Module] | str, type[ScoredLayer]] = {}


class NotLinearError(Exception):
    """A layer's output is not what its kind says of its weight, so that its gradient must be autograd's own."""


class ScoredLayer(ABC):
    """A layer whose sample gradients are taken, and what of it trained when this was made.

    A sample's gradient has D_l coordinates: those of each trained parameter, row-major, one parameter after another.
    The name is the module's full name in the model, for messages. A kind whose calls do not tell a sample's gradient
    `takes_autograd`: rows are scored one at a time, and its parameters' gradients are a row's. Others override all.
    """

    takes_autograd = False
    # It is scored by the parameters of modules within it.
    owns_children = False
    # Most coordinates of a sample are 0, and `sparse_gradients` gives the others.
    is_sparse = False

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this module of a registered class is of the kind after all."""
        return True

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """The trained parameters, in the order of the gradient's coordinates; empty or flat where they are sharded."""

    @property
    @abstractmethod
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Their whole shapes, known also where a wrapper has sharded them."""

    @property
    def parts(self) -> Sequence[ScoredLayer]:
        """The layers whose calls the parameters are used in: several where they are tied."""
        return [self]

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_tokens: int) -> Any:
        """What of a call is kept until the gradient of its output comes, or `None` if it mixes samples.

        The samples are padded to `num_tokens` tokens. Raises a NotLinearError of a layer that is not of the kind.
        """
        raise NotImplementedError

    def inputs(self, kept: Any) -> Tensor:
        """Of what was kept, what the gradients are formed from, with axes of samples and positions in front."""
        inputs: Tensor = kept
        return inputs

    def sample_gradients(
        self, inputs: Tensor, output_gradients: Tensor, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "N _"]:
        """Coordinates `start` to `stop` (one of `cuts`) of sample gradients, in float32.

        They are formed from one call's inputs and ∂(Σ_n ℓ_n)/∂output, with axes of samples and positions in front. A
        sample that the call did not use has gradient 0. An autocast may be in force.
        """
        raise NotImplementedError

    def sparse_gradients(self, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of one sample's gradient, each once, and their values in float32; from those of its one row."""
        raise NotImplementedError

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The part of the output that these numbers in place of the trained parameters make; linear in them."""
        raise NotImplementedError

    @property
    def num_coordinates(self) -> int:
        """D_l, known also where a wrapper has sharded the parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def cuts(self, max_numbers: int) -> Iterator[tuple[int, int]]:
        """Ranges of coordinates that are formed at a time: of at most so many, but at least of a parameter's row."""
        start = 0
        for shape in self.shapes:
            width = math.prod(shape[1:])
            stop, step = start + math.prod(shape), max(1, max_numbers // width) * width
            yield from ((begin, min(begin + step, stop)) for begin in range(start, stop, step))
            start = stop


def register_layer(*classes: type[nn.Module] | str) -> Callable[[type[ScoredLayer]], type[ScoredLayer]]:
    """Class decorator: modules of these classes, and of subclasses without a kind of their own, are scored by it.

    A class is given by its full name where its library need not be installed.

    Example:
    ```python
    >>> @register_layer(MyLinear, "their_package.TheirLinear")
    ... class MyLinearLayer(ScoredLayer): ...
    ```
    """

    def register(kind: type[ScoredLayer]) -> type[ScoredLayer]:
        for cls in classes:
            if cls in LAYER_KINDS:
                name = cls if isinstance(cls, str) else cls.__name__
                raise ValueError(f"{name} is scored by {LAYER_KINDS[cls].__name__} already.")
            LAYER_KINDS[cls] = kind
        return kind

    return register


# Parameters that require a gradient which no optimizer applies.
_idle = WeakIdKeyDictionary()


def trains(parameter: Tensor) -> bool:
    """Whether a parameter of a layer that is scored trains."""
    return parameter.requires_grad and parameter not in _idle


def set_idle(parameter: Tensor, *, is_idle: bool) -> None:
    """Says whether a parameter is trained in vain, where the optimizer is known."""
    if is_idle:
        _idle[parameter] = True
    else:
        _idle.pop(parameter, None)


def by_sample(values: Tensor, num_samples: int, num_tokens: int, *, may_be_flat: bool = True) -> Tensor | None:
    """(N, S, ...) with one axis of positions: any where N is 1, and (N·S, F) if it `may_be_flat`; `None` of others."""
    if len(values) == num_samples and values.dim() == 3:
        return values
    if num_samples == 1 or (len(values) == num_samples and values.dim() > 3):
        # Not -1: an expert may get no token at all.
        return values.reshape(num_samples, math.prod(values.shape[:-1]) // num_samples, values.shape[-1])
    is_flat = may_be_flat and values.dim() == 2 and len(values) == num_samples * num_tokens
    return values.view(num_samples, num_tokens, -1) if is_flat else None


def holds_only(module: nn.Module, *names: str) -> bool:
    """Whether it holds no other parameter, and no module within it, such as one that computes a weight from others."""
    return module._parameters.keys() <= {*names} and not module._modules


@contextmanager
def stand_ins(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which a module finds these tensors in the place of its parameters."""
    # As attributes, which come before parameters: those of sharded models may not be there at this moment.
    attributes = vars(module)
    before = {key: attributes[key] for key in values if key in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for key in values:
            del attributes[key]
        attributes.update(before)


_whole_shapes: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


def whole_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a module's parameter as it was when it was first asked for: before a wrapper sharded it."""
    shapes = _whole_shapes.setdefault(module, {})
    if name not in shapes:
        parameter = getattr(module, name)
        # ZeRO-3 may have loaded it in parts.
        shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return shapes[name]
