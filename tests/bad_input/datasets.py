"""Datasets: of a wrong kind, without the columns, with rows that don't fit the model; replaced after attaching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, DatasetDict

from spice_trainer import SpiceSampler
from spice_trainer.data.sample import SAMPLE_ROWS
from tests.bad_input.scene import ATTACHING, CALLING, STARTING, TRAINING, BadInput, Scene
from tests.support.models import tiny_lora_model
from tests.support.streams import CountedStream
from tests.support.trainers import collate, tiny_dataset, tiny_rows

# Row 7 is none of those that are looked at before a run; 0 is.
UNSEEN, SEEN = 7, 0


def _rows(**columns: Callable[[dict[str, Any]], Any]) -> Callable[[int], list[dict[str, Any]]]:
    """Rows of which one has other columns."""

    def build(which: int) -> list[dict[str, Any]]:
        rows = tiny_rows()
        return [
            row | {name: change(row) for name, change in columns.items()} if index == which else row
            for index, row in enumerate(rows)
        ]

    return build


def _ids(value: int) -> Callable[[int], list[dict[str, Any]]]:
    return _rows(input_ids=lambda row: [value] * len(row["input_ids"]))


def _labels(value: int) -> Callable[[int], list[dict[str, Any]]]:
    return _rows(labels=lambda row: [value] * len(row["labels"]))


def _dataset(
    dataset: Any, settings: dict[str, Any] | None = None, **options: Any
) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.attach(settings, train_dataset=dataset() if callable(dataset) else dataset, **options)


def _with_validation(dataset: Callable[[], Any]) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.attach({"strategy": "less"}, eval_dataset=dataset())


def _trained_on(dataset: Callable[[], Any], **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.train(train_dataset=dataset(), **options)


def _train(build: Callable[[int], list[dict[str, Any]]], **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.train(
        train_dataset=build(UNSEEN), **({"model": options["model"]()} if "model" in options else {})
    )


def _replaced(dataset: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train()
        scene.trainer.train_dataset = dataset() if callable(dataset) else dataset
        return train

    return prepare


def _no_dataset(scene: Scene) -> Callable[[], Any]:
    attach = scene.attach()
    scene.trainer.train_dataset = None
    return attach


def _splits() -> DatasetDict:
    return DatasetDict({"train": tiny_dataset(), "test": tiny_dataset(5)})


def _masked() -> Dataset:
    return Dataset.from_list([row | {"labels": [-100] * len(row["labels"])} for row in tiny_rows()])


def _texts() -> Dataset:
    return Dataset.from_list([{"text": "w3 w4 w5"}] * 20)


class UnreadableRow(list[Any]):
    """Rows of which one cannot be read."""

    def __init__(self, which: int) -> None:
        super().__init__(tiny_rows())
        self.which = which

    def __getitem__(self, index: Any) -> Any:
        if index == self.which:
            raise FileNotFoundError(2, "No such file or directory", f"{index}.json")
        return super().__getitem__(index)


class ReadOnce(CountedStream):
    """A generator behind the name of a stream."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(rows)
        self.iterator = iter(rows)

    def __iter__(self) -> Iterator[Any]:
        return self.iterator


class ReadOnceBehind(ReadOnce):
    """The same, but each iteration has an iterator of its own."""

    def __iter__(self) -> Iterator[Any]:
        yield from self.iterator


class NoLength:
    """Rows that can only be iterated."""

    def __iter__(self) -> Iterator[Any]:
        return iter(tiny_rows())


def _changing() -> Any:
    """Rows that are made anew each time they are read."""
    import torch

    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 55

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = tiny_rows()[index]
            return row | {"input_ids": torch.randint(3, 60, (len(row["input_ids"]),)).tolist()}

    return Augmented()


ROWS = (
    BadInput(
        "no_dataset", "no `train_dataset`", ATTACHING, ValueError, ("has no train_dataset", "Pass one"), _no_dataset
    ),
    BadInput(
        "stream_without_rows",
        "a stream that gives no row",
        ATTACHING,
        ValueError,
        ("(CountedStream) is a stream that gives no row", "iterated more than once"),
        _dataset(lambda: CountedStream([]), max_steps=3),
    ),
    BadInput(
        "stream_read_once",
        "a stream that can be read only once",
        ATTACHING,
        ValueError,
        ("(ReadOnce) is a stream that can be read only once", "let `__iter__` begin anew"),
        _dataset(lambda: ReadOnce(tiny_rows()), max_steps=3),
    ),
    BadInput(
        "stream_read_once_behind",
        "a stream of which what it reads from can be read only once",
        ATTACHING,
        ValueError,
        ("(ReadOnceBehind) gave 18 rows or more, and 0 when it was iterated once more", "let `__iter__` begin anew"),
        _dataset(lambda: ReadOnceBehind(tiny_rows(SAMPLE_ROWS)), max_steps=3),
    ),
    BadInput(
        "stream_of_validation_rows_without_end",
        "a stream of validation rows that does not end",
        ATTACHING,
        ValueError,
        ("eval_dataset (CountedStream) is a stream that has not ended after 10,000 rows", "stream.take(256)"),
        _with_validation(lambda: CountedStream(num_passes=10**9)),
    ),
    BadInput(
        "stream_of_no_validation_rows",
        "a stream of validation rows that gives none",
        ATTACHING,
        ValueError,
        ("eval_dataset (CountedStream) is a stream that gives no row", "stream.take(256)"),
        _with_validation(lambda: CountedStream([])),
    ),
    BadInput(
        "stream_replayed",
        "`selection_epochs` with a stream",
        ATTACHING,
        ValueError,
        ("selection_epochs=1 trains on earlier picks again", "leave selection_epochs out"),
        _dataset(lambda: tiny_dataset().to_iterable_dataset(), {"selection_epochs": 1}, max_steps=3),
    ),
    BadInput(
        "stream_too_short",
        "a stream shorter than a step, with `dataloader_drop_last`",
        TRAINING,
        ValueError,
        ("stream ended after 15 rows, too few for one step", "2 pools of 10", "Set dataloader_drop_last=False"),
        _trained_on(
            lambda: tiny_dataset(15).to_iterable_dataset(),
            max_steps=3,
            dataloader_drop_last=True,
            per_device_train_batch_size=8,
        ),
    ),
    BadInput(
        "stream_bound",
        "a stream in a loop of one's own",
        CALLING,
        ValueError,
        ("(IterableDataset) is streamed", "only a Trainer trains on a stream", "without `streaming=True`"),
        lambda scene: (
            lambda: SpiceSampler().bind(
                tiny_lora_model(),
                tiny_dataset().to_iterable_dataset(),
                data_collator=collate,
                per_device_train_batch_size=4,
            )
        ),
    ),
    BadInput(
        "no_length",
        "rows without a length that are no stream of torch's",
        ATTACHING,
        ValueError,
        ("(NoLength) is streamed", "no random access", "without `streaming=True`"),
        _dataset(NoLength, max_steps=3),
    ),
    BadInput(
        "no_rows",
        "a dataset without rows",
        ATTACHING,
        ValueError,
        ("training dataset has 0 rows", "Check the filters"),
        _dataset(lambda: tiny_dataset().select([])),
    ),
    BadInput(
        "splits",
        "a dict of splits in place of one of them",
        ATTACHING,
        ValueError,
        ("(DatasetDict) is a dict of splits", "['train', 'test']", "such as `dataset['train']`"),
        _dataset(_splits),
    ),
    BadInput(
        "file_name",
        "a file's name in place of its rows",
        ATTACHING,
        ValueError,
        ("is a str, 'rows.jsonl', and not its rows", "Load it first"),
        _dataset("rows.jsonl"),
    ),
    BadInput(
        "texts",
        "texts that nothing tokenises",
        ATTACHING,
        ValueError,
        ("No columns in the dataset match the model's forward", "ignored: [text]"),
        _dataset(_texts),
    ),
    BadInput(
        "texts_kept",
        "the same with `remove_unused_columns=False`",
        ATTACHING,
        ValueError,
        ("failed on row 0", "KeyError: 'input_ids'", "which holds text (str of 8)", "Fix: correct the row"),
        _dataset(_texts, remove_unused_columns=False),
    ),
    BadInput(
        "no_labels_column",
        "a collator that pads `labels`, rows without them",
        ATTACHING,
        ValueError,
        ("failed on row 0", "KeyError: 'labels'", "attention_mask (list of 16), input_ids (list of 16)"),
        _dataset(lambda: tiny_dataset().remove_columns("labels")),
    ),
    BadInput(
        "masked",
        "all labels −100",
        ATTACHING,
        ValueError,
        ("None of 18 rows looked at has a label token", "prompt masking and at `max_length`"),
        _dataset(_masked),
    ),
    BadInput(
        "ids_of_another_model",
        "token ids beyond the model's vocabulary, in rows looked at",
        ATTACHING,
        ValueError,
        ("Row 0 of the training dataset has 999 in its input_ids", "from 0 to 60", "tokenised for another model"),
        _dataset(lambda: _ids(999)(SEEN)),
    ),
    BadInput(
        "id_beyond",
        "the same in another row",
        TRAINING,
        ValueError,
        ("Row 7 of the training dataset has 999 in its input_ids", "resize_token_embeddings", "Fix: tokenise it"),
        _train(_ids(999)),
    ),
    BadInput(
        "negative_id",
        "padding with a negative token id",
        TRAINING,
        ValueError,
        ("Row 7", "has -1 in its input_ids", "padding with a negative number"),
        _train(_ids(-1)),
    ),
    BadInput(
        "label_beyond",
        "labels beyond the vocabulary",
        TRAINING,
        ValueError,
        ("Row 7", "has 999 in its labels"),
        _train(_labels(999)),
    ),
    BadInput(
        "other_ignored_label",
        "labels masked with −1 in place of −100",
        TRAINING,
        ValueError,
        ("Row 7", "has -1 in its labels", "another number than -100 marks labels"),
        _train(_labels(-1)),
    ),
    BadInput(
        "long_labels",
        "more labels than tokens",
        TRAINING,
        ValueError,
        ("labels of shape (1, 14) beside input_ids of shape (1, 13) for row 7", "Fix: tokenise the row again"),
        _train(_rows(labels=lambda row: [*row["labels"], 5])),
    ),
    BadInput(
        "null",
        "a column that is null in one row",
        TRAINING,
        ValueError,
        ("failed on row 7", "TypeError", "labels (NoneType)", "Fix: correct the row or leave it out"),
        _train(_rows(labels=lambda row: None)),
    ),
    BadInput(
        "long_row",
        "a row longer than the model's positions",
        TRAINING,
        IndexError,
        ("index out of range", "SPICE was scoring row(s)", "the longest of 260 tokens", "`max_length=64`"),
        _train(
            _rows(
                **{name: lambda row, name=name: row[name] * 20 for name in ("input_ids", "attention_mask", "labels")}
            ),
            model=lambda: tiny_lora_model("gpt2"),
        ),
    ),
    BadInput(
        "float_ids",
        "token ids that are no whole numbers",
        ATTACHING,
        ValueError,
        ("input_ids of type torch.float32", "for row 0", "make them torch.int64"),
        _dataset(lambda: Dataset.from_list([row | {"input_ids": [0.5] * len(row["labels"])} for row in tiny_rows()])),
    ),
    BadInput(
        "changing_rows",
        "rows that are made anew, at random, each time they are read",
        ATTACHING,
        None,
        ("(collate) gives row 0 differently each time", "Make it a function of the row alone"),
        _dataset(_changing),
    ),
    BadInput(
        "unreadable_row",
        "a dataset that raises on a row, one of those looked at",
        ATTACHING,
        FileNotFoundError,
        ("No such file or directory: '0.json'", "SPICE was reading row(s) 0 of the training dataset (UnreadableRow)"),
        _dataset(lambda: UnreadableRow(SEEN)),
    ),
    BadInput(
        "unreadable_row_later",
        "the same of another row",
        TRAINING,
        FileNotFoundError,
        ("No such file or directory: '7.json'", "SPICE was reading row(s) 7 of the training dataset", "or leave"),
        lambda scene: scene.train(train_dataset=UnreadableRow(UNSEEN)),
    ),
    BadInput(
        "removed_later",
        "`trainer.train_dataset` set to `None` after attaching",
        STARTING,
        ValueError,
        ("has no train_dataset",),
        _replaced(None),
    ),
    BadInput(
        "splits_later",
        "`trainer.train_dataset` replaced by a dict of splits",
        STARTING,
        ValueError,
        ("is a dict of splits",),
        _replaced(_splits),
    ),
    BadInput(
        "streamed_later",
        "`trainer.train_dataset` replaced by a streamed one",
        STARTING,
        ValueError,
        ("(IterableDataset) is a stream, whose end is not known", "needs max_steps"),
        _replaced(lambda: tiny_dataset().to_iterable_dataset()),
    ),
    BadInput(
        "masked_later",
        "`trainer.train_dataset` replaced by rows without labels",
        TRAINING,
        RuntimeError,
        ("could pick no sample in 3 of the last 3", "10 a zero gradient", "rows without label tokens"),
        _replaced(_masked),
    ),
)
