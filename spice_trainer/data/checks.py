"""Checks of what a collator makes of dataset rows, with errors that name the row, the likely cause and the fix.

Without them a row that doesn't fit shows as an index error within the model, on a GPU as a failed assertion that ends
the process, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state

if TYPE_CHECKING:
    from spice_trainer.data.rows import CandidateRow

# With other inputs (pixels, say) a model may use ids outside its vocabulary as marks.
_TEXT_KEYS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "completion_mask"})
_MAX_LISTED = 8


def collate_alone(row: Any, collate: Callable[[list[Any]], Mapping[str, Any]], *, where: str) -> dict[str, Any]:
    """Collates one dataset row, and checks what comes out.

    Args:
        row (`Any`): What the dataset holds there.
        collate (`Callable`): The trainer's collator.
        where (`str`): Which row of what it is, for messages.

    Returns:
        `dict[str, Any]`: With `input_ids` and `labels` of shape `(1, S)`.

    Raises:
        ValueError: If the collator fails, or gives something else.
    """
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


def vocabulary_sizes(model: nn.Module) -> tuple[int | None, int | None]:
    """Rows of a model's input embedding and of its output layer; `None` where they cannot be told."""
    sizes: list[int | None] = []
    for getter, attribute in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        get = getattr(model, getter, None)
        size = getattr(get(), attribute, None) if callable(get) else None
        sizes.append(size if isinstance(size, int) and size > 0 else None)
    num_inputs, num_outputs = sizes
    return num_inputs, num_outputs if num_outputs is not None else num_inputs


def check_token_ids(rows: Iterable[CandidateRow], sizes: tuple[int | None, int | None]) -> None:
    """Refuses token ids that the model has no entry for.

    Args:
        rows (`Iterable[CandidateRow]`): Collated rows.
        sizes (`tuple`): From [`vocabulary_sizes`].

    Raises:
        ValueError: If an id, or a label but −100, is outside.
    """
    for row in rows:
        if set(row.inputs) - _TEXT_KEYS:
            continue
        _check_ids(row, "input_ids", row.inputs["input_ids"], sizes[0])
        _check_ids(row, "labels", row.labels[row.labels != -100], sizes[1])


def _check_ids(row: CandidateRow, key: str, values: Tensor, size: int | None) -> None:
    if size is None or values.numel() == 0:
        return
    lowest, highest = (int(value) for value in torch.aminmax(values))
    if lowest >= 0 and highest < size:
        return
    if highest >= size:
        cause = (
            "the row was tokenised for another model, or tokens were added to the tokenizer and not to the model "
            "(`model.resize_token_embeddings(len(tokenizer))`)"
        )
    elif key == "labels":
        cause = "another number than -100 marks labels that don't count"
    else:
        cause = "padding with a negative number; it needs an id of the vocabulary and an attention_mask"
    raise ValueError(
        f"Row {row.index} of the {row.source} has {highest if highest >= size else lowest} in its {key}, and the "
        f"model's vocabulary goes from 0 to {size - 1}. Likely cause: {cause}. Fix: tokenise it with this model's "
        "tokenizer, or leave the row out."
    )


def check_collator(
    dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]], *, num_rows: int, device: torch.device
) -> None:
    """Tries the collator on some rows together, as training will, and warns if a row comes out differently each time.

    Args:
        dataset (`Any`): The training rows, each of which it takes alone.
        collate (`Callable`): The trainer's collator.
        num_rows (`int`): Rows of a micro-batch.
        device (`torch.device`): Where training draws from, beside the CPU.

    Raises:
        ValueError: If it fails on them.
    """
    number = min(num_rows, _MAX_LISTED, len(dataset))
    indices = [position * len(dataset) // number for position in range(number)]
    with preserved_random_state(device):
        try:
            collate([dataset[index] for index in indices])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"The data collator ({name_of(collate)}) takes rows {', '.join(map(str, indices))} of the training "
                f"dataset one at a time and failed on them together ({type(error).__name__}: {error}). Likely cause: "
                "it does not pad rows to the same length. Fix: use one that does, such as "
                "`DataCollatorForSeq2Seq(tokenizer)`, or per_device_train_batch_size=1."
            ) from error
        once, again = (dict(collate([dataset[indices[0]]])) for _ in range(2))
    if any(not _same(value, again.get(key)) for key, value in once.items()):
        logger.warning(
            "SPICE: the dataset or the data collator (%s) gives row %d differently each time (random masking or "
            "augmentation?). A step then trains on something else than what was scored, and runs cannot be repeated. "
            "Make it a function of the row alone.",
            name_of(collate),
            indices[0],
        )


@contextmanager
def naming_rows(rows: Sequence[CandidateRow], model: nn.Module) -> Iterator[None]:
    """Adds to an error in the block which rows the model was given; it keeps its type and text.

    Args:
        rows (`Sequence[CandidateRow]`): The rows.
        model (`torch.nn.Module`): The model.
    """
    try:
        yield
    except Exception as error:
        num_tokens = max(row.num_tokens for row in rows)
        listed = ", ".join(str(row.index) for row in rows[:_MAX_LISTED]) + (" ..." if len(rows) > _MAX_LISTED else "")
        note = f"SPICE was scoring row(s) {listed} of the {rows[0].source}, the longest of {num_tokens:,} tokens."
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and num_tokens > limit:
            note += f" Likely cause: the model has {limit:,} positions. Fix: shorten the rows (`max_length={limit}`)."
        error.add_note(note)
        raise


def name_of(collate: Callable[..., Any]) -> str:
    """A collator's name for messages, also where the trainer wrapped it to remove columns."""
    collate = getattr(collate, "data_collator", collate)
    return getattr(collate, "__name__", type(collate).__name__)


_FIX_COLLATOR = (
    "SPICE scores causal language models on token ids and labels: use a collator that returns both, such as "
    "`DataCollatorForLanguageModeling(tokenizer, mlm=False)` or `DataCollatorForSeq2Seq(tokenizer)`."
)


def _describe(row: Any) -> str:
    """Names and types of columns; never their content."""
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}"
    parts = [
        f"{key} ({type(value).__name__}{f' of {len(value)}' if isinstance(value, list | str) else ''})"
        for key, value in sorted(row.items(), key=lambda item: str(item[0]))
    ]
    return ", ".join(parts[:_MAX_LISTED]) + (" ..." if len(parts) > _MAX_LISTED else "") if parts else "no column"


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return isinstance(second, type(first))
