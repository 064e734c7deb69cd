"""Curvature and guarantees against all subsets of small pools."""

from __future__ import annotations

import math

import pytest
import torch

from spice_trainer import select
from spice_trainer.theory import best_subset, curvature_ratio, leave_one_out_gains, measure_guarantees, total_curvature
from tests.support.theory_oracle import best_information, curvature, gain, information, random_gradients


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7])
def test_leave_one_out_gains_and_curvature(num_rows):
    gradients = random_gradients(num_rows, 5, seed=num_rows)
    gram = gradients @ gradients.T
    found = leave_one_out_gains(gram, fisher_alpha=2.0)
    for row in range(num_rows):
        others = [other for other in range(num_rows) if other != row]
        assert float(found[row]) == pytest.approx(gain(gradients, 2.0, others, row), abs=1e-12)
    assert total_curvature(gram, fisher_alpha=2.0) == pytest.approx(curvature(gradients, 2.0), abs=1e-10)


def test_curvature_at_its_ends():
    assert total_curvature(torch.eye(4)) == 0.0
    # Two copies: the second adds log(1 + 2a) − log(1 + a) of log(1 + a), next to nothing as a grows.
    assert total_curvature(torch.full((2, 2), 1e30), fisher_alpha=1.0) == pytest.approx(
        1 - math.log(2) / math.log(1e30)
    )
    assert total_curvature(torch.zeros(3, 3)) is None
    assert curvature_ratio(0.0) == 1.0
    assert curvature_ratio(1.0) == pytest.approx(1 - 1 / math.e)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        curvature_ratio(1.5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("num_selected", [1, 3])
def test_guarantees_hold_beside_the_best_subset(seed, num_selected):
    alpha = (0.1, 1.0, 40.0)[seed % 3]
    gradients = random_gradients(9, 4, seed=seed, shared=(0.0, 2.0)[seed % 2])
    gram = gradients @ gradients.T
    best = best_information(gradients, alpha, num_selected)
    picks = select(gram, num_selected, fisher_alpha=alpha, conflict_penalty=0.0, tie_tolerance=0.0).indices
    reached = information(gradients, alpha, picks)
    found = measure_guarantees(gram, picks, fisher_alpha=alpha)
    assert found.optimum_ratio == pytest.approx(reached / best, abs=1e-12)
    assert found.shortfall == pytest.approx(0.0, abs=1e-12)
    # The classical guarantees, and a certificate that claims no more than is true.
    assert reached / best >= found.curvature_ratio - 1e-12
    assert found.curvature_ratio >= 1 - 1 / math.e - 1e-12
    assert found.certified_ratio <= reached / best + 1e-12
    if num_selected == 1:
        assert found.certified_ratio == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(8))
def test_a_penalty_costs_no_more_than_its_shortfall(seed):
    gradients = random_gradients(10, 12, seed=seed, shared=0.0)
    gram = gradients @ gradients.T
    penalty, size = 2.0, 4
    picks = select(gram, size, conflict_penalty=penalty, tie_tolerance=0.0).indices
    found = measure_guarantees(gram, picks)
    shortfall = max(
        max(gain(gradients, 1.0, picks[:order], row) for row in range(10) if row not in picks[:order])
        - gain(gradients, 1.0, picks[:order], pick)
        for order, pick in enumerate(picks)
    )
    assert found.shortfall == pytest.approx(shortfall, abs=1e-11)
    assert found.shortfall <= penalty
    best = best_information(gradients, 1.0, size)
    share = 1 - (1 - 1 / size) ** size
    reached = information(gradients, 1.0, picks)
    assert reached >= share * (best - size * shortfall) - 1e-12
    # Also of picks that are not greedy at all.
    assert found.certified_ratio <= reached / best + 1e-12


def test_the_certificate_is_sound_for_bad_picks():
    gradients = random_gradients(8, 6, seed=3)
    picks = sorted(range(8), key=lambda row: float(gradients[row].norm()))[:3]
    found = measure_guarantees(gradients @ gradients.T, picks)
    ratio = information(gradients, 1.0, picks) / best_information(gradients, 1.0, 3)
    assert found.certified_ratio <= ratio < 0.7
    assert found.optimum_ratio == pytest.approx(ratio)


def test_best_subset_is_the_best_and_gives_up_in_time():
    gradients = random_gradients(8, 6, seed=4)
    gram = gradients @ gradients.T
    picks, value = best_subset(gram, 3)
    assert value == pytest.approx(best_information(gradients, 1.0, 3), abs=1e-12)
    assert information(gradients, 1.0, picks) == pytest.approx(value, abs=1e-12)
    assert best_subset(gram, 3, max_subsets=55) is None
    assert best_subset(gram, 3, max_subsets=56) is not None
    assert best_subset(1e12 * gram, 3) is None
    # Of fewer sound rows than asked for, all.
    assert best_subset(torch.diag(torch.tensor([1.0, 0.0, 2.0])), 5)[0] == (0, 2)
