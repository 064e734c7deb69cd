"""A dataset's rows as a model reads them where no trainer has prepared them: tokenised already, or raw."""

from __future__ import annotations

from typing import Any

from torch import nn

from spice_trainer.data.checks import check_dataset, check_is_labelled, embedding_size
from spice_trainer.data.raw_rows import find_raw_format
from spice_trainer.data.rows import TargetRows
from spice_trainer.data.tokenized_rows import TokenizedRows, collate_rows


def read_rows(
    dataset: Any,
    model: nn.Module,
    processing_class: Any,
    data_collator: Any,
    *,
    caller: str = "select_subset",
    **tokenization: Any,
) -> TargetRows:
    """The rows with what collates them; raises a ValueError for raw rows without a tokenizer."""
    known = {"processing_class": processing_class, "vocab_size": embedding_size(model), "raw_dataset": dataset}
    check_dataset(dataset)
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    is_raw = find_raw_format(columns) is not None
    if "input_ids" in columns and ("labels" in columns or data_collator is not None or not is_raw):
        if data_collator is None:
            check_is_labelled(dataset, "The dataset", "data_collator=...")
        return TargetRows(dataset, data_collator if data_collator is not None else collate_rows, **known)
    if processing_class is None and is_raw:
        raise ValueError(
            f"The dataset holds raw rows ({', '.join(sorted(columns))}) and {caller} has no tokenizer to read them "
            "with. Pass `processing_class=`, the model's own."
        )
    rows = TokenizedRows(dataset, processing_class, **tokenization)
    return TargetRows(rows, rows.collate, **known)
