"""A proxy on two processes: scoring is shared, its updates are averaged, and the target's wrapper never sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spice_trainer import SpiceConfig, select_subset
from spice_trainer.subset.manifest import SubsetManifest
from tests.distributed import setting
from tests.distributed.launch import fork
from tests.support.trainers import read_records, trained_indices

pytestmark = pytest.mark.distributed

# What is compared with one process: nothing, the target's own scores, scoring beside the training.
CASES: dict[str, dict[str, Any]] = {
    "multi_gpu": {"overlap_scoring": True},
    "fsdp2": {},
    "deepspeed_zero3": {"proxy_check_pools": 3},
}


@pytest.mark.parametrize(
    "config", [pytest.param(config, marks=[pytest.mark.slow] * (config != "multi_gpu")) for config in CASES]
)
def test_a_proxy_picks_what_it_picks_in_one_process(config: str, tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    target = setting.save_model(tmp_path / "target", lora_dropout=0.0)
    small = setting.save_model(tmp_path / "small", lora_dropout=0.0, hidden_size=16)
    # Process 0's fresh adapter is everyone's.
    proxy = setting.load_proxy(small, seed=0)
    setting.single_trainer(target, tmp_path / "one", spice=CASES[config], proxy=proxy).train()
    picks = trained_indices(tmp_path / "one")

    options = (f"model={target}", f"proxy={small}", f"spice={json.dumps(CASES[config])}")
    fork(config, tmp_path / "two", "train", *options).check()
    results = [json.loads((tmp_path / "two" / f"train.{rank}.json").read_text()) for rank in range(2)]
    assert [result["picks"] for result in results] == [picks, picks]
    assert results[0]["learned"] == results[1]["learned"] and len(results[0]["learned"]) == 28

    if config == "deepspeed_zero3":
        ours, theirs = (read_records(tmp_path / name, "transfer") for name in ("one", "two/trained"))
        assert len(ours) == len(theirs) == 3
        for one, two in zip(ours, theirs, strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                assert two[key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), key


def test_a_subset_is_that_of_one_process(tmp_path: Path) -> None:
    small = setting.save_model(tmp_path / "small", lora_dropout=0.0, hidden_size=16)
    one = select_subset(
        setting.load_proxy(small, seed=0),
        setting.dataset(),
        SpiceConfig(**setting.SETTINGS),
        output_dir=tmp_path / "one",
        samples_per_step=setting.SAMPLES_PER_STEP,
    )
    fork("multi_gpu", tmp_path / "two", "select", f"proxy={small}").check()
    for rank in range(2):
        assert json.loads((tmp_path / "two" / f"select.{rank}.json").read_text())["rows"] == one.dataset.to_list()
    manifests = [SubsetManifest.load(tmp_path / name) for name in ("one", "two/subset")]
    assert manifests[0].indices == manifests[1].indices and manifests[0].model == manifests[1].model
    assert len(manifests[0].indices) == 17
