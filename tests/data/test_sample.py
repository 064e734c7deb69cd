from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Sequence

from spice_trainer.data.fingerprints import fingerprint_rows
from spice_trainer.data.sample import SAMPLE_ROWS, RowSample
from tests.support.trainers import collate, tiny_rows

pytestmark = pytest.mark.oldest

CPU = torch.device("cpu")


class Reads(torch.utils.data.Dataset[Any]):
    """Rows that are made when they are asked for, which counts."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.num_reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.num_reads += 1
        return self.rows[index]


class RandomReads(Reads):
    def __getitem__(self, index: int) -> Any:
        row = super().__getitem__(index)
        return row | {"input_ids": [random.randint(3, 60) for _ in row["input_ids"]]}


def fingerprint(rows: Any, earlier: RowSample | None = None) -> str | None:
    return fingerprint_rows(RowSample.read(rows, device=CPU), None if earlier is None else earlier.digests)


def test_reads_few_rows_and_no_random_state() -> None:
    rows = RandomReads(tiny_rows(3000))
    state = random.getstate()
    sample = RowSample.read(rows, device=CPU)
    assert sample.indices[0] == 0 and sample.indices[-1] == 2999
    assert rows.num_reads == len(sample.indices) == SAMPLE_ROWS
    sample.collate(collate)
    assert rows.num_reads == SAMPLE_ROWS and random.getstate() == state


def test_a_collator_that_takes_rows_apart_takes_copies_apart() -> None:
    def popping(rows: list[Any]) -> Any:
        batch = collate(rows)
        for row in rows:
            row.pop("labels")
            row["input_ids"].clear()
        return batch

    rows = tiny_rows(5)
    sample = RowSample.read(rows, device=CPU)
    first, again = sample.collate(popping), sample.collate(popping)
    assert [row.num_tokens for row in first] == [row.num_tokens for row in again] and rows == tiny_rows(5)


def test_rows_that_cannot_be_copied_are_handed_out() -> None:
    rows = [{"rows": (number for number in range(2))} for _ in range(2)]
    sample = RowSample.read(rows, device=CPU)
    assert sample.copies([1])[0]["rows"] is rows[1]["rows"] and sample.digests == (None, None)
    assert fingerprint_rows(sample) is None


class TestFingerprintOfRows:
    def test_takes_few_reads_of_rows_that_are_made_when_asked_for(self) -> None:
        rows = Reads(tiny_rows(3000))
        sample = RowSample.read(rows, device=CPU)
        found = fingerprint_rows(sample)
        assert found == fingerprint(tiny_rows(3000)) is not None
        assert rows.num_reads <= SAMPLE_ROWS + 4

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: random.Random(1).shuffle(rows),
            lambda rows: rows.reverse(),
            lambda rows: rows.sort(key=lambda row: len(row["input_ids"])),
            lambda rows: rows.pop(),
            lambda rows: rows.append(rows[0]),
            lambda rows: rows.insert(0, rows.pop()),
            lambda rows: [row.update(labels=row["input_ids"]) for row in rows],
        ],
        ids=["shuffled", "reversed", "sorted", "shorter", "longer", "moved", "other labels"],
    )
    @pytest.mark.parametrize("is_stored", [False, True])
    def test_sees_another_order_other_rows_and_another_length(self, change: Any, is_stored: bool) -> None:
        rows = tiny_rows(3000)
        change(rows)
        make = Dataset.from_list if is_stored else Reads
        assert fingerprint(make(rows)) != fingerprint(make(tiny_rows(3000)))

    def test_rows_that_change_from_reading_to_reading_have_none(self) -> None:
        rows = RandomReads(tiny_rows(300))
        earlier = RowSample.read(rows, device=CPU)
        # From the same random state they come out the same.
        assert fingerprint(rows, earlier) is None and fingerprint(rows) is None
        random.random()
        assert fingerprint(rows, earlier) is None

    def test_rows_that_were_replaced_have_another(self) -> None:
        rows = Reads(tiny_rows(300))
        earlier = RowSample.read(rows, device=CPU)
        rows.rows = tiny_rows(300, seed=1)
        assert fingerprint(rows, earlier) == fingerprint(tiny_rows(300, seed=1)) is not None

    def test_images_are_read_as_they_are_stored(self) -> None:
        pytest.importorskip("PIL")
        rows = [{"images": [{"bytes": bytes([number]), "path": f"/here/{number}.png"}]} for number in range(3)]
        features = Features({"images": Sequence(Image())})
        stored = Dataset.from_list(rows, features=features)
        # No image is behind these bytes: to decode one would fail.
        fingerprints = [fingerprint_rows(RowSample(stored, (), (), CPU))]
        elsewhere = [
            {"images": [image | {"path": f"/there{image['path'][5:]}"} for image in row["images"]]} for row in rows
        ]
        fingerprints += [
            fingerprint_rows(RowSample(Dataset.from_list(some, features=features), (), (), CPU))
            for some in (elsewhere, rows[::-1])
        ]
        assert fingerprints[0] is not None and fingerprints[0] == fingerprints[1] != fingerprints[2]

    def test_of_a_transformed_dataset_the_stored_columns_count(self) -> None:
        calls = []

        def transform(batch: Any) -> Any:
            calls.append(len(batch["input_ids"]))
            return batch

        stored = Dataset.from_list(tiny_rows(300))
        sample = RowSample.read(stored.with_transform(transform), device=CPU)
        assert fingerprint_rows(sample) == fingerprint(stored) and sum(calls) == SAMPLE_ROWS
