"""Gains, conflicts and picks of a large pool, computed where they are read, against those of its whole Gram matrix."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer import SpiceConfig
from spice_trainer.data.rows import RowShape
from spice_trainer.scoring.features import OwnedFeatures
from spice_trainer.scoring.measure import from_features, from_shapes
from spice_trainer.selection import large_pool
from spice_trainer.selection.gram import scale_rows
from spice_trainer.selection.greedy import PickOptions, greedy, select, select_from_gradients
from spice_trainer.selection.information import ExactInformation, build_information, gains_in_order
from spice_trainer.selection.large_pool import GramRows, LargePoolInformation
from spice_trainer.selection.pool import select_pool
from tests.support.greedy_oracle import greedy_oracle


def some_rows(num_rows: int, dimension: int, seed: int, spread: float = 0.6) -> torch.Tensor:
    """Clusters around a few opposed directions, norms over a range, copies, and rows of zeros and nan."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, dimension, generator=generator, dtype=torch.float64)
    rows = torch.randn(num_rows, dimension, generator=generator, dtype=torch.float64)
    signs = torch.randn(num_rows, 1, generator=generator).sign()
    rows += signs * centres[torch.randint(0, 3, (num_rows,), generator=generator)]
    rows *= torch.exp(spread * torch.randn(num_rows, 1, generator=generator, dtype=torch.float64)) / dimension**0.5
    if num_rows > 8:
        rows[5], rows[7], rows[2], rows[6, 0] = rows[1], -2.0 * rows[1], 0.0, math.nan
    return rows


def as_rows(rows: torch.Tensor) -> GramRows:
    """What stands for their Gram matrix."""
    rows = rows.clone()
    found = scale_rows(rows)
    return GramRows(rows, found, found.norms)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and rounds in pools that are quick to check, and no matrix at once."""
    monkeypatch.setattr(large_pool, "_BLOCK", 4)
    monkeypatch.setattr(LargePoolInformation, "block_size", 2)
    monkeypatch.setattr(large_pool, "_SHARE_IN_PARTS", 10.0)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 30), st.integers(0, 10**6), st.sampled_from([0.0, 0.6, 3.0]),
    st.sampled_from([0.0, 0.1, 3.0]), st.sampled_from(["selected", "candidates", "pool"]), st.integers(1, 40),
)  # fmt: skip
def test_picks_are_those_of_the_whole_matrix(num_rows, dimension, seed, spread, penalty, reference, num_selected):
    gram = as_rows(some_rows(num_rows, dimension, seed, spread))
    options = PickOptions(fisher_alpha=2.0, conflict_penalty=penalty, conflict_reference=reference)
    found = greedy(LargePoolInformation(gram, fisher_alpha=2.0), gram, num_selected, options)
    expected = greedy(ExactInformation(gram.whole, fisher_alpha=2.0), gram.whole, num_selected, options)
    assert found.indices == expected.indices
    assert found.gains == pytest.approx(expected.gains, rel=1e-7, abs=1e-9)
    assert found.conflicts == pytest.approx(expected.conflicts, abs=1e-7)
    assert found.information == pytest.approx(expected.information, rel=1e-9)
    fewer = greedy(LargePoolInformation(gram, fisher_alpha=2.0), gram, max(1, num_selected // 2), options)
    assert fewer.indices == found.indices[: len(fewer.indices)]


@pytest.mark.parametrize("reference", ["selected", "candidates"])
@pytest.mark.parametrize("penalty", [0.0, 0.1, 3.0])
def test_picks_equal_brute_force(monkeypatch: pytest.MonkeyPatch, penalty: float, reference: str) -> None:
    monkeypatch.setattr("spice_trainer.selection.greedy.LARGE_POOL", 1)
    rows = some_rows(20, 12, seed=3)
    rules = {"fisher_alpha": 2.0, "conflict_penalty": penalty, "conflict_reference": reference}
    picked, _ = greedy_oracle(rows, 9, **rules)
    found = select_from_gradients(rows, 9, **rules)
    assert found.indices == tuple(option[0] for option in picked)
    assert found.gains == pytest.approx([option[1] for option in picked], abs=1e-9)
    assert found.conflicts == pytest.approx([option[2] for option in picked], abs=1e-7)


@pytest.mark.parametrize("stopping", [{"stop_ratio": 0.6}, {"min_gain": 0.5}, {"tie_tolerance": 0.1}])
def test_stopping_and_ties(stopping: dict[str, float]) -> None:
    gram = as_rows(some_rows(40, 20, seed=4))
    options = PickOptions(**stopping)
    found = greedy(LargePoolInformation(gram, fisher_alpha=1.0), gram, 30, options)
    expected = select(gram.whole, 30, **stopping)
    assert (found.indices, found.stopped_early) == (expected.indices, expected.stopped_early)
    assert found.stopped_early is ("tie_tolerance" not in stopping)


def test_the_matrix_and_its_parts() -> None:
    rows = some_rows(30, 25, seed=5)
    gram = as_rows(rows)
    expected = rows @ rows.T
    sound = gram.lengths > 0
    assert sound.nonzero()[:, 0].tolist() == [row for row in range(30) if row not in (2, 6)]
    expected = torch.where(sound[:, None] & sound, expected, 0.0)
    torch.testing.assert_close(gram.whole, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.diagonal(), expected.diagonal(), rtol=1e-12, atol=0)
    other = as_rows(rows)
    for some in ([3, 9, 1], [9, 8, 7, 5, 4], [3]):
        part = other.block(torch.tensor(some), torch.tensor([1, 5, 7, 20]))
        torch.testing.assert_close(part, expected[some][:, [1, 5, 7, 20]], rtol=1e-12, atol=1e-12)
    # A copy, and an opposed one.
    places = torch.tensor([1, 5, 7])
    cosines = other.block(places, places) / torch.outer(other.lengths[places], other.lengths[places])
    assert cosines.round(decimals=15).tolist() == [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    mask = torch.arange(30) % 2 == 0
    torch.testing.assert_close(other.masked(mask).whole, torch.where(mask[:, None] & mask, expected, 0.0))
    products, square = other.mean_products(sound & mask)
    torch.testing.assert_close(products, expected[:, sound & mask].sum(dim=1))
    assert square == pytest.approx(float(expected[sound & mask][:, sound & mask].sum()))


def test_few_products_where_norms_differ_and_all_at_once_where_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(400, 300, generator=generator, dtype=torch.float64) / 300**0.5
    computed = []
    compute = GramRows._compute
    monkeypatch.setattr(
        GramRows, "_compute", lambda self, r, c: computed.append(len(r) * len(c)) or compute(self, r, c)
    )
    monkeypatch.setattr(large_pool, "_SHARE_IN_PARTS", 1 / 32)
    gram = as_rows(rows * torch.exp(torch.randn(400, 1, generator=generator)))
    greedy(LargePoolInformation(gram, fisher_alpha=1.0), gram, 40, PickOptions())
    assert sum(computed) < 400 * 40 / 4 and "whole" not in gram.__dict__
    gram = as_rows(rows / rows.norm(dim=1, keepdim=True))
    found = greedy(LargePoolInformation(gram, fisher_alpha=1.0), gram, 200, PickOptions())
    assert "whole" in gram.__dict__
    assert found.indices == select(gram.whole, 200).indices


def test_gradients_beyond_float64_take_the_whole_matrix() -> None:
    gram = as_rows(some_rows(12, 30, seed=7) * 1e6)
    measure = build_information("exact", gram=gram, fisher_alpha=1.0)
    assert isinstance(measure, ExactInformation)
    assert greedy(measure, gram, 4, PickOptions()).indices == select(gram.whole, 4).indices


def test_gains_in_order_are_those_of_adding_one_by_one() -> None:
    gram = as_rows(some_rows(30, 25, seed=8))
    order = [9, 1, 20, 5, 12]
    expected = list(map(ExactInformation(gram.whole, fisher_alpha=1.0).add, order))
    assert gains_in_order(lambda: LargePoolInformation(gram, fisher_alpha=1.0), order) == pytest.approx(expected)
    assert list(map(LargePoolInformation(gram, fisher_alpha=1.0).add, order)) == pytest.approx(expected)


@pytest.mark.parametrize("strategy", ["spice", "fisher", "dpp", "matching"])
@pytest.mark.parametrize("normalization", ["sqrt_tokens", "unit"])
def test_a_large_pool_is_selected_like_a_small_one(
    monkeypatch: pytest.MonkeyPatch, strategy: str, normalization: str
) -> None:
    rows = some_rows(40, 60, seed=9).float()
    known = from_shapes(0, range(100, 140), [RowShape(30, 3 + place % 7, True, ("input_ids",)) for place in range(40)])
    config = SpiceConfig(pool_size=40, num_selected=10, strategy=strategy, gradient_normalization=normalization)

    def chosen():
        norms = rows.double().norm(dim=1)
        nothing = torch.zeros(40, dtype=torch.bool)
        found = OwnedFeatures({}, rows.clone(), norms, norms.clone(), torch.ones(40), nothing)
        scores = from_features(known, found, config)
        return scores, select_pool(scores, 10, config)

    scores, expected = chosen()
    assert isinstance(scores.gram, torch.Tensor)
    monkeypatch.setattr("spice_trainer.scoring.measure.LARGE_POOL", 40)
    scores, found = chosen()
    assert isinstance(scores.gram, GramRows) is (strategy in ("spice", "fisher"))
    for name in ("indices", "top_norm", "without_conflict", "nonfinite", "zero", "candidates"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("alpha", "information", "information_top_norm", "top_norm_gains", "information_gains"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert found.selection.conflicts == pytest.approx(expected.selection.conflicts, abs=1e-5)


def test_nearly_parallel_rows_are_compared_row_by_row_not_pair_by_pair() -> None:
    generator = torch.Generator().manual_seed(10)
    rows = torch.randn(1, 2000, generator=generator) + 1e-4 * torch.randn(700, 2000, generator=generator)
    rows[650] = -rows[3]
    started = time.process_time()
    found = select_from_gradients(rows, 5)
    assert time.process_time() - started < 2.5
    assert 3 in found.indices or 650 not in found.indices
