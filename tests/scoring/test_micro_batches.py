"""Micro-batches keep the token budget, are filled, and are dealt to processes evenly by tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer.data.rows import RowShape
from spice_trainer.scoring.sharing import plan_micro_batches, share_micro_batches


def _shape(length: int, kind: str = "plain") -> RowShape:
    keys = ("input_ids", "token_type_ids") if kind == "types" else ("input_ids",)
    return RowShape(num_tokens=length, num_label_tokens=1, can_be_padded=kind != "alone", keys=keys)


def _cost(shapes: list[RowShape], batch: list[int]) -> int:
    return len(batch) * max(shapes[position].num_tokens for position in batch)


def _check_batches(shapes: list[RowShape], batches: list[list[int]], budget: int) -> None:
    assert sorted(sum(batches, [])) == list(range(len(shapes)))
    for batch in batches:
        assert len(batch) == 1 or _cost(shapes, batch) <= budget
        assert len({shapes[position].keys for position in batch}) == 1
        assert len(batch) == 1 or all(shapes[position].can_be_padded for position in batch)


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["plain", "types", "alone"])), max_size=30)


@settings(max_examples=100, deadline=None)
@given(rows=LENGTHS, budget=st.integers(1, 120))
def test_micro_batches_keep_the_token_budget(rows: list[tuple[int, str]], budget: int) -> None:
    shapes = [_shape(*row) for row in rows]
    batches = plan_micro_batches(shapes, budget)
    _check_batches(shapes, batches, budget)
    longest = [max(shapes[position].num_tokens for position in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_micro_batches_are_filled() -> None:
    assert plan_micro_batches([_shape(length) for length in (3, 10, 4, 5, 10)], 20) == [[1, 4], [3, 2, 0]]


@settings(max_examples=200, deadline=None)
@given(rows=LENGTHS, budget=st.integers(1, 120), num_shares=st.integers(1, 7))
def test_shares_are_even(rows: list[tuple[int, str]], budget: int, num_shares: int) -> None:
    shapes = [_shape(*row) for row in rows]
    shares = share_micro_batches(shapes, budget, num_shares=num_shares)
    assert len(shares) == num_shares
    batches = sum(shares, [])
    _check_batches(shapes, batches, budget)
    # Never more rounds than the full budget needs: with sharded weights each is a gathering of all of them.
    most = -(-len(plan_micro_batches(shapes, budget)) // num_shares)
    assert max(map(len, shares)) <= most
    loads = [sum(_cost(shapes, batch) for batch in share) for share in shares]
    if len(batches) >= num_shares and all(len(share) < most for share in shares):
        assert max(loads) - min(loads) <= max(_cost(shapes, batch) for batch in batches)
    for share in shares:
        costs = [_cost(shapes, batch) for batch in share]
        assert costs == sorted(costs, reverse=True)


def test_a_few_short_rows_are_split_between_processes() -> None:
    shapes = [_shape(10) for _ in range(8)]
    assert [sum(map(len, share)) for share in share_micro_batches(shapes, 2048, num_shares=2)] == [4, 4]
    assert [sum(map(len, share)) for share in share_micro_batches(shapes, 2048, num_shares=8)] == [1] * 8
    # Fewer rows than processes: some have nothing to do.
    assert sorted(len(share) for share in share_micro_batches(shapes[:2], 2048, num_shares=4)) == [0, 0, 1, 1]
    assert share_micro_batches([], 2048, num_shares=3) == [[], [], []]


@pytest.mark.parametrize("num_shares", [2, 8])
def test_the_shares_of_a_paper_sized_step_are_even_within_five_percent(num_shares: int) -> None:
    """Ten pools of 120 rows with a long tail of lengths."""
    generator = random.Random(0)
    shapes = [_shape(min(2048, int(generator.lognormvariate(5.5, 0.8)) + 1)) for _ in range(1200)]
    shares = share_micro_batches(shapes, 4096, num_shares=num_shares)
    loads = [sum(_cost(shapes, batch) for batch in share) for share in shares]
    mean = sum(loads) / num_shares
    assert max(loads) < 1.05 * mean
    # Hardly any padding.
    assert sum(loads) < 1.05 * sum(shape.num_tokens for shape in shapes)


@settings(max_examples=100, deadline=None)
@given(rows=LENGTHS, budget=st.integers(1, 120), num_shares=st.integers(1, 7))
def test_shares_equal_those_of_the_plan_written_out(rows: list[tuple[int, str]], budget: int, num_shares: int) -> None:
    """The smallest budget found by trying all of them, row by row, and the least loaded process by looking at all."""
    shapes = [_shape(*row) for row in rows]

    def plan(budget: int) -> list[list[int]]:
        batches: list[list[int]] = []
        for position in sorted(range(len(shapes)), key=lambda position: -shapes[position].num_tokens):
            same = [batch for batch in batches if shapes[batch[0]].keys == shapes[position].keys]
            same = [batch for batch in same if shapes[batch[0]].can_be_padded and shapes[position].can_be_padded]
            if same and (len(same[-1]) + 1) * shapes[same[-1][0]].num_tokens <= budget:
                same[-1].append(position)
            else:
                batches.append([position])
        return batches

    most = -(-len(plan(budget)) // num_shares)
    smallest = next(tried for tried in range(1, budget + 1) if len(plan(tried)) <= most * num_shares)
    expected: list[list[list[int]]] = [[] for _ in range(num_shares)]
    for batch in sorted(plan(smallest), key=lambda batch: -_cost(shapes, batch)):
        loads = [(sum(_cost(shapes, mine) for mine in share), rank) for rank, share in enumerate(expected)]
        expected[min(load for load in loads if len(expected[load[1]]) < most)[1]].append(batch)
    assert plan_micro_batches(shapes, budget) == plan(budget)
    assert share_micro_batches(shapes, budget, num_shares=num_shares) == expected


def test_planning_a_hundred_pools_takes_about_as_long_as_sorting_them() -> None:
    """Every process plans each step anew, while nothing else runs."""
    generator = random.Random(0)
    shapes = [_shape(min(2048, int(generator.lognormvariate(5.5, 0.8)) + 1)) for _ in range(12_000)]

    def seconds(work: Callable[[], object]) -> float:
        def once() -> float:
            started = time.process_time()
            work()
            return time.process_time() - started

        return min(once() for _ in range(5))

    sorting = seconds(lambda: sorted(shapes, key=lambda shape: (-shape.num_tokens, shape.keys)))
    assert seconds(lambda: share_micro_batches(shapes, 4096, num_shares=8)) < 12 * sorting
