"""Correlations of conflict with gain and ε, and thirds by conflict, against plain loops."""

from __future__ import annotations

import pytest

from spice_trainer.theory import conflict_groups, correlate, decompose
from tests.support.theory_oracle import gain, mean_cosine, random_gradients, rank_correlation


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
