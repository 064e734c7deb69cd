"""The inequalities around ε, held against plain loops over pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer.theory import check_bounds, decompose
from tests.support.theory_oracle import gain, mean_cosine, pairs, random_gradients


def bounds_of(gradients, picks, alpha, **options):
    decomposition = decompose(gradients @ gradients.T, picks, fisher_alpha=alpha, **options)
    return {bound.name: bound for bound in check_bounds(decomposition)}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    alpha=st.sampled_from([1e-6, 1e-2, 1.0, 50.0, 1e4]),
    shared=st.sampled_from([0.0, 0.5, 3.0]),
    num_copies=st.integers(0, 3),
)
def test_what_is_proved_is_never_violated(seed, alpha, shared, num_copies):
    gradients = random_gradients(10, 6, seed=seed, shared=shared)
    for copy in range(num_copies):
        gradients[copy] = (-1) ** copy * gradients[9 - copy] * (copy + 1)
    bounds = bounds_of(gradients, (0, 9, 4, 5), alpha)
    for name in ("overlap", "coherence", "mean_floor"):
        assert bounds[name].proved
        assert bounds[name].violation_rate == 0.0
        assert 0.0 <= bounds[name].tightness <= 1.0 + 1e-6
    assert bounds["overlap"].constant <= alpha * (1 + 1e-6)


def test_proved_bounds_are_tight_where_they_can_be():
    """One pick: the coherence is the whole story. Weak gradients of one length: log1p is linear and C = α exact."""
    gradients = random_gradients(8, 5, seed=5)
    gradients /= gradients.norm(dim=1, keepdim=True)
    bounds = bounds_of(gradients, (3, 1), 1e-7)
    assert bounds["overlap"].tightness == pytest.approx(1.0, rel=1e-5)
    assert bounds["overlap"].constant == pytest.approx(1e-7, rel=1e-5)
    assert bounds["coherence"].tightness == pytest.approx(1.0, rel=1e-5)
    # With one pick ḡ is that pick, whatever α.
    assert bounds_of(gradients, (3, 1), 20.0)["mean_floor"].tightness == pytest.approx(1.0, rel=1e-9)


def test_conflict_bounds_nothing_where_candidates_agree():
    gradients = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2]], dtype=torch.float64)
    bounds = bounds_of(gradients, (0, 1), 1.0)
    assert not bounds["conflict"].proved
    assert bounds["conflict"].violation_rate == 1.0
    assert bounds["conflict"].constant is None
    assert bounds["alignment"].violation_rate == 0.0
    opposed = bounds_of(gradients * torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64), (0, 1), 1.0)
    assert opposed["conflict"].violation_rate == 0.0
    assert opposed["conflict"].constant == pytest.approx(opposed["alignment"].constant)


def test_violations_and_constants_against_a_loop():
    # Directions in a plane. At right angles to the mean of two picks a third may still lie close to one of them.
    angles = torch.tensor([0.0, 130.0, 155.0, 20.0, 65.0, 200.0, 310.0]).double().deg2rad()
    gradients = torch.stack([angles.cos(), angles.sin()], dim=1)
    picks, alpha = (0, 1, 5), 0.7
    largest = float(gradients.norm(dim=1).max()) ** 2
    violated, ratios = 0, []
    expected = pairs(7, picks)
    for chosen, candidate in expected:
        epsilon = gain(gradients, alpha, [], candidate) - gain(gradients, alpha, chosen, candidate)
        cosine = abs(mean_cosine(gradients, chosen, candidate))
        violated += epsilon > alpha * cosine * largest
        ratios.append(epsilon / (cosine * largest))
    bound = bounds_of(gradients, picks, alpha)["alignment"]
    assert 0 < violated < len(expected)
    assert bound.num_pairs == len(expected)
    assert bound.violation_rate == pytest.approx(violated / len(expected))
    assert bound.constant == pytest.approx(max(ratios), rel=1e-6)
