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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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


def plan_micro_batches(shapes: Sequence[RowShape], tokens_per_batch: int) -> list[list[int]]:
    """Groups rows into micro-batches of at most `tokens_per_batch` tokens, rows × longest row; positions in `shapes`.

    The longest come first, so that a lack of memory shows at once; one beyond the budget is alone. Rows with different
    inputs never share a micro-batch.
    """
    order = sorted(range(len(shapes)), key=lambda position: (-shapes[position].num_tokens, position))
    batches: list[list[int]] = []
    open_batches: dict[tuple[str, ...], list[int]] = {}
    for position in order:
        shape = shapes[position]
        if not shape.can_be_padded:
            batches.append([position])
            continue
        batch = open_batches.get(shape.keys)
        if batch is None or (len(batch) + 1) * shapes[batch[0]].num_tokens > tokens_per_batch:
            batch = open_batches[shape.keys] = []
            batches.append(batch)
        batch.append(position)
    return batches


def share_micro_batches(
    shapes: Sequence[RowShape], tokens_per_batch: int, *, num_shares: int = 1
) -> list[list[list[int]]]:
    """Deals micro-batches to processes by tokens: for each its own, those of most tokens first, maybe none."""
    batches = plan_micro_batches(shapes, tokens_per_batch)
    most = -(-len(batches) // num_shares)
    # Even micro-batches: with the full budget the last would be nearly empty, and its process idle. More budget never
    # makes more of them, so bisection finds the smallest that serves.
    low, high = 1, tokens_per_batch
    while low < high:
        middle = (low + high) // 2
        tried = plan_micro_batches(shapes, middle)
        if len(tried) <= most * num_shares:
            batches, high = tried, middle
        else:
            low = middle + 1
    shares: list[list[list[int]]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    # The heaviest goes to whoever has least, which leaves loads apart by at most one micro-batch.
    for batch in sorted(batches, key=lambda batch: -_num_padded_tokens(shapes, batch)):
        share = min((s for s in range(num_shares) if len(shares[s]) < most), key=lambda s: (loads[s], s))
        shares[share].append(batch)
        loads[share] += _num_padded_tokens(shapes, batch)
    return shares


def _num_padded_tokens(shapes: Sequence[RowShape], batch: Sequence[int]) -> int:
    return len(batch) * max(shapes[position].num_tokens for position in batch)


def _interleave(shares: Sequence[Sequence[RowShape]]) -> list[RowShape]:
    """Puts together again what was dealt in turns: the first of every share, the second of every share, ..."""
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
