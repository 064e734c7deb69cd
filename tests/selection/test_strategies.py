"""Every strategy against its definition written out on explicit gradients and plain numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer.config import STRATEGIES
from spice_trainer.selection import (
    PickOptions,
    PoolScores,
    centred_gram,
    match_with_weights,
)
from spice_trainer.selection import select_by_strategy as select_with_options
from spice_trainer.selection.greedy import information_of, select
from spice_trainer.selection.information import ExactInformation, build_information
from spice_trainer.selection.results import Selection
from spice_trainer.selection.strategies.matching import nonnegative_weights
from spice_trainer.selection.target import Target
from tests.support import field_oracles
from tests.support import strategy_oracles as oracles
from tests.support.greedy_oracle import conflict, greedy_oracle, log_det_gain

NAMES = tuple(STRATEGIES)
OF_GRADIENTS = ("dpp", "matching", "facility_location")
GREEDY_ORACLES = {
    "dpp": oracles.dpp,
    "matching": oracles.matching,
    "facility_location": oracles.facility_location,
}


def select_by_strategy(name, inputs, num_selected, measure=None, **rules):
    """Picks with settings by name."""
    options = PickOptions(**rules, new_measure=None if measure is None else lambda: measure)
    return select_with_options(name, inputs, num_selected, options)


def pool(num_rows, dimension, seed=0, spread=1.0, unsound=()):
    """Gradients of many lengths around a common direction, and everything else that is known of their rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dimension, generator=generator, dtype=torch.float64)
    rows += torch.randn(dimension, generator=generator, dtype=torch.float64) * torch.sign(rows[:, :1])
    norms = torch.logspace(-0.5, 0.5, num_rows).double()[torch.randperm(num_rows, generator=generator)] ** spread
    rows = rows / rows.norm(dim=1, keepdim=True) * norms[:, None]
    for position, value in unsound:
        rows[position] = value
    losses = 5.0 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    reference = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return {
        "gradients": rows,
        "losses": losses,
        "losses_without_instruction": losses * (0.4 + torch.rand(num_rows, generator=generator, dtype=torch.float64)),
        "label_tokens": tuple(torch.randint(1, 60, (num_rows,), generator=generator).tolist()),
        "reference": reference,
    }


TARGET_LENGTHS = (4, 9, 20, 33, 50, 51)
LEARNING_RATE = 0.05


def target_rows(known, number):
    """Rows to do well on, apart from the pool."""
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(number, known["gradients"].shape[1], generator=generator, dtype=torch.float64)
    return oracles.unit(rows + 2.0 * known["reference"])


def inputs_of(known, order=None, target_lengths=TARGET_LENGTHS):
    rows = known["gradients"]
    order = list(range(len(rows))) if order is None else order
    rows = rows[order]
    sound = rows.isfinite().all(dim=1) & rows.any(dim=1)
    units = torch.cat([oracles.unit(rows), target_rows(known, len(target_lengths))])
    return PoolScores(
        sound=sound,
        gradient_cosines=units @ units.T,
        hidden_cosines=units @ units.T,
        last_hidden_cosines=units @ units.T,
        gradient_lengths=rows.norm(dim=1),
        logit_norms=known["losses"][order] * 7.0,
        logit_features=known["gradients"].nan_to_num(0.0, 0.0)[order] / known["gradients"].nan_to_num(0.0, 0.0).norm(),
        past_features=target_rows(known, 3),
        learning_rate=LEARNING_RATE,
        target=Target(target_lengths, gradient_norms=torch.linspace(0.5, 2.0, len(target_lengths)).double()),
        gram=rows @ rows.T,
        gradient_norms=rows.norm(dim=1),
        losses=known["losses"][order],
        losses_without_instruction=known["losses_without_instruction"][order],
        label_tokens=tuple(known["label_tokens"][index] for index in order),
        alignment=rows @ known["reference"],
        reference_norm=float(known["reference"].norm()),
        seed=3,
        step=5,
        pool=7,
    )


def expected_picks(name, known, num_selected, tie_tolerance=1e-6):
    rows = known["gradients"]
    sound = oracles.sound_rows(rows)
    if name in GREEDY_ORACLES:
        return GREEDY_ORACLES[name](rows, num_selected, tie_tolerance)
    losses, alone = known["losses"].tolist(), known["losses_without_instruction"].tolist()
    if name == "ifd":
        return oracles.ifd(losses, alone, sound, num_selected, tie_tolerance)
    if name == "perplexity":
        picks, _ = oracles.ranked(losses, sound, num_selected, tie_tolerance)
        return picks, [math.exp(losses[index]) for index in picks]
    if name == "less":
        reference = known["reference"]
        cosines = [float(row @ reference / (row.norm() * reference.norm())) for row in rows]
        return oracles.ranked(cosines, sound, num_selected, tie_tolerance, smallest_scale=1.0)
    if name == "uds":
        inputs = inputs_of(known)
        return field_oracles.uds(
            inputs.logit_norms, inputs.logit_features, inputs.past_features, sound, num_selected, tie_tolerance
        )
    if name in ("rds", "tsds", "greats", "opus"):
        return of_the_field(name, known, sound, num_selected, tie_tolerance)
    if name == "targeted_matching":
        targets = target_rows(known, len(TARGET_LENGTHS))
        units, seed = oracles.unit(rows), oracles.seed_of(3, 5, 7)
        return oracles.targeted(
            units, targets, known["label_tokens"], TARGET_LENGTHS, sound, num_selected, seed, tie_tolerance
        )
    values = {
        "top_norm": [math.sqrt(sum(entry * entry for entry in row)) for row in rows.tolist()],
        "loss": [loss * tokens for loss, tokens in zip(losses, known["label_tokens"], strict=True)],
    }[name]
    return oracles.ranked(values, sound, num_selected, tie_tolerance)


def of_the_field(name, known, sound, num_selected, tie_tolerance):
    """Rules that aim at validation rows, from the vectors."""
    rows, targets, key = known["gradients"], target_rows(known, len(TARGET_LENGTHS)), (3, 5, 7)
    if name == "rds":
        return field_oracles.rds(oracles.unit(rows), targets, sound, num_selected, key, tie_tolerance)
    if name == "tsds":
        return field_oracles.tsds(oracles.unit(rows), targets, sound, num_selected, key)
    reference = (targets * torch.linspace(0.5, 2.0, len(targets)).double()[:, None]).mean(dim=0)
    if name == "greats":
        return field_oracles.greats(rows, reference, sound, num_selected, LEARNING_RATE, tie_tolerance)
    return field_oracles.opus(rows, reference, sound, num_selected, LEARNING_RATE, key)


RULES = tuple(name for name in NAMES if name not in ("spice", "fisher", "random", "length_matched"))
UNSOUND = ((2, 0.0), (5, math.nan), (6, math.inf))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("num_rows", "dimension", "num_selected"), [(15, 40, 6), (12, 4, 12), (11, 2, 30), (20, 9, 8)]
)
def test_strategies_equal_brute_force(name, num_rows, dimension, num_selected):
    for seed in range(3):
        known = pool(num_rows, dimension, seed, unsound=UNSOUND)
        picks, gains = expected_picks(name, known, num_selected)
        selection = select_by_strategy(name, inputs_of(known), num_selected)
        assert selection.indices == tuple(picks)
        assert selection.gains == pytest.approx(gains, rel=1e-6, abs=1e-8)
        assert selection.scores == selection.gains
        assert selection.stopped_early is False


DRAWN = ("tsds", "opus")


@pytest.mark.parametrize("name", [name for name in RULES if name not in DRAWN])
def test_ties_go_to_the_lowest_position(name):
    known = pool(12, 20, seed=4)
    for field in ("gradients", "losses", "losses_without_instruction"):
        known[field][7:] = known[field][:5].clone()
        # What rounding leaves between equal rows must not choose between them.
        known[field][7:] *= 1 + 1e-12
    known["label_tokens"] = known["label_tokens"][:7] + known["label_tokens"][:5]
    selection = select_by_strategy(name, inputs_of(known), 8)
    assert selection.indices == tuple(expected_picks(name, known, 8)[0])
    twins = [index for index in selection.indices if index >= 7]
    for twin in twins:
        original = twin - 7
        assert selection.indices.index(original) < selection.indices.index(twin)
    strict = select_by_strategy(name, inputs_of(known), 8, tie_tolerance=0.0)
    if name in ("top_norm", "loss", "perplexity"):
        assert any(index >= 7 for index in strict.indices[:2])
    coarse = select_by_strategy(name, inputs_of(known), 3, tie_tolerance=0.999)
    assert coarse.indices == tuple(expected_picks(name, known, 3, tie_tolerance=0.999)[0])


def test_spice_and_fisher_are_the_greedy_pass():
    picks = {}
    for seed, rules in (
        (1, {"fisher_alpha": 2.0, "conflict_reference": "candidates", "stop_ratio": 0.3, "min_gain": 0.01}),
        (2, {"fisher_alpha": 1.0, "conflict_reference": "selected"}),
    ):
        known = pool(14, 30, seed, unsound=UNSOUND)
        for name, penalty in (("spice", 3.0), ("fisher", 0.0)):
            picked, stopped = greedy_oracle(known["gradients"], 9, conflict_penalty=penalty, **rules)
            selection = select_by_strategy(name, inputs_of(known), 9, conflict_penalty=3.0, **rules)
            assert selection.indices == tuple(option[0] for option in picked)
            assert selection.scores == pytest.approx([option[3] for option in picked], abs=1e-7)
            assert selection.stopped_early is stopped
            picks[name] = selection.indices
    assert picks["spice"] != picks["fisher"]
    rows = known["gradients"]
    gram = inputs_of(known).sound_gram()
    measure = build_information("diagonal", gram=gram, gradients=rows.nan_to_num(0.0, 0.0), fisher_alpha=1.0)
    assert select_by_strategy("fisher", inputs_of(known), 4, measure=measure).information == measure.information > 0


def test_masked_rows_are_never_picked_whatever_the_gram_holds_for_them():
    known = pool(10, 15, seed=2)
    inputs = inputs_of(known)
    gram = inputs.gram.clone()
    gram[3] = math.nan
    gram[8, 1] = 1e9
    masked = inputs.sound.clone()
    masked[[3, 8]] = False
    for name in NAMES:
        changed = replace(inputs, gram=gram, sound=masked)
        selection = select_by_strategy(name, changed, 10)
        assert sorted(selection.indices) == [0, 1, 2, 4, 5, 6, 7, 9]
        assert all(map(math.isfinite, (*selection.gains, *selection.conflicts, selection.information)))
        nothing = replace(inputs, sound=torch.zeros(10, dtype=torch.bool))
        empty = select_by_strategy(name, nothing, 3)
        assert replace(empty, facts={}) == Selection((), (), (), (), 0.0, False)
    assert match_with_weights(inputs.gram, torch.zeros(10, dtype=torch.bool), 3).weights == ()


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("top_norm", "gradient_norms"),
        ("loss", "losses"),
        ("perplexity", "losses"),
        ("ifd", "losses"),
        ("ifd", "losses_without_instruction"),
        ("less", "gradient_norms"),
        ("less", "alignment"),
    ],
)
def test_rows_without_the_number_that_counts_are_never_picked(name, field):
    inputs = inputs_of(pool(6, 9))
    values = getattr(inputs, field).clone()
    values[1], values[4] = math.nan, math.inf
    selection = select_by_strategy(name, replace(inputs, **{field: values}), 6)
    assert sorted(selection.indices) == [0, 2, 3, 5]


def test_picks_without_a_gram_have_no_conflicts_and_no_information():
    known = pool(9, 12, seed=3)
    for name in ("random", "top_norm", "loss", "perplexity", "ifd", "less"):
        full = inputs_of(known)
        needed = {field: getattr(full, field) for field in STRATEGIES[name].needs}
        selection = select_by_strategy(name, PoolScores(sound=full.sound, **needed), 4)
        with_gram = select_by_strategy(name, full, 4)
        assert selection.indices == with_gram.indices
        assert selection.gains == with_gram.gains
        assert all(map(math.isnan, (*selection.conflicts, selection.information)))
        assert not any(map(math.isnan, (*with_gram.conflicts, with_gram.information)))


def test_what_a_candidate_costs():
    passes = {name: (rule.num_forwards, rule.num_backwards) for name, rule in STRATEGIES.items()}
    assert passes == {
        "spice": (1, 1), "fisher": (1, 1), "random": (0, 0), "top_norm": (1, 1), "dpp": (1, 1), "matching": (1, 1),
        "facility_location": (1, 1), "loss": (1, 0), "perplexity": (1, 0), "ifd": (2, 0), "less": (1, 1),
        "length_matched": (0, 0), "targeted_matching": (1, 1), "rds": (1, 0), "tsds": (1, 0), "greats": (1, 1),
        "opus": (1, 1), "uds": (1, 0),
    }  # fmt: skip
    assert {name for name, rule in STRATEGIES.items() if "gram" in rule.needs} == {"spice", "fisher", *OF_GRADIENTS}
    assert {n for n, rule in STRATEGIES.items() if rule.compares_gradients} == {
        "spice",
        "fisher",
        "less",
        "targeted_matching",
        "greats",
        "opus",
        *OF_GRADIENTS,
    }
    hidden = STRATEGIES["targeted_matching"].on_hidden_states
    assert (hidden.num_forwards, hidden.num_backwards, hidden.compares_gradients) == (1, 0, False)


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NAMES for field in STRATEGIES[name].needs])
def test_what_is_missing_is_named(name, field):
    # Cosines are of the target's rows too, and a rule that has two kinds takes the one that is there.
    missing = {"target", "gradient_cosines", "hidden_cosines", "last_hidden_cosines"}
    missing = missing if field == "target" else {field, "hidden_cosines"} if field == "gradient_cosines" else {field}
    inputs = replace(inputs_of(pool(5, 8)), **dict.fromkeys(missing))
    with pytest.raises(ValueError, match=rf'strategy="{name}" needs .*, but {field} is None'):
        select_by_strategy(name, inputs, 2)


def random_picks(num_rows, num_selected, sound=None, **key):
    sound = torch.ones(num_rows, dtype=torch.bool) if sound is None else sound
    key = {"seed": 0, "step": 0, "pool": 0, **key}
    return select_by_strategy("random", PoolScores(sound=sound, **key), num_selected)


def test_random_is_a_function_of_seed_step_and_pool():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = random_picks(120, 12)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert random_picks(120, 12) == first
    # Written down once: other picks would break a resume across versions.
    assert random_picks(10, 4, seed=1, step=2, pool=3).indices == (4, 9, 1, 6)
    others = [random_picks(120, 12, **key).indices for key in ({"seed": 1}, {"step": 1}, {"pool": 1})]
    assert len({first.indices, *others}) == 4
    assert first.gains == (0.0,) * 12


def test_random_is_uniform_and_skips_unsound_rows():
    sound = torch.tensor([True, False, True, True, True, False, True])
    counts = torch.zeros(7)
    pairs = torch.zeros(7, 7)
    for step in range(4000):
        picks = random_picks(7, 2, sound=sound, step=step).indices
        counts[list(picks)] += 1
        pairs[picks] += 1
        everything = random_picks(7, 7, step=step).indices
        assert tuple(index for index in everything if bool(sound[index]))[:2] == picks
    assert counts[~sound].sum() == 0
    # 5 sound rows, 2 picked: 1600 times each, standard deviation 31; 20 ordered pairs, 200 times each, deviation 14.
    assert bool(((counts[sound] - 1600).abs() < 5 * 31).all())
    sound_pairs = pairs[sound][:, sound]
    assert bool(((sound_pairs[~torch.eye(5, dtype=torch.bool)] - 200).abs() < 5 * 14).all())


def test_ifd_takes_rows_that_the_instruction_does_not_help_last():
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    alone = torch.tensor([2.0, 0.5, 1.25, 1.0, 0.25, 0.0])
    inputs = PoolScores(sound=torch.ones(6, dtype=torch.bool), losses=losses, losses_without_instruction=alone)
    selection = select_by_strategy("ifd", inputs, 6)
    assert selection.indices == (2, 0, 5, 3, 1, 4)
    assert selection.gains == pytest.approx((0.8, 0.5, 0.0, 1.0, 2.0, 4.0))
    hopeless = PoolScores(sound=inputs.sound, losses=losses, losses_without_instruction=torch.zeros(6))
    assert all(map(math.isfinite, select_by_strategy("ifd", hopeless, 6).gains))


def test_perplexity_orders_by_mean_loss_and_loss_by_total_loss():
    losses = torch.tensor([2.0, 1.0, 3.0, 900.0])
    inputs = PoolScores(sound=torch.tensor([True] * 4), losses=losses, label_tokens=(10, 40, 1, 0))
    perplexity = select_by_strategy("perplexity", inputs, 4)
    assert perplexity.indices == (3, 2, 0, 1)
    assert perplexity.gains[1:] == pytest.approx((math.exp(3), math.exp(2), math.exp(1)))
    assert math.isfinite(perplexity.gains[0])
    total = select_by_strategy("loss", inputs, 4)
    assert total.indices == (1, 0, 2, 3)
    assert total.gains == (40.0, 20.0, 3.0, 0.0)


def test_dpp_first_takes_the_longest_and_then_what_is_left_of_the_others():
    rows = torch.tensor([[3.0, 0.0], [2.9, 0.1], [0.0, 0.5], [0.1, 0.1]]).double()
    inputs = PoolScores(sound=torch.ones(4, dtype=torch.bool), gram=rows @ rows.T)
    selection = select_by_strategy("dpp", inputs, 4)
    # Two directions; then the longest of those that add none.
    assert selection.indices == (0, 2, 1, 3)
    assert selection.gains[:2] == pytest.approx((math.log(9.0), math.log(0.25)))
    assert selection.gains[2] == pytest.approx(math.log(1e-6 * 8.42))
    # The limit of `fisher` for large α.
    fisher = select_by_strategy("fisher", inputs, 2, fisher_alpha=1e6)
    assert fisher.indices == (0, 2)
    assert fisher.gains == pytest.approx([gain + math.log(1e6) for gain in selection.gains[:2]], rel=1e-5)


def test_dpp_gives_the_same_first_picks_however_many_are_asked_for():
    # BLAS rounds a product otherwise for another width, so that no width may hang on num_selected.
    for seed in range(20):
        inputs = inputs_of(pool(num_rows=11, dimension=7, seed=seed, spread=0.5))
        whole = select_by_strategy("dpp", inputs, 11)
        for num_selected in range(1, 11):
            part = select_by_strategy("dpp", inputs, num_selected)
            assert part.indices == whole.indices[:num_selected]
            assert part.gains == whole.gains[:num_selected]


def test_matching_reaches_the_pools_mean_and_beats_random():
    known = pool(24, 60, seed=8)
    rows = known["gradients"]
    mean = rows.mean(dim=0)

    def distance(indices):
        return float((rows[list(indices)].mean(dim=0) - mean).norm())

    inputs = inputs_of(known)
    whole = select_by_strategy("matching", inputs, 24)
    assert sum(whole.gains) == pytest.approx(float(mean.square().sum()), rel=1e-9)
    picks = select_by_strategy("matching", inputs, 6).indices
    assert all(distance(picks) < distance(random_picks(24, 6, step=step).indices) for step in range(50))


def test_facility_location_hears_every_cluster():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 30, dtype=torch.float64) * 10
    rows = centres.repeat_interleave(6, dim=0) + 0.1 * torch.randn(24, 30, generator=generator, dtype=torch.float64)
    inputs = PoolScores(sound=torch.ones(24, dtype=torch.bool), gram=rows @ rows.T)
    assert {index // 6 for index in select_by_strategy("facility_location", inputs, 4).indices} == {0, 1, 2, 3}


@pytest.mark.parametrize(("num_rows", "dimension", "num_selected"), [(12, 30, 6), (10, 3, 7), (6, 1, 6), (9, 5, 5)])
def test_weighted_matching_equals_brute_force(num_rows, dimension, num_selected):
    for seed in range(4):
        rows = pool(num_rows, dimension, seed, unsound=UNSOUND[:2])["gradients"]
        sound = rows.isfinite().all(dim=1) & rows.any(dim=1)
        mean = rows[sound].mean(dim=0)
        picks, gains, weights = oracles.match_with_weights(rows, num_selected)
        result = match_with_weights(rows @ rows.T, sound, num_selected)
        # Once the mean is reached nothing but rounding is left to order the rest by.
        reached = next((k for k in range(len(gains)) if sum(gains[:k]) > (1 - 1e-9) * float(mean @ mean)), len(gains))
        assert result.selection.indices[:reached] == tuple(picks[:reached])
        assert result.selection.gains[:reached] == pytest.approx(gains[:reached], abs=1e-8)
        assert len(set(result.selection.indices)) == min(num_selected, int(sound.sum()))
        assert all(weight >= 0 for weight in result.weights)
        left = torch.tensor(result.weights).double() @ rows[list(result.selection.indices)] - mean
        assert float(left.square().sum()) == pytest.approx(float(mean @ mean) - sum(gains), abs=1e-8)
        if reached == len(gains) and dimension >= num_selected:
            assert result.weights == pytest.approx(weights, abs=1e-6)


def test_nonnegative_weights_equal_trying_every_support():
    num_at_zero = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        rows += 2 * torch.randn(8, generator=generator, dtype=torch.float64)
        target = rows.mean(dim=0) + torch.randn(8, generator=generator, dtype=torch.float64)
        for size in range(1, 7):
            weights = nonnegative_weights(rows[:size] @ rows[:size].T, rows[:size] @ target)
            best, _ = oracles.nonnegative_least_squares(rows[:size], target)
            assert weights.tolist() == pytest.approx(best.tolist(), abs=1e-8)
            num_at_zero += int((weights == 0).sum())
    # Weights that would be negative, which is what the method is for.
    assert num_at_zero > 10


def test_weighted_matching_beats_any_equal_weights():
    rows = pool(20, 40, seed=5)["gradients"]
    result = match_with_weights(rows @ rows.T, torch.ones(20, dtype=torch.bool), 8)
    picked = rows[list(result.selection.indices)]
    mean = rows.mean(dim=0)
    left = float((torch.tensor(result.weights).double() @ picked - mean).norm())
    assert left < min(float((scale * picked.mean(dim=0) - mean).norm()) for scale in (0.1, 0.25, 0.5, 1.0, 2.0))


def test_weighted_matching_of_copies_and_opposites():
    row = torch.tensor([1.0, 2.0, 0.0]).double()
    rows = torch.stack([row, row, -row, torch.tensor([0.0, 0.0, 1.0]).double(), 5 * row])
    result = match_with_weights(rows @ rows.T, torch.ones(5, dtype=torch.bool), 5)
    weights = torch.tensor(result.weights).double()
    assert torch.allclose(weights @ rows[list(result.selection.indices)], rows.mean(dim=0), atol=1e-9)
    assert result.weights[result.selection.indices.index(2)] == 0.0


def test_centred_gram_equals_centred_gradients():
    rows = pool(9, 14, seed=6, unsound=UNSOUND)["gradients"]
    sound = rows.isfinite().all(dim=1) & rows.any(dim=1)
    centred = torch.zeros_like(rows)
    centred[sound] = rows[sound] - rows[sound].mean(dim=0)
    result = centred_gram(rows @ rows.T, sound)
    assert torch.allclose(result, centred @ centred.T, atol=1e-10)
    assert bool((result[~sound] == 0).all()) and bool((result[:, ~sound] == 0).all())
    assert select(result, 4).indices == tuple(option[0] for option in greedy_oracle(centred, 4)[0])


def test_centred_gram_of_rows_that_are_the_mean_is_exactly_zero():
    row = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    every = torch.ones(3, dtype=torch.bool)
    for rows in (row.repeat(3, 1), torch.stack([row + row.flip(0), row, row.flip(0) * 2 + row])):
        gram = centred_gram(rows @ rows.T, every)
        expected_zero = (rows - rows.mean(dim=0)).norm(dim=1) < 1e-9
        assert torch.equal(gram.diagonal() == 0, expected_zero)
        assert select(gram, 3).indices == tuple((~expected_zero).nonzero().flatten().tolist())
    for seed in range(40):
        # What rounding leaves of 0 must not be taken for a gradient.
        row = torch.randn(50, generator=torch.Generator().manual_seed(seed)).double() / 3
        gram = centred_gram((row @ row).repeat(7, 7), torch.ones(7, dtype=torch.bool))
        assert bool((gram == 0).all())
    alone = torch.tensor([False, True, False])
    assert bool((centred_gram(torch.eye(3), alone) == 0).all())
    assert bool((centred_gram(torch.eye(3), ~every) == 0).all())


@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_conflict_with_the_momentum(penalty):
    for seed in range(3):
        known = pool(12, 20, seed, unsound=UNSOUND)
        rows, reference = known["gradients"], known["reference"]
        cosines = rows @ reference / (rows.norm(dim=1) * reference.norm())
        inputs = replace(inputs_of(known), momentum_cosines=cosines)
        rules = {"fisher_alpha": 2.0, "conflict_penalty": penalty, "conflict_reference": "momentum"}
        expected = oracles.against_reference(
            rows, reference, 6, fisher_alpha=2.0, conflict_penalty=penalty, gain_of=log_det_gain
        )
        selection = select_by_strategy("spice", inputs, 6, **rules)
        assert selection.indices == tuple(option[0] for option in expected)
        assert selection.gains == pytest.approx([option[1] for option in expected])
        assert selection.conflicts == pytest.approx([option[2] for option in expected], abs=1e-7)
        assert selection.scores == pytest.approx([option[3] for option in expected], abs=1e-6)
        assert selection.information == pytest.approx(sum(selection.gains))
        # The Fisher rule knows the conflicts, and does not go by them.
        fisher = select_by_strategy("fisher", inputs, 6, **rules)
        assert fisher.indices == select_by_strategy("fisher", inputs, 6, fisher_alpha=2.0).indices
        assert fisher.conflicts == pytest.approx([max(0.0, -float(cosines[place])) for place in fisher.indices])
        before = replace(inputs, momentum_cosines=torch.zeros(12))
        no_momentum = select_by_strategy("spice", before, 6, **rules)
        assert (no_momentum.indices, no_momentum.gains) == (fisher.indices, fisher.gains)
        assert no_momentum.conflicts == (0.0,) * 6


def test_conflict_with_the_momentum_ties_go_to_the_lowest_position():
    # Later candidates are ahead by less than the tolerance.
    gram = torch.diag(1.0 + 1e-9 * torch.arange(4, dtype=torch.float64))
    inputs = PoolScores(
        sound=torch.ones(4, dtype=torch.bool), gram=gram, momentum_cosines=torch.tensor([-1.0, 0.5, 0.5, 0.0])
    )
    picked = select_by_strategy("spice", inputs, 4, conflict_reference="momentum")
    assert picked.indices == (1, 2, 3, 0)
    assert picked.conflicts == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_picks_do_not_depend_on_the_scale_of_the_gradients(name, scale):
    known = pool(10, 8, seed=9)
    # α goes with the scale, as alpha_scaling="pool" makes it.
    usual = select_by_strategy(name, inputs_of(known), 7)
    inputs = inputs_of({**known, "gradients": known["gradients"] * scale})
    # So does the learning rate.
    inputs = replace(inputs, learning_rate=LEARNING_RATE / scale)
    scaled = select_by_strategy(name, inputs, 7, fisher_alpha=1 / scale**2)
    assert scaled.indices == usual.indices
    assert scaled.information == pytest.approx(usual.information, rel=1e-6)
    assert all(map(math.isfinite, scaled.gains))


pools = st.builds(
    pool,
    num_rows=st.integers(1, 14),
    dimension=st.integers(3, 12),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.5, 1.0, 3.0]),
)


@settings(deadline=None, max_examples=80)
@given(pools, st.sampled_from(NAMES), st.integers(1, 16), st.randoms(use_true_random=False))
def test_properties(known, name, num_selected, random):
    rows = known["gradients"]
    num_rows = len(rows)
    for position in random.sample(range(num_rows), random.randint(0, num_rows // 3)):
        rows[position] = random.choice([0.0, math.nan, math.inf])
    inputs = inputs_of(known)
    state = torch.random.get_rng_state()
    selection = select_by_strategy(name, inputs, num_selected)
    assert select_by_strategy(name, inputs, num_selected) == selection
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(selection.indices)) == len(selection.indices) == min(num_selected, int(inputs.sound.sum()))
    assert all(bool(inputs.sound[index]) for index in selection.indices)
    assert all(map(math.isfinite, (*selection.gains, *selection.scores)))

    # Conflicts and information mean the same for every strategy.
    picked = list(selection.indices)
    expected = [conflict(rows, picked[:order], index) for order, index in enumerate(picked)]
    assert selection.conflicts == pytest.approx(expected, abs=1e-6)
    information = information_of(ExactInformation(inputs.sound_gram(), fisher_alpha=1.0), picked)
    assert selection.information == pytest.approx(information, rel=1e-12)

    # The first k of K picks are the k picks, but where quotas go by K.
    keeps_quotas = STRATEGIES[name].has_own_quotas
    prefix = select_by_strategy(name, inputs, random.randint(1, num_selected))
    assert keeps_quotas or prefix.indices == selection.indices[: len(prefix.indices)]
    assert keeps_quotas or prefix.gains == selection.gains[: len(prefix.gains)]

    # dpp's volumes and facility location's cover are submodular: gains fall, but for ties.
    if name in ("dpp", "facility_location"):
        slack = 1.1e-6 * max(1.0, abs(selection.gains[0])) if picked else 0.0
        falling = selection.gains[: min(len(picked), rows.shape[1])] if name == "dpp" else selection.gains
        assert all(later <= earlier + slack for earlier, later in pairwise(falling))

    # Reordering the pool reorders the picks; of rows that are as long as each other the first is in the lower stratum.
    has_ties = keeps_quotas and len(set(known["label_tokens"])) < num_rows
    if name not in ("random", "length_matched", *DRAWN) and not has_ties:
        order = random.sample(range(num_rows), num_rows)
        straight = select_by_strategy(name, inputs, num_selected, tie_tolerance=1e-9)
        reordered = select_by_strategy(name, inputs_of(known, order), num_selected, tie_tolerance=1e-9)
        both = list(zip([order[index] for index in reordered.indices], straight.indices, strict=True))
        # Candidates can tie for good (facility location: two rows cover just each other): the gains agree up to there,
        # and after other picks they need not.
        same = next((place + 1 for place, (one, other) in enumerate(both) if one != other), len(both))
        assert reordered.scores[:same] == pytest.approx(straight.scores[:same], rel=1e-6, abs=1e-6)


@pytest.mark.wrong_arrays
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sound": torch.ones(4)}, "sound must be a boolean torch.Tensor with one entry per candidate"),
        ({"sound": torch.ones(0, dtype=torch.bool)}, "sound must be a boolean"),
        ({"sound": [True] * 4}, "got list"),
        ({"gram": torch.eye(3)}, r"for each of the 4 candidates of sound, got shape \(3, 3\)"),
        ({"gram": torch.arange(16.0).reshape(4, 4)}, "gram must be symmetric"),
        ({"gram": torch.ones(4)}, "gram must be a floating point torch.Tensor with two axes"),
        ({"losses": torch.ones(5)}, r"losses must be .* each of the 4 candidates of sound.*shape \(5,\)"),
        ({"losses": [1.0] * 4}, "losses must be .* got list"),
        ({"gradient_norms": torch.ones(4, dtype=torch.long)}, "gradient_norms must be a floating point"),
        ({"losses_without_instruction": torch.ones(4, 1)}, "losses_without_instruction must be"),
        ({"alignment": torch.ones(3)}, "alignment must be"),
        ({"label_tokens": (1, 2, 3)}, "label_tokens has 3 entries, but sound is for 4 candidates"),
        ({"reference_norm": 0.0}, "reference_norm is the length of the reference gradient and must be positive"),
        ({"reference_norm": math.nan}, "reference_norm is the length"),
    ],
)
def test_inputs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        PoolScores(**{"sound": torch.ones(4, dtype=torch.bool), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "greedy"}, "strategy must be one of 'spice', 'fisher', .*, got 'greedy'"),
        ({"num_selected": 0}, "num_selected is the number of samples to pick"),
        ({"tie_tolerance": 1.0}, "tie_tolerance must lie in"),
        ({"fisher_alpha": 0.0}, "fisher_alpha scales"),
        ({"conflict_penalty": -1.0}, "conflict_penalty must be finite"),
        ({"conflict_reference": "all"}, "conflict_reference must be one of"),
        ({"stop_ratio": 0.5}, 'stop_ratio is about gains of Fisher information, which strategy="dpp" does not'),
        ({"min_gain": 0.5}, 'min_gain is about .* Set min_gain=None, or use strategy="spice"'),
        ({"measure": ExactInformation(torch.eye(4), fisher_alpha=1.0)}, "measure is about"),
    ],
)
def test_arguments_are_checked(change, message):
    arguments = {"name": "dpp", "inputs": inputs_of(pool(4, 6)), "num_selected": 2, **change}
    with pytest.raises(ValueError, match=message):
        select_by_strategy(**arguments)


@pytest.mark.wrong_arrays
def test_arguments_of_variants_are_checked():
    every = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="gram is None"):
        PoolScores(sound=every).sound_gram()
    with pytest.raises(ValueError, match="num_selected"):
        match_with_weights(torch.eye(2), every, 0)
    with pytest.raises(ValueError, match=r"momentum_cosines is None. Pass PoolScores\(momentum_cosines="):
        select_by_strategy("spice", PoolScores(sound=every, gram=torch.eye(2)), 1, conflict_reference="momentum")
    with pytest.raises(ValueError, match="momentum_cosines must be a floating point"):
        PoolScores(sound=every, momentum_cosines=torch.ones(3))
    with pytest.raises(ValueError, match="candidates of sound, got shape"):
        centred_gram(torch.eye(3), every)
    with pytest.raises(ValueError, match="gram must be symmetric"):
        centred_gram(torch.tensor([[1.0, 5.0], [0.0, 1.0]]), every)
