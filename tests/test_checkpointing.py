"""Gradient checkpointing under SFTTrainer, both kinds (under `Trainer` see `test_side_effects.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from spice_trainer.gradients import SampleGradients

from .models import tiny_lora_model
from .replays import train_and_replay
from .trainers import checkpointing_options, make_sft_trainer

LAYER = "base_model.model.model.layers.1"


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_run_under_sft(use_reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"training": 0, "scoring": 0}
    while_scoring: list[bool] = []
    compute = SampleGradients.compute

    def watched(self: SampleGradients, *args: Any, **kwargs: Any) -> Any:
        while_scoring.append(True)
        losses = compute(self, *args, **kwargs)
        while_scoring.pop()
        return losses

    def count(module: nn.Module, *args: Any) -> None:
        calls["scoring" if while_scoring else "training"] += 1

    def make(output_dir: Path) -> Any:
        trainer = make_sft_trainer(
            output_dir,
            model=tiny_lora_model(lora_dropout=0.3),
            spice={"scoring_tokens_per_batch": 10_000},
            verify=True,
            max_steps=3,
            **checkpointing_options(use_reentrant=use_reentrant),
        )
        trainer.model.get_submodule(LAYER).input_layernorm.register_forward_hook(count)
        return trainer

    monkeypatch.setattr(SampleGradients, "compute", watched)
    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)
    # Every layer runs twice a step under checkpointing; two runs of three steps. Scoring has it off.
    assert calls == {"training": 2 * 3 * 2, "scoring": 3}
