"""Runs on two processes that pick what one process picks: resumed, adaptive, quantised, fresh, in bf16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spice_trainer.config import STRATEGIES
from tests.distributed import setting
from tests.distributed.launch import fork
from tests.support.trainers import read_records, trained_indices

pytestmark = pytest.mark.distributed

AIMED = ("targeted_matching", "rds", "tsds", "greats", "opus")
# DDP is what `make test` tries; with sharded weights the same takes longer.
CONFIGS = ["multi_gpu", *(pytest.param(config, marks=pytest.mark.slow) for config in ("fsdp2", "deepspeed_zero3"))]


def train_on_two(config: str, folder: Path, *options: str) -> list[list[int]]:
    """The picks of a run on two processes, which both must have heard."""
    fork(config, folder, "train", *options).check()
    heard = [json.loads((folder / f"train.{rank}.json").read_text())["picks"] for rank in range(2)]
    assert heard[0] == heard[1]
    return heard[0]


@pytest.mark.slow
def test_resuming_with_other_numbers_of_processes(tmp_path: Path) -> None:
    # Without dropout, which draws differently in every process.
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "whole").train()
    picks = trained_indices(tmp_path / "whole")
    assert len(picks) == setting.NUM_STEPS

    # The first steps in one process, the next in two, the last in one again.
    checkpoint = tmp_path / "whole" / f"checkpoint-{setting.SAVED_STEP}"
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"checkpoint={checkpoint}")
    assert heard == picks[setting.SAVED_STEP :]

    last = setting.single_trainer(folder, tmp_path / "one")
    last.train(resume_from_checkpoint=str(tmp_path / "two" / "trained" / "checkpoint-4"))
    assert trained_indices(tmp_path / "one") == picks


# A share of the first gain at which some pools of this run stop early and others don't.
ADAPTIVE = {"stop_ratio": 0.75, "pools_per_step": 2}


@pytest.mark.parametrize("config", CONFIGS)
def test_adaptive_stopping(config: str, tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "one", spice=ADAPTIVE).train()
    picks = trained_indices(tmp_path / "one")
    sizes = {len(step) for step in picks}
    # Also odd numbers, which two processes share unevenly, and fewer picks than the four micro-batches.
    assert min(sizes) < 4 < max(sizes) and any(size % 2 for size in sizes), sizes
    heard = train_on_two(config, tmp_path / "two", f"model={folder}", f"spice={json.dumps(ADAPTIVE)}")
    assert heard == picks
    assert trained_indices(tmp_path / "two" / "trained") == picks


def test_layers_frozen_in_mid_run(tmp_path: Path) -> None:
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    single = setting.single_trainer(folder, tmp_path / "one")
    single.add_callback(setting.Freeze())
    single.train()
    fork("multi_gpu", tmp_path / "two", "freeze", "where=everywhere", f"model={folder}").check()
    found = [json.loads((tmp_path / "two" / f"freeze.{rank}.json").read_text()) for rank in range(2)]
    assert [one["picks"] for one in found] == [trained_indices(tmp_path / "one")] * 2
    assert [one["layers"] for one in found] == [14, 14]


# What computes less than whole gradients: two forwards of different rows a step, and a backward that ends early.
PARTIAL = {"scoring_layers": 1, "scoring_max_tokens": 3, "scoring_prefilter": 0.6}


@pytest.mark.parametrize("config", CONFIGS)
def test_scoring_less(config: str, tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "whole").train()
    setting.single_trainer(folder, tmp_path / "one", spice=PARTIAL).train()
    picks = trained_indices(tmp_path / "one")
    assert picks != trained_indices(tmp_path / "whole")
    heard = train_on_two(config, tmp_path / "two", f"model={folder}", f"spice={json.dumps(PARTIAL)}")
    assert heard == picks


def test_packed_picks(tmp_path: Path) -> None:
    """Each pick trains once on some process, in the epoch that selects and in the one that replays."""
    spice = {"pack_picks": True, "selection_epochs": 1}
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    single = setting.single_trainer(folder, tmp_path / "one", spice=spice)
    single.train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"spice={json.dumps(spice)}")
    assert heard == trained_indices(tmp_path / "one") == trained_indices(tmp_path / "two" / "trained")
    found = json.loads((tmp_path / "two" / "train.0.json").read_text())["losses"]
    assert found == pytest.approx([entry["loss"] for entry in single.state.log_history if "loss" in entry], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [*("random", "loss", "matching", "less", "ifd", "uds"), *AIMED])
def test_strategies(strategy: str, tmp_path: Path) -> None:
    spice = {"strategy": strategy, "validation_rows": setting.NUM_VALIDATION}
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "one", spice=spice).train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"spice={json.dumps(spice)}")
    assert heard == trained_indices(tmp_path / "one")


def test_a_strategy_of_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Registered by the script of each process, and here taken away again.
    monkeypatch.setitem(STRATEGIES, setting.OWN_STRATEGY.name, setting.OWN_STRATEGY)
    spice = {"strategy": setting.OWN_STRATEGY.name}
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "one", spice=spice).train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"spice={json.dumps(spice)}")
    assert heard == trained_indices(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ifd", "less", "rds", "greats", "uds"])
def test_strategies_with_sharded_weights(strategy: str, tmp_path: Path) -> None:
    # Every process runs as many forwards as the others: two a row, or those of the validation rows first.
    spice = {"strategy": strategy, "validation_rows": setting.NUM_VALIDATION}
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "one", spice=spice).train()
    heard = train_on_two("fsdp2", tmp_path / "two", f"model={folder}", f"spice={json.dumps(spice)}")
    assert heard == trained_indices(tmp_path / "one")


@pytest.mark.slow
def test_preconditioned_gradients(tmp_path: Path) -> None:
    # DDP leaves the whole optimizer on every process.
    spice = {"gradient_preconditioning": "adam", "alpha_scaling": "pool"}
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "one", spice=spice).train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"spice={json.dumps(spice)}")
    assert heard == trained_indices(tmp_path / "one")


def test_conflict_with_the_momentum(tmp_path: Path) -> None:
    spice = {"conflict_reference": "momentum", "conflict_penalty": 3.0}
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    setting.single_trainer(folder, tmp_path / "one", spice=spice).train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"spice={json.dumps(spice)}")
    assert heard == trained_indices(tmp_path / "one")
    assert any(pick["conflict"] for pick in read_records(tmp_path / "one", "selections"))


@pytest.mark.slow
def test_a_fresh_adapter(tmp_path: Path) -> None:
    # B is zero, so the gradients of A are too until the first update.
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0, randomize=False)
    setting.single_trainer(folder, tmp_path / "one").train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}")
    assert heard == trained_indices(tmp_path / "one")


@pytest.mark.slow
def test_a_base_in_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # Blocks of 64 weights.
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0, hidden_size=64)
    single = setting.single_trainer(folder, tmp_path / "one", quantized=True)
    assert any(type(module).__name__ == "Linear4bit" for module in single.model.modules())
    single.train()
    heard = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", "quantized=yes")
    assert heard == trained_indices(tmp_path / "one")


@pytest.mark.slow
def test_bf16(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    folder = setting.save_model(tmp_path / "model")
    options: dict[str, Any] = {"bf16": True, "num_train_epochs": 1, "save_strategy": "no"}
    picks = train_on_two("multi_gpu", tmp_path / "two", f"model={folder}", f"args={json.dumps(options)}")
    assert [len(step) for step in picks] == [8, 8, 1]
    # Rounding differs with the rows that share a micro-batch, so across numbers of processes picks only overlap.
    setting.single_trainer(folder, tmp_path / "one", **options | {"max_steps": 1}).train()
    overlap = len(set(picks[0]) & set(trained_indices(tmp_path / "one")[0])) / len(picks[0])
    record_property("overlap of first picks, 2 processes and 1, bf16", overlap)
    assert overlap >= 0.5
