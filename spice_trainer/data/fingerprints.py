"""What a manifest says of the dataset and the model: fingerprints of their content, and the model's description.

A fingerprint answers "is this still the same?" on another machine and years later, so it reads values alone: no file
names, cache locations, transform histories or object identities.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from spice_trainer.data.rows import fetch_rows
from spice_trainer.distributed import without_wrapper
from spice_trainer.utils.random import preserved_random_state

MAX_ROWS = 2_000
"""Rows of a dataset that its fingerprint reads, at most."""

MAX_VALUES = 4_096
"""Numbers of a tensor that a model's fingerprint reads, at most."""

_ROWS_PER_READ = 100
_PLAIN = {bool, int, float, str}


def fingerprint_dataset(dataset: Any, *, max_rows: int = MAX_ROWS) -> str:
    """Fingerprint of the content of a dataset's rows.

    The same rows give the same fingerprint on every machine, under every version of Python and `datasets`, whether
    they are a `datasets.Dataset` or a list of dicts, and wherever they are cached; `Dataset._fingerprint` does not.
    Hashed are the number of rows, the sorted column names, and the rows as JSON with sorted keys. Of a
    `datasets.Dataset` the stored columns count: `set_format` and `set_transform` are put aside. A field that is null
    counts as absent, since Arrow fills the fields that a nested dict lacks with nulls.

    **A dataset of more than `max_rows` rows is hashed by its length and `max_rows` evenly spread rows**, the first and
    the last among them: a change of another row is then not seen.

    Args:
        dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`): The rows.
        max_rows (`int`, *optional*, defaults to `2000`): Number of rows to read, at most. At least 1.

    Returns:
        `str`: SHA-256 as 64 hexadecimal digits.

    Raises:
        TypeError: If this is not a dataset of known length whose rows are dicts of JSON-like values.
    """
    if max_rows < 1:
        raise ValueError(f"fingerprint_dataset: max_rows={max_rows} is below 1. Fix: read at least one row.")
    check_is_rows(dataset)
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)
    num_rows = len(dataset)
    positions = _spread(num_rows, max_rows)
    names: set[str] = set(getattr(dataset, "column_names", None) or ())
    lines = hashlib.sha256()
    for start in range(0, len(positions), _ROWS_PER_READ):
        batch = positions[start : start + _ROWS_PER_READ]
        for position, row in zip(batch, fetch_rows(dataset, batch), strict=True):
            if not isinstance(row, Mapping):
                raise TypeError(
                    f"Row {position} of the dataset is a {type(row).__name__}, not a dict of columns. Fix: give rows "
                    'such as {"messages": [...]} or {"input_ids": [...], "labels": [...]}.'
                )
            names.update(str(name) for name in row)
            lines.update(_canonical_line(row, f"row {position} of the dataset"))
    header = {"kind": "dataset", "num_rows": num_rows, "columns": sorted(names)}
    return hashlib.sha256(_canonical_line(header, "the column names") + lines.digest()).hexdigest()


def fingerprint_rows(dataset: Any, *, device: torch.device) -> str | None:
    """Fingerprint of training rows, whatever kind of dataset they come from, without touching any random state.

    Args:
        dataset (`Any`): Rows by number. Those of a `datasets.Dataset` are read as [`fingerprint_dataset`] does, of any
            other, which may tokenise each row as it is read, only 256.
        device (`torch.device`): Where training draws from, beside the CPU.

    Returns:
        `str`, *optional*: The fingerprint, or `None` where rows are not made of JSON-like values or change from one
        reading to the next.
    """
    is_stored = hasattr(dataset, "with_format")
    found = set()
    for _ in range(1 if is_stored else 2):
        with preserved_random_state(device):
            try:
                found.add(fingerprint_dataset(dataset, max_rows=MAX_ROWS if is_stored else 256))
            except TypeError:
                return None
    return found.pop() if len(found) == 1 else None


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a model's weights, adapters included, from a sample of them.

    Hashed are the names, shapes and dtypes of all parameters and the bytes of 4,096 evenly spread values of each, so
    that a 7B model takes seconds; a change of other values alone is not seen. Quantised parameters count by their
    stored bytes and the scales beside them, parameters on the meta device by name, shape and dtype. Where a parameter
    is spread over processes (FSDP, ZeRO-3), only this process's share is read.

    Args:
        model (`torch.nn.Module`): The model, on any device.

    Returns:
        `str`: SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, parameter in _without_wrappers(model).named_parameters():
        digest.update(_canonical_line([name, list(parameter.shape), str(parameter.dtype)], "a parameter"))
        for tensor in _stored_tensors(parameter):
            digest.update(_sampled_bytes(tensor))
    return digest.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a manifest says of the model that selected, as JSON values.

    Args:
        model (`torch.nn.Module`): The model, with or without a PEFT adapter.

    Returns:
        `dict[str, Any]`: `name_or_path`, `class`, `model_type`, `num_parameters`, `num_trainable_parameters`, `lora`
        (settings of the active adapter, or `None`) and `fingerprint` (see [`fingerprint_model`]).
    """
    model = _without_wrappers(model)
    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else model
    config = getattr(base, "config", None)
    parameters = list(model.parameters())
    return {
        "name_or_path": _text_or_none(getattr(config, "_name_or_path", None)),
        "class": type(base).__name__,
        "model_type": _text_or_none(getattr(config, "model_type", None)),
        "num_parameters": sum(_num_values(parameter) for parameter in parameters),
        "num_trainable_parameters": sum(_num_values(item) for item in parameters if item.requires_grad),
        "lora": _describe_adapter(model),
        "fingerprint": fingerprint_model(model),
    }


def check_is_rows(dataset: Any) -> None:
    """Raises `TypeError` unless this is a sequence of rows: a dict of splits and a stream have no row numbers."""
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"The dataset is a {type(dataset).__name__} of {sorted(map(str, dataset))}, not a sequence of rows. Fix: "
            'give one split, such as dataset["train"].'
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"The dataset is a {type(dataset).__name__}, which has no length or no rows by number; a stream cannot be "
            "selected from by row. Fix: load it without streaming=True, or give a list of dicts."
        )


def to_json_value(value: Any, where: str) -> Any:
    """A value as plain JSON: tensors and arrays as lists, bytes as Base64, times in ISO format.

    Args:
        value (`Any`): What a row holds.
        where (`str`): What to call it in an error.

    Returns:
        `Any`: Dicts, lists, strings, numbers, booleans and `None`. Numbers that are not finite stay.

    Raises:
        TypeError: If the value, or one inside it, has no such form.
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


def _canonical_line(value: Any, where: str) -> bytes:
    plain = without_nulls(to_json_value(value, where))
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate is no valid UTF-8, yet a Python string may hold one.
    return (text + "\n").encode("utf-8", "surrogatepass")


def _spread(length: int, maximum: int) -> list[int]:
    if length <= maximum:
        return list(range(length))
    return [position * (length - 1) // max(maximum - 1, 1) for position in range(maximum)]


def _sampled_bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta or tensor.numel() == 0:
        return b""
    flat = tensor.detach().reshape(-1)
    # As bytes, because not every dtype (float8) can be indexed on every device.
    values = flat.view(torch.uint8).reshape(flat.numel(), -1)
    positions = torch.tensor(_spread(flat.numel(), MAX_VALUES), device=flat.device)
    return values[positions].cpu().numpy().tobytes()


def _stored_tensors(parameter: Tensor) -> Iterable[Tensor]:
    """The tensors that hold a parameter's bytes: itself, the parts of a subclass, a quantised one's scales."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _stored_tensors(getattr(parameter, name))
        return
    yield parameter
    state = getattr(parameter, "quant_state", None)
    holders = ((parameter, "SCB"), (state, "absmax"), (state, "offset"), (getattr(state, "state2", None), "absmax"))
    for holder, name in holders:
        scales = getattr(holder, name, None)
        if isinstance(scales, Tensor):
            yield scales


def _num_values(parameter: Tensor) -> int:
    # Four-bit weights are stored two a byte, in a shape of their own; ZeRO-3 leaves an empty tensor behind.
    shape: Sequence[int] | None = getattr(getattr(parameter, "quant_state", None), "shape", None)
    if shape is not None:
        return math.prod(shape)
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _describe_adapter(model: nn.Module) -> dict[str, Any] | None:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    active = getattr(model, "active_adapters", None)
    # A property of `PeftModel`, a method of a `PreTrainedModel` with an adapter.
    names = list(active() if callable(active) else active or configs)
    adapter = str(names[0])
    config = configs[adapter]
    fields = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    settings = {name: _adapter_value(getattr(config, name, None)) for name in fields}
    return {"adapter": adapter, **settings}


def _adapter_value(value: Any) -> Any:
    if isinstance(value, (set, frozenset, list, tuple)):
        return sorted(str(item) for item in value)
    return value


def _text_or_none(value: Any) -> str | None:
    return str(value) if value else None


def _without_wrappers(model: nn.Module) -> nn.Module:
    model = without_wrapper(model)
    original = getattr(model, "_orig_mod", model)  # inside `torch.compile`
    return original if isinstance(original, nn.Module) else model
