"""How a dataset is read: how often before the first step, what names a row that breaks, what changes in rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.data.references import hash_tokens
from tests.support.models import tiny_lora_model
from tests.support.trainers import (
    BATCH_SIZE,
    POOL_SIZE,
    SETTINGS,
    collate,
    make_sft_trainer,
    make_trainer,
    read_records,
    tiny_dataset,
    tiny_rows,
    trained_indices,
)

pytestmark = pytest.mark.oldest

MOST_READS = 64
NUM_ROWS = 3000


class MapStyle(torch.utils.data.Dataset[Any]):
    """Counts the rows it is asked for, alone or together."""

    def __init__(self) -> None:
        self.rows = tiny_rows(60)
        self.num_reads = 0

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.num_reads += 1
        return dict(self.rows[index % len(self.rows)])


class InBatches(MapStyle):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


class Transformed:
    """A `datasets.Dataset` whose transform counts the rows it makes."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.dataset = Dataset.from_list(tiny_rows(NUM_ROWS)).with_transform(self.transform)

    def transform(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        self.num_reads += len(batch["input_ids"])
        return batch


class ReadsBeforeTheFirstStep(TrainerCallback):
    def __init__(self, source: Any) -> None:
        self.source = source
        self.num_reads: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.num_reads is None:
            self.num_reads = self.source.num_reads


@pytest.mark.parametrize("make", [MapStyle, InBatches, Transformed])
@pytest.mark.parametrize("with_proxy", [False, True], ids=["alone", "proxy"])
def test_few_rows_are_read_before_the_first_step(with_proxy: bool, make: Any, tmp_path: Path) -> None:
    """The step's own: its candidates when they are scored, and its picks when they are trained on."""

    def run(**resume: Any) -> int:
        source = make()
        watch = ReadsBeforeTheFirstStep(source)
        trainer = make_trainer(
            tmp_path, train_dataset=getattr(source, "dataset", source), callbacks=[watch], max_steps=2, **saving
        )
        proxy = ProxyModel(tiny_lora_model(seed=1)) if with_proxy else None
        attach_spice(trainer, SpiceConfig(**SETTINGS), proxy=proxy)
        trainer.train(**resume)
        assert watch.num_reads is not None
        return watch.num_reads - POOL_SIZE - BATCH_SIZE

    saving = {"save_strategy": "steps", "save_steps": 1}
    assert run() <= MOST_READS
    assert run(resume_from_checkpoint=str(tmp_path / "checkpoint-1")) <= MOST_READS


class Shrinking(TrainerCallback):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.pop(0)


def test_a_dataset_that_shrinks_in_mid_run_is_refused(tmp_path: Path) -> None:
    """Every later row number means another row, also where it is still there."""
    rows = tiny_rows()
    trainer = make_trainer(tmp_path, spice={}, train_dataset=rows, callbacks=[Shrinking(rows)])
    with pytest.raises(ValueError, match=r"\(list\) has 54 rows now, and had 55 when the run began"):
        trainer.train()
    assert trainer.state.global_step == 1


LABEL = "the trainer left out 3 of 40 rows, of which max_length=8 leaves no label token"


class Broken(MapStyle):
    """Some rows cannot be read any more."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise OSError("the user's own error")
        return super().__getitem__(index)


class Breaks(TrainerCallback):
    """Breaks a picked row, or the collator, once everything is picked."""

    def __init__(self, output_dir: Path, rows: set[int]) -> None:
        self.output_dir = output_dir
        self.rows = rows

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.add(trained_indices(self.output_dir)[0][1])


@pytest.mark.parametrize("what", ["dataset", "collator"])
def test_a_row_that_breaks_where_it_trains_is_named(what: str, tmp_path: Path) -> None:
    """Of a replayed epoch nothing is scored: only the trainer's own loader reads the row."""
    rows, broken = Broken(), set[int]()
    breaks = Breaks(tmp_path, rows.broken if what == "dataset" else broken)
    broken_ids = broken if what == "collator" else ()

    def collate_unbroken(given: list[Any]) -> Any:
        if any(rows.rows[index]["input_ids"] == row["input_ids"] for index in broken_ids for row in given):
            raise OSError("the user's own error")
        return collate(given)

    settings = {"selection_epochs": 1}
    trainer = make_trainer(
        tmp_path, spice=settings, train_dataset=rows, data_collator=collate_unbroken, callbacks=[breaks],
        num_train_epochs=2,
    )  # fmt: skip
    with pytest.raises(OSError, match="the user's own error") as caught:
        trainer.train()
    (note,) = caught.value.__notes__
    (row,) = breaks.rows
    if what == "dataset":
        assert note.startswith(f"SPICE was reading row(s) {row} of the training dataset (Broken)")
    else:
        assert note.startswith("SPICE was collating row(s) ") and str(row) in re.findall(r"\d+", note)


def _lengthening(rows: list[Any]) -> Any:
    """A collator that leaves its rows a token longer."""
    for row in rows:
        for values in row.values():
            values.append(values[-1])
    return collate(rows)


@pytest.mark.parametrize("strategy", ["spice", "less"])
def test_rows_that_a_collator_alters_train_as_with_a_dataset_that_hands_out_new_ones(
    strategy: str, tmp_path: Path
) -> None:
    """Scored or looked at, a row of the list is left as it is; trained, the collator has it as in the stock loader."""
    found = []
    for name, dataset in (("held", tiny_rows()), ("new", tiny_dataset())):
        trainer = make_trainer(
            tmp_path / name, spice={"strategy": strategy}, train_dataset=dataset, data_collator=_lengthening,
            eval_dataset=tiny_rows(6, seed=1) if name == "held" else tiny_dataset(6, seed=1),
        )  # fmt: skip
        trainer.train()
        found.append((trained_indices(tmp_path / name), [entry.get("loss") for entry in trainer.state.log_history]))
        if name == "held":
            trained = {index for step in trained_indices(tmp_path / name) for index in step}
            longer = [len(row["labels"]) - len(old["labels"]) for row, old in zip(dataset, tiny_rows(), strict=True)]
            assert longer == [int(index in trained) for index in range(len(longer))]
    assert found[0] == found[1]


def _prompts(num_rows: int = 40) -> list[dict[str, Any]]:
    """Three rows have a prompt as long as all that is kept."""
    return [
        {"id": f"row-{place}", "prompt": "w5 " * (9 if place in (3, 10, 20) else 2), "completion": f"w{place + 6}"}
        for place in range(num_rows)
    ]


def test_picks_of_a_dataset_that_trl_filtered_are_found_in_the_users_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = _prompts()
    # A selection of a larger dataset is a dataset like any other.
    dataset = Dataset.from_list(_prompts(50)).select(range(40))
    settings = {"record_text_length": 20}
    trainer = make_sft_trainer(tmp_path, spice=settings, train_dataset=dataset, max_length=8, max_steps=2)
    said = [message for message in caplog.messages if "record_text_length" in message]
    num_left_out = 40 - len(trainer.train_dataset)
    assert len(said) == (num_left_out > 0) and all(LABEL in message for message in said)
    trainer.train()
    picks = read_records(tmp_path, "selections")
    for pick in picks:
        (row,) = (row for row in given if row["id"] == pick["id"])
        assert pick["text"] == row["completion"]
        assert pick["token_hash"] == hash_tokens(trainer.train_dataset[pick["index"]]["input_ids"])
    if num_left_out:
        assert any(given[pick["index"]]["id"] != pick["id"] for pick in picks)


def test_nothing_is_said_where_rows_are_as_given(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list(_prompts(50)).select([0, 1, 2, *range(25, 50)])
    make_sft_trainer(tmp_path / "sft", spice={}, train_dataset=rows, max_length=8)
    make_trainer(tmp_path / "plain", spice={}, train_dataset=Dataset.from_list(tiny_rows(60)).select(range(55)))
    assert not any("record_text_length" in message for message in caplog.messages)
    if not hasattr(SFTConfig, "shuffle_dataset"):
        return  # TRL 0.24
    make_sft_trainer(tmp_path / "shuffled", spice={}, train_dataset=rows, max_length=8, shuffle_dataset=True)
    assert [message for message in caplog.messages if "the trainer shuffled the rows, so that `index`" in message]
