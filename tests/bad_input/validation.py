"""Validation rows: what is none, what nothing can be told from, and what the settings do not go with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from spice_trainer import SpiceConfig, SpiceSampler
from tests.bad_input.scene import ATTACHING, CALLING, SETTINGS, TRAINING, BadInput, Scene
from tests.support.models import VOCAB_SIZE, tiny_lora_model
from tests.support.trainers import collate, tiny_dataset, tiny_rows

AIMED = {"strategy": "targeted_matching"}


def _rows(number: int = 9) -> list[dict[str, Any]]:
    return tiny_rows(number, seed=5)


def _changed(row: int | None = None, **columns: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Rows of which one, or each, has other columns."""
    return [
        {**values, **{name: make(values) for name, make in columns.items()}} if row in (None, number) else values
        for number, values in enumerate(_rows())
    ]


def _aimed(
    validation: Callable[[], Any], settings: dict[str, Any] | None = None, **options: Any
) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        return scene.attach(AIMED if settings is None else settings, validation_dataset=validation(), **options)

    return prepare


def _copies_in_pools(scene: Scene) -> Callable[[], Any]:
    rows = tiny_rows()
    return scene.train(AIMED, train_dataset=rows, validation_dataset=[*_rows(), rows[3]])


def _bound(scene: Scene) -> Callable[[], Any]:
    model, sampler = tiny_lora_model(), SpiceSampler(SpiceConfig(**(SETTINGS | AIMED)))
    scene.models.append(model)
    return lambda: sampler.bind(
        model,
        tiny_dataset(),
        data_collator=collate,
        per_device_train_batch_size=4,
        validation_dataset=_changed(labels=lambda row: [-100] * len(row["labels"])),
    )


def _selected(scene: Scene) -> Callable[[], Any]:
    rows = _changed(2, input_ids=lambda row: [VOCAB_SIZE + 7] * len(row["input_ids"]))
    return scene.select(config=SpiceConfig(**(SETTINGS | AIMED)), validation_dataset=Dataset.from_list(rows))


def _row(
    name: str, wrong: str, error: type[BaseException] | None, *says: str, prepare: Any, when: str = ATTACHING
) -> Any:
    return BadInput(name, wrong, when, error, says, prepare)


ROWS = (
    _row(
        "no_validation_row", "no row", ValueError, "validation_dataset (list) has no row", "Fix: give rows like those",
        prepare=_aimed(list),
    ),
    _row(
        "no_validation_set", "an empty dict of sets", ValueError, "validation_dataset is an empty dict",
        prepare=_aimed(dict),
    ),
    _row(
        "no_row_of_a_validation_set", "one set of several without a row", ValueError,
        "validation_dataset['code'] (Dataset) has no row",
        prepare=_aimed(lambda: {"mathematics": _rows(), "code": Dataset.from_list(_rows()).select([])}),
    ),
    _row(
        "validation_text", "the name of a dataset in place of its rows", TypeError,
        "validation_dataset is the text 'org/rows'", "load_dataset(...)['validation']",
        prepare=_aimed(lambda: "org/rows"),
    ),
    _row(
        "validation_stream", "a stream", TypeError,
        "validation_dataset is a IterableDataset, which has no rows by number", "list(stream.take(32))",
        prepare=_aimed(lambda: Dataset.from_list(_rows()).to_iterable_dataset()),
    ),
    _row(
        "validation_columns", "one row, or columns, in place of rows", TypeError,
        "a dict whose 'input_ids', 'attention_mask', 'labels' holds no rows", "Fix: give a list of rows",
        prepare=_aimed(lambda: _rows()[0]),
    ),
    _row(
        "unlabelled_validation_rows", "rows without a label token", ValueError,
        "None of the 9 rows of the validation set 'validation' that are read has a label token",
        prepare=_aimed(lambda: _changed(labels=lambda row: [-100] * len(row["labels"]))),
    ),
    _row(
        "unlabelled_validation_rows_bound", "the same, given to `SpiceSampler.bind`", ValueError,
        "None of the 9 rows of the validation set 'validation' that are read has a label token",
        prepare=_bound, when=CALLING,
    ),
    _row(
        "validation_rows_of_another_tokenizer", "rows that were tokenised for another model", ValueError,
        f"Row 2 of the validation dataset has {VOCAB_SIZE + 7} in its input_ids",
        "the row was tokenised for another model",
        prepare=_aimed(lambda: _changed(2, input_ids=lambda row: [VOCAB_SIZE + 7] * len(row["input_ids"]))),
    ),
    _row(
        "validation_rows_of_another_tokenizer_selected", "the same, given to `select_subset`", ValueError,
        f"Row 2 of the validation dataset has {VOCAB_SIZE + 7} in its input_ids",
        prepare=_selected, when=CALLING,
    ),
    _row(
        "raw_validation_rows", "raw rows for a Trainer that takes tokenised ones", ValueError,
        "The data collator (collate) failed on row 0 of the validation dataset 'validation'", "holds text (str of 5)",
        prepare=_aimed(lambda: [{"text": "w3 w4"}] * 9),
    ),
    _row(
        "few_validation_rows", "a single row", None,
        "1 validation row can hardly show that pools differ from it", "at least 8",
        prepare=_aimed(lambda: _rows(1)),
    ),
    _row(
        "copies_of_training_rows", "rows that are training rows too", None,
        "2 rows of the validation set 'validation' are copies of training rows (1, 4) and are left out",
        prepare=_aimed(lambda: [*_rows(1), tiny_rows()[3], *_rows()[1:3], tiny_rows()[7], *_rows()[3:]]),
    ),
    _row(
        "copies_in_pools", "the same in a dataset that stores no tokens, where only a pool can show it", None,
        "1 rows of the validation set 'validation' are copies of training rows (9) and are left out of the pools",
        prepare=_copies_in_pools, when=TRAINING,
    ),
    _row(
        "all_copies_of_training_rows", "nothing but training rows", ValueError,
        "All 9 rows of the validation set 'validation' are training rows too", "Fix: take them out of the training",
        prepare=_aimed(lambda: tiny_rows()[:9]),
    ),
    _row(
        "validation_weights", "weights in another number than there are sets", ValueError,
        "validation_weights=[1.0, 2.0] for 1 validation sets ('validation')", "Fix: give one weight for each",
        prepare=_aimed(_rows, AIMED | {"validation_weights": [1.0, 2.0]}),
    ),
    _row(
        "validation_rows_that_nothing_reads", "rows for a strategy that reads none", ValueError,
        "strategy='fisher' reads no validation rows, and a validation_dataset was given", "Fix: leave it out",
        prepare=_aimed(_rows, {"strategy": "fisher"}),
    ),
    _row(
        "no_validation_rows_for_quotas", '`length_quotas="validation"` without rows', ValueError,
        "length_quotas='validation' compares candidates with a validation set, and there is none",
        prepare=_aimed(lambda: None, {"length_quotas": "validation"}),
    ),
)  # fmt: skip
