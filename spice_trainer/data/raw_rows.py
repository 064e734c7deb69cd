"""Raw rows, before any tokenizer has read them: which of TRL's formats a dataset has, and what a row of it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

RawFormat = Literal["prompt_completion", "messages", "text"]

_EXPECTED: dict[RawFormat, str] = {
    "prompt_completion": "texts or lists of messages with `role` and `content`",
    "messages": "a list of messages with `role` and `content`",
    "text": "a text",
}


def find_raw_format(column_names: Iterable[str], *, dataset_text_field: str = "text") -> RawFormat | None:
    """The first format whose columns are complete: "prompt_completion", "messages" or "text"; `None` without any."""
    columns = set(column_names)
    if {"prompt", "completion"} <= columns:
        return "prompt_completion"
    if "messages" in columns:
        return "messages"
    return "text" if dataset_text_field in columns else None


def list_raw_columns(raw_format: RawFormat, *, dataset_text_field: str = "text") -> tuple[str, ...]:
    """The columns that a format reads, in the order in which they are joined."""
    if raw_format == "prompt_completion":
        return ("prompt", "completion")
    return (dataset_text_field if raw_format == "text" else raw_format,)


def read_raw_row(
    index: int, row: Any, raw_format: RawFormat, *, dataset_text_field: str = "text"
) -> list[str] | list[list[Any]]:
    """A raw row's parts, texts or conversations: prompt and completion, or the one that there is."""
    texts: list[str] = []
    conversations: list[list[Any]] = []
    columns = list_raw_columns(raw_format, dataset_text_field=dataset_text_field)
    for column in columns:
        if not isinstance(row, Mapping) or column not in row:
            seen = f"the columns {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
            problem = f"is missing, the row is {seen}"
        elif isinstance(value := row[column], str) and raw_format != "messages":
            texts.append(value)
            continue
        elif isinstance(value, list) and raw_format != "text":
            if value and all(_is_message(message) for message in value):
                conversations.append(value)
                continue
            problem = "holds something else than messages with a `role`" if value else "is an empty list"
        else:
            problem = f"is of type {type(value).__name__}"
        raise malformed_row(index, (column,), problem, raw_format)
    if texts and conversations:
        raise malformed_row(index, columns, "are not both texts or both messages", raw_format)
    return texts or conversations


def malformed_row(index: int, columns: Iterable[str], problem: str, raw_format: RawFormat) -> ValueError:
    """The error that names a row and its columns."""
    named = " and ".join(repr(column) for column in columns)
    return ValueError(
        f"Row {index} of the proxy's dataset is malformed: {named} {problem}. Fix: correct the row "
        f"({named} must hold {_EXPECTED[raw_format]}), or leave it out of the dataset that the trainer is given."
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)
