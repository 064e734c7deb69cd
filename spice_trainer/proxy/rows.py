"""Which rows a proxy reads: the target's own tokenised rows, or its own copy of the same rows.

a dataset of its own                  row i for row i of the training set
the target's tokenizer                the rows the target trains on
another tokenizer, raw columns kept   the raw rows, tokenised when they are asked for
another tokenizer, no raw columns     an error: the ids would mean other words
"""

from __future__ import annotations

from functools import partial
from typing import Any

from spice_trainer.data.checks import check_is_labelled, embedding_size
from spice_trainer.data.rows import DataCollator, TargetRows
from spice_trainer.data.tokenized_rows import TokenizedRows, collate_rows
from spice_trainer.proxy.model import ProxyModel

# Rows of an embedding beyond the tokenizer's are padding to a round number: 128 lie between Qwen2.5's 0.5B and 7B,
# which share a tokenizer. Vocabularies further apart than this are different ones.
_VOCABULARY_PADDING = 1024


def rows_for_proxy(proxy: ProxyModel, target: TargetRows) -> TargetRows:
    """The training rows as a proxy reads them: those of its own dataset, else [`shared_rows`]."""
    if proxy.dataset is not None:
        if len(proxy.dataset) != len(target.dataset):
            raise ValueError(
                f"The proxy's dataset has {len(proxy.dataset):,} rows and the training dataset "
                f"{len(target.dataset):,}. Row i of one must be row i of the other, so that what the proxy picks is "
                "what the target trains on. Fix: tokenise the training dataset itself for the proxy, filtering and "
                "shuffling nothing."
            )
        if proxy.data_collator is None:
            check_is_labelled(proxy.dataset, "The proxy's dataset", "ProxyModel(..., data_collator=...)")
        collate = proxy.data_collator or _pad_right(proxy.processing_class)
        return _as_read_by(proxy, target, proxy.dataset, collate)
    return shared_rows(proxy, target)


def shared_rows(proxy: ProxyModel, target: TargetRows) -> TargetRows:
    """Rows of the target as a proxy reads them that has no copy of them; a `ValueError` if it has nothing to read."""
    if has_same_vocabulary(proxy, target):
        tokenizer = proxy.processing_class or target.processing_class
        return _as_read_by(proxy, target, target.dataset, proxy.data_collator or target.collate, tokenizer)
    if proxy.processing_class is None:
        raise ValueError(
            f"The proxy's vocabulary has {embedding_size(proxy.model):,} entries and the target's "
            f"{target_size(target):,}: it would read the target's token ids as other words. Fix: give it its own "
            "tokenizer, `ProxyModel(model, processing_class=...)`, with which it tokenises the raw rows, or "
            "`ProxyModel(model, dataset=...)` with the same rows tokenised for it."
        )
    raw = target.raw_dataset if target.raw_dataset is not None else target.dataset
    rows = TokenizedRows(raw, proxy.processing_class, **target.tokenization)
    if len(rows) != len(target.dataset):
        raise ValueError(
            f"The raw training dataset has {len(rows):,} rows and the tokenised one {len(target.dataset):,} (packing "
            "or filtering), so the proxy cannot read it row by row. Fix: switch packing off, or pass "
            "`ProxyModel(..., dataset=...)` with the rows of the tokenised dataset tokenised for the proxy."
        )
    return _as_read_by(proxy, target, rows, proxy.data_collator or rows.collate)


def _as_read_by(
    proxy: ProxyModel, target: TargetRows, dataset: Any, collate: DataCollator, tokenizer: Any = None
) -> TargetRows:
    """The same rows under the proxy's tokenizer; the raw dataset still has their ids."""
    raw = target.raw_dataset if target.raw_dataset is not None else target.dataset
    return TargetRows(dataset, collate, processing_class=tokenizer or proxy.processing_class, raw_dataset=raw)


def has_same_vocabulary(proxy: ProxyModel, target: TargetRows) -> bool:
    """Whether a proxy reads the target's token ids as the same tokens, as far as can be told.

    With both tokenizers their vocabularies are compared. Without, the numbers of entries must be about the same.
    """
    ours, theirs = proxy.processing_class, target.processing_class
    ours, theirs = getattr(ours, "tokenizer", ours), getattr(theirs, "tokenizer", theirs)
    size = embedding_size(proxy.model)
    if ours is not None and theirs is not None:
        return ours is theirs or bool(ours.get_vocab() == theirs.get_vocab())
    return target_size(target) - _VOCABULARY_PADDING <= size <= target_size(target) + _VOCABULARY_PADDING


def target_size(target: TargetRows) -> int:
    """Entries of the target's vocabulary: of its embedding, which a wrapper may hide, or of its tokenizer."""
    if target.vocab_size is not None:
        return target.vocab_size
    return len(target.processing_class) if target.processing_class is not None else 0


def _pad_right(processing_class: Any) -> DataCollator:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    # Padding is masked: any id serves.
    return partial(collate_rows, pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0)
