"""Checks of settings, with errors that say what is wrong, why, and the fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real


def whole_number(owner: str, name: str, value: object, minimum: int, reason: str) -> int:
    """Returns a setting as an `int`.

    Args:
        owner (`str`): The class that has it, for the message.
        name (`str`): Its name.
        value (`object`): Its value.
        minimum (`int`): The smallest legal value.
        reason (`str`): Why smaller ones are not.

    Raises:
        ValueError: If it is no whole number or too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(
            f"{owner}: {name}={value!r} is of type {type(value).__name__}, but {name} is a whole number. "
            f"Fix: set {name} to an int of at least {minimum}, written without quotes or decimal point."
        )
    number = int(value)
    if number < minimum:
        raise ValueError(
            f"{owner}: {name}={number} is below {minimum}: {reason}. Fix: set {name} to at least {minimum}."
        )
    return number


def real_number(
    owner: str, name: str, value: object, *, legal: str, reason: str, is_legal: Callable[[float], bool]
) -> float:
    """Returns a setting as a `float`.

    Args:
        owner (`str`): The class that has it, for the message.
        name (`str`): Its name.
        value (`object`): Its value.
        legal (`str`): Which values are legal, in words.
        reason (`str`): Why others are not.
        is_legal (`Callable[[float], bool]`): Whether a finite value is.

    Raises:
        ValueError: If it is no finite number, or not a legal one.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(
            f"{owner}: {name}={value!r} is of type {type(value).__name__}, but {name} is a number. Fix: set "
            f"{name} to a float {legal}; YAML reads 1e-6 as text and 1.0e-6 as a number."
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{owner}: {name}={value} is not finite. Fix: set {name} to a float {legal}.")
    if not is_legal(number):
        raise ValueError(f"{owner}: {name}={value} is not {legal}: {reason}. Fix: set {name} to a float {legal}.")
    return number


def truth_value(owner: str, name: str, value: object) -> None:
    """Checks a setting that is on or off.

    Args:
        owner (`str`): The class that has it, for the message.
        name (`str`): Its name.
        value (`object`): Its value.

    Raises:
        ValueError: If it is no `bool`.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name}={value!r} is neither True nor False. Fix: set {name} to one of them.")


def model_name(owner: str, name: str, value: object) -> str | None:
    """Returns the name of a model, or `None`.

    Args:
        owner (`str`): The class that has it, for the message.
        name (`str`): Its name.
        value (`object`): Its value. Argument parsers make the text "None" of `None`.

    Raises:
        ValueError: If it is neither a text nor `None`.
    """
    if value is None or value == "None":
        return None
    if not (isinstance(value, str) and value):
        raise ValueError(
            f"{owner}: {name}={value!r} is no name. Fix: give a model on the hub or a folder, or None. A loaded model "
            "goes to attach_spice as `proxy=ProxyModel(model)`."
        )
    return value


def name_list(owner: str, name: str, value: object) -> list[str] | None:
    """Returns some names as a list, or `None`.

    Args:
        owner (`str`): The class that has them, for the message.
        name (`str`): The setting.
        value (`object`): Its value. Argument parsers make a list of the text "None" of `None`.

    Raises:
        ValueError: If it is no list of texts, or an empty one.
    """
    if value is None or value == ["None"]:
        return None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(
            f"{owner}: {name}={value!r} is no list of names. Fix: give a list such as ['q_proj', 'v_proj'], or None."
        )
    return list(value)


def one_of(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Checks a setting that has a few legal values.

    Args:
        owner (`str`): The class that has it, for the message.
        name (`str`): Its name.
        value (`object`): Its value.
        choices (`tuple[str, ...]`): The legal ones.

    Raises:
        ValueError: If it is none of them.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{owner}: {name}={value!r} is unknown. Fix: set {name} to one of {listed}.")
