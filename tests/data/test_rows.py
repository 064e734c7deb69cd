"""Candidate rows: collated alone, stripped, grouped within a token budget, and padded again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from transformers import DataCollatorForSeq2Seq
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from spice_trainer.data.rows import collate_row, fetch_rows, pad_rows
from tests.support.trainers import collate, tiny_rows, tiny_tokenizer

ROW = {"input_ids": [5, 6, 7, 8, 9], "attention_mask": [1] * 5, "labels": [-100, -100, 7, 8, 9]}


def _tensors(row: CandidateRow) -> dict[str, list[Any]]:
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.inputs.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 16])
def test_padding_of_the_users_collator_is_stripped(side: str, multiple: int | None) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    row = collate_row(3, ROW, DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple))
    assert row.index == 3 and row.num_tokens == 5 and row.num_label_tokens == 3 and row.can_be_padded
    assert _tensors(row) == {"input_ids": [ROW["input_ids"]], "attention_mask": [[1] * 5]}
    assert row.labels.tolist() == [ROW["labels"]]


def test_positions_of_a_left_padded_row_are_dropped_when_the_model_makes_the_same() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, -100, 6, 7]]),
    }
    counted = collate_row(0, None, lambda rows: {**batch, "position_ids": torch.tensor([[0, 0, 0, 1, 2]])})
    assert counted.can_be_padded and "position_ids" not in counted.inputs
    absolute = collate_row(0, None, lambda rows: {**batch, "position_ids": torch.tensor([[0, 1, 2, 3, 4]])})
    assert absolute.inputs["position_ids"].tolist() == [[2, 3, 4]]


def test_a_hole_in_the_attention_mask_stays() -> None:
    mask = torch.tensor([[0, 1, 0, 1, 1, 0]])
    ids = torch.arange(6)[None]
    row = collate_row(0, None, lambda rows: {"input_ids": ids, "attention_mask": mask, "labels": ids})
    assert row.inputs["attention_mask"].tolist() == [[1, 0, 1, 1]] and row.labels.tolist() == [[1, 2, 3, 4]]


def test_patches_with_as_many_numbers_as_the_row_has_tokens_stay_whole() -> None:
    batch = collate([ROW | {"attention_mask": [1, 1, 1, 0, 0]}])
    patches, mask = torch.rand(8, 5), torch.arange(5).view(1, 5, 1, 1)
    row = collate_row(0, None, lambda rows: {**batch, "pixel_values": patches, "cross_attention_mask": mask})
    assert torch.equal(row.inputs["pixel_values"], patches) and row.num_tokens == 3
    assert torch.equal(row.inputs["cross_attention_mask"], mask[:, :3])


def test_the_first_token_has_no_prediction() -> None:
    whole = collate_row(0, {**ROW, "labels": ROW["input_ids"]}, collate)
    assert whole.num_label_tokens == 4
    only_first = collate_row(0, {**ROW, "labels": [5, -100, -100, -100, -100]}, collate)
    assert only_first.num_label_tokens == 0


def test_a_padding_free_collators_rows_share_batches() -> None:
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    rows = [collate_row(index, row, collator) for index, row in enumerate(tiny_rows(3))]
    assert all(row.can_be_padded and set(row.inputs) == {"input_ids"} for row in rows)
    inputs, labels = pad_rows(rows)
    expected = collate(tiny_rows(3))
    assert set(inputs) == {"input_ids", "attention_mask"}
    for key, value in inputs.items():
        assert torch.equal(value, expected[key])
    assert torch.equal(labels, expected["labels"])


def test_a_packed_row_is_scored_alone_as_the_collator_made_it() -> None:
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    packed = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}
    row, batch = collate_row(0, packed, collator), collator([packed])
    assert not row.can_be_padded and row.num_tokens == 5
    # Nothing is predicted across the border of two documents.
    assert row.labels.tolist() == [[-100, 6, 7, -100, 9]] and row.num_label_tokens == 3
    inputs, labels = pad_rows([row])
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]] and "attention_mask" not in inputs
    assert set(inputs) == set(batch) - {"labels"} and labels.tolist() == row.labels.tolist()


@pytest.mark.parametrize(
    ("name", "value", "shares"),
    [
        ("token_type_ids", torch.tensor([[0, 0, 1, 1, 1]]), True),
        ("pixel_values", torch.zeros(1, 3, 4, 4), False),
        ("pixel_values", torch.zeros(8, 5), False),
        ("image_sizes", torch.zeros(1, 2), False),
        ("attention_mask", torch.ones(1, 1, 5, 5), False),
        ("names", ["a"], False),
    ],
)
def test_rows_with_other_inputs(name: str, value: Any, shares: bool) -> None:
    row = collate_row(0, ROW, lambda rows: {**collate(rows), name: value})
    assert row.can_be_padded == shares
    inputs, labels = pad_rows([row])
    assert torch.equal(labels, row.labels)
    kept = inputs[name]
    assert torch.equal(kept, value) if isinstance(value, Tensor) else kept == value


@pytest.mark.parametrize("missing", ["input_ids", "labels"])
def test_a_collator_that_gives_too_little_is_named(missing: str) -> None:
    def no_labels(rows: list[Any]) -> dict[str, Tensor]:
        return {key: value for key, value in collate(rows).items() if key != missing}

    with pytest.raises(ValueError, match=rf"\(no_labels\) gave no tensor '{missing}' for row 7.*DataCollatorFor"):
        collate_row(7, ROW, no_labels)


def test_pad_rows_pads_on_the_right_and_masks() -> None:
    rows = [collate_row(index, row, collate) for index, row in enumerate(tiny_rows(6))]
    inputs, labels = pad_rows(rows)
    expected = collate(tiny_rows(6))
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert torch.equal(inputs["input_ids"], expected["input_ids"]) and torch.equal(labels, expected["labels"])
    # A row whose collator gave no mask attends to all of itself.
    del rows[0].inputs["attention_mask"]
    again, _ = pad_rows(rows)
    assert torch.equal(again["attention_mask"], expected["attention_mask"])


class Calls:
    """A dataset that notes how it was asked."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> dict[str, int]:
        self.calls.append(index)
        return {"row": index}


class BatchCalls(Calls):
    def __getitems__(self, indices: list[int]) -> list[dict[str, int]]:
        self.calls.append(list(indices))
        return [{"row": index} for index in indices]


class NoBatches(Calls):
    __getitems__ = None


@pytest.mark.parametrize("make", [Calls, BatchCalls, NoBatches, lambda: torch.utils.data.Subset(Calls(), range(9))])
def test_rows_are_asked_for_as_torchs_loader_asks(make: Any) -> None:
    def note(rows: Any) -> Any:
        return rows

    ours, theirs = make(), make()
    fetcher = _MapDatasetFetcher(theirs, auto_collation=True, collate_fn=note, drop_last=False)
    assert fetch_rows(ours, (5, 2, 7)) == fetcher.fetch([5, 2, 7]) == [{"row": 5}, {"row": 2}, {"row": 7}]
    calls = [getattr(some, "calls", None) or some.dataset.calls for some in (ours, theirs)]
    assert calls[0] == calls[1]


class Broken(Calls):
    def __getitem__(self, index: int) -> dict[str, int]:
        if index in (7, 8):
            raise FileNotFoundError(2, "no such file", f"{index}.json")
        return super().__getitem__(index)


class BrokenBatches(Broken):
    def __getitems__(self, indices: list[int]) -> list[dict[str, int]]:
        return [self[index] for index in indices]


@pytest.mark.parametrize(("make", "named"), [(Broken, "7"), (BrokenBatches, "7, 8")])
def test_a_row_that_cannot_be_read_is_named_and_the_error_stays(make: Any, named: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        fetch_rows(make(), [3, 7, 8, 9])
    assert caught.value.filename == "7.json"
    (note,) = caught.value.__notes__
    assert f"SPICE was reading row(s) {named} of the training dataset ({make.__name__})" in note


def test_a_dataset_that_shrank_is_named() -> None:
    with pytest.raises(IndexError) as caught:
        fetch_rows([{"row": 0}], [0, 3])
    assert "row 3 of the training dataset (list), which has 1 rows now" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_described_stays() -> None:
    class Hopeless(Broken):
        def __len__(self) -> int:
            raise RuntimeError("no length either")

    with pytest.raises(FileNotFoundError):
        fetch_rows(Hopeless(), [7])
