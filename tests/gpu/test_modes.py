"""Sharded modes on GPUs with the shipped configurations as they are, bf16 included: what CPUs need shims for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.distributed import setting
from tests.distributed.launch import launch
from tests.support.trainers import trained_indices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("config", ["fsdp1", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_run(config: str, tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    num_processes = min(2, torch.cuda.device_count())
    folder = setting.save_model(tmp_path / "model", lora_dropout=0.0)
    launched = launch(
        config, tmp_path, "train", f"model={folder}", num_processes=num_processes, device="cuda", timeout=500
    ).check()

    results = [json.loads((tmp_path / f"train.{rank}.json").read_text()) for rank in range(num_processes)]
    picks = results[0]["picks"]
    assert all(result["picks"] == picks for result in results)
    assert [len(step) for step in picks] == [8, 8, 1, 8, 8, 1]
    assert trained_indices(tmp_path / "trained") == picks
    assert all(math.isfinite(loss) for loss in results[0]["losses"])
    assert ("does not find the adapter" in launched.stderr) == (config == "fsdp1")

    # The first picks in fp32 on the CPU, from the same weights: bf16 changes some.
    setting.single_trainer(folder, tmp_path / "one", max_steps=1, save_strategy="no").train()
    assert len(set(picks[0]) & set(trained_indices(tmp_path / "one")[0])) >= len(picks[0]) // 2
