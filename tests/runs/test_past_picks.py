"""Picks that depend on earlier picks: the memory's course over steps, whole and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from spice_trainer import SpiceConfig
from spice_trainer.gradients.label_logits import LabelLogits
from spice_trainer.scoring import past_picks
from tests.support import field_oracles
from tests.support.models import tiny_lora_model
from tests.support.trainers import make_trainer, read_records, tiny_rows, trained_indices

ROWS = tiny_rows()


def build(folder: Path, **options: Any) -> Any:
    spice = {"strategy": "uds", "num_selected": 3, "pools_per_step": 2}
    options = {"per_device_train_batch_size": 6, "learning_rate": 0.0, "num_train_epochs": 2} | options
    return make_trainer(folder, spice=spice, train_dataset=Dataset.from_list(ROWS), **options)


@pytest.mark.parametrize("size", [1024, 5])
def test_each_step_remembers_the_picks_before_it(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a learning rate of 0, where a row's logits stay what they are."""
    monkeypatch.setattr(past_picks, "MEMORY_ROWS", size)
    build(tmp_path).train()
    model = tiny_lora_model().eval()
    logits = LabelLogits(model, 42)
    matrices = [field_oracles.label_logits(model, row) for row in ROWS]
    norms = [float(torch.linalg.svdvals(matrix).sum()) for matrix in matrices]
    sketches = torch.stack([logits.sketch(matrix.float()) for matrix in matrices]).double()
    memory: list[int] = []
    steps = {line["step"]: [] for line in read_records(tmp_path, "pools")}
    for line in read_records(tmp_path, "pools"):
        pool = line["candidates"]
        places, _ = field_oracles.uds(
            [norms[row] for row in pool],
            sketches[pool],
            sketches[memory],
            range(len(pool)),
            line["num_selected"],
        )
        steps[line["step"]] += [pool[place] for place in places]
        if line["pool"] == 1 or len(pool) < 10:
            memory = (memory + steps[line["step"]])[-size:]
    assert [steps[step] for step in sorted(steps)] == trained_indices(tmp_path)
    assert len(memory) == min(size, sum(map(len, steps.values())))


def test_the_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "with").train()
    monkeypatch.setattr(past_picks.PastPicks, "remember", lambda self, picked: None)
    build(tmp_path / "without").train()
    with_memory, without = trained_indices(tmp_path / "with"), trained_indices(tmp_path / "without")
    assert with_memory[0] == without[0] and with_memory != without


def test_scoring_once_is_refused() -> None:
    with pytest.raises(ValueError, match=r"score_once_after=2 with strategy='uds': its memory of past picks changes"):
        SpiceConfig(strategy="uds", score_once_after=2)
