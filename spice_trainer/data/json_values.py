"""Rows' values as plain JSON."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy
from torch import Tensor

_PLAIN = {bool, int, float, str}


def to_json_value(value: Any, where: str) -> Any:
    """A value as plain JSON: tensors and arrays as lists, bytes as Base64, times in ISO format.

    Numbers that are not finite stay. `where` is what to call it in the `TypeError` of a value, or one inside it, that
    has no such form.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        # Token ids, most of what a training row holds: looked at one by one they take ten times as long.
        if set(map(type, value)) <= _PLAIN:
            return list(value)
        return [to_json_value(item, where) for item in value]
    if isinstance(value, (Tensor, numpy.ndarray, numpy.generic)):
        return to_json_value(value.tolist(), where)
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise TypeError(
        f"SPICE cannot write a {type(value).__name__} as JSON, which {where} holds. Likely cause: a column of decoded "
        "images or audio. Fix: remove the column, or cast it with decode=False "
        '(`dataset.cast_column("image", datasets.Image(decode=False))`).'
    )


def without_nulls(value: Any) -> Any:
    """The same JSON value without the fields of dicts that are null; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return value if set(map(type, value)) <= _PLAIN else [without_nulls(item) for item in value]
    return value


def without_nonfinite(value: Any) -> Any:
    """The same JSON value with null in place of numbers that are not finite, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def canonical_line(value: Any, where: str) -> bytes:
    """A value as one line of JSON with sorted keys, the same for the same values everywhere."""
    plain = without_nulls(to_json_value(value, where))
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate is no valid UTF-8, yet a Python string may hold one.
    return (text + "\n").encode("utf-8", "surrogatepass")
