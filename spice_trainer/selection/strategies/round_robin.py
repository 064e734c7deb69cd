"""Rules in which the validation rows take turns, each with a pick of its own.

Axes: N candidates of a pool, m validation rows, K picked.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.quotas import QuotaRoom
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.ranking import pick_random
from spice_trainer.selection.strategies.strategy import Picks, Strategy, lowest_tied
from spice_trainer.selection.target import Target
from spice_trainer.utils.random import unit_from


def pick_rds(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Lets the validation rows take turns; each takes the candidate most like it that nobody has taken.

        h_n = Σ_t t x_nt / Σ_t t,      row j takes argmax_x cos(h_x, h_j)

    with x_nt the last hidden state of token t of row n, as the model's head reads it: RDS+ of "Large-Scale Data
    Selection for Instruction Tuning" (2025), its representation by position-weighted means and its round robin. Makes
    sense where what is wanted is known by example; answers count by what they say, not by what they would teach.

    The paper selects once, from a whole dataset, more rows than there are to compare with. Here it is done pool by
    pool at the current weights, and K may be fewer than the validation rows: turns go by an order that is drawn for
    each pool from (seed, step, pool) and the rows' tokens, so that each row has its turns in the long run, and rows of
    a set of more weight have more. Where the released code lets a row lose its turn when another has taken its
    candidate, it takes the next here. Where no validation row is left (all are copies of candidates), picks are
    random.

    Gains are the cosines. Costs a forward a row, of the validation rows too, then O(K (N + m)).
    """
    assert scores.target is not None
    target, num_candidates = scores.target, scores.num_candidates
    cosines = scores.values("last_hidden_cosines")
    is_known = cosines.diagonal() > 0
    remaining = scores.eligible() & is_known[:num_candidates]
    has_label = torch.tensor(target.label_tokens, dtype=torch.int64) > 0
    weights = target.weights(has_label & is_known[num_candidates:])
    if not bool((weights > 0).any()):
        return pick_random(scores, num_selected, options)
    picks, room = Picks([], []), QuotaRoom(options.quotas)
    for row in take_turns(target, weights, scores, min(num_selected, int(remaining.sum()))):
        similar = cosines[num_candidates + row, :num_candidates]
        index = lowest_tied(similar, room.among(remaining), options.tie_tolerance)
        remaining[index] = False
        room.take(index)
        picks.indices.append(index)
        picks.gains.append(float(similar[index]))
    return picks


def take_turns(target: Target, weights: Float64[Tensor, " m"], scores: PoolScores, num_turns: int) -> list[int]:
    """Whose turn it is: rows in proportion to their weights, from an order drawn for the pool by the rows' tokens."""
    rows = weights.nonzero().flatten().tolist()
    names = {row: target.token_hashes[row] if target.token_hashes else row for row in rows}
    starts = {row: unit_from("turn", scores.seed, scores.step, scores.pool, names[row]) for row in rows}
    # The n-th turn of a row is at (n + its start) / weight.
    times = [((number + starts[row]) / float(weights[row]), row) for row in rows for number in range(num_turns)]
    return [row for _, row in sorted(times)[:num_turns]]


RDS = Strategy("rds", ("target", "last_hidden_cosines", "seed", "step", "pool"), pick_rds)
