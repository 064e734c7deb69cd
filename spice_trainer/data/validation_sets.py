"""Rows that the user wants to do well on, in one set or several, and copies of training rows among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from spice_trainer.data.rows import (
    MAX_LISTED,
    VALIDATION,
    CandidateRow,
    TargetRows,
    fetch_rows,
)
from spice_trainer.data.stream import is_stream
from spice_trainer.utils.logging import logger

DEFAULT_NAME = "validation"

# Training rows that are looked through for copies.
_MAX_SEARCHED = 1_000_000
_ROWS_PER_READ = 10_000


def named_sets(given: Any) -> dict[str, Any]:
    """The validation sets by name; raises a TypeError or ValueError for what holds no rows by number."""
    sets = {str(name): rows for name, rows in given.items()} if isinstance(given, Mapping) else {DEFAULT_NAME: given}
    if not sets:
        raise ValueError("validation_dataset is an empty dict. Fix: give rows to do well on, or leave it out.")
    columns = [name for name, rows in sets.items() if isinstance(rows, list) and rows and not _is_row(rows[0])]
    if isinstance(given, Mapping) and columns:
        raise TypeError(
            f"validation_dataset is a dict whose {', '.join(map(repr, columns[:MAX_LISTED]))} holds no rows: it looks "
            "like one row, or like columns. Fix: give a list of rows, datasets.Dataset.from_dict(columns), or a dict "
            "of named sets of rows."
        )
    for name, rows in sets.items():
        which = "validation_dataset" if len(sets) == 1 else f"validation_dataset[{name!r}]"
        if is_stream(rows) or not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
            raise TypeError(
                f"{which} is a {type(rows).__name__}, which has no rows by number. Fix: give a datasets.Dataset or a "
                "list of rows; of a stream, datasets.Dataset.from_list(list(stream.take(32)))."
            )
        if isinstance(rows, str):
            raise TypeError(
                f"{which} is the text {rows!r}. Fix: give the rows, such as load_dataset(...)['validation']."
            )
        if not len(rows):
            raise ValueError(
                f"{which} ({type(rows).__name__}) has no row. Fix: give rows like those to do well on, or leave it "
                "out."
            )
    return sets


def _is_row(value: Any) -> bool:
    """Whether something may be a row of a list; what a torch.utils.data.Dataset gives may be anything."""
    return isinstance(value, Mapping) or hasattr(value, "keys")


def checked_sets(sets: Mapping[str, TargetRows], training: Any, num_rows: int) -> dict[str, TargetRows]:
    """The first `num_rows` rows of each without copies of training rows; a ValueError where nothing is left."""
    return {name: _checked(rows, name, training, num_rows) for name, rows in sets.items()}


def _checked(rows: TargetRows, name: str, training: Any, num_rows: int) -> TargetRows:
    number = min(num_rows, len(rows.dataset))
    fetched = fetch_rows(rows.dataset, range(number), source=VALIDATION)
    collated = rows.collate_each(range(number), fetched, source=f"{VALIDATION} {name!r}")
    if not any(row.num_label_tokens for row in collated):
        raise ValueError(
            f"None of the {len(collated)} rows of the validation set {name!r} that are read has a label token (all "
            "labels are -100), so there is nothing to do well on. Look at the prompt masking and at `max_length`."
        )
    copies = find_copies(collated, training)
    if not copies:
        return rows
    warn_of_copies(name, sorted(copies), "what picks aim at")
    left = [position for position in range(number) if position not in copies]
    if not left:
        raise ValueError(
            f"All {number} rows of the validation set {name!r} are training rows too, so aiming at them would tell "
            "nothing of other rows. Fix: take them out of the training dataset, or give others."
        )
    raw = rows.raw_dataset
    if raw is not None:
        raw = raw.select(left) if hasattr(raw, "select") else fetch_rows(raw, left)
    dataset = rows.dataset.select(left) if hasattr(rows.dataset, "select") else [fetched[row] for row in left]
    return replace(rows, dataset=dataset, raw_dataset=raw)


def find_copies(rows: Sequence[CandidateRow], dataset: Any) -> set[int]:
    """Positions of validation rows whose tokens are those of a training row, in a dataset that stores tokens.

    Of any other dataset, whose rows may be dear to read, nothing is looked at.
    """
    columns = getattr(dataset, "column_names", None)
    if (
        is_stream(dataset)
        or not hasattr(dataset, "with_format")
        or not isinstance(columns, list)
        or "input_ids" not in columns
    ):
        return set()
    if len(dataset) > _MAX_SEARCHED:
        return set()
    wanted: dict[bytes, list[int]] = {}
    for position, row in enumerate(rows):
        wanted.setdefault(_bytes_of(row.inputs["input_ids"]), []).append(position)
    lengths = {len(key) // 8 for key in wanted}
    found: set[int] = set()
    table = dataset.with_format(None).select_columns(["input_ids"]).with_format("arrow")
    for batch in table.iter(batch_size=_ROWS_PER_READ):
        column = batch["input_ids"].combine_chunks()
        if not hasattr(column, "offsets"):
            return set()
        offsets = column.offsets.to_numpy(zero_copy_only=False)
        values = column.values.to_numpy(zero_copy_only=False)
        sizes = np.diff(offsets)
        for place in np.isin(sizes, list(lengths)).nonzero()[0]:
            tokens = np.ascontiguousarray(values[offsets[place] : offsets[place + 1]], dtype="<i8")
            found.update(wanted.get(tokens.tobytes(), ()))
    return found


def warn_of_copies(name: str, positions: Sequence[int], where: str) -> None:
    """Names validation rows that are training rows too."""
    listed = ", ".join(map(str, positions[:MAX_LISTED])) + (", ..." if len(positions) > MAX_LISTED else "")
    logger.warning(
        "SPICE: %d rows of the validation set %r are copies of training rows (%s) and are left out of %s: picks would "
        "aim at themselves, and a loss measured on them says nothing.",
        len(positions), name, listed, where,
    )  # fmt: skip


def _bytes_of(input_ids: torch.Tensor) -> bytes:
    return input_ids.reshape(-1).to("cpu", torch.int64).numpy().astype("<i8", copy=False).tobytes()
