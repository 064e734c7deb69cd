"""How a pool differs from the rows to do well on: gate, shrinkage and target, from vectors and from draws."""

import pytest
import torch

from spice_trainer.selection.target import Target, lengths_differ, measure_shift
from tests.support.strategy_oracles import shift, unit


def rows_around(centre, number, generator, dimension=20):
    rows = torch.randn(number, dimension, generator=generator, dtype=torch.float64)
    return unit(rows + centre)


def pool_and_target(seed, number=40, num_target=8, offset=0.0, dimension=20):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dimension, generator=generator, dtype=torch.float64) * 0.5
    direction = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return (
        rows_around(centre, number, generator, dimension),
        rows_around(centre + offset * direction, num_target, generator, dimension),
    )


def measure(candidates, targets, target=None, sound=None, **options):
    rows = torch.cat([candidates, targets])
    sound = torch.ones(len(rows), dtype=torch.bool) if sound is None else sound
    target = Target((5,) * len(targets)) if target is None else target
    return measure_shift(rows @ rows.T, sound, target, **options)


@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
def test_one_set_equals_the_definition(offset):
    for seed in range(3):
        candidates, targets = pool_and_target(seed, offset=offset)
        found = measure(candidates, targets, seed=seed)
        p_value, shrinkage, centre = shift(candidates, targets, [1 / 8] * 8, [list(range(8))], seed)
        assert found.p_value == p_value
        assert found.shrinkage == pytest.approx(shrinkage, abs=1e-9)
        rows = torch.cat([candidates, targets])
        assert torch.allclose(found.target_weights @ rows, centre, atol=1e-12)
        assert found.distance == pytest.approx(float((targets.mean(0) - candidates.mean(0)).norm()))
    assert (found.shrinkage > 0) == (offset == 1.0)


def test_several_sets_count_by_their_weights():
    candidates, targets = pool_and_target(1, offset=1.0)
    target = Target((5,) * 8, sets=(0, 0, 0, 0, 0, 1, 1, 1), set_weights=(1.0, 3.0))
    weights = [0.25 / 5] * 5 + [0.75 / 3] * 3
    assert target.weights(torch.ones(8, dtype=torch.bool)).tolist() == pytest.approx(weights)
    found = measure(candidates, targets, target, seed=4)
    p_value, shrinkage, centre = shift(candidates, targets, weights, [[0, 1, 2, 3, 4], [5, 6, 7]], 4)
    assert (found.p_value, found.shrinkage) == (p_value, pytest.approx(shrinkage, abs=1e-9))
    assert torch.allclose(found.target_weights @ torch.cat([candidates, targets]), centre, atol=1e-12)


def test_rows_that_are_not_sound_take_no_part():
    candidates, targets = pool_and_target(2, offset=1.0)
    sound = torch.ones(48, dtype=torch.bool)
    sound[[3, 7, 41]] = False
    found = measure(candidates, targets, sound=sound)
    fewer = measure(
        candidates[sound[:40]], targets[sound[40:]], Target((5,) * 7), sound=torch.ones(45, dtype=torch.bool)
    )
    assert (found.p_value, found.shrinkage) == (fewer.p_value, pytest.approx(fewer.shrinkage))
    assert not found.target_weights[~sound].any()


def test_the_order_of_rows_is_indifferent():
    candidates, targets = pool_and_target(3, offset=0.35)
    first = measure(candidates, targets)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        again = measure(
            candidates[torch.randperm(40, generator=generator)], targets[torch.randperm(8, generator=generator)]
        )
        assert (again.p_value, again.shrinkage) == (first.p_value, pytest.approx(first.shrinkage, abs=1e-12))
    assert 0.002 < first.p_value < 1


def test_nothing_to_compare_with_is_no_difference():
    candidates, targets = pool_and_target(4)
    alone = measure(candidates, targets[:0], Target(()))
    assert (alone.p_value, alone.shrinkage) == (1.0, 0.0)
    assert torch.allclose(alone.target_weights, torch.full((40,), 1 / 40, dtype=torch.float64))
    unlabelled = torch.ones(48, dtype=torch.bool)
    unlabelled[40:] = False
    assert measure(candidates, targets, sound=unlabelled).p_value == 1.0


def test_one_row_is_trusted_less_than_many():
    candidates, targets = pool_and_target(5, number=100, offset=2.0)
    one, many = measure(candidates, targets[:1]), measure(candidates, targets)
    assert one.shrinkage < many.shrinkage
    assert many.shrinkage > 0.8


@pytest.mark.parametrize(("offset", "num_target", "least", "most"), [(0.0, 24, 0, 4), (0.5, 24, 180, 200)])
def test_the_gate_opens_where_there_is_a_difference(offset, num_target, least, most):
    """In 200 draws: at most 2 % false alarms, at least 90 % found with 24 rows."""
    opened = 0
    for seed in range(200):
        candidates, targets = pool_and_target(seed, number=120, num_target=num_target, offset=offset, dimension=64)
        opened += measure(candidates, targets, seed=seed).shrinkage > 0
    assert least <= opened <= most


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label_tokens": (1, 2), "sets": (0,)}, "needs the set of each, got 1"),
        ({"label_tokens": (1, 2), "sets": (0, 1), "set_weights": (1.0,)}, "a weight of each of 2 sets, got 1"),
        ({"label_tokens": (1,), "set_weights": (0.0,)}, "must be above 0"),
    ],
)
def test_a_target_that_cannot_be(options, text):
    with pytest.raises(ValueError, match=text):
        Target(**options)


def test_lengths():
    assert lengths_differ(range(10, 130), [5, 6, 7, 5, 6, 7, 8, 9, 5, 6]) < 0.01
    assert lengths_differ(range(10, 130), range(10, 130, 5)) > 0.5
    assert lengths_differ([5] * 30, [5] * 10) == 1.0
    assert lengths_differ(range(10), []) == 1.0


@pytest.mark.parametrize(("num_values", "num_rows", "num_target"), [(6, 96, 24), (60, 120, 8)])
def test_lengths_that_tie_are_no_difference(num_values, num_rows, num_target):
    """At most 2 % false alarms."""
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for seed in range(200):
        drawn = torch.randint(5, 5 + num_values, (num_rows + num_target,), generator=generator).tolist()
        alarms += lengths_differ(drawn[:num_rows], drawn[num_rows:], seed=seed) <= 0.01
    assert alarms <= 4


def test_the_order_of_lengths_is_indifferent():
    lengths, others = [3, 9, 9, 4, 20, 7, 7, 30], [9, 40, 7, 50]
    found = {lengths_differ(sorted(lengths, key=lambda n: hash((n, key))), others[::-1]) for key in range(5)}
    assert len(found) == 1 and 0.002 < found.pop() < 1


@pytest.mark.parametrize("sizes", [(1, 30), (1, 1), (2, 200)])
def test_sets_of_very_different_size(sizes):
    """Without a difference the gate stays shut, the lone row's weight is its set's, and a row is trusted little."""
    sets = tuple(number for number, size in enumerate(sizes) for _ in range(size))
    alarms, shrinkages = 0, []
    for seed in range(200):
        found = measure(*pool_and_target(seed, num_target=sum(sizes)), Target((4,) * sum(sizes), sets), seed=seed)
        alarms += found.shrinkage > 0
        assert 0.0 <= found.shrinkage < 1.0
        candidates, targets = pool_and_target(seed, num_target=sum(sizes), offset=4.0)
        shrinkages.append(measure(candidates, targets, Target((4,) * sum(sizes), sets), seed=seed).shrinkage)
    # A level of 0.01: more than 8 of 200 come once in 10,000 times.
    assert alarms <= 8
    if sum(sizes) > 2:
        assert min(shrinkages) > 0.3
    weights = Target((4,) * sum(sizes), sets).weights(torch.ones(sum(sizes), dtype=torch.bool))
    assert weights[0] == pytest.approx(0.5 / sizes[0]) and weights[-1] == pytest.approx(0.5 / sizes[1])
    sound = torch.tensor([number > 0 for number in sets])
    assert Target((4,) * sum(sizes), sets).weights(sound)[-1] == pytest.approx(1 / sizes[1])
