"""Collators: what they give for one row, and for several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.bad_input.scene import ATTACHING, BadInput, Scene
from tests.support.trainers import collate


def _collator(collator: Callable[[Any], Any] | None) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.attach(data_collator=collator)


def as_list(rows: Sequence[Any]) -> Any:
    return [torch.tensor(row["input_ids"]) for row in rows]


def as_arrays(rows: Sequence[Any]) -> Any:
    return {key: value.numpy() for key, value in collate(rows).items()}


def without_labels(rows: Sequence[Any]) -> Any:
    return {key: value for key, value in collate(rows).items() if key != "labels"}


def without_ids(rows: Sequence[Any]) -> Any:
    batch = collate(rows)
    return {"inputs_embeds": torch.zeros(*batch["labels"].shape, 32), "labels": batch["labels"]}


def twice(rows: Sequence[Any]) -> Any:
    return collate([*rows, *rows])


def without_batch(rows: Sequence[Any]) -> Any:
    return {key: value[0] for key, value in collate(rows).items()}


def real_labels(rows: Sequence[Any]) -> Any:
    return {key: value.float() if key == "labels" else value for key, value in collate(rows).items()}


def short_mask(rows: Sequence[Any]) -> Any:
    return {key: value[:, 1:] if key == "attention_mask" else value for key, value in collate(rows).items()}


def padding_beyond(rows: Sequence[Any]) -> Any:
    batch = collate(rows)
    batch["input_ids"][batch["attention_mask"] == 0] = 64
    return batch


def padding_below(rows: Sequence[Any]) -> Any:
    batch = collate(rows)
    batch["labels"][batch["attention_mask"] == 0] = -1
    return batch


def failing(rows: Sequence[Any]) -> Any:
    raise ZeroDivisionError("division by zero")


def masking_at_random(rows: Sequence[Any]) -> Any:
    batch = collate(rows)
    batch["labels"][torch.rand(batch["labels"].shape) < 0.5] = -100
    return batch


ROWS = (
    BadInput(
        "as_list",
        "a collator that returns a list or a tuple",
        ATTACHING,
        ValueError,
        ("(as_list) gave a list for row 0", "not a dict of tensors", "DataCollatorForSeq2Seq(tokenizer)"),
        _collator(as_list),
    ),
    BadInput(
        "as_arrays",
        "a collator that returns arrays or lists in place of tensors",
        ATTACHING,
        ValueError,
        ("(as_arrays) gave no tensor 'input_ids' for row 0", "input_ids (ndarray)"),
        _collator(as_arrays),
    ),
    BadInput(
        "without_labels",
        "a collator that returns no labels",
        ATTACHING,
        ValueError,
        (
            "(without_labels) gave no tensor 'labels' for row 0",
            "DataCollatorForLanguageModeling(tokenizer, mlm=False)",
        ),
        _collator(without_labels),
    ),
    BadInput(
        "without_ids",
        "a collator that returns embeddings in place of token ids",
        ATTACHING,
        ValueError,
        ("(without_ids) gave no tensor 'input_ids' for row 0", "inputs_embeds (Tensor)"),
        _collator(without_ids),
    ),
    BadInput(
        "twice",
        "a collator that makes several rows of one",
        ATTACHING,
        ValueError,
        ("(twice) gave input_ids of shape (2, 16) for row 0", "must give one row for one"),
        _collator(twice),
    ),
    BadInput(
        "without_batch",
        "a collator that returns tensors without the batch's dimension",
        ATTACHING,
        ValueError,
        ("(without_batch) gave input_ids of shape (16,) for row 0",),
        _collator(without_batch),
    ),
    BadInput(
        "real_labels",
        "a collator that returns labels of a floating point type",
        ATTACHING,
        ValueError,
        ("(real_labels) gave input_ids of type torch.int64 and labels of type torch.float32", "make them torch.int64"),
        _collator(real_labels),
    ),
    BadInput(
        "short_mask",
        "an attention mask of another length than the tokens",
        ATTACHING,
        ValueError,
        ("(short_mask) gave attention_mask of shape (1, 15) beside input_ids of shape (1, 16)",),
        _collator(short_mask),
    ),
    BadInput(
        "padding_beyond",
        "a pad token that was added to the tokenizer and not to the model",
        ATTACHING,
        ValueError,
        ("(padding_beyond) pads input_ids with 64", "goes from 0 to 60", "resize_token_embeddings(len(tokenizer))"),
        _collator(padding_beyond),
    ),
    BadInput(
        "padding_below",
        "labels that are padded with another number than -100",
        ATTACHING,
        ValueError,
        ("(padding_below) pads labels with -1", "goes from 0 to 60", "Fix: pad labels with -100"),
        _collator(padding_below),
    ),
    BadInput(
        "failing_collator",
        "a collator that fails",
        ATTACHING,
        ValueError,
        ("(failing) failed on row 0", "(ZeroDivisionError: division by zero)", "input_ids (list of 16)"),
        _collator(failing),
    ),
    BadInput(
        "no_padding",
        "a collator that does not pad (the Trainer's default)",
        ATTACHING,
        ValueError,
        (
            "(default_data_collator) takes rows 0, 6, 15, 54",
            "failed on them together",
            "does not pad",
            "Fix: use one",
        ),
        _collator(None),
    ),
    BadInput(
        "masking_at_random",
        "a collator that draws random numbers",
        ATTACHING,
        None,
        ("(masking_at_random) gives row 0 differently each time", "Make it a function of the row alone"),
        _collator(masking_at_random),
    ),
)
