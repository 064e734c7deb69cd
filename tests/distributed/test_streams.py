"""Streams on two processes: each reads the whole, and they pick what one process picks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import setting
from tests.distributed.launch import fork
from tests.distributed.test_runs import train_on_two
from tests.support.trainers import read_records, trained_indices

pytestmark = pytest.mark.distributed
MAX_STEPS = 5


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that every process loads, without dropout, which draws differently in each."""
    return setting.save_model(tmp_path_factory.mktemp("model"), lora_dropout=0.0)


def test_two_processes_pick_what_one_picks(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the end of a pass, and resumed from the run of one process, within a shuffle buffer."""
    stream = setting.stream()
    monkeypatch.setattr(setting, "dataset", lambda: stream)
    setting.single_trainer(model_folder, tmp_path / "one", max_steps=MAX_STEPS).train()
    picks = trained_indices(tmp_path / "one")
    assert [line["epoch"] for line in read_records(tmp_path / "one", "trained")] == [0, 0, 0, 1, 1]
    # As TRL sets it: the stock loader would give each process shards of its own.
    args = {"max_steps": MAX_STEPS, "accelerator_config": {"dispatch_batches": False}}
    options = (f"model={model_folder}", "stream=whole", f"args={json.dumps(args)}")
    assert train_on_two("multi_gpu", tmp_path / "two", *options) == picks
    for name in ("selections", "pools"):
        ours, theirs = (
            [(line["step"], line.get("token_hash"), line.get("candidates")) for line in read_records(folder, name)]
            for folder in (tmp_path / "one", tmp_path / "two" / "trained")
        )
        assert ours == theirs
    checkpoint = tmp_path / "one" / "checkpoint-2"
    resumed = train_on_two("multi_gpu", tmp_path / "resumed", *options, f"checkpoint={checkpoint}")
    assert resumed == picks[2:]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_partitioned_models_train_on_streams(
    config: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    stream = setting.stream()
    monkeypatch.setattr(setting, "dataset", lambda: stream)
    setting.single_trainer(model_folder, tmp_path / "one", max_steps=MAX_STEPS).train()
    picks = trained_indices(tmp_path / "one")
    options = (f"model={model_folder}", "stream=whole", f"args={json.dumps({'max_steps': MAX_STEPS})}")
    assert train_on_two(config, tmp_path / "two", *options) == picks
    checkpoint = tmp_path / "two" / "trained" / "checkpoint-2"
    assert train_on_two(config, tmp_path / "resumed", *options, f"checkpoint={checkpoint}") == picks[2:]


def test_a_stream_that_is_split_already_is_refused(model_folder: Path, tmp_path: Path) -> None:
    launched = fork("multi_gpu", tmp_path, "train", f"model={model_folder}", "stream=split", 'args={"max_steps": 3}')
    assert launched.returncode != 0
    assert "was split over the processes by datasets.distributed.split_dataset_by_node" in launched.stderr


@pytest.mark.parametrize(
    ("kind", "errors"),
    [
        ("reversed", ["what the training stream gives next is 'rows 20 to 39, ", "on process 1"]),
        ("ended", ["what the training stream gives next is 'rows 20 to 39, ", "and 'its end' on process 1"]),
        ("broken", ["SPICE: process 1 of 2 failed while reading the training stream", "the connection was closed"]),
    ],
)
def test_a_stream_that_goes_another_way_on_one_process(
    kind: str, errors: list[str], model_folder: Path, tmp_path: Path
) -> None:
    """Both end, after the first step, and neither waits for the other."""
    launched = fork("multi_gpu", tmp_path, "train", f"model={model_folder}", f"stream={kind}", 'args={"max_steps": 3}')
    assert launched.returncode != 0 and not launched.timed_out
    assert all(error in launched.stderr for error in errors), launched.stderr
    assert len(read_records(tmp_path / "trained", "trained")) == 1
