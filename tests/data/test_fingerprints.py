from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset, load_dataset, load_from_disk

from spice_trainer.data.fingerprints import fingerprint_dataset

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"question {number} é\n"}], "number": number, "share": number / 7}
    for number in range(12)
]


class TestDatasetFingerprint:
    def test_says_the_same_of_the_same_rows(self, tmp_path: Path) -> None:
        dataset = Dataset.from_list(ROWS)
        expected = fingerprint_dataset(dataset)
        dataset.save_to_disk(str(tmp_path / "saved"))
        json_file = str(tmp_path / "rows.jsonl")
        Path(json_file).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        same = {
            "list": ROWS,
            "tuple": tuple(ROWS),
            "other order of keys": [dict(reversed(row.items())) for row in ROWS],
            "copy": Dataset.from_list(ROWS),
            "twice reversed": dataset.select(range(11, -1, -1)).select(range(11, -1, -1)),
            "mapped": dataset.map(lambda row: row),
            "saved and loaded": load_from_disk(str(tmp_path / "saved")),
            "json": load_dataset("json", data_files=json_file, split="train", cache_dir=str(tmp_path / "cache")),
            "torch format": dataset.with_format("torch"),
            "transform": dataset.with_transform(lambda batch: {"input_ids": [[1]] * len(batch["number"])}),
        }
        assert {name: fingerprint_dataset(value) for name, value in same.items()} == dict.fromkeys(same, expected)

    def test_of_a_known_dataset_never_changes(self) -> None:
        # Written down once: another value would make every manifest so far unusable.
        expected = "27b4309931bd1ce09ef80c7297f449c5ff9eff9376661e9a937713e274d88d36"
        assert fingerprint_dataset([{"text": "naïve\n", "count": 1, "share": 0.1, "tags": ["a", None]}]) == expected

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: rows[4].update(number=99),
            lambda rows: rows[4].update(share=rows[4]["share"] + 1e-12),
            lambda rows: rows[4]["messages"][0].update(content="question 4 e\n"),
            lambda rows: rows[4]["messages"].append({"role": "user", "content": ""}),
            lambda rows: rows[4].update(number="4"),
            lambda rows: rows.reverse(),
            lambda rows: rows.append(rows[0]),
            lambda rows: [row.update(extra=None) for row in rows],
            lambda rows: [row.update(numbers=row.pop("number")) for row in rows],
        ],
    )
    def test_sees_every_change_of_a_small_dataset(self, change: Any) -> None:
        rows = json.loads(json.dumps(ROWS))
        assert fingerprint_dataset(rows) == fingerprint_dataset(ROWS)
        change(rows)
        assert fingerprint_dataset(rows) != fingerprint_dataset(ROWS)

    def test_tensors_and_arrays_are_lists(self) -> None:
        lists = [{"input_ids": [1, 2, 3], "weight": 0.5}]
        arrays = [{"input_ids": numpy.array([1, 2, 3], dtype=numpy.int32), "weight": numpy.float32(0.5)}]
        tensors = [{"input_ids": torch.tensor([1, 2, 3]), "weight": torch.tensor(0.5)}]
        assert fingerprint_dataset(lists) == fingerprint_dataset(arrays) == fingerprint_dataset(tensors)
        assert fingerprint_dataset(lists) == fingerprint_dataset(Dataset.from_list(lists).with_format("numpy"))

    def test_fields_that_arrow_fills_in_do_not_count(self) -> None:
        ragged = [{"call": {"name": "f"}}, {"call": {"name": "g", "city": "Oslo"}}]
        assert fingerprint_dataset(ragged) == fingerprint_dataset(Dataset.from_list(ragged))

    def test_of_a_large_dataset_reads_evenly_spread_rows(self) -> None:
        rows = [{"number": number} for number in range(5_001)]
        read: list[int] = []

        class Recorder:
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, index: int) -> dict[str, int]:
                read.append(index)
                return rows[index]

        fingerprint = fingerprint_dataset(Recorder())
        assert fingerprint == fingerprint_dataset(Dataset.from_list(rows))
        assert (len(set(read)), read[0], read[-1]) == (2_000, 0, 5_000)
        assert {later - earlier for earlier, later in itertools.pairwise(read)} == {2, 3}
        assert fingerprint_dataset(rows, max_rows=10_000) != fingerprint
        assert fingerprint_dataset(rows, max_rows=1) == fingerprint_dataset([*rows[:-1], {"number": -1}], max_rows=1)

    def test_other_values(self) -> None:
        row = {"time": datetime.datetime(2024, 1, 2), "bytes": b"\x00\xff", "nothing": None, "nan": float("nan")}
        assert fingerprint_dataset([row]) == fingerprint_dataset(Dataset.from_list([row]))
        assert fingerprint_dataset([]) == fingerprint_dataset(Dataset.from_list([]))
        fingerprint_dataset([{"text": "half a pair: \ud83d"}])
        with pytest.raises(TypeError, match="cannot write a object as JSON, which row 0 of the dataset holds.*Fix: "):
            fingerprint_dataset([{"image": object()}])
        with pytest.raises(TypeError, match="Row 0 of the dataset is a int.*Fix: "):
            fingerprint_dataset([1])
        with pytest.raises(ValueError, match="max_rows=0 is below 1"):
            fingerprint_dataset(ROWS, max_rows=0)
