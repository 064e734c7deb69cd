"""Curvature, guarantees and decay against all subsets of small pools; one pool's analysis and its means over pools."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from spice_trainer import select
from spice_trainer.theory import (
    analyse_pool,
    aumg,
    best_subset,
    curvature_ratio,
    decompose,
    group_decays,
    half_life,
    leave_one_out_gains,
    measure_guarantees,
    summarise,
    total_curvature,
)
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


def test_a_pool_is_analysed_with_picks_given_or_made():
    gradients = random_gradients(12, 10, seed=6)
    gram = gradients @ gradients.T
    rules = {"fisher_alpha": 3.0, "conflict_penalty": 0.5, "conflict_reference": "candidates"}
    selection = select(gram, 4, **rules)
    made = analyse_pool(gram, 4, **rules)
    given = analyse_pool(gram, selection, fisher_alpha=3.0, conflict_reference="candidates")
    listed = analyse_pool(gram.float(), list(selection.indices), fisher_alpha=3.0, conflict_reference="candidates")
    assert made.decomposition.indices == selection.indices
    assert made.as_numbers() == given.as_numbers()
    # Against whom a conflict is matters here, and reaches the numbers.
    other = analyse_pool(gram, selection, fisher_alpha=3.0, conflict_reference="selected")
    assert made.as_numbers()["group/low/mean_cosine"] != other.as_numbers()["group/low/mean_cosine"]
    expected = decompose(gram, selection.indices, fisher_alpha=3.0, conflict_reference="candidates")
    assert torch.equal(made.decomposition.pair_cosines, expected.pair_cosines)
    assert listed.as_numbers()["information"] == pytest.approx(selection.information, rel=1e-5)
    numbers = made.as_numbers()
    assert numbers["information"] == pytest.approx(numbers["base_gain"] - numbers["epsilon"], abs=1e-12)
    assert numbers["group/low/size"] == numbers["num_pairs"] / 3 == 10
    json.dumps(numbers, allow_nan=False)


def test_a_pool_without_a_sound_row():
    theory = analyse_pool(torch.zeros(4, 4), 2)
    assert theory.num_sound == 0
    assert theory.half_life is None
    assert theory.guarantees.certified_ratio is None
    json.dumps(theory.as_numbers(), allow_nan=False)


def test_summaries_are_means_of_the_pools_that_have_the_number():
    pools = [
        analyse_pool(gradients @ gradients.T, 3) for gradients in (random_gradients(9, 8, seed=s) for s in range(3))
    ]
    # Gains of equal, orthogonal gradients never halve.
    flat = analyse_pool(torch.eye(9), 3)
    summary = summarise([*pools, flat])
    values = [pool.aumg for pool in [*pools, flat]]
    assert summary["aumg"].mean == pytest.approx(statistics.fmean(values))
    assert summary["aumg"].standard_error == pytest.approx(statistics.stdev(values) / 2)
    assert (summary["aumg"].minimum, summary["aumg"].maximum) == (min(values), max(values))
    reached = [pool.half_life for pool in pools if pool.half_life is not None]
    assert summary["half_life"].num_pools == len(reached) < 4
    assert summarise([flat])["aumg"].standard_error is None
    assert "half_life" not in summarise([flat])
    with pytest.raises(ValueError, match="at least one analysed pool"):
        summarise([])
