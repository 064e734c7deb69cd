"""`select_subset`: models, datasets, values, and what is in `output_dir` already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict

from tests.bad_input.datasets import UnreadableRow
from tests.bad_input.scene import CALLING, BadInput, Scene
from tests.support.subsets import PROMPTS, export
from tests.support.trainers import tiny_dataset, tiny_tokenizer


def _select(**options: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        built = {name: value() if callable(value) else value for name, value in options.items()}
        return scene.select(**built)

    return prepare


def _into_file(scene: Scene) -> Callable[[], Any]:
    (scene.folder / "run").write_text("mine")
    return scene.select()


def _another_there(scene: Scene) -> Callable[[], Any]:
    export(PROMPTS, scene.folder / "run")
    return scene.select()


def _texts() -> Dataset:
    return Dataset.from_list([{"text": "w3 w4"}] * 20)


ROWS = (
    BadInput(
        "selector_by_name",
        "a model's name in place of a model",
        CALLING,
        TypeError,
        ("select_subset needs a model with a LoRA adapter, got str", "`ProxyModel.from_pretrained(name_or_path)`"),
        _select(model="org/model"),
    ),
    BadInput(
        "subset_config",
        "a dict in place of a `SpiceConfig`",
        CALLING,
        TypeError,
        ("config must be a SpiceConfig, got dict",),
        _select(config={"pool_size": 10}),
    ),
    BadInput(
        "subset_unreadable_row",
        "a dataset that raises on a row",
        CALLING,
        FileNotFoundError,
        ("No such file or directory: '7.json'", "SPICE was reading row(s) 7 of the training dataset (UnreadableRow)"),
        _select(dataset=lambda: UnreadableRow(7)),
    ),
    BadInput(
        "subset_splits",
        "a dict of splits",
        CALLING,
        ValueError,
        ("(DatasetDict) is a dict of splits", "['train', 'test']"),
        _select(dataset=lambda: DatasetDict({"train": tiny_dataset(), "test": tiny_dataset(2)})),
    ),
    BadInput(
        "subset_streamed",
        "a streamed dataset",
        CALLING,
        ValueError,
        ("is streamed",),
        _select(dataset=lambda: tiny_dataset().to_iterable_dataset()),
    ),
    BadInput(
        "subset_file_name",
        "a file's name in place of its rows",
        CALLING,
        ValueError,
        ("is a str, 'rows.jsonl', and not its rows",),
        _select(dataset="rows.jsonl"),
    ),
    BadInput(
        "no_tokenizer",
        "raw rows without a tokenizer",
        CALLING,
        ValueError,
        ("holds raw rows (text) and select_subset has no tokenizer", "`processing_class=`"),
        _select(dataset=_texts),
    ),
    BadInput(
        "unknown_columns",
        "raw rows of other columns than TRL's",
        CALLING,
        ValueError,
        ("only the columns ['answer', 'question']", "It needs 'messages', 'prompt' and 'completion', or 'text'"),
        _select(
            dataset=lambda: Dataset.from_list([{"question": "w3", "answer": "w4"}]), processing_class=tiny_tokenizer
        ),
    ),
    BadInput(
        "subset_null",
        "a raw row without text",
        CALLING,
        ValueError,
        ("Row 19 of the proxy's dataset is malformed: 'text' is of type NoneType", "Fix: correct the row"),
        _select(
            dataset=lambda: Dataset.from_list([{"text": "w3 w4"}] * 19 + [{"text": None}]),
            processing_class=tiny_tokenizer,
        ),
    ),
    BadInput(
        "cut_to_nothing",
        "a `max_length` that leaves no label token",
        CALLING,
        ValueError,
        ("None of 18 rows looked at has a label token", "`max_length`"),
        _select(dataset=_texts, processing_class=tiny_tokenizer, max_length=1),
    ),
    BadInput(
        "length_as_text",
        "a number as text (`max_length`, `seed`, `save_steps`, `samples_per_step`)",
        CALLING,
        ValueError,
        ("select_subset: max_length='10' is of type str",),
        _select(max_length="10"),
    ),
    BadInput(
        "no_save_steps",
        "`save_steps=0` or `samples_per_step=0`",
        CALLING,
        ValueError,
        ("select_subset: save_steps=0 is below 1", "Fix: set save_steps to at least 1"),
        _select(save_steps=0),
    ),
    BadInput(
        "subset_seed",
        "a negative seed",
        CALLING,
        ValueError,
        ("select_subset: seed=-1 is below 0",),
        _select(seed=-1),
    ),
    BadInput(
        "name_outside",
        "a `name` that leads out of `output_dir`",
        CALLING,
        ValueError,
        ("name='../elsewhere' cannot be the name of a subset", "Fix: use letters, digits"),
        _select(name="../elsewhere"),
    ),
    BadInput(
        "output_is_file",
        "an `output_dir` that is a file",
        CALLING,
        NotADirectoryError,
        ("SPICE cannot write its records to",),
        _into_file,
    ),
    BadInput(
        "another_subset",
        "an `output_dir` with another subset",
        CALLING,
        FileExistsError,
        ("holds a subset of another selection", "Choose another output_dir, or pass overwrite=True"),
        _another_there,
    ),
)
