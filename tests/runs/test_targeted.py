"""Runs that aim at validation rows: what they pick, that they resume, and that nothing else changes."""

import pytest
import torch

from spice_trainer import SpiceConfig, attach_spice
from tests.support.trainers import make_trainer, read_records

POOL, PICKS = 32, 4
OF_BOTH = ["hidden_states", "gradients"]


def kinds_of_rows(number, share=0.5, seed=0):
    """Rows of three low or of three high token ids, which any model tells apart."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        low, high = (3, 6) if index < share * number else (50, 53)
        ids = torch.randint(low, high, (int(torch.randint(6, 12, (1,), generator=generator)),), generator=generator)
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": [-100, *ids.tolist()[1:]]})
    order = torch.randperm(number, generator=generator).tolist()
    return [rows[index] for index in order]


TRAINING = kinds_of_rows(128, share=0.25)
WANTED = kinds_of_rows(24, share=1.0, seed=7)


def run(output_dir, *, validation=WANTED, resume=None, **settings):
    config = SpiceConfig(
        **{"strategy": "targeted_matching", "pool_size": POOL, "num_selected": PICKS, "pools_per_step": 2, **settings}
    )
    trainer = make_trainer(output_dir, train_dataset=TRAINING, per_device_train_batch_size=8, num_train_epochs=2)
    attach_spice(trainer, config, validation_dataset=validation)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def share_of_wanted(output_dir):
    picked = [row["index"] for row in read_records(output_dir, "selections")]
    return sum(max(TRAINING[index]["input_ids"]) < 6 for index in picked) / len(picked)


@pytest.mark.parametrize("features", OF_BOTH)
def test_picks_are_like_the_validation_rows(tmp_path, features):
    run(tmp_path / "wanted", matching_features=features)
    run(tmp_path / "mixed", matching_features=features, validation=kinds_of_rows(24, share=0.25, seed=9))
    run(tmp_path / "none", matching_features=features, validation=None)
    assert share_of_wanted(tmp_path / "wanted") > 0.8
    for name in ("mixed", "none"):
        assert 0.15 <= share_of_wanted(tmp_path / name) <= 0.35
    pools = read_records(tmp_path / "wanted", "pools")
    assert all(pool["shift_p_value"] <= 0.01 and 0 < pool["shift_shrinkage"] < 1 for pool in pools)
    assert all(pool["shift_shrinkage"] == 0 for pool in read_records(tmp_path / "mixed", "pools"))
    assert "shift_p_value" not in read_records(tmp_path / "none", "pools")[0]
