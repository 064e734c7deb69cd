"""ε, the inequalities around it and its correlations, against determinants in D dimensions and plain loops."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer import select
from spice_trainer.theory import check_bounds, conflict_groups, correlate, decompose
from spice_trainer.utils.statistics import spearman
from tests.support.theory_oracle import (
    gain,
    information,
    mean_cosine,
    pairs,
    random_gradients,
    rank_correlation,
    squared_overlap,
    squared_span_cosine,
)


@pytest.fixture(params=[0.05, 1.0, 30.0])
def alpha(request):
    return request.param


def bounds_of(gradients, picks, alpha, **options):
    decomposition = decompose(gradients @ gradients.T, picks, fisher_alpha=alpha, **options)
    return {bound.name: bound for bound in check_bounds(decomposition)}


def test_gains_and_epsilons_are_those_of_the_definition(alpha):
    gradients = random_gradients(9, 14, seed=1)
    picks = (4, 0, 7, 2)
    found = decompose(gradients @ gradients.T, picks, fisher_alpha=alpha)
    expected = pairs(9, picks)
    assert found.pair_picks.tolist() == [len(chosen) for chosen, _ in expected]
    assert found.pair_candidates.tolist() == [candidate for _, candidate in expected]
    for place, (chosen, candidate) in enumerate(expected):
        alone, beside = gain(gradients, alpha, [], candidate), gain(gradients, alpha, chosen, candidate)
        assert float(found.pair_base_gains[place]) == pytest.approx(alone, abs=1e-11)
        assert float(found.pair_gains[place]) == pytest.approx(beside, abs=1e-11)
        assert float(found.pair_epsilons[place]) == pytest.approx(alone - beside, abs=1e-11)
        overlap = squared_overlap(gradients, alpha, chosen, candidate)
        assert float(found.pair_overlaps[place]) ** 2 == pytest.approx(overlap, abs=1e-11)
        assert overlap <= squared_span_cosine(gradients, chosen, candidate) + 1e-12
    for order, pick in enumerate(picks):
        alone, beside = gain(gradients, alpha, [], pick), gain(gradients, alpha, picks[:order], pick)
        assert found.gains[order] == pytest.approx(beside, abs=1e-11)
        assert found.epsilons[order] == pytest.approx(alone - beside, abs=1e-11)
    assert found.information == pytest.approx(information(gradients, alpha, picks), abs=1e-11)
    assert found.identity_residual < 1e-12


@pytest.mark.parametrize("conflict_reference", ["selected", "candidates", "pool"])
def test_conflicts_are_those_of_the_selection(conflict_reference):
    gradients = random_gradients(12, 4, seed=2, shared=0.1)
    gradients /= gradients.norm(dim=1, keepdim=True)
    gram = gradients @ gradients.T
    selection = select(gram, 9, conflict_reference=conflict_reference, conflict_penalty=0.01)
    found = decompose(gram, selection.indices, conflict_reference=conflict_reference)
    assert max(selection.conflicts) > 0
    for place, (chosen, candidate) in enumerate(pairs(12, selection.indices)):
        rest = [row for row in range(12) if row not in chosen]
        reference = {"selected": chosen, "candidates": rest, "pool": range(12)}[conflict_reference]
        assert float(found.pair_cosines[place]) == pytest.approx(
            mean_cosine(gradients, reference, candidate), abs=1e-9
        )
        if candidate == selection.indices[len(chosen)]:
            assert float(found.pair_conflicts[place]) == pytest.approx(selection.conflicts[len(chosen)], abs=1e-15)


def test_information_cannot_tell_the_sign_of_a_gradient_but_conflict_can():
    gradients = random_gradients(10, 8, seed=3)
    signs = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    picks = (0, 1, 2, 3)
    plain = decompose(gradients @ gradients.T, picks)
    turned = decompose((signs[:, None] * gradients) @ (signs[:, None] * gradients).T, picks)
    assert torch.allclose(plain.pair_epsilons, turned.pair_epsilons, atol=1e-14)
    assert float((plain.pair_conflicts - turned.pair_conflicts).abs().max()) > 0.3


def test_scales_that_float64_cannot_subtract():
    """A copy of a gradient of norm 1e+20 beside it adds log 2, and what lies at right angles its base gain."""
    gram = torch.tensor([[1e40, 1e40, 0.0], [1e40, 1e40, 0.0], [0.0, 0.0, 1e-6]], dtype=torch.float64)
    found = decompose(gram, (0, 2))
    assert found.identity_residual is None
    assert found.pair_gains.tolist() == pytest.approx([math.log(2), 1e-6], rel=1e-6)
    with mpmath.workdps(60):
        lost = mpmath.log(1 + mpmath.mpf(10) ** 40) - mpmath.log(
            (1 + 2 * mpmath.mpf(10) ** 40) / (1 + mpmath.mpf(10) ** 40)
        )
    assert found.pair_epsilons.tolist() == pytest.approx([float(lost), 0.0], rel=1e-12)


def test_tiny_gradients_keep_their_epsilon():
    """At α K = 1e-12 an ε of 1e-25 is far below the rounding of the gains that it is the difference of."""
    gram = 1e-12 * torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    found = decompose(gram, (0, 1))
    assert float(found.pair_epsilons[0]) == pytest.approx(0.25e-24, rel=1e-6)


def test_rows_that_cannot_be_picked_take_no_part():
    gradients = random_gradients(6, 8, seed=4)
    gram = gradients @ gradients.T
    padded = torch.zeros(8, 8, dtype=torch.float64)
    keep = [0, 1, 3, 4, 5, 7]
    for row, place in enumerate(keep):
        padded[place, keep] = gram[row]
    padded[6, :] = padded[:, 6] = math.nan
    places = [keep[row] for row in (5, 1, 2)]
    found, expected = decompose(padded, places), decompose(gram, (5, 1, 2))
    assert found.pair_candidates.tolist() == [keep[row] for row in expected.pair_candidates.tolist()]
    assert torch.allclose(found.pair_epsilons, expected.pair_epsilons, atol=1e-14)
    assert found.largest_norm == pytest.approx(float(gradients.norm(dim=1).max()))


def test_picks_that_are_not_of_the_pool_are_refused():
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="distinct positions in the pool of 3 candidates.*candidates"):
        decompose(gram, (0, 3))
    with pytest.raises(ValueError, match="distinct"):
        decompose(gram, (0, 0))
    with pytest.raises(ValueError, match="Candidate 1 is among the picks.*another pool"):
        decompose(gram, (0, 1))


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


def test_one_pick_has_no_pairs():
    decomposition = decompose(torch.eye(4), (2,))
    assert decomposition.pair_epsilons.numel() == 0
    assert all(bound.violation_rate is None and bound.num_pairs == 0 for bound in check_bounds(decomposition))
    assert correlate(decomposition).conflict_gain is None
    assert conflict_groups(decomposition) == ()


def test_spearman_against_counting():
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        first = torch.randint(0, 5, (12,), generator=generator).double()
        second = torch.randint(0, 5, (12,), generator=generator).double()
        assert spearman(first, second) == pytest.approx(rank_correlation(first.tolist(), second.tolist()), abs=1e-12)
    assert spearman(torch.ones(5).double(), torch.arange(5).double()) is None
    assert spearman(torch.arange(2).double(), torch.arange(2).double()) is None


def test_correlations_are_means_over_steps():
    gradients = random_gradients(11, 6, seed=8, shared=0.2)
    picks = (0, 5, 9)
    found = correlate(decompose(gradients @ gradients.T, picks))
    names = ("conflict_gain", "conflict_epsilon", "opposition_gain", "opposition_epsilon", "alignment_epsilon")
    columns = {name: [] for name in (*names, "conflict_loss", "alignment_loss")}
    for size in (1, 2):
        rest = [row for row in range(11) if row not in picks[:size]]
        cosines = [mean_cosine(gradients, picks[:size], row) for row in rest]
        alone = [gain(gradients, 1.0, [], row) for row in rest]
        gains = [gain(gradients, 1.0, picks[:size], row) for row in rest]
        lost = [base - left for base, left in zip(alone, gains, strict=True)]
        conflicts = [max(0.0, -cosine) for cosine in cosines]
        shares = [part / base for part, base in zip(lost, alone, strict=True)]
        columns["conflict_gain"].append(rank_correlation(conflicts, gains))
        columns["conflict_epsilon"].append(rank_correlation(conflicts, lost))
        columns["opposition_epsilon"].append(rank_correlation([-cosine for cosine in cosines], lost))
        columns["opposition_gain"].append(rank_correlation([-cosine for cosine in cosines], gains))
        columns["alignment_epsilon"].append(rank_correlation([abs(cosine) for cosine in cosines], lost))
        columns["conflict_loss"].append(rank_correlation(conflicts, shares))
        columns["alignment_loss"].append(rank_correlation([abs(cosine) for cosine in cosines], shares))
    assert found.num_steps == found.num_steps_with_conflict == 2
    for name, values in columns.items():
        assert getattr(found, name) == pytest.approx(sum(values) / 2, abs=1e-9), name


def test_conflict_groups_are_thirds_by_conflict():
    gradients = random_gradients(9, 7, seed=9, shared=0.1)
    decomposition = decompose(gradients @ gradients.T, (2, 4, 6))
    rows = sorted(
        zip(
            decomposition.pair_cosines.tolist(),
            decomposition.pair_gains.tolist(),
            decomposition.pair_epsilons.tolist(),
            decomposition.pair_base_gains.tolist(),
            strict=True,
        ),
        reverse=True,
    )
    assert len(rows) == 15
    for number, group in enumerate(conflict_groups(decomposition)):
        third = rows[5 * number : 5 * number + 5]
        assert group.group == ("low", "medium", "high")[number]
        assert group.size == 5
        assert group.mean_conflict == pytest.approx(sum(max(0.0, -row[0]) for row in third) / 5)
        assert group.mean_cosine == pytest.approx(sum(row[0] for row in third) / 5)
        assert group.mean_gain == pytest.approx(sum(row[1] for row in third) / 5)
        assert group.mean_epsilon == pytest.approx(sum(row[2] for row in third) / 5)
        assert group.mean_decay == pytest.approx(sum(row[2] / row[3] for row in third) / 5)
