"""The rows that a selection without a trainer reads, and what is looked at before it starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import check_token_ids
from spice_trainer.data.raw_rows import find_raw_format
from spice_trainer.data.rows import sample_rows
from spice_trainer.data.tokenized_rows import TokenizedRows, collate_rows
from spice_trainer.gradients.verification import verify_gradients
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.proxy.rows import TargetRows, check_is_labelled, embedding_size
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.trainer.checks import check_dataset, check_memory


def read_rows(
    dataset: Any, proxy: ProxyModel, processing_class: Any, data_collator: Any, **tokenization: Any
) -> TargetRows:
    """The dataset's rows as the selector reads them.

    Args:
        dataset (`Any`): Raw or tokenised rows.
        proxy ([`ProxyModel`]): The selector.
        processing_class (`Any`): Its tokenizer; `None` is the proxy's own.
        data_collator (`Callable`, *optional*): Collates tokenised rows.
        tokenization: Options of [`TokenizedRows`], for raw rows.

    Returns:
        [`TargetRows`]

    Raises:
        ValueError: If there are no rows, or no tokenizer to read raw ones with.
    """
    processing_class = proxy.processing_class if processing_class is None else processing_class
    known = {"processing_class": processing_class, "vocab_size": embedding_size(proxy.model)}
    check_dataset(dataset)
    columns = getattr(dataset, "column_names", None) or list(dataset[0])
    is_raw = find_raw_format(columns) is not None
    if "input_ids" in columns and ("labels" in columns or data_collator is not None or not is_raw):
        if data_collator is None:
            check_is_labelled(dataset, "The dataset", "data_collator=...")
        return TargetRows(dataset, data_collator if data_collator is not None else collate_rows, **known)
    if processing_class is None and is_raw:
        raise ValueError(
            f"The dataset holds raw rows ({', '.join(sorted(columns))}) and select_subset has no tokenizer to read "
            "them with. Pass `processing_class=`, the selector's tokenizer."
        )
    rows = TokenizedRows(dataset, processing_class, **tokenization)
    return TargetRows(rows, rows.collate, **known)


def check_selection(
    scorer: GradientScorer,
    config: SpiceConfig,
    *,
    verify: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Looks at some rows, the memory and two gradients before anything is selected.

    Args:
        scorer ([`GradientScorer`]): The selector's scorer.
        config ([`SpiceConfig`]): The settings.
        verify (`bool`): Whether to compare gradients with autograd's.
        autocast (`Callable`): Makes the context of the precision.

    Raises:
        ValueError: If no row has a label token, or a pool's features don't fit.
        GradientMismatchError: If gradients would be wrong.
    """
    rows = sample_rows(scorer.dataset, scorer.collate, device=scorer.device)
    if not any(row.num_label_tokens > 0 for row in rows):
        raise ValueError(
            f"None of {len(rows)} rows looked at has a label token (all labels are -100), so nothing could be "
            "scored. Look at the prompt masking and at `max_length`."
        )
    check_token_ids(rows, scorer.vocabulary)
    num_candidates = min(config.pool_size, len(scorer.dataset))
    check_memory(
        scorer.feature_bytes(1, num_candidates),
        num_candidates,
        num_features=scorer.num_features,
        dimension=scorer.dimension,
        device=scorer.device,
        config=config,
    )
    if verify and config.takes_gradients:
        shortest = sorted((row for row in rows if row.num_label_tokens > 0), key=lambda row: row.num_tokens)[:2]
        verify_gradients(scorer.get_model(), scorer.modules, shortest, device=scorer.device, autocast=autocast)
