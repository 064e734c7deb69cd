"""Aiming at validation rows leaves no trace: with its picks fixed beforehand a run is the same without it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from spice_trainer import SpiceConfig, attach_spice, detach_spice
from tests.runs.test_side_effects import noisy_collate
from tests.runs.test_targeted import TRAINING, WANTED
from tests.support.replays import train_and_replay
from tests.support.traces import random_states, trainer_state
from tests.support.trainers import collate, make_trainer

AIMED = {"strategy": "targeted_matching"}
RULES = {
    "hidden states": AIMED,
    "gradients": AIMED | {"matching_features": "gradients", "validation_every": 2},
    "lengths": {"strategy": "length_matched"},
}


@pytest.mark.parametrize("spice", RULES.values(), ids=RULES)
def test_run_with_an_aim_equals_run_without(
    spice: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(output_dir: Path) -> Any:
        torch.manual_seed(0)
        random.seed(1)
        np.random.seed(1)
        return make_trainer(
            output_dir,
            spice={"pool_size": 16, "scoring_tokens_per_batch": 64} | spice,
            train_dataset=TRAINING[:64],
            eval_dataset=TRAINING[64:72],
            eval_strategy="epoch",
            validation_dataset=WANTED,
            data_collator=noisy_collate,
            lora_dropout=0.3,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            neftune_noise_alpha=5.0,
        )

    train_and_replay(make, tmp_path, monkeypatch, num_steps=4)


@pytest.mark.parametrize("spice", RULES.values(), ids=RULES)
def test_attaching_leaves_the_trainer_as_it_was(spice: dict[str, Any], tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, train_dataset=TRAINING, eval_dataset=TRAINING[:8], data_collator=noisy_collate, lora_dropout=0.3,
        dataloader_num_workers=1, dataloader_persistent_workers=True,
    )  # fmt: skip
    evaluated = trainer.get_eval_dataloader()
    before, random_before = trainer_state(trainer), random_states()
    handle = attach_spice(trainer, SpiceConfig(pool_size=16, num_selected=4, **spice), validation_dataset=WANTED)
    assert random_states() == random_before
    rows = handle.sampler  # Bound when training begins.
    assert rows is not None
    (read,) = trainer._spice._validation.values()
    assert [row["labels"] for row in read.dataset] == [row["labels"] for row in WANTED]
    # A loader with workers that persist is the evaluation's own, before and after.
    assert trainer.get_eval_dataloader() is evaluated and evaluated.dataset is trainer.eval_dataset
    detach_spice(trainer)
    assert trainer_state(trainer) == before


class Rows(TorchDataset[Any]):
    """Rows with a column that the model does not take."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "source": "web"}


def altering_collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A collator that takes its rows apart."""
    batch = collate(rows)
    for row in rows:
        row.pop("labels")
        row["input_ids"] = []
    return batch


def test_rows_of_any_kind_are_read_alike_and_stay_as_they_are(tmp_path: Path) -> None:
    from datasets import Dataset

    picks = []
    own = [dict(row) for row in WANTED]
    kinds = {
        "list": own,
        "torch": Rows(WANTED),
        "datasets": Dataset.from_list(WANTED).add_column("source", ["x"] * 24),
    }
    for name, validation in kinds.items():
        collator = altering_collate if name == "list" else collate
        trainer = make_trainer(
            tmp_path / name, spice=AIMED | {"pool_size": 16}, train_dataset=[dict(row) for row in TRAINING],
            validation_dataset=validation, data_collator=collator, max_steps=3,
        )  # fmt: skip
        heard: list[Any] = []
        trainer._spice.sampler.add_listener(lambda selection, heard=heard: heard.append(selection.indices))
        if name == "list":
            # Training itself takes rows apart that a list holds; looking at them does not.
            assert own == WANTED
            trainer._spice.begin_run()
            sampler = trainer._spice.sampler
            for step in range(3):
                list(sampler.scorer.score(sampler.schedule.pools(0, step).pools))
            assert own == WANTED
            continue
        trainer.train()
        picks.append(heard)
    assert len(picks) == 2 and picks[0] == picks[1]
