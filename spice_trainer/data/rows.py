"""Candidate rows: collated alone with the user's own collator, then right-padded into micro-batches.

Collating each row alone and padding here serves every collator alike, also those that flatten a batch into one
sequence (padding-free). Right padding changes nothing in a causal model: no token attends to what comes after it.

Axes: N samples, S tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

DataCollator = Callable[[list[Any]], Mapping[str, Any]]

TRAINING = "training dataset"
VALIDATION = "validation dataset"

# What flattening collators tell variable-length attention kernels; meaningless once rows are padded into a batch.
_FLATTENED_KEYS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})

_FIX_COLLATOR = (
    "SPICE scores causal language models on token ids and labels: use a collator that returns both, such as "
    "`DataCollatorForLanguageModeling(tokenizer, mlm=False)` or `DataCollatorForSeq2Seq(tokenizer)`."
)
MAX_LISTED = 8


@dataclass(frozen=True)
class RowReference:
    """A row's own id, the hash of its token ids, and the beginning of the text that it trains, as far as known."""

    id: str | None = None
    token_hash: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class RowShape:
    """What planning needs to know of a row, from its [`CandidateRow`]; small, as processes tell each other."""

    num_tokens: int
    num_label_tokens: int
    can_be_padded: bool
    keys: tuple[str, ...]
    num_dropped_tokens: int = 0
    reference: RowReference = RowReference()


@dataclass(frozen=True)
class CandidateRow:
    """One row of the training set, or the validation set, as the model reads it.

    `inputs` are of shape `(1, S)`, without labels and padding; labels are unshifted, and `num_label_tokens` counts
    those that are not −100 after the causal shift. Packed rows and rows with inputs other than token sequences cannot
    be padded: they are scored alone, as the collator made them. `num_dropped_tokens` were cut off: they train, and are
    not scored. `index` counts the rows of `source`.
    """

    index: int
    inputs: dict[str, Any]
    labels: Int[Tensor, "1 S"]
    num_tokens: int
    num_label_tokens: int
    can_be_padded: bool
    num_dropped_tokens: int = 0
    source: str = TRAINING
    reference: RowReference = RowReference()

    @property
    def other_inputs(self) -> tuple[str, ...]:
        """Names of inputs that are no tokens, such as an image's pixels."""
        return tuple(key for key, value in self.inputs.items() if torch.is_tensor(value) and value.is_floating_point())

    @property
    def shape(self) -> RowShape:
        """What planning needs to know of the row."""
        keys = tuple(sorted(key for key in self.inputs if key != "attention_mask"))
        return RowShape(
            self.num_tokens,
            self.num_label_tokens,
            self.can_be_padded,
            keys,
            self.num_dropped_tokens,
            self.reference,
        )


@dataclass(frozen=True)
class TargetRows:
    """The training rows as the target reads them, and what is known of how they came about.

    `raw_dataset` has the same rows with their raw columns, if they are still there; `tokenization` are the options
    with which they were tokenised, and `vocab_size` the rows of the target's input embedding.
    """

    dataset: Any
    collate: DataCollator
    processing_class: Any = None
    raw_dataset: Any = None
    tokenization: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    _altering: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)
    """Whether the collator alters the rows it is given, once some were tried; by what they are of."""

    def collate_each(
        self, indices: Sequence[int], rows: Sequence[Any], *, source: str = TRAINING
    ) -> list[CandidateRow]:
        """Collates each row alone.

        A dataset may hand out the rows that it holds: what a collator alters in them would be altered again when they
        train. So it gets copies, unless the first rows show that it leaves them as they are.
        """
        given = list(map(copy_row, rows)) if self._altering.get(source, True) else rows
        collated = [
            collate_row(index, row, self.collate, source=source) for index, row in zip(indices, given, strict=True)
        ]
        if rows and source not in self._altering:
            self._altering[source] = not all(map(_is_same, given, rows))
        return collated


def _is_same(first: Any, second: Any) -> bool:
    """Whether two rows hold the same, as far as that can be told."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool((first == second).all())
    try:
        return bool(np.all(first == second))
    except Exception:
        return True


def fetch_rows(dataset: Any, indices: Sequence[int], *, source: str = TRAINING) -> list[Any]:
    """Rows of a dataset by the calls that torch's own loader makes; `source` is what they are of, for messages."""
    indices = list(indices)
    if not indices:
        return []
    # As torch's `_MapDatasetFetcher`: a class may have the name and no method behind it.
    if hasattr(dataset, "__getitems__") and dataset.__getitems__:
        with naming_unreadable(dataset, indices, source=source):
            rows: list[Any] = dataset.__getitems__(indices)
        return rows
    rows = []
    for index in indices:
        with naming_unreadable(dataset, [index], source=source):
            rows.append(dataset[index])
    return rows


def copy_row(row: Any) -> Any:
    """A row that may be altered; what of it cannot be copied is handed out itself."""
    # Lists of token ids, most of a row: `deepcopy` takes them one by one, eight times as long.
    if type(row) is dict:
        return {key: copy_row(value) for key, value in row.items()}
    if type(row) is list:
        return list(row) if {int, str, float, bool}.issuperset(map(type, row)) else [copy_row(item) for item in row]
    try:
        return copy.deepcopy(row)
    except Exception:
        return row


@contextmanager
def naming_unreadable(dataset: Any, indices: Sequence[int], *, source: str = TRAINING) -> Iterator[None]:
    """Adds to an error of a dataset in the block which row it is about; it keeps its type, text and cause."""
    try:
        yield
    except Exception as error:
        name_unreadable(error, dataset, indices, source=source)
        raise


def name_unreadable(error: Exception, dataset: Any, indices: Sequence[int], *, source: str = TRAINING) -> None:
    """Adds a note to an error of a dataset, or of a collator that has its own, unless it has one."""
    if not any(note.startswith((READING, COLLATING)) for note in getattr(error, "__notes__", ())):
        # What it asks of the dataset may fail too; the error itself is what matters.
        with suppress(Exception):
            error.add_note(_describe_unreadable(dataset, indices, source))


READING, COLLATING = "SPICE was reading", "SPICE was collating"


def _describe_unreadable(dataset: Any, indices: Sequence[int], source: str) -> str:
    named = f"the {source} ({type(dataset).__name__})"
    length = len(dataset)
    if max(indices, default=-1) >= length:
        return (
            f"{READING} row {max(indices)} of {named}, which has {length} rows now. Likely cause: it shrank while it "
            "was being used. Fix: leave a dataset as it is until the run has ended, or give the trainer a copy."
        )
    failing = [index for index in indices if len(indices) == 1 or _cannot_be_read(dataset, index)]
    # Where each can be read alone the error is of all together.
    listed = ", ".join(map(str, (failing or indices)[:MAX_LISTED]))
    return f"{READING} row(s) {listed} of {named}. Fix: correct what it reads there, or leave the row(s) out."


def _cannot_be_read(dataset: Any, index: int) -> bool:
    try:
        fetch_rows(dataset, [index])
    except Exception:
        return True
    return False


def spread_positions(length: int, maximum: int) -> list[int]:
    """At most `maximum` evenly spread positions, the first and the last among them."""
    if length <= maximum:
        return list(range(length))
    return [position * (length - 1) // max(maximum - 1, 1) for position in range(maximum)]


def collate_row(index: int, row: Any, collate: DataCollator, *, source: str = TRAINING) -> CandidateRow:
    """Collates one dataset row alone; `source` is what it is a row of, for messages."""
    batch = collate_alone(row, collate, where=f"row {index} of the {source}")
    labels = batch.pop("labels")
    if "attention_mask" in batch and batch["attention_mask"].dim() == 2:
        batch, labels = _strip_padding(batch, labels)
    length = batch["input_ids"].shape[1]
    can_be_padded = not _is_packed(batch.get("position_ids"))
    if can_be_padded:
        positions = batch.get("position_ids")
        if positions is not None and bool((positions == torch.arange(length, device=positions.device)).all()):
            # The model's own positions are the same, and need no padding.
            del batch["position_ids"]
        batch = {key: value for key, value in batch.items() if key not in _FLATTENED_KEYS}
        can_be_padded = all(isinstance(value, Tensor) and value.shape == (1, length) for value in batch.values())
    return CandidateRow(
        index=index,
        inputs=batch,
        labels=labels,
        num_tokens=length,
        num_label_tokens=int((labels[:, 1:] != -100).sum()),
        can_be_padded=can_be_padded,
        source=source,
    )


def collate_alone(row: Any, collate: DataCollator, *, where: str) -> dict[str, Any]:
    """Collates one dataset row into `input_ids` and `labels` `(1, S)` and what else there is, and checks them."""
    try:
        made: Any = collate([row])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"The data collator ({name_of(collate)}) failed on {where} ({type(error).__name__}: {error}), which holds "
            f"{_describe(row)}. Likely cause: a column that is missing, empty or of another type than the collator "
            "reads. Fix: correct the row or leave it out, or pass a collator for these columns."
        ) from error
    try:
        batch: dict[str, Any] = dict(made)
    except (TypeError, ValueError):
        raise ValueError(
            f"The data collator ({name_of(collate)}) gave a {type(made).__name__} for {where}, not a dict of "
            f"tensors. {_FIX_COLLATOR}"
        ) from None
    for key in ("input_ids", "labels"):
        if not isinstance(batch.get(key), Tensor):
            raise ValueError(
                f"The data collator ({name_of(collate)}) gave no tensor {key!r} for {where}, only "
                f"{_describe(batch)}. {_FIX_COLLATOR}"
            )
    if batch["input_ids"].numel() == 0:
        # `torch.tensor([[]])` is of a floating point type.
        batch |= {key: value.long() for key, value in batch.items() if isinstance(value, Tensor)}
    _check_shapes(batch, name_of(collate), where)
    return batch


def keep_first_labels(row: CandidateRow, num_label_tokens: int) -> CandidateRow:
    """Cuts a row off behind its first label tokens. In a causal model they do not depend on what follows.

    It keeps the whole row's `num_label_tokens`, which its gradient is weighted by. A row with inputs other than token
    sequences keeps them and loses labels alone.
    """
    places = (row.labels[0, 1:] != -100).nonzero()[:, 0] + 1
    if len(places) <= num_label_tokens:
        return row
    stop = int(places[num_label_tokens - 1]) + 1
    if not row.can_be_padded:
        labels = row.labels.clone()
        labels[:, stop:] = -100
        return replace(row, labels=labels)
    return replace(
        row,
        inputs={key: value[:, :stop] for key, value in row.inputs.items()},
        labels=row.labels[:, :stop],
        num_tokens=stop,
        num_dropped_tokens=row.num_tokens - stop,
    )


def pad_rows(rows: Sequence[CandidateRow]) -> tuple[dict[str, Any], Int[Tensor, "N S"]]:
    """Right-pads rows into a micro-batch: inputs `(N, S)` with an `attention_mask`, and labels padded with −100.

    A row that cannot be padded must be alone.
    """
    if len(rows) == 1 and not rows[0].can_be_padded:
        return rows[0].inputs, rows[0].labels
    length = max(row.num_tokens for row in rows)

    def pad(tensors: list[Tensor], value: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(item, (0, length - item.shape[1]), value=value) for item in tensors])

    inputs = {
        key: pad([row.inputs[key] for row in rows], 0) for key in rows[0].inputs if key not in ("attention_mask",)
    }
    inputs["attention_mask"] = pad(
        [row.inputs.get("attention_mask", torch.ones_like(row.inputs["input_ids"])) for row in rows], 0
    )
    return inputs, pad([row.labels for row in rows], -100)


def name_of(collate: Callable[..., Any]) -> str:
    """A collator's name for messages, also where the trainer wrapped it to remove columns."""
    collate = getattr(collate, "data_collator", collate)
    return getattr(collate, "__name__", type(collate).__name__)


def _check_shapes(batch: Mapping[str, Any], name: str, where: str) -> None:
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(
            f"The data collator ({name}) gave input_ids of shape {tuple(ids.shape)} for {where} alone, where (1, "
            "tokens) was expected. SPICE scores a row at a time: a collator must give one row for one, not several "
            "(pairs, augmentations) and not one without the batch's dimension."
        )
    others = [("labels", labels)]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        others.append(("attention_mask", mask))
    for key, value in others:
        if value.shape != ids.shape:
            raise ValueError(
                f"The data collator ({name}) gave {key} of shape {tuple(value.shape)} beside input_ids of shape "
                f"{tuple(ids.shape)} for {where}. Every token needs its own. Likely cause: {key} that were cut, "
                "lengthened or made for other tokens. Fix: tokenise the row again, or leave it out."
            )
    if ids.is_floating_point() or ids.dtype == torch.bool or labels.dtype != torch.int64:
        raise ValueError(
            f"The data collator ({name}) gave input_ids of type {ids.dtype} and labels of type {labels.dtype} for "
            f"{where}. Both are token ids: make them torch.int64."
        )


def _describe(row: Any) -> str:
    """Names and types of columns; never their content."""
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}"
    parts = [
        f"{key} ({type(value).__name__}{f' of {len(value)}' if isinstance(value, list | str) else ''})"
        for key, value in sorted(row.items(), key=lambda item: str(item[0]))
    ]
    return ", ".join(parts[:MAX_LISTED]) + (" ..." if len(parts) > MAX_LISTED else "") if parts else "no column"


def _strip_padding(batch: dict[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Drops the columns before the first and after the last attended token (`pad_to_multiple_of`, left padding)."""
    attended = batch["attention_mask"][0].nonzero()
    length = batch["attention_mask"].shape[1]
    if len(attended) in (0, length):
        return batch, labels
    start, stop = int(attended[0]), int(attended[-1]) + 1
    stripped = {
        key: value[:, start:stop]
        # Not the patches of an image that have as many numbers.
        if isinstance(value, Tensor) and value.shape[:2] == (1, length)
        else value
        for key, value in batch.items()
    }
    return stripped, labels[:, start:stop]


def _is_packed(position_ids: Tensor | None) -> bool:
    """Whether positions start anew within the row: several documents that must not attend to each other."""
    return position_ids is not None and int((position_ids == 0).sum()) > 1
