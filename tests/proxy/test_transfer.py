"""Comparing a proxy's picks with the target's: against brute force, and the properties that any pool must have."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import RowShape
from spice_trainer.proxy.transfer import TransferTotals, _shuffles, compare_pools, describe_transfer, scores_by_length
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.results import PoolTransfer
from spice_trainer.selection.scores import PoolScores
from spice_trainer.utils.statistics import spearman
from tests.support.greedy_oracle import adafisher_gain, diagonal_gain, greedy_oracle, log_det_gain
from tests.support.scorers import measured_pool

GAINS = {"exact": log_det_gain, "diagonal": diagonal_gain, "adafisher": adafisher_gain}
NORMALIZATIONS = ["none", "sqrt_tokens", "tokens", "unit"]


def raw_config(**changes: Any) -> SpiceConfig:
    """Settings under which the Gram matrix is that of the gradients as they are, unless it is said otherwise."""
    return SpiceConfig(**({"gradient_normalization": "none"} | changes))


def gradients_of(num_candidates: int, dimension: int, seed: int = 0) -> Tensor:
    """Gradients of different lengths, in no special directions."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 0.2 + torch.rand(num_candidates, 1, generator=generator)
    return lengths.double() * torch.randn(num_candidates, dimension, generator=generator).double()


def label_tokens_of(rows: list[int]) -> Tensor:
    return torch.tensor([1.0 + row % 5 for row in rows]).double()


def scored(gradients: Tensor, config: SpiceConfig, rows: list[int] | None = None, pool: int = 0) -> PoolScores:
    rows = list(range(len(gradients))) if rows is None else rows
    shapes = [RowShape(9, int(tokens), True, ()) for tokens in label_tokens_of(rows)]
    return measured_pool(gradients, shapes, config, pool=pool, candidates=rows)


def normalized(gradients: Tensor, normalization: str) -> Tensor:
    tokens = label_tokens_of(list(range(len(gradients))))[:, None]
    factors = {
        "none": torch.ones_like(tokens),
        "sqrt_tokens": tokens.sqrt(),
        "tokens": tokens,
        "unit": 1 / gradients.norm(dim=1, keepdim=True),
    }
    return gradients * factors[normalization]


def slow_rank_correlation(first: list[float], second: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]

    return statistics.correlation(ranks(first), ranks(second))


def slow_information(gradients: Tensor, subset: Any, config: SpiceConfig, alpha: float) -> float:
    subset, gain_of = list(subset), GAINS[config.information]
    return sum(gain_of(gradients, subset[:place], row, alpha) for place, row in enumerate(subset))


def slow_comparison(target: Tensor, proxy: Tensor, budget: int, config: SpiceConfig) -> dict[str, Any]:
    """The definition, on sound gradient vectors."""
    picks, first, alphas = [], [], []
    models = [normalized(gradients, config.gradient_normalization) for gradients in (target, proxy)]
    for gradients in models:
        scale = float(gradients.square().sum(dim=1).mean()) if config.alpha_scaling == "pool" else 1.0
        alphas.append(config.fisher_alpha / scale)
        gain_of = GAINS[config.information]
        picked, _ = greedy_oracle(
            gradients, budget, gain_of=gain_of, fisher_alpha=alphas[-1], conflict_penalty=config.conflict_penalty,
            stop_ratio=config.stop_ratio, min_gain=config.min_gain,
        )  # fmt: skip
        picks.append([index for index, *_ in picked])
        first.append([gain_of(gradients, [], row, alphas[-1]) for row in range(len(gradients))])
    rows = list(range(len(target)))
    beyond = []
    for chosen in picks:
        subsets = [order[: len(chosen)] for order in _shuffles(rows, rows, 200)]
        chance = statistics.mean(slow_information(models[0], subset, config, alphas[0]) for subset in subsets)
        beyond.append(slow_information(models[0], chosen, config, alphas[0]) - chance)
    return {
        "sizes": tuple(map(len, picks)),
        "shared": len(set(picks[0]) & set(picks[1])),
        "rank_correlation": slow_rank_correlation(*first),
        "retained": beyond[1] / beyond[0],
    }


@pytest.mark.parametrize(
    "changes",
    [
        *({"gradient_normalization": name} for name in NORMALIZATIONS),
        {"alpha_scaling": "pool", "fisher_alpha": 3.0},
        {"conflict_penalty": 2.0, "gradient_normalization": "sqrt_tokens"},
        {"stop_ratio": 0.6, "pools_per_step": 1},
        {"min_gain": 1.0, "pools_per_step": 1},
        {"information": "diagonal"},
        {"information": "diagonal", "gradient_normalization": "unit", "alpha_scaling": "pool"},
        {"information": "adafisher", "fisher_alpha": 0.1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_number_is_the_definitions(changes: dict[str, Any]) -> None:
    config = raw_config(**changes)
    target = gradients_of(9, 6)
    proxy = (0.7 * target + gradients_of(9, 6, seed=1))[:, [5, 0, 1, 2, 3]]
    found = compare_pools(scored(target, config), scored(proxy, config), 4, config)
    expected = slow_comparison(target, proxy, 4, config)
    assert (found.num_selected, found.num_selected_proxy) == expected["sizes"]
    if config.is_adaptive:
        assert found.num_selected != found.num_selected_proxy and min(expected["sizes"]) >= 1
    assert found.num_shared == expected["shared"]
    assert found.overlap == found.num_shared / found.num_selected
    assert found.retained == pytest.approx(expected["retained"], rel=1e-6)
    if config.gradient_normalization == "unit" and config.information == "exact":
        assert found.rank_correlation is None
    else:
        assert found.rank_correlation == pytest.approx(expected["rank_correlation"], rel=1e-9)


def test_chance_is_the_mean_over_all_subsets() -> None:
    config = raw_config(conflict_penalty=0.0)
    target, proxy = gradients_of(8, 5), gradients_of(8, 5, seed=2)
    found = compare_pools(scored(target, config), scored(proxy, config), 3, config, num_random_subsets=1500)
    subsets = list(itertools.combinations(range(8), 3))
    chance = statistics.mean(slow_information(target, subset, config, 1.0) for subset in subsets)
    ours, theirs = ([i for i, *_ in greedy_oracle(g, 3, conflict_penalty=0.0)[0]] for g in (target, proxy))
    best, approximate = (slow_information(target, picks, config, 1.0) - chance for picks in (ours, theirs))
    assert found.retained == pytest.approx(approximate / best, abs=0.05)


@given(st.lists(st.integers(0, 4), min_size=3, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_rank_correlation_is_spearmans_with_mean_ranks(first: list[int], data: st.DataObject) -> None:
    second = data.draw(st.lists(st.integers(0, 4), min_size=len(first), max_size=len(first)))
    found = spearman(*(torch.tensor(values, dtype=torch.float64) for values in (first, second)))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(slow_rank_correlation(first, second), abs=1e-12)


def test_what_cannot_be_ranked() -> None:
    def values(*numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    rising = values(1.0, 2.0, 3.0)
    assert spearman(rising, rising) == 1.0
    assert spearman(rising, rising.flip(0)) == -1.0
    # Only the order counts.
    assert spearman(rising, rising.pow(7)) == 1.0
    assert spearman(values(1.0, 2.0), values(1.0, 2.0)) is None
    assert spearman(rising, values(0.0, 0.0, 0.0)) is None
    # Rounding is no order, but a small difference that gains really have is one, at any scale.
    assert spearman(rising, 0.7 + 1e-9 * rising, equal_share=1e-6) is None
    assert spearman(rising, 1e-20 * (0.7 + 1e-3 * rising)) == 1.0


POOLS = st.tuples(st.integers(5, 14), st.integers(2, 10), st.integers(0, 2**31))
KINDS = st.sampled_from(["exact", "diagonal", "adafisher"])


@given(POOLS, KINDS, st.sampled_from(NORMALIZATIONS), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_a_proxy_that_scores_as_the_target_is_as_good(
    pool: tuple[int, int, int], information: Any, normalization: Any, budget: int
) -> None:
    config = raw_config(information=information, gradient_normalization=normalization)
    scores = scored(gradients_of(*pool), config)
    found = compare_pools(scores, scores, budget, config, num_random_subsets=10)
    assert (found.num_selected, found.num_shared, found.overlap) == (budget, budget, 1.0)
    assert found.rank_correlation in (1.0, None) and found.retained in (1.0, None)
    if normalization == "none":
        assert found.rank_correlation == 1.0
    if normalization == "none" and information != "adafisher":
        assert found.retained == 1.0


@given(POOLS, st.sampled_from(["exact", "diagonal"]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_candidates_does_not_matter(pool: tuple[int, int, int], information: Any, seed: int) -> None:
    config = raw_config(information=information, conflict_penalty=0.0)
    target, proxy = gradients_of(*pool), gradients_of(*pool[:2], seed=pool[2] + 1)
    rows = [7 + 3 * row for row in range(len(target))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    moved = [rows[place] for place in order]
    first = compare_pools(scored(target, config, rows), scored(proxy, config, rows), 3, config, num_random_subsets=10)
    second = compare_pools(
        scored(target[order], config, moved), scored(proxy[order], config, moved), 3, config, num_random_subsets=10
    )
    assert second.num_shared == first.num_shared
    assert second.rank_correlation == pytest.approx(first.rank_correlation, abs=1e-12)
    assert second.retained == pytest.approx(first.retained, rel=1e-6, abs=1e-6)


@given(POOLS, st.integers(-40, 40), st.integers(-40, 40))
@settings(max_examples=30, deadline=None)
def test_the_length_of_gradients_does_not_matter_under_unit_norm(
    pool: tuple[int, int, int], power: int, proxy_power: int
) -> None:
    config = raw_config(gradient_normalization="unit")
    target, proxy = gradients_of(*pool), gradients_of(*pool[:2], seed=pool[2] + 1)
    first, second = (
        compare_pools(scored(target * 2.0**p, config), scored(proxy * 2.0**q, config), 3, config, num_random_subsets=5)
        for p, q in ((0, 0), (power, proxy_power))
    )
    assert first == second


def test_rows_that_one_model_cannot_pick() -> None:
    config = raw_config(conflict_penalty=0.0)
    target, proxy = gradients_of(8, 5), gradients_of(8, 5, seed=3)
    target[1], target[2, 0], proxy[3] = 0.0, float("nan"), 0.0
    # What the proxy likes best is nothing to the target.
    proxy[1] *= 100.0
    found = compare_pools(scored(target, config), scored(proxy, config), 2, config)
    both = [0, 4, 5, 6, 7]
    norms = [g[both].norm(dim=1).tolist() for g in (target, proxy)]
    assert found.rank_correlation == pytest.approx(slow_rank_correlation(*norms))
    ours, theirs = ([i for i, *_ in greedy_oracle(g, 2, conflict_penalty=0.0)[0]] for g in (target, proxy))
    assert theirs[0] == 1 and not set(theirs) & {3} and not set(ours) & {1, 2}
    pickable = [0, 3, 4, 5, 6, 7]
    subsets = [order[:2] for order in _shuffles(list(range(8)), pickable, 200)]
    assert {row for subset in subsets for row in subset} == set(pickable)
    chance = statistics.mean(slow_information(target, subset, config, 1.0) for subset in subsets)
    gained = [row for row in theirs if row in pickable]
    approximate = slow_information(target, gained, config, 1.0) - chance
    assert found.retained == pytest.approx(approximate / (slow_information(target, ours, config, 1.0) - chance))


@pytest.mark.parametrize("information", ["exact", "diagonal", "adafisher"])
def test_a_row_marked_unsound_counts_as_one_without_a_gradient(information: Any) -> None:
    config = raw_config(information=information, conflict_penalty=0.0)
    target, proxy = gradients_of(8, 5), gradients_of(8, 5, seed=3)
    proxy[1] *= 100.0
    whole = scored(target, config)
    marked = replace(whole, sound=torch.arange(8) != 1)
    target[1] = 0.0
    found = compare_pools(marked, scored(proxy, config), 2, config)
    assert found == compare_pools(scored(target, config), scored(proxy, config), 2, config)
    assert found.retained is not None
    assert found.retained < compare_pools(whole, scored(proxy, config), 2, config).retained


@pytest.mark.parametrize("information", ["exact", "diagonal", "adafisher"])
def test_where_there_is_nothing_to_retain(information: Any) -> None:
    config = raw_config(information=information)
    target, proxy = gradients_of(4, 6), gradients_of(4, 6, seed=1)
    # All are picked, whatever they are worth.
    everything = compare_pools(scored(target, config), scored(proxy, config), 4, config)
    assert (everything.num_selected, everything.overlap, everything.retained) == (4, 1.0, None)
    # Copies of one gradient: any pick is as good.
    copies = compare_pools(scored(target[[0] * 4], config), scored(proxy, config), 2, config)
    assert copies.retained is None and copies.rank_correlation is None and copies.num_selected == 2
    # A model without a sound row picks nothing.
    for models in ((torch.zeros(4, 6).double(), proxy), (target, torch.zeros(4, 6).double())):
        nothing = compare_pools(*(scored(model, config) for model in models), 2, config)
        assert nothing.rank_correlation is None and nothing.retained is None and nothing.num_shared == 0
        assert nothing.overlap == (0.0 if nothing.num_selected else None)


def test_no_global_random_state_is_touched_and_chance_is_the_same_again() -> None:
    config = raw_config()
    target, proxy = scored(gradients_of(9, 5), config, pool=3), scored(gradients_of(9, 5, seed=1), config, pool=3)
    state = torch.get_rng_state()
    gram = target.gram.clone()
    first = compare_pools(target, proxy, 3, config)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(target.gram, gram)
    torch.manual_seed(5)
    assert compare_pools(target, proxy, 3, config) == first and first.pool == 3


def test_pools_of_other_candidates_are_refused() -> None:
    config = raw_config()
    target = scored(gradients_of(7, 5), config)
    message = (
        r"the target scored rows \[0, 1, 2, 3, 4\]… \(7 of them\) and the proxy rows \[1, 0\] \(2 of them\). Their "
        r"picks can be compared only on the same candidates in the same order. Fix: score one pool"
    )
    with pytest.raises(ValueError, match=message):
        compare_pools(target, scored(gradients_of(2, 5), config, [1, 0]), 2, config)
    with pytest.raises(ValueError, match="num_random_subsets=0, but chance needs at least 1"):
        compare_pools(target, target, 2, config, num_random_subsets=0)


# Several pools, and what the log says


def transfer(**changes: Any) -> PoolTransfer:
    values = {"num_selected": 12, "num_selected_proxy": 12, "num_shared": 8, "rank_correlation": 0.9, "retained": 0.8}
    return PoolTransfer(pool=0, **{**values, **changes})


def test_totals_are_means_over_the_pools_that_have_the_number() -> None:
    totals = TransferTotals()
    assert (totals.mean("rank_correlation"), totals.mean("overlap"), totals.mean("retained")) == (None, None, None)
    totals.add(transfer())
    totals.add(transfer(rank_correlation=None, num_shared=4, retained=None))
    totals.add(transfer(rank_correlation=0.5, num_shared=0, retained=-0.2))
    assert totals.mean("rank_correlation") == pytest.approx(0.7)
    assert totals.mean("overlap") == pytest.approx(1 / 3)
    assert (totals.mean("retained"), totals.values("retained")) == (pytest.approx(0.3), [0.8, -0.2])
    resumed = TransferTotals()
    resumed.load_state_dict(json.loads(json.dumps(totals.state_dict())))
    assert resumed == totals


def test_what_the_log_says() -> None:
    totals = TransferTotals([transfer(), transfer(num_shared=7, rank_correlation=0.76, retained=1.02)])
    assert describe_transfer(totals) == (
        "SPICE: on 2 pools the proxy's gains rank as the target's with a correlation of 0.83, 7.5 of 12 picks are the "
        "same, and its picks retain 0.91 of the information that the target's own picks add over random ones (1 is as "
        "good, 0 as good as chance; 0.80 on the worst pool)."
    )
    assert describe_transfer(TransferTotals([transfer(num_selected_proxy=9)])) == (
        "SPICE: on 1 pool the proxy's gains rank as the target's with a correlation of 0.90, 8 of the target's 12 "
        "picks are among the proxy's 9, and its picks retain 0.80 of the information that the target's own picks add "
        "over random ones (1 is as good, 0 as good as chance)."
    )
    assert describe_transfer(TransferTotals([transfer(rank_correlation=None, retained=None)])) == (
        "SPICE: on 1 pool the gains of the proxy or of the target are all equal and cannot be ranked, 8 of 12 picks "
        "are the same, and what its picks retain cannot be measured: there are none, or the target's own add nothing "
        "over random ones."
    )
    assert describe_transfer(TransferTotals()) == (
        "SPICE: no pool was scored by both the proxy and the target, so they cannot be compared."
    )


@pytest.mark.parametrize(
    ("retained", "verdict"),
    [
        (0.5, None),
        (0.49, "closer to random ones than to the target's own"),
        (0.0, "no better than random ones"),
        (-0.3, "no better than random ones"),
    ],
)
def test_the_verdict_is_what_was_measured(retained: float, verdict: str | None) -> None:
    text = describe_transfer(TransferTotals([replace(transfer(), retained=retained)]))
    if verdict is None:
        assert text.endswith("(1 is as good, 0 as good as chance).")
    else:
        assert text.endswith(
            f"chance). On this data this proxy's picks are {verdict}: take a larger proxy, or one of the target's "
            "family."
        )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_length_alone_is_the_definitions(normalization: Any) -> None:
    """Orthogonal gradients of squared norm 1 / label tokens, through the same definition."""
    config = raw_config(gradient_normalization=normalization)
    target = gradients_of(9, 6)
    by_length = torch.diag(label_tokens_of(list(range(9))).rsqrt())
    expected = compare_pools(scored(target, config), scored(by_length, config), 4, config).retained
    found = compare_pools(scored(target, config), scored(gradients_of(9, 6, seed=1), config), 4, config)
    assert found.retained_by_length == pytest.approx(expected, rel=1e-9) and expected is not None


def test_length_alone_is_not_asked_where_coordinates_count() -> None:
    config = raw_config(information="diagonal")
    target = scored(gradients_of(9, 6), config)
    assert compare_pools(target, target, 4, config).retained_by_length is None


def test_length_alone_never_picks_what_the_target_cannot() -> None:
    config = raw_config()
    target = gradients_of(9, 6)
    target[0] = 0.0  # its answer is as short as any
    scores = scores_by_length(scored(target, config), config)
    assert float(scores.gram[0].abs().sum()) == 0.0
    assert 0 not in select_pool(scores, 9, config).indices


@pytest.mark.parametrize(("retained", "adds_nothing"), [(0.9, False), (0.7, True), (0.6, True)])
def test_the_log_tells_what_length_alone_retains(retained: float, adds_nothing: bool) -> None:
    text = describe_transfer(TransferTotals([transfer(retained=retained, retained_by_length=0.7)]))
    assert "Picking by the length of answers alone, with no model, retains 0.70." in text
    assert ("So nothing here shows that the proxy knows more than that." in text) == adds_nothing
