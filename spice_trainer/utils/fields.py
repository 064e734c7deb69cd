"""Checks of settings, with errors that say what is wrong, why, and the fix.

Each is called with the class that has the setting, the setting's name and its value, and returns the value to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

Check = Callable[[str, str, object], object]


@dataclass(frozen=True)
class WholeNumber:
    """An integer of at least `minimum`; `reason` says why smaller ones are not legal."""

    minimum: int
    reason: str

    def __call__(self, owner: str, name: str, value: object) -> int:
        """The value as an `int`."""
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(
                f"{owner}: {name}={value!r} is of type {type(value).__name__}, but {name} is a whole number. "
                f"Fix: set {name} to an int of at least {self.minimum}, written without quotes or decimal point."
            )
        number = int(value)
        if number < self.minimum:
            raise ValueError(
                f"{owner}: {name}={number} is below {self.minimum}: {self.reason}. "
                f"Fix: set {name} to at least {self.minimum}."
            )
        return number


@dataclass(frozen=True)
class RealNumber:
    """A finite number that `is_legal`; `legal` says in words which are, `reason` why others are not."""

    legal: str
    reason: str
    is_legal: Callable[[float], bool]

    def __call__(self, owner: str, name: str, value: object) -> float:
        """The value as a `float`."""
        fix = f"Fix: set {name} to a float {self.legal}"
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(
                f"{owner}: {name}={value!r} is of type {type(value).__name__}, but {name} is a number. {fix}; YAML "
                "reads 1e-6 as text and 1.0e-6 as a number."
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{owner}: {name}={value} is not finite. {fix}.")
        if not self.is_legal(number):
            raise ValueError(f"{owner}: {name}={value} is not {self.legal}: {self.reason}. {fix}.")
        return number


@dataclass(frozen=True)
class OneOf:
    """One of a few texts."""

    choices: tuple[str, ...]

    def __call__(self, owner: str, name: str, value: object) -> object:
        """The value as it is."""
        if value not in self.choices:
            listed = ", ".join(repr(choice) for choice in self.choices)
            raise ValueError(f"{owner}: {name}={value!r} is unknown. Fix: set {name} to one of {listed}.")
        return value


def truth_value(owner: str, name: str, value: object) -> object:
    """Checks a setting that is on or off."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name}={value!r} is neither True nor False. Fix: set {name} to one of them.")
    return value


def model_name(owner: str, name: str, value: object) -> str | None:
    """Checks the name of a model, or `None`, of which argument parsers make the text "None"."""
    if value is None or value == "None":
        return None
    if not (isinstance(value, str) and value):
        raise ValueError(
            f"{owner}: {name}={value!r} is no name. Fix: give a model on the hub or a folder, or None. A loaded model "
            "goes to attach_spice as `proxy=ProxyModel(model)`."
        )
    return value


def column_name(owner: str, name: str, value: object) -> str | None:
    """Checks the name of a column, or `None`, of which argument parsers make the text "None"."""
    if value is None or value == "None":
        return None
    if not (isinstance(value, str) and value):
        raise ValueError(f"{owner}: {name}={value!r} is no name. Fix: give a column of the dataset, or None.")
    return value


def name_list(owner: str, name: str, value: object) -> list[str] | None:
    """Checks some names, kept as a list, or `None`, of which argument parsers make a list of the text "None"."""
    if value is None or value == ["None"]:
        return None
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, str) and item for item in value):
        raise ValueError(
            f"{owner}: {name}={value!r} is no list of names. Fix: give a list such as ['q_proj', 'v_proj'], or None."
        )
    return list(value)
