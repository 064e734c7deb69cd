"""What a few scored rows tell, against the vectors themselves."""

import pytest
import torch

from spice_trainer.pilot.evidence import explained_by_length, measure_pointing
from spice_trainer.selection.target import Target
from tests.support.strategy_oracles import unit


def rows(number, centre, generator, dimension=30):
    return unit(torch.randn(number, dimension, generator=generator, dtype=torch.float64) + centre)


def explained(candidates, targets, lengths, target_lengths):
    matrix = torch.cat([candidates, targets])
    sound = torch.ones(len(matrix), dtype=torch.bool)
    return explained_by_length(matrix @ matrix.T, sound, lengths, Target(tuple(target_lengths)))


def test_a_difference_of_lengths_alone_is_explained_by_them():
    """Short and long rows lie apart, and the validation rows are the short ones."""
    generator = torch.Generator().manual_seed(0)
    short, long = torch.zeros(30).double(), torch.zeros(30).double()
    short[0], long[1] = 4.0, 4.0
    candidates = torch.cat([rows(60, short, generator), rows(180, long, generator)])
    lengths = [5] * 60 + [50] * 180
    assert explained(candidates, rows(24, short, generator), lengths, [5] * 24) > 0.95
    # The others, of the same lengths as the pool, differ in something else.
    other = torch.zeros(30).double()
    other[2] = 4.0
    assert explained(candidates, rows(24, other, generator), lengths, [5] * 6 + [50] * 18) < 0.1


def test_it_is_the_definition():
    generator = torch.Generator().manual_seed(1)
    centre = torch.zeros(30).double()
    centre[0] = 1.0
    candidates, targets = rows(40, 0 * centre, generator), rows(12, 2 * centre, generator)
    lengths = torch.randint(1, 40, (40,), generator=generator).tolist()
    target_lengths = torch.randint(10, 30, (12,), generator=generator).tolist()
    edges = [sorted(target_lengths)[place] for place in (2, 5, 8)]

    def bin_of(length):
        return sum(edge < length for edge in edges)

    mean = torch.zeros(30).double()
    for one in range(4):
        members = [row for row in range(40) if bin_of(lengths[row]) == one]
        share = sum(bin_of(length) == one for length in target_lengths) / 12
        mean += share * candidates[members].mean(dim=0)
    weights = [sum(bin_of(n) == bin_of(lengths[row]) for n in target_lengths) / 12 for row in range(40)]
    weights = [w / sum(bin_of(n) == bin_of(lengths[row]) for n in lengths) for row, w in enumerate(weights)]

    def excess(mean, weights):
        effective = sum(weight**2 for weight in weights)
        by_chance = (1 - float(mean @ mean)) * effective / (1 - effective)
        by_chance += (1 - float(targets.mean(0) @ targets.mean(0))) / 11
        return float((targets.mean(0) - mean).square().sum()) - by_chance

    expected = 1 - excess(mean, weights) / excess(candidates.mean(0), [1 / 40] * 40)
    assert explained(candidates, targets, lengths, target_lengths) == pytest.approx(min(max(expected, 0), 1))


def test_where_picks_point():
    """Of two pools, the picks of rows that go where the held rows go, and of those that do not."""
    generator = torch.Generator().manual_seed(2)
    there = torch.zeros(30).double()
    there[0] = 2.0
    steps = torch.cat([rows(20, there, generator), rows(20, 0 * there, generator)])
    order = torch.randperm(40, generator=generator)
    steps, is_there = steps[order], (order < 20).tolist()
    pools = [list(range(20)), list(range(20, 40))]
    good = [[row for row in pool if is_there[row]][:5] for pool in pools]
    bad = [[row for row in pool if not is_there[row]][:5] for pool in pools]
    held = rows(16, there, generator)
    better, worse = (measure_pointing(steps, held, pools, picks) for picks in (good, bad))
    total, target = steps[[row for picks in good for row in picks]].sum(0), held.mean(0)
    assert better.cosine == pytest.approx(float(total @ target / total.norm() / target.norm()))
    assert better.is_better and not worse.is_better and worse.over_random < 0
    random = [pool[::4] for pool in pools]
    assert not measure_pointing(steps, held, pools, random).is_better
    assert better == measure_pointing(steps, held, pools, good)
