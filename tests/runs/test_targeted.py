"""Runs that aim at validation rows: what they pick, that they resume, and that nothing else changes."""

import pytest
import torch

from spice_trainer import SpiceConfig, attach_spice
from tests.support.trainers import make_trainer, read_records, same_weights, trainable_weights

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


def run(output_dir, *, validation=WANTED, resume=None, epochs=2, batch=8, **settings):
    config = SpiceConfig(
        **{"strategy": "targeted_matching", "pool_size": POOL, "num_selected": PICKS, "pools_per_step": 2, **settings}
    )
    arguments = {"per_device_train_batch_size": batch, "num_train_epochs": epochs, "save_steps": 5}
    trainer = make_trainer(output_dir, train_dataset=TRAINING, save_strategy="steps", **arguments)
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


def test_a_row_is_picked_again_as_often_as_it_may(tmp_path):
    counts = {}
    for max_repeats in (0, 1, None):
        folder = tmp_path / str(max_repeats)
        run(folder, max_repeats=max_repeats, epochs=6)
        hashes = [pick["token_hash"] for pick in read_records(folder, "selections")]
        counts[max_repeats] = max(hashes.count(one) for one in set(hashes))
        assert len(hashes) == 6 * 16
    assert counts[0] == 1 and counts[1] == 2 and counts[None] > 2


def test_repeats_are_counted_on_after_a_resume(tmp_path):
    options = {"max_repeats": 0, "epochs": 4}
    whole = run(tmp_path / "whole", **options)
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-5"), **options)
    assert same_weights(trainable_weights(whole.model), trainable_weights(resumed.model))
    for name in ("selections", "pools"):
        assert read_records(tmp_path / "whole", name) == read_records(tmp_path / "resumed", name)
    with pytest.raises(ValueError, match="does not say how often rows were picked"):
        run(tmp_path / "free", epochs=4)
        run(tmp_path / "limited", resume=str(tmp_path / "free" / "checkpoint-5"), **options)


def test_more_picks_than_the_limit_leaves_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"max_repeats=0 lets 128 rows be picked 128 times, and 40 steps pick 320"):
        run(tmp_path, max_repeats=0, epochs=20)
