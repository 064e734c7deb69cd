"""ε and its parts against determinants in D dimensions and plain loops."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from spice_trainer import select
from spice_trainer.theory import check_bounds, conflict_groups, correlate, decompose
from tests.support.theory_oracle import (
    gain,
    information,
    mean_cosine,
    pairs,
    random_gradients,
    squared_overlap,
    squared_span_cosine,
)


@pytest.fixture(params=[0.05, 1.0, 30.0])
def alpha(request):
    return request.param


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


def rounding_of_cosine(gram, reference, candidate):
    """Bounds the rounding of a unit row's cosine with a mean: γ = n u of n additions, times the magnitudes added."""
    if not reference:
        return 0.0
    products, squares = gram[candidate, reference], gram[reference][:, reference]
    length = squares.sum().sqrt()
    of_products = len(reference) * products.abs().sum() / length
    of_length = len(reference) ** 2 * squares.abs().sum() / squares.sum() / 2 * products.sum().abs() / length
    # One rounding each of root, quotient and product beside the sums.
    return float(of_products + of_length + 3) * 2.0**-53


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
            error = abs(float(found.pair_conflicts[place]) - selection.conflicts[len(chosen)])
            assert error <= 2 * rounding_of_cosine(gram, list(reference), candidate)


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


def test_one_pick_has_no_pairs():
    decomposition = decompose(torch.eye(4), (2,))
    assert decomposition.pair_epsilons.numel() == 0
    assert all(bound.violation_rate is None and bound.num_pairs == 0 for bound in check_bounds(decomposition))
    assert correlate(decomposition).conflict_gain is None
    assert conflict_groups(decomposition) == ()
