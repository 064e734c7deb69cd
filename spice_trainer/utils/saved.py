"""Values read from a checkpoint's state: JSON that anybody may have written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from spice_trainer.utils.logging import printable


def parse_json(content: str | bytes) -> Any:
    """Reads JSON; a `ValueError` for anything that is none, NaN and nesting without end included."""
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def saved_whole_number(value: Any) -> int:
    """Returns a value that was saved as a whole number; raises a `TypeError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{str(value)[:50]!r} is no whole number")
    return value


def saved_number(value: Any) -> float:
    """Returns a value that was saved as a finite number; raises a `TypeError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:50]!r} is no number")
    if not math.isfinite(value):
        raise TypeError(f"{value} is not finite")
    return value


def saved_numbers(value: Any) -> dict[str, Any]:
    """Returns a value that was saved as numbers by name; raises a `TypeError` for anything else."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{str(value)[:50]!r} holds no numbers by name")
    return {str(name): saved_number(number) for name, number in value.items()}


@contextmanager
def reading_saved(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Says of a state that has other values than this version writes that it cannot be used."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            printable(
                f"SPICE's state in {os.fspath(folder)} has other values than this version writes "
                f"({type(error).__name__}: {error}): it is damaged, or was edited. Resume from another checkpoint."
            )
        ) from error
