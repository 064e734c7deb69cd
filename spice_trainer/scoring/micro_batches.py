"""Which candidates are scored together, and by which process.

Rows of like length share a micro-batch of at most `scoring_tokens_per_batch` tokens, padding included. Micro-batches
are made as even as their number allows and dealt so that every process gets about the same number of tokens.

    M₀ = micro-batches of a plan with the full budget,    R = ⌈M₀ / W⌉
    budget b = the smallest with at most R · W micro-batches,    each process gets at most R of them

with W processes. Everything follows from the rows' shapes, so every process makes the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from spice_trainer.data.rows import RowShape


def plan_micro_batches(shapes: Sequence[RowShape], tokens_per_batch: int) -> list[list[int]]:
    """Groups rows of like length into micro-batches of at most `tokens_per_batch` tokens, padding included.

    Args:
        shapes (`Sequence[RowShape]`): Rows to score.
        tokens_per_batch (`int`): Bound on rows × longest row. A longer row makes a micro-batch of its own.

    Returns:
        `list[list[int]]`: Positions in `shapes`, longest rows first, so that a lack of memory shows at once. Rows with
        different inputs never share a micro-batch.
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
    """Plans micro-batches and deals them to processes by tokens.

    Args:
        shapes (`Sequence[RowShape]`): Rows to score.
        tokens_per_batch (`int`): Bound on rows × longest row of a micro-batch.
        num_shares (`int`, *optional*, defaults to `1`): W, the number of processes.

    Returns:
        `list[list[list[int]]]`: For each process its micro-batches, those of most tokens first, as positions in
        `shapes`. Their numbers may differ: with few rows some processes get none.
    """
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
