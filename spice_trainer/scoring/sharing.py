"""Sharing a step's candidates: who collates, who scores what together, who measures.

    every process collates a W-th of the rows ─ all learn every row's shape ─ all make the same plan
      └ each fetches what it scores but did not collate; its features go to the pool's owner later

Rows of like length share a micro-batch of at most `scoring_tokens_per_batch` tokens, padding included. Micro-batches
are made as even as their number allows and dealt so that every process gets about the same number of tokens:

    M₀ = micro-batches of a plan with the full budget,    R = ⌈M₀ / W⌉
    budget b = the smallest with at most R · W micro-batches,    each process gets at most R of them

Rows without label tokens have a zero gradient: nothing is computed for them, their owner just holds the zeros.

Axes: N candidates, W processes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from spice_trainer.data.rows import CandidateRow, RowShape
from spice_trainer.distributed import Processes
from spice_trainer.scoring.features import order_for_owners
from spice_trainer.scoring.measure import from_shapes
from spice_trainer.selection.scores import PoolScores


@dataclass(frozen=True)
class SharedCandidates:
    """Some pools' candidates, collated and dealt to the processes; positions count them through all these pools."""

    pools: dict[int, tuple[int, ...]]  # Dataset rows of each pool, by its number within the step.
    shapes: tuple[RowShape, ...]
    owners: tuple[int, ...]  # The process that measures each candidate's pool.
    holders: tuple[int, ...]  # The process that scores each candidate.
    held: tuple[int, ...]  # What this process scores, in the order in which it holds the features.
    batches: tuple[tuple[int, ...], ...]  # Its micro-batches; those from `num_kept` on only keep step with others.
    num_kept: int
    rows: dict[int, CandidateRow]  # The collated rows of the micro-batches.

    def by_pool(self) -> Iterator[tuple[int, PoolScores, range]]:
        """Each pool's number, what its rows' lengths tell, and their positions among all candidates."""
        return split_by_pool(self.pools, self.shapes)


def share_candidates(
    pools: dict[int, tuple[int, ...]],
    collate_rows: Callable[[Sequence[int]], list[CandidateRow]],
    *,
    tokens_per_batch: int,
    processes: Processes,
) -> SharedCandidates:
    """Collates candidates, each alone, and deals them to the processes. A collective."""
    indices = [index for rows in pools.values() for index in rows]
    owners = [processes.owner(pool) for pool, rows in pools.items() for _ in rows]
    rows, shapes = read_shapes(indices, collate_rows, processes)
    scored = [position for position, shape in enumerate(shapes) if shape.num_label_tokens > 0]
    shares = [
        [[scored[place] for place in batch] for batch in share]
        for share in share_micro_batches(
            [shapes[position] for position in scored], tokens_per_batch, num_shares=processes.world_size
        )
    ]
    holders = list(owners)
    for rank, share in enumerate(shares):
        for batch in share:
            for position in batch:
                holders[position] = rank
    batches = shares[processes.rank]
    num_kept = len(batches)
    num_rounds = max(map(len, shares)) if processes.lockstep else num_kept
    if num_kept < num_rounds:
        # Every forward gathers sharded weights from all processes. One with nothing left to score repeats the
        # shortest row, and drops what comes of it.
        spare = min(scored, key=lambda position: (shapes[position].num_tokens, position))
        batches = batches + [[spare]] * (num_rounds - num_kept)
    needed = {position for batch in batches for position in batch}
    with processes.failing_together("reading candidates"):
        missing = sorted(needed - rows.keys())
        rows.update(zip(missing, collate_rows([indices[position] for position in missing]), strict=True))
    return SharedCandidates(
        pools=pools,
        shapes=tuple(shapes),
        owners=tuple(owners),
        holders=tuple(holders),
        held=tuple(order_for_owners([p for p, holder in enumerate(holders) if holder == processes.rank], owners)),
        batches=tuple(tuple(batch) for batch in batches),
        num_kept=num_kept,
        rows={position: rows[position] for position in needed},
    )


def read_shapes(
    indices: Sequence[int], collate_rows: Callable[[Sequence[int]], list[CandidateRow]], processes: Processes
) -> tuple[dict[int, CandidateRow], list[RowShape]]:
    """Collates a W-th of some rows on each process, and tells all of them every row's lengths. A collective.

    Returns this process's rows by their position in `indices`, and the lengths of all rows.
    """
    positions = range(processes.rank, len(indices), processes.world_size)
    with processes.failing_together("reading candidates"):
        rows = dict(zip(positions, collate_rows([indices[position] for position in positions]), strict=True))
    return rows, _interleave(processes.gather([rows[position].shape for position in positions]))


def split_by_pool(
    pools: Mapping[int, tuple[int, ...]], shapes: Sequence[RowShape]
) -> Iterator[tuple[int, PoolScores, range]]:
    """Cuts what is known of all candidates into pools; see [`SharedCandidates.by_pool`]."""
    start = 0
    for pool, candidates in pools.items():
        positions = range(start, start + len(candidates))
        start = positions.stop
        yield pool, from_shapes(pool, candidates, shapes[positions.start : positions.stop]), positions


_ENDLESS = 2**62


class _Plan:
    """Rows sorted once, longest first: a budget's micro-batches then take as many steps as there are of them."""

    def __init__(self, shapes: Sequence[RowShape]) -> None:
        self.num_tokens = [shape.num_tokens for shape in shapes]
        # Rows with different inputs never share a micro-batch, and some share with none, as if they were endless.
        kinds = [shape.keys if shape.can_be_padded else None for shape in shapes]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        kind_of = np.array([numbers[kind] for kind in kinds])
        order = np.argsort(-np.array(self.num_tokens, dtype=np.int64), kind="stable")
        self._parts: list[tuple[list[int], list[int]]] = []
        for kind, number in numbers.items():
            part: list[int] = order[kind_of[order] == number].tolist()
            sizes = [_ENDLESS] * len(part) if kind is None else [self.num_tokens[position] or 1 for position in part]
            self._parts.append((part, sizes))

    def count(self, tokens_per_batch: int) -> int:
        """How many micro-batches a budget makes."""
        number = 0
        for _, sizes in self._parts:
            start, stop = 0, len(sizes)
            while start < stop:
                start += tokens_per_batch // sizes[start] or 1
                number += 1
        return number

    def batches(self, tokens_per_batch: int) -> list[list[int]]:
        """The micro-batches of a budget, those of the longest rows first."""
        found = []
        for part, sizes in self._parts:
            start = 0
            while start < len(part):
                rows = part[start : start + (tokens_per_batch // sizes[start] or 1)]
                found.append(rows)
                start += len(rows)
        return sorted(found, key=lambda rows: (-self.num_tokens[rows[0]], rows[0]))

    def padded_tokens(self, batch: Sequence[int]) -> int:
        """Rows × the longest, which is the first."""
        return len(batch) * self.num_tokens[batch[0]]

    def smallest_budget(self, high: int, most: int) -> int:
        """The smallest budget that makes at most so many micro-batches, as `high` does."""
        # More budget never makes more of them, so bisection serves. It begins where Σ min(tokens, budget), which takes
        # a moment, already says that less makes too many.
        tokens, budgets = np.array(self.num_tokens, dtype=np.int64), range(high)
        low = bisect_left(
            budgets, True, lo=1, key=lambda budget: bool(np.minimum(tokens, budget).sum() <= budget * most)
        )
        return bisect_left(budgets, True, lo=low, key=lambda budget: self.count(budget) <= most)


def plan_micro_batches(shapes: Sequence[RowShape], tokens_per_batch: int) -> list[list[int]]:
    """Groups rows into micro-batches of at most `tokens_per_batch` tokens, rows × longest row; positions in `shapes`.

    The longest come first, so that a lack of memory shows at once; one beyond the budget is alone. Rows with different
    inputs never share a micro-batch.
    """
    return _Plan(shapes).batches(tokens_per_batch)


def share_micro_batches(
    shapes: Sequence[RowShape], tokens_per_batch: int, *, num_shares: int = 1
) -> list[list[list[int]]]:
    """Deals micro-batches to processes by tokens: for each its own, those of most tokens first, maybe none."""
    plan = _Plan(shapes)
    most = -(-plan.count(tokens_per_batch) // num_shares)
    # Even micro-batches: with the full budget the last would be nearly empty, and its process idle.
    budget = plan.smallest_budget(tokens_per_batch, most * num_shares)
    shares: list[list[list[int]]] = [[] for _ in range(num_shares)]
    # The heaviest goes to whoever has least, which leaves loads apart by at most one micro-batch.
    loads = [(0, share) for share in range(num_shares)]
    for batch in sorted(plan.batches(budget), key=plan.padded_tokens, reverse=True):
        load, share = heappop(loads)
        shares[share].append(batch)
        if len(shares[share]) < most:
            heappush(loads, (load + plan.padded_tokens(batch), share))
    return shares


def _interleave(shares: Sequence[Sequence[RowShape]]) -> list[RowShape]:
    """Puts together again what was dealt in turns: the first of every share, the second of every share, ..."""
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
