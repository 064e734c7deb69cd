"""Checks of datasets and of their collated rows, with errors that name the row, the likely cause and the fix.

Without them a row that doesn't fit shows as an index error within the model, on a GPU as a failed assertion that ends
the process, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.data.rows import MAX_LISTED, CandidateRow, DataCollator, name_of, spread_positions
from spice_trainer.data.sample import RowSample
from spice_trainer.data.stream import is_stream
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state

_PADDING_ADVICE = {
    "input_ids": (
        "a pad token was added to the tokenizer and not to the model, or the tokenizer has none. Fix: "
        "`model.resize_token_embeddings(len(tokenizer))` before the adapter is added, or a pad token that the model "
        "knows, such as `tokenizer.pad_token = tokenizer.eos_token`."
    ),
    "labels": "it takes another number than -100 for labels that don't count. Fix: pad labels with -100.",
}

# With other inputs (pixels, say) a model may use ids outside its vocabulary as marks.
_TEXT_KEYS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "completion_mask"})


def check_dataset(dataset: Any, *, may_be_stream: bool = False) -> None:
    """Refuses what is no dataset with rows by number: none, a name, a dict of splits, a stream, or no rows."""
    if may_be_stream and is_stream(dataset):
        return
    if dataset is None:
        raise ValueError("The trainer has no train_dataset, so there is nothing to select from. Pass one to it.")
    if isinstance(dataset, str | os.PathLike):
        raise ValueError(
            f"The training dataset is a {type(dataset).__name__}, {os.fspath(dataset)!r}, and not its rows. Load it "
            'first, such as with `datasets.load_dataset("json", data_files=..., split="train")`.'
        )
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        raise ValueError(
            f"The training dataset ({type(dataset).__name__}) is a dict of splits or columns, {splits}, which has no "
            f"rows by number. Pass one of them, such as `dataset[{splits[0] if splits else 'train'!r}]`."
        )
    if is_stream(dataset) or not _has_length(dataset):
        raise ValueError(
            f"The training dataset ({type(dataset).__name__}) is streamed: it has no length and no random access, and "
            "only a Trainer trains on a stream, a torch.utils.data.IterableDataset. Load it without `streaming=True`, "
            "or turn it into a `datasets.Dataset` first (`Dataset.from_generator`, or `.save_to_disk` and "
            "`load_from_disk`)."
        )
    if len(dataset) == 0:
        raise ValueError(
            "The training dataset has 0 rows, so there is nothing to select from. Check the filters and the split "
            "that made it."
        )


def check_is_rows(dataset: Any) -> None:
    """Raises `TypeError` unless this is a sequence of rows: a dict of splits and a stream have no row numbers."""
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"The dataset is a {type(dataset).__name__} of {sorted(map(str, dataset))}, not a sequence of rows. Fix: "
            'give one split, such as dataset["train"].'
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"The dataset is a {type(dataset).__name__}, which has no length or no rows by number; a stream cannot be "
            "selected from by row. Fix: load it without streaming=True, or give a list of dicts."
        )


def check_is_labelled(dataset: Any, name: str, option: str) -> None:
    """Refuses tokenised rows that the default collator cannot read; `name` and `option` are for the message."""
    missing = [key for key in ("input_ids", "labels") if len(dataset) and key not in dataset[0]]
    if missing:
        raise ValueError(
            f"{name} has rows of {sorted(dataset[0])}, without {' and '.join(missing)}. Fix: give each row "
            "`input_ids` and `labels` (the same ids, -100 where nothing is trained), or a collator that makes them, "
            f"{option}."
        )


def embedding_size(model: nn.Module) -> int:
    """Rows of a model's input embedding."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(embedding.num_embeddings)


def configured_vocabulary_size(model: nn.Module) -> int | None:
    """Entries of a model's vocabulary as its configuration says, which no wrapper hides."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return size if isinstance(size, int) else None


def token_id_limits(model: nn.Module) -> tuple[int | None, int | None]:
    """Rows of a model's input embedding and of its output layer; `None` where they cannot be told."""
    sizes: list[int | None] = []
    weights: list[Any] = []
    for getter, attribute in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        get = getattr(model, getter, None)
        module = get() if callable(get) else None
        size = getattr(module, attribute, None)
        sizes.append(size if isinstance(size, int) and size > 0 else None)
        weights.append(getattr(module, "weight", None))
    num_inputs, num_outputs = sizes
    if weights[0] is weights[1]:
        # PEFT's copy of a tied head (`ensure_weight_tying=True`) has its sizes exchanged.
        num_outputs = num_inputs
    return num_inputs, num_outputs if num_outputs is not None else num_inputs


def check_token_ids(rows: Iterable[CandidateRow], sizes: tuple[int | None, int | None]) -> None:
    """Refuses token ids, and labels but −100, that the model has no entry for; sizes by [`token_id_limits`]."""
    for row in rows:
        if set(row.inputs) - _TEXT_KEYS:
            continue
        _check_ids(row, "input_ids", row.inputs["input_ids"], sizes[0])
        _check_ids(row, "labels", row.labels, sizes[1])


def _outside(key: str, values: Tensor, size: int | None) -> int | None:
    """An id that a vocabulary of this size lacks, if there is one; labels of −100 count for nothing."""
    values = values[values != -100] if key == "labels" else values
    if size is None or values.numel() == 0:
        return None
    lowest, highest = (int(value) for value in torch.aminmax(values))
    return highest if highest >= size else lowest if lowest < 0 else None


def _check_ids(row: CandidateRow, key: str, values: Tensor, size: int | None) -> None:
    unknown = _outside(key, values, size)
    if unknown is None or size is None:
        return
    if unknown >= size:
        cause = (
            "the row was tokenised for another model, or tokens were added to the tokenizer and not to the model "
            "(`model.resize_token_embeddings(len(tokenizer))`)"
        )
    elif key == "labels":
        cause = "another number than -100 marks labels that don't count"
    else:
        cause = "padding with a negative number; it needs an id of the vocabulary and an attention_mask"
    raise ValueError(
        f"Row {row.index} of the {row.source} has {unknown} in its {key}, and the "
        f"model's vocabulary goes from 0 to {size - 1}. Likely cause: {cause}. Fix: tokenise it with this model's "
        "tokenizer, or leave the row out."
    )


def check_collator(
    sample: RowSample,
    collate: DataCollator,
    rows: Sequence[CandidateRow],
    sizes: tuple[int | None, int | None],
    *,
    num_rows: int,
) -> None:
    """Tries the collator on rows together, as training will, and warns if a row comes out differently each time.

    `rows` are those of the sample as they are scored, of which the shortest and the longest are padded to each other
    where a step has more than one; sizes by [`token_id_limits`].
    """
    by_length = sorted(rows, key=lambda row: row.num_tokens)
    unlike = list(dict.fromkeys(row.index for row in (by_length[0], by_length[-1]))) if by_length else []
    number = min(num_rows, MAX_LISTED, len(sample.indices))
    spread = [sample.indices[place] for place in spread_positions(len(sample.indices), number)]
    # Two unlike rows and a third are needed to see the padding, also where a micro-batch has two.
    indices = sorted(list(dict.fromkeys([spread[0], *unlike, *spread]))[: max(number, 3) if number > 1 else 1])
    with preserved_random_state(sample.device):
        try:
            batch = collate(sample.copies(indices))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(
                f"The data collator ({name_of(collate)}) takes rows {', '.join(map(str, indices))} of the training "
                f"dataset one at a time and failed on them together ({type(error).__name__}: {error}). Likely cause: "
                "it does not pad rows to the same length. Fix: use one that does, such as "
                "`DataCollatorForSeq2Seq(tokenizer)`, or per_device_train_batch_size=1."
            ) from error
        _check_padding(batch, sample.copies(indices), collate, sizes)
        read = (sample.copies(indices[:1]), sample.read_again(indices[:1]))
        once, again = (dict(collate(list(rows))) for rows in read)
    if any(not _same(value, again.get(key)) for key, value in once.items()):
        logger.warning(
            "SPICE: the dataset or the data collator (%s) gives row %d differently each time (random masking or "
            "augmentation?). A step then trains on something else than what was scored, and runs cannot be repeated. "
            "Make it a function of the row alone.",
            name_of(collate),
            indices[0],
        )


def _check_padding(batch: Any, rows: list[Any], collate: DataCollator, sizes: tuple[int | None, int | None]) -> None:
    """Refuses ids beyond the vocabulary in rows collated together that none has alone: they are the padding's."""
    if not isinstance(batch, Mapping) or set(batch) - _TEXT_KEYS - {"labels"}:
        return
    for key, size in zip(("input_ids", "labels"), sizes, strict=True):
        values = batch.get(key)
        unknown = _outside(key, values, size) if isinstance(values, Tensor) else None
        # A row that has such an id itself is named when it is scored.
        if (
            unknown is None
            or size is None
            or any(_outside(key, collate([row])[key], size) is not None for row in rows)
        ):
            continue
        raise ValueError(
            f"The data collator ({name_of(collate)}) pads {key} with {unknown}, and the model's vocabulary goes from "
            f"0 to {size - 1}. Likely cause: {_PADDING_ADVICE[key]}"
        )


@contextmanager
def naming_rows(rows: Sequence[CandidateRow], model: nn.Module) -> Iterator[None]:
    """Adds to an error in the block which rows the model was given; it keeps its type and text."""
    try:
        yield
    except Exception as error:
        num_tokens = max(row.num_tokens for row in rows)
        listed = ", ".join(str(row.index) for row in rows[:MAX_LISTED]) + (" ..." if len(rows) > MAX_LISTED else "")
        note = f"SPICE was scoring row(s) {listed} of the {rows[0].source}, the longest of {num_tokens:,} tokens."
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and num_tokens > limit:
            note += f" Likely cause: the model has {limit:,} positions. Fix: shorten the rows (`max_length={limit}`)."
        error.add_note(note)
        raise


def _has_length(dataset: Any) -> bool:
    try:
        return len(dataset) is not None
    except (TypeError, AttributeError):  # Ray's datasets raise the second.
        return False


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    return isinstance(second, type(first))
