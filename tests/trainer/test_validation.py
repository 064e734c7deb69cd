"""Validation rows in TRL's trainer: prepared as training rows are, whatever they look like, and never packed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from spice_trainer import SpiceConfig, attach_spice
from tests.support.models import tiny_lora_model
from tests.support.trainers import tiny_tokenizer, training_options

pytest.importorskip("trl")

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<s> ' + message['content'] + ' ' }}"
    "{% else %}{% generation %}{{ message['content'] + ' </s> ' }}{% endgeneration %}{% endif %}{% endfor %}"
)


def words(number: int, start: int) -> str:
    return " ".join(f"w{token}" for token in random.Random(start).choices(range(3, 60), k=number))


def texts(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": words(6 + index % 5, start + index)} for index in range(number)]


def pairs(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": words(4, start + index) + " ", "completion": words(3 + index % 5, start + index + 1)}
        for index in range(number)
    ]


def messages(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": words(4, start + index)},
                {"role": "assistant", "content": words(3 + index % 5, start + index + 1)},
            ]
        }
        for index in range(number)
    ]


def questions(number: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"question": words(4, start + index), "answer": words(3, start + index + 1)} for index in range(number)]


def tokens(number: int, start: int = 0) -> list[dict[str, Any]]:
    ids = [random.Random(start + index).choices(range(3, 60), k=6 + index % 5) for index in range(number)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]


def as_text(row: dict[str, Any]) -> str:
    return f"{row['question']} {row['answer']}"


def sft_trainer(output_dir: Path, rows: list[dict[str, Any]], *, formatting_func: Any = None, **arguments: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return SFTTrainer(
        model=tiny_lora_model(),
        args=SFTConfig(**training_options(output_dir, bf16=False, max_steps=1, **arguments)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        formatting_func=formatting_func,
    )


def read_rows(dataset: Any, collate: Any) -> list[tuple[list[int], list[int]]]:
    batches = [collate([dict(row)]) for row in dataset]
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "texts": (texts, {}),
    "pairs": (pairs, {}),
    "messages": (messages, {}),
    "assistant alone": (messages, {"assistant_only_loss": True}),
    "formatted": (questions, {"formatting_func": as_text}),
    "cut": (texts, {"max_length": 5}),
    "padding-free": (pairs, {"padding_free": True, "max_length": None}),
    "tokenised": (tokens, {}),
    "left as they are": (tokens, {"dataset_kwargs": {"skip_prepare_dataset": True}}),
}


@pytest.mark.filterwarnings("ignore:Padding-free")
@pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)
def test_validation_rows_are_prepared_as_training_rows(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path / "run", make(24), **options)
    config = SpiceConfig(strategy="targeted_matching", pool_size=12, num_selected=4)
    attach_spice(trainer, config, validation_dataset=make(9, 100), verify=False)
    (read,) = trainer._spice._validation.values()
    expected = sft_trainer(tmp_path / "other", make(9, 100), **options)
    assert read_rows(read.dataset, read.collate) == read_rows(
        expected.get_train_dataloader().dataset, expected.data_collator
    )
    assert len(read.dataset) == 9
    if make is not tokens and "padding_free" not in options:
        trainer.train()


def test_validation_rows_are_never_packed(tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path, texts(60), packing=True, max_length=32)
    assert len(trainer.train_dataset) < 30
    config = SpiceConfig(strategy="targeted_matching", pool_size=6, num_selected=4)
    attach_spice(trainer, config, validation_dataset=texts(9, 100), verify=False)
    (read,) = trainer._spice._validation.values()
    assert [len(ids) for ids, _ in read_rows(read.dataset, read.collate)] == [7 + index % 5 for index in range(9)]


def test_copies_are_found_among_what_was_prepared(tmp_path: Path, caplog: Any) -> None:
    trainer = sft_trainer(tmp_path, pairs(24))
    validation = [*pairs(9, 100), pairs(24)[3]]
    config = SpiceConfig(strategy="targeted_matching", pool_size=12, num_selected=4)
    attach_spice(trainer, config, validation_dataset=validation, verify=False)
    (read,) = trainer._spice._validation.values()
    assert len(read.dataset) == len(read.raw_dataset) == 9
    assert "1 rows of the validation set 'validation' are copies of training rows (9)" in caplog.text


def test_rows_that_lose_their_labels_are_left_out_and_said(tmp_path: Path, caplog: Any) -> None:
    trainer = sft_trainer(tmp_path, pairs(24), max_length=6)
    validation = [*pairs(9, 100), {"prompt": words(8, 1), "completion": words(3, 2)}]
    config = SpiceConfig(strategy="targeted_matching", pool_size=12, num_selected=4)
    attach_spice(trainer, config, validation_dataset=validation, verify=False)
    (read,) = trainer._spice._validation.values()
    assert len(read.dataset) == 9
    assert "left out 1 of the 10 first rows of the validation set 'validation'" in caplog.text
    other = sft_trainer(tmp_path / "other", pairs(24), max_length=6)
    with pytest.raises(ValueError, match="preparation left no row with a label token of the validation set"):
        attach_spice(other, config, validation_dataset=[{"prompt": words(8, 1), "completion": "w3"}], verify=False)


def test_rows_with_other_columns_than_the_training_rows(tmp_path: Path) -> None:
    trainer = sft_trainer(tmp_path, texts(24))
    config = SpiceConfig(strategy="targeted_matching", pool_size=12, num_selected=4)
    with pytest.raises(ValueError, match=r"asks for the column 'text', and the rows have 'question', 'answer'\. Fix"):
        attach_spice(trainer, config, validation_dataset=questions(9), verify=False)
