"""Shapes and types of arrays, as the package declares them with jaxtyping, checked while the tests run."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype for annotations of arrays alone: other arguments are mypy's, and wrong ones have our own messages."""
    hints = function.__annotations__
    function.__annotations__ = {name: hint if names_array(hint) else Any for name, hint in hints.items()}
    return beartype(function) if any(names_array(hint) for hint in hints.values()) else function


def names_array(hint: Any) -> bool:
    """Whether an array stands in the annotation, `list[Float[Tensor, "N"]] | None` included."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(names_array, typing.get_args(hint)))
