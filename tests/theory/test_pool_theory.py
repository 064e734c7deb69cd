"""One pool's analysis and its means over pools."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from spice_trainer import select
from spice_trainer.theory import analyse_pool, decompose, summarise
from tests.support.theory_oracle import random_gradients


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
