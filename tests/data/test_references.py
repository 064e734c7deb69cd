"""What the records say of a pick beside its row number."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from spice_trainer.data.references import RowReferences
from spice_trainer.data.rows import TargetRows, collate_row, fetch_rows
from spice_trainer.data.tokenized_rows import TokenizedRows
from tests.support.trainers import collate, tiny_rows, tiny_tokenizer

pytestmark = pytest.mark.oldest

INDICES = (4, 1, 7)


def refer(rows: TargetRows, **settings: Any) -> list[Any]:
    read = fetch_rows(rows.dataset, INDICES)
    collated = [collate_row(index, row, rows.collate) for index, row in zip(INDICES, read, strict=True)]
    references = RowReferences(rows, **settings)
    references.check(read[0])
    return references.refer(INDICES, read, collated)


def rows_with(**columns: Any) -> list[dict[str, Any]]:
    return [row | {name: make(place) for name, make in columns.items()} for place, row in enumerate(tiny_rows(10))]


class MapStyle(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@pytest.mark.parametrize("make", [Dataset.from_list, list, MapStyle])
def test_ids_are_the_first_known_columns_or_the_one_named(make: Any) -> None:
    rows = make(
        rows_with(idx=lambda place: place + 100, uuid=lambda place: f"u{place}", name=lambda place: f"n{place}")
    )
    assert [found.id for found in refer(TargetRows(rows, collate))] == ["u4", "u1", "u7"]
    assert [found.id for found in refer(TargetRows(rows, collate), id_column="idx")] == ["104", "101", "107"]
    assert [found.id for found in refer(TargetRows(rows, collate), id_column="name")] == ["n4", "n1", "n7"]
    assert {found.id for found in refer(TargetRows(make(tiny_rows(10)), collate))} == {None}


@pytest.mark.parametrize("make", [Dataset.from_list, MapStyle])
def test_a_column_that_is_not_there_is_named(make: Any) -> None:
    with pytest.raises(ValueError, match="record_id_column='key' is no column of the training dataset, which has "):
        refer(TargetRows(make(tiny_rows(10)), collate), id_column="key")


def test_ids_of_columns_that_the_trainer_removed() -> None:
    raw = Dataset.from_list(rows_with(id=lambda place: place)).with_transform(lambda batch: 1 / 0)
    rows = TargetRows(Dataset.from_list(tiny_rows(10)), collate, raw_dataset=raw)
    assert [found.id for found in refer(rows)] == ["4", "1", "7"]
    # Row i of a packed dataset is not row i of the given one.
    rows = TargetRows(Dataset.from_list(tiny_rows(9)), collate, raw_dataset=raw)
    assert [found.id for found in refer(rows)] == [None, None, None]


def test_ids_of_raw_rows_that_a_proxy_tokenises() -> None:
    raw = [{"id": f"r{place}", "text": f"w{place + 3} w{place + 4}"} for place in range(10)]
    rows = TokenizedRows(raw, tiny_tokenizer())
    assert [found.id for found in refer(TargetRows(rows, rows.collate))] == ["r4", "r1", "r7"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (np.int64(3), "3"),
        (torch.tensor(3), "3"),
        (b"a", "a"),
        (uuid.UUID(int=1), str(uuid.UUID(int=1))),
        (None, None),
        ([1], None),
        ({"a": 1}, None),
        ("x" * 1000, "x" * 200),
        ("", ""),
    ],
)
def test_ids_are_text(value: Any, text: str | None) -> None:
    assert refer(TargetRows(MapStyle(rows_with(id=lambda place: value)), collate))[0].id == text


def test_a_hash_is_of_the_token_ids_alone_and_never_changes() -> None:
    rows = tiny_rows(10)
    found = refer(TargetRows(rows, collate))
    for index, reference in zip(INDICES, found, strict=True):
        ids = np.asarray(rows[index]["input_ids"], "<i8")
        assert reference.token_hash == hashlib.sha256(ids.tobytes()).hexdigest()[:16]

    def padded(some: Any) -> Any:
        batch = collate(some)
        return {
            key: torch.nn.functional.pad(value, (0, 3), value=-100 if key == "labels" else 0)
            for key, value in batch.items()
        }

    assert [reference.token_hash for reference in refer(TargetRows(rows, padded))] == [one.token_hash for one in found]
    # Written down once: another value would make earlier records useless.
    known = RowReferences(TargetRows([{}], collate)).refer(
        [0], [{}], [collate_row(0, {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}, collate)]
    )
    assert known[0].token_hash == "493630ab4b4b7f42"


def test_text_is_what_a_row_trains_and_only_if_asked_for() -> None:
    rows = tiny_rows(10)
    target = TargetRows(rows, collate, processing_class=tiny_tokenizer())
    assert {found.text for found in refer(target)} == {None}
    for index, found in zip(INDICES, refer(target, text_length=6), strict=True):
        whole = " ".join(f"w{label}" for label in rows[index]["labels"] if label != -100)
        assert found.text == whole[:6]
    with pytest.raises(ValueError, match="record_text_length=6 asks for text .* no tokenizer"):
        refer(TargetRows(rows, collate), text_length=6)
