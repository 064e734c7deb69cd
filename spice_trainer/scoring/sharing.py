"""Sharing a step's candidates: who collates, who scores, who measures.

    every process collates a W-th of the rows ─ all learn every row's shape ─ all make the same plan
      └ each fetches what it scores but did not collate; its features go to the pool's owner later

Rows without label tokens have a zero gradient: nothing is computed for them, their owner just holds the zeros.

Axes: N candidates, W processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from spice_trainer.data.rows import CandidateRow, RowShape
from spice_trainer.distributed import Processes
from spice_trainer.scoring.features import order_for_owners
from spice_trainer.scoring.micro_batches import share_micro_batches


@dataclass(frozen=True)
class SharedCandidates:
    """Some pools' candidates, collated and dealt to the processes; positions count them through all these pools.

    Args:
        pools (`dict[int, tuple[int, ...]]`): Dataset rows of each pool, by its number within the step.
        shapes (`tuple[RowShape, ...]`): Lengths of all candidates.
        owners (`tuple[int, ...]`): The process that measures each candidate's pool.
        holders (`tuple[int, ...]`): The process that scores each candidate.
        held (`tuple[int, ...]`): What this process scores, in the order in which it holds the features.
        batches (`tuple[tuple[int, ...], ...]`): Its micro-batches. Those from `num_kept` on only keep step with other
            processes.
        num_kept (`int`): Micro-batches whose features count.
        rows (`dict[int, CandidateRow]`): The collated rows of those micro-batches.
    """

    pools: dict[int, tuple[int, ...]]
    shapes: tuple[RowShape, ...]
    owners: tuple[int, ...]
    holders: tuple[int, ...]
    held: tuple[int, ...]
    batches: tuple[tuple[int, ...], ...]
    num_kept: int
    rows: dict[int, CandidateRow]

    def by_pool(self) -> Iterator[tuple[int, tuple[int, ...], tuple[RowShape, ...], range]]:
        """Each pool's number, dataset rows, their lengths, and their positions among all candidates."""
        return split_by_pool(self.pools, self.shapes)


def share_candidates(
    pools: dict[int, tuple[int, ...]],
    collate_rows: Callable[[Sequence[int]], list[CandidateRow]],
    *,
    tokens_per_batch: int,
    processes: Processes,
) -> SharedCandidates:
    """Collates candidates and deals them to the processes. A collective: all must call it.

    Args:
        pools (`dict[int, tuple[int, ...]]`): Dataset rows of each pool, by its number within the step.
        collate_rows (`Callable`): Fetches and collates dataset rows, each alone.
        tokens_per_batch (`int`): Bound on rows × longest row of a micro-batch.
        processes ([`Processes`]): Those that share the work.

    Returns:
        [`SharedCandidates`]

    Raises:
        RuntimeError: If another process could not read its rows; with its error.
    """
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

    Args:
        indices (`Sequence[int]`): Dataset rows.
        collate_rows (`Callable`): Fetches and collates dataset rows, each alone.
        processes ([`Processes`]): Those that share the work.

    Returns:
        `tuple`: This process's rows by their position in `indices`, and the lengths of all rows.

    Raises:
        RuntimeError: If another process could not read its rows; with its error.
    """
    positions = range(processes.rank, len(indices), processes.world_size)
    with processes.failing_together("reading candidates"):
        rows = dict(zip(positions, collate_rows([indices[position] for position in positions]), strict=True))
    return rows, _interleave(processes.gather([rows[position].shape for position in positions]))


def split_by_pool(
    pools: Mapping[int, tuple[int, ...]], shapes: Sequence[RowShape]
) -> Iterator[tuple[int, tuple[int, ...], tuple[RowShape, ...], range]]:
    """Cuts what is known of all candidates into pools; see [`SharedCandidates.by_pool`]."""
    start = 0
    for pool, candidates in pools.items():
        positions = range(start, start + len(candidates))
        start = positions.stop
        yield pool, candidates, tuple(shapes[positions.start : positions.stop]), positions


def _interleave(shares: Sequence[Sequence[RowShape]]) -> list[RowShape]:
    """Puts together again what was dealt in turns: the first of every share, the second of every share, ..."""
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
