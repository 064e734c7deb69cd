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
from spice_trainer.records import LEDGER_FILE, RECORD_FILES, RecordWriter

from .models import tiny_lora_model
from .trainers import SETTINGS, make_trainer, read_records, tiny_rows, trained_indices

NAMES = ("selections", "pools", "trained", "costs")
FIELDS = {
    "selections": [
        "step", "epoch", "pool", "order", "index", "gain", "conflict", "score", "gradient_norm", "label_tokens",
    ],
    "pools": [
        "step", "epoch", "pool", "candidates", "num_selected", "gain_first", "gain_last", "information",
        "information_top_norm", "overlap_top_norm", "changed_by_conflict", "tokens_pool", "tokens_selected", "alpha",
        "nonfinite", "zero", "stopped_early",
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
INTEGERS = {"step", "epoch", "pool", "order", "index", "label_tokens", "num_selected", "changed_by_conflict"}


@pytest.mark.parametrize("settings", [{}, {"stop_ratio": 0.85, "pools_per_step": 2}], ids=["fixed", "adaptive"])
def test_fields_are_those_of_the_documentation_and_open_as_datasets(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = tiny_rows()
    rows[3] = rows[3] | {"labels": [-100] * len(rows[3]["labels"])}
    trainer = make_trainer(
        tmp_path, spice=settings, train_dataset=Dataset.from_list(rows), per_device_train_batch_size=8
    )
    trainer.train()
    assert sorted(path.stem for path in (tmp_path / "spice").iterdir()) == sorted([*NAMES, "ledger"])
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
    assert sorted(path.name for path in (tmp_path / "spice").iterdir()) == sorted([*RECORD_FILES, LEDGER_FILE])
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


def test_every_step_is_on_disk_before_it_trains(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    trainer = make_trainer(tmp_path, spice={}, callbacks=[lines], gradient_accumulation_steps=2)
    trainer.train()
    for moment, step, counts in lines.seen[:-1]:
        chosen = step + 1 if moment == "begin" else step
        assert counts == {"selections": chosen, "pools": chosen, "trained": chosen, "costs": step}, (moment, step)
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


def test_records_of_an_earlier_run_are_moved_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "spice"
    for number in (1, 2, 3):
        writer = RecordWriter(folder)
        writer.start()
        writer.write_costs({"step": number})
        writer.close()
    assert (folder / "costs.jsonl").read_text() == '{"step": 3}\n'
    assert (tmp_path / "spice-previous-1" / "costs.jsonl").read_text() == '{"step": 1}\n'
    assert (tmp_path / "spice-previous-2" / "costs.jsonl").read_text() == '{"step": 2}\n'
    assert f"the records of an earlier run in {folder} were moved to {tmp_path / 'spice-previous-2'}" in caplog.text


def test_resuming_cuts_what_was_written_after_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "spice"
    writer = RecordWriter(folder)
    writer.start()
    writer.write_costs({"step": 0})
    positions = writer.positions()
    assert positions == {
        "selections.jsonl": 0,
        "pools.jsonl": 0,
        "trained.jsonl": 0,
        "costs.jsonl": 12,
        "transfer.jsonl": 0,
    }
    writer.write_costs({"step": 1})
    writer.resume(positions, folder)
    assert writer.positions() == positions
    writer.write_costs({"step": 1, "again": True})
    assert (folder / "costs.jsonl").read_text() == '{"step": 0}\n{"step": 1, "again": true}\n'
    writer.close()

    elsewhere = RecordWriter(tmp_path / "elsewhere")
    elsewhere.resume(positions, folder)
    elsewhere.write_costs({"step": 1, "other": True})
    elsewhere.close()
    assert (tmp_path / "elsewhere/costs.jsonl").read_text() == '{"step": 0}\n{"step": 1, "other": true}\n'
    assert (folder / "costs.jsonl").read_text() == '{"step": 0}\n{"step": 1, "again": true}\n'


def test_resuming_without_the_earlier_records_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = RecordWriter(tmp_path / "spice")
    writer.resume({"pools.jsonl": 7, "costs.jsonl": 0}, tmp_path / "gone")
    writer.write_costs({"step": 5})
    writer.close()
    assert f"pools.jsonl in {tmp_path / 'gone'} lack the lines written before this checkpoint" in caplog.text
    assert (tmp_path / "spice/costs.jsonl").read_text() == '{"step": 5}\n'


def test_a_number_that_json_does_not_know_is_never_written(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        writer.write_costs({"step": float("nan")})
    writer.close()
