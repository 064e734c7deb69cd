"""Resuming from any checkpoint equals the uninterrupted run: weights and records bit for bit."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.support.trainers import (
    make_sft_trainer,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    trainable_weights,
    trained_indices,
)
from tests.support.versions import before

pytestmark = pytest.mark.oldest

RECORDS = ("selections.jsonl", "pools.jsonl", "trained.jsonl")
CLOCK_KEYS = {"spice/seconds_scoring", "spice/seconds_selecting", "spice/overhead", "train_runtime"}
CLOCK_KEYS |= {"train_samples_per_second", "train_steps_per_second"}
NUM_STEPS = 10


def build(output_dir: Path, *, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Ten steps: three an epoch, two selecting epochs, one that replays, and one step of a fourth epoch."""
    return make_trainer(
        output_dir,
        spice={"selection_epochs": 2} | (settings or {}),
        **(
            {
                "train_dataset": tiny_dataset(25),
                "lora_dropout": 0.3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
                "max_steps": NUM_STEPS,
                "logging_steps": 2,
                "save_strategy": "steps",
                "save_steps": 1,
            }
            | options
        ),
    )


class Run:
    """What a finished run left behind."""

    def __init__(self, trainer: Any, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.weights: dict[str, Tensor] = trainable_weights(trainer.model)
        self.log_history: list[dict[str, Any]] = trainer.state.log_history

    def record(self, name: str) -> bytes:
        return (self.output_dir / "spice" / name).read_bytes()

    def costs(self) -> list[dict[str, Any]]:
        lines = read_records(self.output_dir, "costs")
        return [{key: value for key, value in line.items() if not key.startswith("seconds_")} for line in lines]

    def logs(self, *, without: set[str]) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in row.items() if key not in CLOCK_KEYS | without} for row in self.log_history
        ]


def compare(resumed: Run, whole: Run, *, step: int) -> None:
    """The resumed run and the uninterrupted one, in everything but clock readings."""
    assert same_weights(resumed.weights, whole.weights)
    for name in RECORDS:
        assert resumed.record(name) == whole.record(name), name
    assert resumed.costs() == whole.costs()
    # The Trainer resets its sums of losses on resume: that of the logging window, if the checkpoint is inside one,
    # and that of the run.
    inside_window = step % 2 == 1
    assert resumed.logs(without={"train_loss"} | ({"loss"} if inside_window else set())) == whole.logs(
        without={"train_loss"} | ({"loss"} if inside_window else set())
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The uninterrupted run, with a checkpoint after every step."""
    output_dir = tmp_path_factory.mktemp("whole")
    trainer = build(output_dir)
    trainer.train()
    assert [line["epoch"] for line in read_records(output_dir, "trained")] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [line["epoch"] for line in read_records(output_dir, "pools")] == [0, 0, 0, 1, 1, 1]
    yield Run(trainer, output_dir)


@pytest.mark.parametrize("step", range(1, NUM_STEPS))
def test_resume_from_every_checkpoint(tmp_path: Path, whole: Run, step: int) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(whole.output_dir, output_dir)
    trainer = build(output_dir, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{step}"))
    compare(Run(trainer, output_dir), whole, step=step)


def test_resume_from_the_latest_checkpoint_after_a_crash(tmp_path: Path, whole: Run) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(whole.output_dir, output_dir)
    for step in range(5, NUM_STEPS + 1):
        shutil.rmtree(output_dir / f"checkpoint-{step}")
    # The crash came in the middle of a line.
    for name in (*RECORDS, "costs.jsonl"):
        path = output_dir / "spice" / name
        path.write_bytes(path.read_bytes()[:-7])
    trainer = build(output_dir)
    trainer.train(resume_from_checkpoint=True)
    compare(Run(trainer, output_dir), whole, step=4)
    # Checkpoints of the resumed run hold what those of the uninterrupted one do.
    for step in (5, 8):
        first, second = (
            json.loads((folder / f"checkpoint-{step}" / "spice" / "state.json").read_text())
            for folder in (output_dir, whole.output_dir)
        )
        assert first["sampler"] == second["sampler"] and first["schedule"] == second["schedule"]
        for name in RECORDS:
            copies = [
                folder / f"checkpoint-{step}/spice/records/{name[:-6]}.{0:012}.jsonl"
                for folder in (output_dir, whole.output_dir)
            ]
            assert copies[0].read_bytes() == copies[1].read_bytes()
        clocks = {key for key in first["totals"] if key.startswith("seconds_")}
        assert {key: first["totals"][key] for key in first["totals"].keys() - clocks} == {
            key: second["totals"][key] for key in second["totals"].keys() - clocks
        }


def test_resume_into_another_directory(tmp_path: Path, whole: Run) -> None:
    (tmp_path / "spice").mkdir()
    (tmp_path / "spice" / "trained.jsonl").write_text('{"step": 0}\n')
    before = {name: whole.record(name) for name in RECORDS}
    trainer = build(tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(whole.output_dir / "checkpoint-4"))
    compare(Run(trainer, tmp_path), whole, step=4)
    assert before == {name: whole.record(name) for name in RECORDS}, "the first run's records were touched"
    assert (tmp_path / "spice" / "trained.1.jsonl").read_text() == '{"step": 0}\n'


def test_resume_from_a_checkpoint_that_was_moved(tmp_path: Path, whole: Run) -> None:
    """A checkpoint alone is enough, wherever it lies: it brings its own copy of the records."""
    shutil.copytree(whole.output_dir / "checkpoint-4", tmp_path / "moved" / "checkpoint-4")
    trainer = build(tmp_path / "run", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-4"))
    compare(Run(trainer, tmp_path / "run"), whole, step=4)


def test_resume_without_the_copied_records(tmp_path: Path, whole: Run, caplog: Any) -> None:
    shutil.copytree(whole.output_dir / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-4" / "spice" / "records")
    trainer = build(tmp_path / "run", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(trainable_weights(trainer.model), whole.weights)
    assert trained_indices(tmp_path / "run") == trained_indices(whole.output_dir)[4:]
    assert "so those of the resumed run begin here" in caplog.text


def test_resume_at_the_end_of_the_run(tmp_path: Path, whole: Run) -> None:
    """Two more steps than the run had: the learning rates are others, the picks of the replayed epoch are not."""
    output_dir = tmp_path / "run"
    shutil.copytree(whole.output_dir, output_dir)
    trainer = build(output_dir, save_strategy="no", max_steps=NUM_STEPS + 2)
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{NUM_STEPS}"))
    steps = trained_indices(output_dir)
    assert steps[:NUM_STEPS] == trained_indices(whole.output_dir) and len(steps) == NUM_STEPS + 2
    assert sorted(itertools.chain(*steps[9:12])) == sorted(itertools.chain(*steps[3:6]))


def test_resume_in_sft_trainer(tmp_path: Path) -> None:
    options = {"lora_dropout": 0.3, "logging_steps": 2, "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    first = make_sft_trainer(tmp_path, spice={}, **options)
    first.train()
    shutil.copytree(tmp_path / "spice", tmp_path / "whole" / "spice")
    whole = Run(first, tmp_path / "whole")
    second = make_sft_trainer(tmp_path, spice={}, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    resumed = Run(second, tmp_path)
    assert same_weights(resumed.weights, whole.weights)
    assert [resumed.record(name) == whole.record(name) for name in RECORDS] == [True] * 3
    assert resumed.costs() == whole.costs()


def test_ignore_data_skip_starts_the_epoch_anew(tmp_path: Path, whole: Run) -> None:
    output_dir = tmp_path / "run"
    shutil.copytree(whole.output_dir, output_dir)
    trainer = build(output_dir, save_strategy="no", ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-4"))
    lines = read_records(output_dir, "pools")
    # Steps 4 to 6 are the whole of epoch 1 again, and what is replayed after them are its new picks alone.
    assert [(line["step"], line["epoch"]) for line in lines[3:]] == [(3, 1), (4, 1), (5, 1), (6, 1)]
    assert [line["candidates"] for line in lines[4:]] == [
        line["candidates"] for line in read_records(whole.output_dir, "pools")[3:]
    ]
    trained = read_records(output_dir, "trained")
    assert [line["step"] for line in trained] == list(range(NUM_STEPS))
    assert [line["epoch"] for line in trained] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    steps = [line["indices"] for line in trained]
    assert sorted(itertools.chain(*steps[7:])) == sorted(itertools.chain(*steps[4:7]))


def test_checkpoint_of_a_run_without_spice(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, **options).train()
    with pytest.raises(ValueError, match=r"has no spice/state\.json: it was written by a run without SPICE"):
        make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_checkpoint_of_another_format(tmp_path: Path, whole: Run) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(whole.output_dir / "checkpoint-4", checkpoint)
    path = checkpoint / "spice" / "state.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 7'))
    with pytest.raises(ValueError, match="is of format version 7, this version of spice_trainer reads 3"):
        build(tmp_path).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"pool_size": 12}}, "pool_size was 10 and is 12"),
        ({"settings": {"pool_seed": 7}}, "pool_seed was 42 and is 7"),
        ({"settings": {"pool_seed": None}, "data_seed": 3}, "pool_seed was 42 and is 3"),
        ({"train_dataset": tiny_dataset(24)}, "num_rows was 25 and is 24; dataset_fingerprint was"),
        (
            {"train_dataset": tiny_dataset(25, seed=1)},
            "dataset_fingerprint was [0-9a-f]{64} and is [0-9a-f]{64}. ",
        ),
        ({"per_device_train_batch_size": 4}, "samples_per_step was 4 and is 8"),
    ],
)
@pytest.mark.filterwarnings("ignore:The following arguments do not match the ones in the `trainer_state.json`")
def test_checkpoint_of_another_schedule(tmp_path: Path, whole: Run, options: dict[str, Any], message: str) -> None:
    if "per_device_train_batch_size" in options and before("transformers", "5.2"):
        pytest.skip(
            "before transformers 5.2 a run goes on with its checkpoint's batch size, whatever its arguments say"
        )
    recorded = whole.record("trained.jsonl")
    with pytest.raises(ValueError, match=f"belongs to another selection schedule: .*{message}"):
        build(tmp_path, **options).train(resume_from_checkpoint=str(whole.output_dir / "checkpoint-4"))
    assert whole.record("trained.jsonl") == recorded


def test_another_setting_is_a_warning(tmp_path: Path, whole: Run, caplog: Any) -> None:
    trainer = build(tmp_path, settings={"conflict_penalty": 0.7}, save_strategy="no", max_steps=5)
    trainer.train(resume_from_checkpoint=str(whole.output_dir / "checkpoint-4"))
    assert "settings changed since the checkpoint" in caplog.text
    assert "conflict_penalty was 0.1 and is 0.7" in caplog.text


def test_a_new_run_moves_earlier_records_aside(tmp_path: Path) -> None:
    contents = []
    for number in range(3):
        make_trainer(tmp_path, spice={"pool_seed": number}, max_steps=1).train()
        contents.append((tmp_path / "spice" / "trained.jsonl").read_bytes())
    assert len(set(contents)) == 3
    kept = [(tmp_path / "spice" / f"trained.{number}.jsonl").read_bytes() for number in (1, 2)]
    assert kept == contents[:2]


def test_training_twice_with_one_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice={}, max_steps=2)
    trainer.train()
    # A loader that is looked at between runs is no part of any record.
    next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert [line["step"] for line in read_records(tmp_path, "trained")] == [0, 1]
    first = (tmp_path / "spice" / "trained.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in first] == [0, 1]
