"""Rows that the user wants to do well on, in one set or several, and copies of training rows among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spice_trainer.data.rows import MAX_LISTED, CandidateRow
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


def find_copies(rows: Sequence[CandidateRow], dataset: Any) -> set[int]:
    """Positions of validation rows whose tokens are those of a training row, in a dataset that stores tokens.

    Of any other dataset, whose rows may be dear to read, nothing is looked at.
    """
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "with_format") or not isinstance(columns, list) or "input_ids" not in columns:
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
