"""Quotas by answer length: whole numbers that sum to K, by largest remainder, and a greedy rule that keeps to them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer import SpiceConfig
from spice_trainer.config import STRATEGIES
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.quotas import (
    QuotaRoom,
    largest_remainders,
    quotas_by_pool,
    quotas_by_reference,
    without_quotas,
)
from spice_trainer.selection.target import Target
from tests.selection.test_strategies import inputs_of, pool
from tests.support.strategy_oracles import apportion


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), st.integers(1, 200))
def test_largest_remainders_are_those_of_exact_fractions(shares, total):
    found = largest_remainders(torch.tensor(shares, dtype=torch.float64), total)
    assert sum(found) == total
    assert list(found) == apportion(shares, total)


def test_shares_of_nothing_go_to_the_first():
    assert largest_remainders(torch.zeros(3, dtype=torch.float64), 5) == (5, 0, 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(1, 6),
    st.integers(0, 2**31),
)
def test_strata_of_a_pool_are_of_equal_size_and_ordered_by_length(lengths, num_selected, num_bins, seed):
    eligible = torch.rand(len(lengths), generator=torch.Generator().manual_seed(seed)) < 0.8
    if not eligible.any():
        return
    quotas = quotas_by_pool(lengths, eligible, num_selected, num_bins=num_bins)
    assert sum(quotas.sizes) == num_selected
    counts = torch.bincount(quotas.bins[eligible], minlength=num_bins)
    assert int(counts.max() - counts.min()) <= 1
    for low, high in zip(range(num_bins - 1), range(1, num_bins), strict=True):
        below = [n for n, b, e in zip(lengths, quotas.bins, eligible, strict=True) if e and b == low]
        above = [n for n, b, e in zip(lengths, quotas.bins, eligible, strict=True) if e and b == high]
        assert not below or not above or max(below) <= min(above)


def test_bins_of_reference_rows_are_their_quartiles():
    reference = [10, 20, 30, 40, 50, 60, 70, 80]
    quotas = quotas_by_reference([5, 20, 21, 40, 41, 60, 61, 500], reference, torch.ones(8).double(), 12, num_bins=4)
    assert quotas.bins.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert quotas.sizes == (3, 3, 3, 3)


def test_quantiles_are_numpys_where_rows_weigh_the_same():
    generator = np.random.default_rng(0)
    for _ in range(50):
        reference = generator.integers(1, 200, size=generator.integers(1, 40)).tolist()
        lengths = generator.integers(1, 300, size=30).tolist()
        edges = np.quantile(reference, [0.25, 0.5, 0.75], method="inverted_cdf")
        quotas = quotas_by_reference(lengths, reference, torch.ones(len(reference)).double(), 12, num_bins=4)
        assert quotas.bins.tolist() == [int((edges < length).sum()) for length in lengths]
        shares = np.bincount([int((edges < length).sum()) for length in reference], minlength=4)
        assert list(quotas.sizes) == apportion(shares.tolist(), 12)


def test_a_set_counts_by_its_weight():
    # Three quarters of the weight lie on the two short rows.
    weights = torch.tensor([0.375, 0.375, 0.0625, 0.0625, 0.0625, 0.0625], dtype=torch.float64)
    quotas = quotas_by_reference([1, 100], [1, 2, 100, 100, 100, 100], weights, 16, num_bins=2)
    assert quotas.bins.tolist() == [0, 1]
    assert quotas.sizes == (12, 4)


def test_a_bin_without_candidates_leaves_its_picks_to_all():
    room = QuotaRoom(quotas_by_reference([5, 6, 6, 90], [5, 6, 80, 90], torch.ones(4).double(), 4, num_bins=2))
    remaining = torch.ones(4, dtype=torch.bool)
    for index in (0, 1):
        room.take(index)
        remaining[index] = False
    assert room.among(remaining).tolist() == [False, False, False, True]
    room.take(3)
    remaining[3] = False
    assert room.among(remaining).tolist() == [False, False, True, False]


QUOTA_RULES = [name for name in STRATEGIES if name not in ("targeted_matching", "length_matched")]


@pytest.mark.parametrize("kind", ["pool", "validation"])
@pytest.mark.parametrize("name", [*QUOTA_RULES, "targeted_matching", "length_matched"])
def test_every_rule_keeps_to_quotas(name, kind):
    known = pool(24, 30, seed=1)
    known["label_tokens"] = tuple([3] * 12 + [50] * 12)
    config = SpiceConfig(
        strategy=name,
        matching_features="gradients",
        length_quotas=kind,
        length_bins=2,
        pool_size=24,
        num_selected=8,
        conflict_penalty=0.1,
    )
    scores = replace(inputs_of(known, target_lengths=(3, 3, 3, 50)), num_tokens=(60,) * 24)
    selection = select_pool(scores, 8, config, seed=0, step=0)
    of_short = sum(pick.label_tokens == 3 for pick in selection.picks)
    # Of the rows to do well on three quarters are short: the median is 3.
    assert (of_short, len(selection.picks)) == ((4, 8) if kind == "pool" else (6, 8))


@pytest.mark.parametrize("name", ["spice", "matching", "top_norm", "targeted_matching"])
def test_no_quotas_are_one_bin(name):
    known = pool(20, 30, seed=2)
    config = SpiceConfig(
        strategy=name, matching_features="gradients", length_quotas="none", pool_size=20, num_selected=6
    )
    scores = replace(inputs_of(known), num_tokens=(60,) * 20)
    free = select_pool(scores, 6, config, seed=0, step=0)
    one_bin = SpiceConfig(**{**config.to_dict(), "length_quotas": "pool", "length_bins": 1})
    assert select_pool(scores, 6, one_bin, seed=0, step=0).indices == free.indices
    assert without_quotas(20, 6).sizes == (6,)


def test_validation_quotas_need_validation_rows():
    config = SpiceConfig(length_quotas="validation", pool_size=20, num_selected=6)
    scores = inputs_of(pool(20, 30))
    with pytest.raises(ValueError, match='length_quotas="validation" needs validation rows'):
        select_pool(type(scores)(sound=scores.sound, gram=scores.gram, label_tokens=scores.label_tokens), 6, config)
    assert Target(()).num_rows == 0
