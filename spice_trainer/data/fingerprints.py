"""Fingerprints of the content of datasets, for manifests and checkpoints.

A fingerprint answers "is this still the same?" on another machine and years later, so it reads values alone: no file
names, cache locations, transform histories or object identities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from spice_trainer.data.checks import check_is_rows
from spice_trainer.data.json_values import canonical_line
from spice_trainer.data.rows import fetch_rows
from spice_trainer.utils.random import preserved_random_state

MAX_ROWS = 2_000
"""Rows of a dataset that its fingerprint reads, at most."""

_ROWS_PER_READ = 100


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
    positions = spread_positions(num_rows, max_rows)
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
            lines.update(canonical_line(row, f"row {position} of the dataset"))
    header = {"kind": "dataset", "num_rows": num_rows, "columns": sorted(names)}
    return hashlib.sha256(canonical_line(header, "the column names") + lines.digest()).hexdigest()


def fingerprint_rows(dataset: Any, *, device: torch.device) -> str | None:
    """Fingerprint of training rows, whatever kind of dataset they come from, without touching any random state.

    Those of a `datasets.Dataset` are read as [`fingerprint_dataset`] does; of any other, which may tokenise each row
    as it is read, only 256. `None` where rows are not made of JSON-like values or change from one reading to the next.
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


def spread_positions(length: int, maximum: int) -> list[int]:
    """At most `maximum` evenly spread positions, the first and the last among them."""
    if length <= maximum:
        return list(range(length))
    return [position * (length - 1) // max(maximum - 1, 1) for position in range(maximum)]
