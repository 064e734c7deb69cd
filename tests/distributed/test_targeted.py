"""Runs on two processes that aim at validation rows: they pick what one process picks, and refuse what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import setting
from tests.distributed.launch import fork
from tests.support.trainers import read_records, trained_indices

pytestmark = pytest.mark.distributed

ON_HIDDEN_STATES = {"strategy": "targeted_matching"}
ON_GRADIENTS = {"strategy": "targeted_matching", "matching_features": "gradients"}
BY_LENGTH = {"strategy": "length_matched"}
QUOTAS = {"length_quotas": "validation"}
# The last layer alone trains, so what the first gives is kept from the first epoch to the second.
KEPT = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}

slow = pytest.mark.slow
CASES = [
    pytest.param("multi_gpu", ON_HIDDEN_STATES, KEPT, id="ddp-kept"),
    pytest.param("multi_gpu", ON_GRADIENTS | {"validation_every": 2}, {}, id="ddp-gradients"),
    pytest.param("multi_gpu", ON_HIDDEN_STATES, {}, marks=slow, id="ddp-hidden"),
    pytest.param("multi_gpu", BY_LENGTH, {}, marks=slow, id="ddp-lengths"),
    pytest.param("multi_gpu", QUOTAS, {}, marks=slow, id="ddp-quotas"),
    pytest.param("fsdp2", ON_HIDDEN_STATES, {}, marks=slow, id="fsdp2-hidden"),
    pytest.param("fsdp2", ON_HIDDEN_STATES, KEPT, marks=slow, id="fsdp2-kept"),
    pytest.param("fsdp2", ON_GRADIENTS, {}, marks=slow, id="fsdp2-gradients"),
    pytest.param("fsdp2", BY_LENGTH, {}, marks=slow, id="fsdp2-lengths"),
    pytest.param("deepspeed_zero3", ON_HIDDEN_STATES, {}, marks=slow, id="zero3-hidden"),
    pytest.param("deepspeed_zero3", ON_HIDDEN_STATES, KEPT, marks=slow, id="zero3-kept"),
    pytest.param("deepspeed_zero3", ON_GRADIENTS, {}, marks=slow, id="zero3-gradients"),
]


@pytest.mark.parametrize(("config", "spice", "lora"), CASES)
def test_two_processes_pick_what_one_picks(
    config: str, spice: dict[str, Any], lora: dict[str, Any], tmp_path: Path
) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0, **lora)
    setting.single_trainer(folder, tmp_path / "one", spice=spice).train()
    picks = trained_indices(tmp_path / "one")
    fork(config, tmp_path / "two", "train", f"model={folder}", f"spice={json.dumps(spice)}").check()
    for rank in range(2):
        assert json.loads((tmp_path / "two" / f"train.{rank}.json").read_text())["picks"] == picks
    ours, theirs = (read_records(tmp_path / run, "pools") for run in ("one", "two/trained"))
    for pool, other in zip(ours, theirs, strict=True):
        facts, others = ({name: number for name, number in p.items() if "shift" in name} for p in (pool, other))
        assert facts == pytest.approx(others, rel=1e-4)
    # Else nothing was aimed at, and nothing compared.
    shifts = {pool["shift_p_value"] <= 0.01 for pool in ours if "shift_p_value" in pool}
    assert (True in shifts) == ("strategy" in spice)
    assert json.loads((tmp_path / "two/trained/spice/run.json").read_text())["validation"]["rows"] == {"validation": 5}


@pytest.mark.parametrize("when", ["content", "number"])
def test_other_validation_rows_on_one_process_are_refused(when: str, tmp_path: Path) -> None:
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    fork("multi_gpu", tmp_path / "two", "other_validation_rows", f"model={folder}", f"when={when}").check()
    found = [json.loads((tmp_path / "two" / f"other_validation_rows.{rank}.json").read_text()) for rank in range(2)]
    what = {"content": "what is known of the validation rows", "number": "the number of rows of each validation set"}
    for result in found:
        assert f"don't see the same: {what[when]} is" in result["error"] and "on process 1" in result["error"]
