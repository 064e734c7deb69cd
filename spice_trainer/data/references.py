"""What tells a picked row from the others of a user's own file, where row numbers may count other rows.

A trainer may have filtered, sorted or packed what it was given. So each pick is recorded with the dataset's own id, a
hash of its tokens and, if asked for, the beginning of the text that it trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from spice_trainer.data.rows import CandidateRow, RowReference, TargetRows
from spice_trainer.data.stream import StreamRows
from spice_trainer.data.tokenized_rows import TokenizedRows

ID_COLUMNS = ("id", "_id", "uuid", "idx", "row_id", "sample_id", "example_id")
"""Columns that are taken for a dataset's own ids, the first that it has."""

_MAX_ID_LENGTH = 200


@dataclass(frozen=True)
class RowReferences:
    """Refers to rows of a dataset: by the ids of a column (`None` looks for one), and by so many letters of text."""

    rows: TargetRows
    id_column: str | None = None
    text_length: int = 0

    def __post_init__(self) -> None:
        """Finds the column where the dataset names its columns, and the tokenizer where text is wanted."""
        dataset = self.rows.dataset if self.rows.raw_dataset is None else self.rows.raw_dataset
        dataset = dataset.dataset if isinstance(dataset, TokenizedRows) else dataset
        # Packed or filtered rows are others than the given ones.
        dataset = dataset if len(dataset) == len(self.rows.dataset) else self.rows.dataset
        columns = getattr(dataset, "column_names", None)
        stored = None
        if isinstance(columns, list) and hasattr(dataset, "select_columns"):
            column = self._column_of(columns)
            # Without formats and transforms, which may read all columns.
            stored = None if column is None else dataset.with_format(None).select_columns([column])
        # A frozen instance is written to only while it is made.
        object.__setattr__(self, "_stored", stored)
        # A proxy's own tokens of a stream's rows come without the other columns.
        is_apart = isinstance(dataset, StreamRows) and dataset is not self.rows.dataset
        object.__setattr__(self, "_listed", dataset if is_apart or isinstance(dataset, list | tuple) else None)
        tokenizer = getattr(self.rows.processing_class, "tokenizer", self.rows.processing_class)
        if self.text_length and not hasattr(tokenizer, "decode"):
            raise ValueError(
                f"SpiceConfig: record_text_length={self.text_length} asks for text in the records, and there is no "
                "tokenizer to decode the rows with. Fix: give the trainer (or `bind`, or the ProxyModel) a "
                "`processing_class`, or leave record_text_length out."
            )
        object.__setattr__(self, "_tokenizer", tokenizer)

    def check(self, row: Any) -> None:
        """Refuses an `id_column` that a row, read from a dataset that does not name its columns, lacks."""
        if self._stored is None and self._listed is None and isinstance(row, Mapping):  # type: ignore[attr-defined]
            self._column_of(row)

    def refer(
        self, indices: Sequence[int], rows: Sequence[Any], candidates: Sequence[CandidateRow]
    ) -> list[RowReference]:
        """References to rows by their numbers, as they were read, and as they were collated."""
        return [
            RowReference(row_id, hash_tokens(candidate.inputs["input_ids"]), self._text(candidate))
            for row_id, candidate in zip(self._ids(indices, rows), candidates, strict=True)
        ]

    def _column_of(self, columns: Any) -> str | None:
        if self.id_column is not None and self.id_column not in columns:
            raise ValueError(
                f"SpiceConfig: record_id_column={self.id_column!r} is no column of the training dataset, which has "
                f"{', '.join(map(str, columns))}. Likely cause: preparing the dataset dropped it, as packing does. "
                "Fix: give one of these, or leave record_id_column out."
            )
        wanted = ID_COLUMNS if self.id_column is None else (self.id_column,)
        return next((name for name in wanted if name in columns), None)

    def _ids(self, indices: Sequence[int], rows: Sequence[Any]) -> list[str | None]:
        stored, listed = self._stored, self._listed  # type: ignore[attr-defined]
        if stored is not None:
            (values,) = stored[list(indices)].values()
            return list(map(_as_id, values))
        rows = rows if listed is None else [listed[index] for index in indices]
        wanted = ID_COLUMNS if self.id_column is None else (self.id_column,)
        return [
            _as_id(next((row[name] for name in wanted if name in row), None)) if isinstance(row, Mapping) else None
            for row in rows
        ]

    def _text(self, row: CandidateRow) -> str | None:
        if not self.text_length:
            return None
        trained = row.inputs["input_ids"][0][row.labels[0] != -100]
        # A letter may take several tokens, a token several letters.
        ids = trained[: 4 * self.text_length].tolist()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        return text.strip()[: self.text_length]


def hash_tokens(input_ids: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of token ids as little-endian 64-bit integers."""
    ids = torch.as_tensor(input_ids).reshape(-1).to("cpu", torch.int64)
    return hashlib.sha256(ids.numpy().astype("<i8", copy=False).tobytes()).hexdigest()[:16]


def _as_id(value: Any) -> str | None:
    """An id as text, so that a column has one type whatever the dataset's; `None` for what is no id."""
    value = value.tolist() if isinstance(value, Tensor | numpy.ndarray | numpy.generic) else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    if value is None or isinstance(value, Mapping | list | tuple):
        return None
    return str(value)[:_MAX_ID_LENGTH]
