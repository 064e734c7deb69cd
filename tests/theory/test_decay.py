"""Half-life, AUMG and greedy picks from thirds of a pool, against plain loops."""

from __future__ import annotations

import pytest
import torch

from spice_trainer.theory import aumg, group_decays, half_life
from tests.support.theory_oracle import gain, random_gradients


def test_half_life_and_aumg():
    assert half_life([8.0, 5.0, 4.0, 1.0]) == 2
    assert half_life([8.0, 4.0]) == 1
    assert half_life([8.0, 5.0]) is None
    assert half_life([]) is None
    assert half_life([0.0]) is None
    assert aumg([8.0, 5.0, 4.0, 1.0]) == pytest.approx(18 / 32)
    assert aumg([3.0]) == 1.0
    assert aumg([]) is None
    assert aumg([0.0, 1.0]) is None


def test_group_decays_pick_within_thirds():
    gradients = random_gradients(13, 9, seed=5, shared=0.5)
    mean = gradients.mean(dim=0)
    cosines = [float(row @ mean / row.norm() / mean.norm()) for row in gradients]
    order = sorted(range(13), key=lambda row: -cosines[row])
    thirds = order[:5], order[5:9], order[9:]
    for name, third, decay in zip(
        ("low", "medium", "high"), thirds, group_decays(gradients @ gradients.T, 6), strict=True
    ):
        picks, gains = [], []
        # As many as the smallest third has.
        for _ in range(4):
            left = {row: gain(gradients, 1.0, picks, row) for row in third if row not in picks}
            picks.append(max(left, key=left.__getitem__))
            gains.append(left[picks[-1]])
        assert (decay.group, decay.size) == (name, len(third))
        assert decay.mean_cosine == pytest.approx(sum(cosines[row] for row in third) / len(third), abs=1e-6)
        assert list(decay.gains) == pytest.approx(gains, abs=1e-11)
        assert decay.half_life == half_life(gains)
        assert decay.aumg == pytest.approx(aumg(gains))
        assert decay.information == pytest.approx(sum(gains))
    assert group_decays(torch.eye(5), 2) == ()
