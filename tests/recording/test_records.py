"""The record files: their fields, when they are written, and that they open as datasets."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import TrainerCallback

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.recording.records import LEDGER_FILE, RECORD_FILES, RecordWriter
from tests.support.models import tiny_lora_model
from tests.support.trainers import (
    SETTINGS,
    make_trainer,
    read_records,
    same_weights,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

NAMES = ("selections", "pools", "trained", "costs")
FIELDS = {
    "selections": [
        "step", "epoch", "pool", "order", "index", "gain", "conflict", "score", "gradient_norm", "label_tokens",
        "id", "token_hash", "text",
    ],
    "pools": [
        "step", "epoch", "pool", "candidates", "num_selected", "gain_first", "gain_last", "information",
        "information_top_norm", "overlap_top_norm", "changed_by_conflict", "tokens_pool", "tokens_selected", "alpha",
        "nonfinite", "zero", "out_of_memory", "filtered", "stopped_early",
    ],
    "trained": ["step", "epoch", "indices"],
    "costs": [
        "step", "epoch", "seconds_scoring", "seconds_selecting", "seconds_learning", "seconds_checking",
        "seconds_ahead", "seconds_training", "tokens_scored", "tokens_trained",
    ],
    "transfer": [
        "step", "epoch", "pool", "num_selected", "num_selected_proxy", "num_shared", "rank_correlation", "retained",
        "retained_by_length", "overlap",
    ],
}  # fmt: skip
OTHERS = (LEDGER_FILE, "run.json", ".lock")
FIRST = "costs.000000000000.jsonl"
INTEGERS = {"step", "epoch", "pool", "order", "index", "label_tokens", "num_selected", "changed_by_conflict"}


@pytest.mark.parametrize("settings", [{}, {"stop_ratio": 0.85, "pools_per_step": 2}], ids=["fixed", "adaptive"])
def test_fields_are_those_of_the_documentation_and_open_as_datasets(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = tiny_rows()
    rows[3] = rows[3] | {"labels": [-100] * len(rows[3]["labels"])}
    trainer = make_trainer(
        tmp_path, spice=settings, train_dataset=Dataset.from_list(rows), per_device_train_batch_size=8
    )
    trainer.train()
    assert sorted(path.stem for path in (tmp_path / "spice").iterdir()) == sorted([*NAMES, "ledger", "run", ".lock"])
    check_fields(tmp_path, NAMES)
    pools, selections = read_records(tmp_path, "pools"), read_records(tmp_path, "selections")
    assert [row for line in pools for row in line["zero"]] == [3]
    assert {line["stopped_early"] for line in pools} == ({True, False} if settings else {False})
    for step, indices in enumerate(trained_indices(tmp_path)):
        assert indices == [line["index"] for line in selections if line["step"] == step]
    costs = read_records(tmp_path, "costs")
    assert sum(line["tokens_scored"] for line in costs) == sum(len(row["input_ids"]) for row in rows)
    for line, indices in zip(costs, trained_indices(tmp_path), strict=True):
        assert line["tokens_trained"] == sum(len(rows[index]["input_ids"]) for index in indices)
        assert all(line[f"seconds_{name}"] > 0 for name in ("scoring", "selecting", "training"))
        assert all(line[f"seconds_{name}"] == 0 for name in ("learning", "checking", "ahead"))
    ledger = json.loads((tmp_path / "spice" / LEDGER_FILE).read_text())
    assert ledger["num_rows_scored"] == 55 and ledger["num_rows"] == 55
    assert ledger["tokens_scored"] == sum(line["tokens_scored"] for line in costs)
    assert ledger["tokens_trained"] == sum(line["tokens_trained"] for line in costs)
    for name in ("scoring", "selecting", "training"):
        assert ledger[f"seconds_{name}"] == pytest.approx(sum(line[f"seconds_{name}"] for line in costs))
    per_token = ledger["seconds_training"] / ledger["tokens_trained"]
    assert ledger["estimated_seconds_on_all_data"] == pytest.approx(per_token * ledger["tokens_scored"])


def test_a_proxys_comparison_is_recorded_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2)
    attach_spice(trainer, SpiceConfig(**SETTINGS, proxy_check_pools=2), proxy=ProxyModel(tiny_lora_model(seed=3)))
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "spice").iterdir()) == sorted([*RECORD_FILES, *OTHERS])
    check_fields(tmp_path, [*NAMES, "transfer"])


def check_fields(tmp_path: Path, names: Sequence[str]) -> None:
    """The files have the documented fields, and open as datasets."""
    for name in names:
        lines = read_records(tmp_path, name)
        assert all(list(line) == FIELDS[name] for line in lines)
        for line in lines:
            assert all(type(line[key]) is int for key in INTEGERS & set(line))
        opened = load_dataset(
            "json",
            data_files=str(tmp_path / "spice" / f"{name}.jsonl"),
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        assert opened.column_names == FIELDS[name] and opened.to_list() == lines


class Lines(TrainerCallback):
    """Counts what is on disk when a step begins to train, and when it has ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: list[tuple[str, int, dict[str, int]]] = []

    def _count(self, moment: str, step: int) -> None:
        paths = {name: self.directory / "spice" / f"{name}.jsonl" for name in NAMES}
        steps = {name: path.read_text().splitlines() if path.exists() else [] for name, path in paths.items()}
        self.seen.append((moment, step, {k: len({json.loads(x)["step"] for x in v}) for k, v in steps.items()}))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("begin", state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._count("end", state.global_step)


def test_every_step_is_on_disk_when_it_has_trained(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    trainer = make_trainer(tmp_path, spice={}, callbacks=[lines], gradient_accumulation_steps=2)
    trainer.train()
    for moment, step, counts in lines.seen[:-1]:
        assert counts == {"selections": step, "pools": step, "trained": step, "costs": step}, (moment, step)
    assert {moment for moment, _, _ in lines.seen} == {"begin", "end"}


def test_no_clock_reading_is_in_the_first_three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trainer(tmp_path / "one", spice={}).train()
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 1000 * clock())
    make_trainer(tmp_path / "two", spice={}).train()
    for name in (f"{name}.jsonl" for name in NAMES):
        same = (tmp_path / "one/spice" / name).read_bytes() == (tmp_path / "two/spice" / name).read_bytes()
        assert same == (name != "costs.jsonl")


def test_replayed_epochs_are_recorded_as_trained_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice={"selection_epochs": 1}, num_train_epochs=3)
    trainer.train()
    for name in ("selections", "pools"):
        assert {line["epoch"] for line in read_records(tmp_path, name)} == {0}
    trained = read_records(tmp_path, "trained")
    assert [(line["step"], line["epoch"]) for line in trained] == [(step, step // 6) for step in range(18)]
    epochs = [sum((line["indices"] for line in trained if line["epoch"] == epoch), []) for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for line in read_records(tmp_path, "costs"):
        assert (line["tokens_scored"] == 0) == (line["seconds_scoring"] == 0.0) == (line["epoch"] > 0)
        assert line["tokens_trained"] > 0


def test_a_step_without_any_pick_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in tiny_rows(20)]
    trainer = make_trainer(
        tmp_path, spice={}, train_dataset=Dataset.from_list(tiny_rows(20)), gradient_accumulation_steps=2
    )
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.train()
    pool = read_records(tmp_path, "pools")[0]
    assert pool["num_selected"] == 0 and sorted(pool["zero"]) == sorted(pool["candidates"])
    assert [pool[key] for key in ("gain_first", "gain_last", "overlap_top_norm", "tokens_selected")] == [None] * 4
    assert pool["information"] == pool["information_top_norm"] == pool["tokens_pool"] == 0.0
    assert trained_indices(tmp_path) == [[]] and not read_records(tmp_path, "selections")
    assert trainer._spice.callback.totals.num_fillers == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert "no sample could be picked for step 0: 0 candidates had a gradient that is not finite and 20" in caplog.text


def write_steps(writer: RecordWriter, *steps: int) -> None:
    for step in steps:
        writer.write_costs({"step": step})


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_of_an_earlier_run_are_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3):
        writer = RecordWriter(tmp_path)
        writer.start()
        write_steps(writer, number)
        writer.write_ledger({"number": number})
        writer.close()
    assert lines_of(tmp_path / "costs.jsonl") == [3]
    assert lines_of(tmp_path / "costs.1.jsonl") == [1] and lines_of(tmp_path / "costs.2.jsonl") == [2]
    assert json.loads((tmp_path / "ledger.2.json").read_text()) == {"number": 2}
    assert f"the records of an earlier run in {tmp_path} were renamed to costs.2.jsonl and so on" in caplog.text
    assert len({json.loads(path.read_text())["run_id"] for path in tmp_path.glob("run*.json")}) == 3
    assert len(list(tmp_path.iterdir())) == 10


def test_resuming_cuts_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    folder, copy = tmp_path / "spice", tmp_path / "checkpoint-1" / "spice" / "records"
    writer = RecordWriter(folder)
    writer.start()
    write_steps(writer, 0)
    writer.save(copy)
    assert sorted(path.name for path in copy.iterdir()) == [FIRST, "run.json"]
    write_steps(writer, 1, 2)
    (folder / "transfer.jsonl").write_text("written after the checkpoint")
    writer.resume(copy)
    assert not (folder / "transfer.jsonl").exists()
    write_steps(writer, 1)
    assert lines_of(folder / "costs.jsonl") == [0, 1]
    writer.close()

    # A half-written line, as a kill leaves it.
    (folder / "costs.jsonl").write_text('{"step": 0}\n{"ste')
    writer.resume(copy)
    write_steps(writer, 1)
    assert lines_of(folder / "costs.jsonl") == [0, 1]
    writer.close()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "costs.jsonl", "run.json"]

    elsewhere = RecordWriter(tmp_path / "elsewhere")
    elsewhere.resume(copy)
    write_steps(elsewhere, 1, 2)
    elsewhere.close()
    assert lines_of(tmp_path / "elsewhere" / "costs.jsonl") == [0, 1, 2]
    assert lines_of(folder / "costs.jsonl") == [0, 1] and lines_of(copy / FIRST) == [0]
    ids = {json.loads((place / "run.json").read_text())["run_id"] for place in (folder, copy, tmp_path / "elsewhere")}
    assert len(ids) == 1


@pytest.mark.parametrize("there", ['{"step": 5}\n{"step": 6}\n', '{"st', ""])
def test_records_that_are_not_the_checkpoints_are_kept(there: str, tmp_path: Path) -> None:
    """Another run's, lost bytes, an empty file: all are renamed, and the copy takes their place."""
    writer = RecordWriter(tmp_path / "first")
    writer.start()
    write_steps(writer, 0)
    writer.save(tmp_path / "copy")
    writer.close()
    writer = RecordWriter(tmp_path / "second")
    writer.directory.mkdir()
    (writer.directory / "costs.jsonl").write_text(there)
    writer.resume(tmp_path / "copy")
    write_steps(writer, 1)
    writer.close()
    assert lines_of(writer.directory / "costs.jsonl") == [0, 1]
    assert (writer.directory / "costs.1.jsonl").read_text() == there


def test_resuming_without_the_copy_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = RecordWriter(tmp_path / "spice")
    writer.start()
    write_steps(writer, 0, 1)
    writer.resume(tmp_path / "gone")
    write_steps(writer, 5)
    writer.close()
    assert f"the checkpoint's copy of the records, {tmp_path / 'gone'}, is missing or damaged (File" in caplog.text
    assert lines_of(tmp_path / "spice/costs.jsonl") == [5] and lines_of(tmp_path / "spice/costs.1.jsonl") == [0, 1]


def test_a_copy_over_an_earlier_one_holds_nothing_of_it(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "spice")
    writer.start()
    write_steps(writer, 0)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "pools.jsonl").write_text("of a run before")
    writer.save(tmp_path / "copy")
    writer.close()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [FIRST, "run.json"]


def test_discarding_an_attempt(tmp_path: Path) -> None:
    """Only what was written since the start, and nothing of a resumed run, which the next attempt cuts itself."""
    writer = RecordWriter(tmp_path / "spice")
    writer.start()
    write_steps(writer, 0)
    writer.save(tmp_path / "copy")
    writer.start()
    write_steps(writer, 9)
    writer.discard()
    assert sorted(path.name for path in (tmp_path / "spice").iterdir()) == [".lock", "costs.1.jsonl", "run.1.json"]
    writer.resume(tmp_path / "copy")
    write_steps(writer, 1)
    writer.discard()
    assert lines_of(tmp_path / "spice" / "costs.jsonl") == [0, 1]


def test_a_directory_that_cannot_be_written_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / "spice").write_text("a file where the folder should be")
    trainer = make_trainer(tmp_path, spice={}, max_steps=2)
    before = trainable_weights(trainer.model)
    with pytest.raises(OSError, match="SPICE cannot write its records to .*make it writable, or choose another"):
        trainer.train()
    assert same_weights(trainable_weights(trainer.model), before)
    assert (tmp_path / "spice").read_text() == "a file where the folder should be"


def test_a_number_that_json_does_not_know_is_never_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = RecordWriter(tmp_path)
    writer.write_costs({"step": float("nan")})
    writer.write_costs({"step": float("nan")})
    writer.close()
    assert not (tmp_path / "costs.jsonl").exists() and caplog.text.count("costs.jsonl failed (Out of range") == 1
    with pytest.raises(ValueError, match="JSON"):
        RecordWriter(tmp_path, is_result=True).write_costs({"step": float("nan")})
