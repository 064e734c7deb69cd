"""Rules of other papers: their properties, and the numbers that the papers' released code gives."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spice_trainer.selection import PickOptions, PoolScores, select_by_strategy
from spice_trainer.selection.quotas import LengthQuotas
from spice_trainer.selection.strategies.transport import densities, transport
from spice_trainer.selection.target import Target
from tests.support import field_oracles as oracles
from tests.support.strategy_oracles import unit

RELEASED = json.loads((Path(__file__).parent / "released_rules.json").read_text(encoding="utf-8"))
AIMED = ("rds", "tsds", "greats", "opus")
DRAWN = ("tsds", "opus")


def released_rows(number, dimension, phase):
    """Rows that need no generator."""
    rows = [[math.sin(phase + 7.3 * i + 3.1 * j * j + 0.37 * i * j) for j in range(dimension)] for i in range(number)]
    return torch.tensor(rows, dtype=torch.float64)


def scores_of(rows, targets, learning_rate=0.05, hashes=None, sets=(), set_weights=(), **fields):
    """What is known of a pool whose rows and validation rows have these gradients, and hidden states."""
    units = torch.cat([unit(rows), unit(targets)])
    number = len(targets)
    names = tuple(f"row {index}" for index in range(number)) if hashes is None else hashes
    known = {
        "sound": rows.isfinite().all(dim=1) & rows.any(dim=1),
        "gradient_cosines": units @ units.T,
        "hidden_cosines": units @ units.T,
        "last_hidden_cosines": units @ units.T,
        "gradient_lengths": rows.norm(dim=1),
        "learning_rate": learning_rate,
        "target": Target(
            (5,) * number,
            sets=sets,
            set_weights=set_weights,
            gradient_norms=targets.norm(dim=1),
            token_hashes=names,
        ),
        "seed": 3,
        "step": 5,
        "pool": 7,
    }
    return PoolScores(**(known | fields))


def pool(number=30, dimension=8, num_targets=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, dimension, generator=generator, dtype=torch.float64)
    targets = torch.randn(num_targets, dimension, generator=generator, dtype=torch.float64) + 0.5
    return rows * torch.linspace(0.3, 2.0, number, dtype=torch.float64)[:, None], targets


def picks(name, scores, num_selected, **options):
    return select_by_strategy(name, scores, num_selected, PickOptions(**options)).indices


@pytest.mark.parametrize("learning_rate", [1e-4, 0.05, 0.5])
def test_greats_picks_what_the_released_code_picks(learning_rate):
    rows = unit(released_rows(14, 9, 1.0)) * torch.tensor([[0.5 + 0.25 * (5 * i % 14)] for i in range(14)]).double()
    scores = scores_of(rows, released_rows(4, 9, 2.0), learning_rate)
    assert list(picks("greats", scores, 8)) == RELEASED["greats"][str(learning_rate)]


@pytest.mark.parametrize("learning_rate", [1e-4, 0.5])
def test_opus_picks_what_the_released_code_picks_with_its_noise(learning_rate):
    rows = unit(released_rows(14, 9, 1.0)) * torch.tensor([[0.5 + 0.25 * (5 * i % 14)] for i in range(14)]).double()
    scores = scores_of(rows, released_rows(4, 9, 2.0), learning_rate)
    assert list(picks("opus", scores, 8)) == RELEASED["opus"][str(learning_rate)]


@pytest.mark.parametrize("name", ["tsds", "tsds_few"])
def test_tsds_gives_the_chances_that_the_released_code_gives(name):
    if name == "tsds":
        rows, targets = released_rows(40, 5, 1.0), released_rows(6, 5, 4.0)
        rows[30:] = rows[:10] + 0.05 * released_rows(10, 5, 9.0)
    else:
        rows = released_rows(80, 6, 1.0)
        rows[70:] = rows[:10] + 0.05 * released_rows(10, 6, 9.0)
        targets = rows[[3, 20]] + 0.3 * released_rows(2, 6, 5.0)
    scores = scores_of(rows, targets)
    selection = select_by_strategy("tsds", scores, len(rows), PickOptions())
    found = dict(zip(selection.indices, selection.gains, strict=True))
    assert [found[index] for index in range(len(rows))] == pytest.approx(RELEASED[name], abs=1e-9)
    assert sum(selection.gains) == pytest.approx(1.0)
    if name == "tsds_few":
        # Those that have no chance come last, the nearest first.
        behind = [index for index in selection.indices if found[index] == 0]
        assert behind == list(selection.indices[-len(behind) :])
        distances = torch.cdist(unit(rows), unit(targets)).amin(dim=1)
        assert behind == sorted(behind, key=lambda index: float(distances[index]))


def test_a_near_duplicate_shares_its_chance():
    rows, targets = pool(20, 6, 3, seed=4)
    alone = transport_of(rows, targets)
    best = int(alone.argmax())
    doubled = transport_of(torch.cat([rows, rows[best : best + 1]]), targets)
    # One more candidate is there, so other neighbours may be reached.
    assert float(doubled[best] + doubled[-1]) == pytest.approx(float(alone[best]), rel=0.2)


def transport_of(rows, targets):
    units, goals = unit(rows), unit(targets)
    return transport(
        torch.cdist(goals, units),
        torch.full((len(targets),), 1 / len(targets), dtype=torch.float64),
        densities(torch.cdist(units, units)),
    )


def test_weighted_rows_are_transported_by_their_weights():
    rows, targets = pool(12, 6, 3, seed=2)
    weights = [0.6, 0.2, 0.2]
    scores = scores_of(rows, targets, sets=(0, 1, 1), set_weights=(3.0, 2.0))
    selection = select_by_strategy("tsds", scores, 12, PickOptions())
    found = dict(zip(selection.indices, selection.gains, strict=True))
    expected = oracles.transport_plan(unit(rows), unit(targets), list(range(12)), weights)
    assert [found[index] for index in range(12)] == pytest.approx(expected, abs=1e-9)


def test_the_rate_of_a_warm_ups_first_step_is_no_tie():
    rows, targets = pool()
    first = picks("greats", scores_of(rows, targets, 0.0), 8)
    assert first == picks("greats", scores_of(rows, targets, 1e-9), 8)
    aligned = rows @ targets.mean(dim=0)
    assert first == tuple(aligned.argsort(descending=True)[:8].tolist())
    # The second term counts where the rate does.
    assert first != picks("greats", scores_of(rows, targets, 0.3), 8)


def test_draws_are_as_likely_as_the_rule_says():
    rows, targets = pool(5, 4, 2, seed=1)
    utilities = rows @ targets.mean(dim=0)
    expected = torch.softmax(utilities / (0.9 * utilities.std(correction=0)), dim=0)
    counts, pairs = Counter(), Counter()
    for step in range(3000):
        first, second = picks("opus", scores_of(rows, targets, 0.2, step=step), 2)
        counts[first] += 1
        pairs[first, second] += 1
    for index in range(5):
        deviation = math.sqrt(3000 * float(expected[index] * (1 - expected[index])))
        assert abs(counts[index] - 3000 * float(expected[index])) < 5 * deviation
    first = max(counts, key=counts.get)
    left = utilities - 0.2 * rows @ rows[first]
    left[first] = -math.inf
    second = torch.softmax(left / (0.9 * utilities.std(correction=0)), dim=0)
    for index in range(5):
        deviation = math.sqrt(counts[first] * float(second[index] * (1 - second[index])))
        assert abs(pairs[first, index] - counts[first] * float(second[index])) <= 5 * deviation


@pytest.mark.parametrize("name", DRAWN)
def test_draws_follow_seed_step_and_pool_and_touch_no_generator(name):
    rows, targets = pool()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    base = picks(name, scores_of(rows, targets), 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    others = [picks(name, scores_of(rows, targets, **key), 8) for key in ({"seed": 4}, {"step": 6}, {"pool": 8})]
    assert len({base, *others}) == 4


@pytest.mark.parametrize("name", AIMED)
def test_the_first_picks_are_those_of_a_smaller_budget(name):
    rows, targets = pool()
    scores = scores_of(rows, targets)
    whole = picks(name, scores, 30)
    assert sorted(whole) == list(range(30))
    assert all(picks(name, scores, number) == whole[:number] for number in range(1, 30))


@pytest.mark.parametrize("name", AIMED)
def test_the_order_of_the_validation_rows_is_indifferent(name):
    rows, targets = pool(num_targets=5)
    order = [3, 0, 4, 1, 2]
    given = scores_of(rows, targets, sets=(0, 0, 1, 1, 1), set_weights=(1.0, 2.0))
    shuffled = scores_of(
        rows,
        targets[order],
        hashes=tuple(f"row {index}" for index in order),
        sets=tuple((0, 0, 1, 1, 1)[index] for index in order),
        set_weights=(1.0, 2.0),
    )
    assert picks(name, given, 12) == picks(name, shuffled, 12)


@pytest.mark.parametrize("name", AIMED)
def test_validation_rows_that_do_not_count_are_not_read(name):
    rows, targets = pool(num_targets=5)
    kept = scores_of(rows, targets[:4])
    target = scores_of(rows, targets).target
    # A copy of a candidate: it has no label token then.
    copied = replace(scores_of(rows, targets), target=replace(target, label_tokens=(5, 5, 5, 5, 0)))
    assert picks(name, copied, 12) == picks(name, kept, 12)
    broken = targets.clone()
    broken[4] = 0.0
    assert picks(name, scores_of(rows, broken), 12) == picks(name, kept, 12)
    nobody = replace(scores_of(rows, targets), target=replace(target, label_tokens=(0,) * 5))
    assert len(set(picks(name, nobody, 12))) == 12


@pytest.mark.parametrize("name", AIMED)
def test_quotas_are_kept(name):
    rows, targets = pool()
    bins = torch.arange(30) % 3
    quotas = LengthQuotas(bins, (5, 2, 1))
    found = picks(name, scores_of(rows, targets), 8, quotas=quotas)
    assert [sum(int(bins[index]) == number for index in found) for number in range(3)] == [5, 2, 1]


def test_turns_go_by_weight_and_every_row_has_its_own_in_the_long_run():
    # Row n of six takes candidate n.
    rows = torch.eye(6, dtype=torch.float64)
    takers = Counter()
    for step in range(400):
        scores = scores_of(rows, rows, step=step, sets=(0, 0, 0, 0, 1, 1), set_weights=(1.0, 1.0))
        takers.update(picks("rds", scores, 1))
        assert sorted(picks("rds", scores, 6)) == list(range(6))
    for row, number in enumerate([50, 50, 50, 50, 100, 100]):
        assert abs(takers[row] - number) < 5 * math.sqrt(number)
