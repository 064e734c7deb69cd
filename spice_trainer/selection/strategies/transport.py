"""Picks by optimal transport between the validation rows and the candidates, near-duplicates discounted.

Axes: N candidates of a pool, m validation rows, K picked.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.quotas import QuotaRoom
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.ranking import pick_random
from spice_trainer.selection.strategies.strategy import Picks, Strategy, lowest_tied
from spice_trainer.utils.random import unit_from

# The released code's defaults: between alignment and diversity, the scale of distances, and the kernel's width.
DIVERSITY = 0.5
SCALE = 5.0
WIDTH = 0.75


def pick_tsds(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Draws picks from where the validation rows' weight goes when it moves to near candidates, spread out a little.

        min over γ >= 0, Σ_x γ_jx = w_j:   α/C Σ_jx γ_jx d_jx + (1 − α) max_jx ρ_x γ_jx / w_j,      P(x) = Σ_j γ_jx
        ρ_x = Σ_y max(0, 1 − d_xy² / σ²),   α = 0.5, C = 5, σ = 0.75

    d are distances of unit vectors: of hidden states, less the mean of all. So each validation row gives its weight to
    its nearest candidates, as many as their distances allow, and a candidate with near-duplicates gets less, in
    proportion to how many they are: KNN-KDE of "TSDS: Data Selection for Task-Specific Model Finetuning" (2024), with
    the released code's three settings. Makes sense where what is wanted is known by example and the pool repeats
    itself.

    The paper works on the whole dataset, finds neighbours by an index, and draws with repetition. Here it is a pool:
    distances are exact, every candidate is a neighbour, and none is drawn twice; where fewer than K have a chance, the
    others follow by their distance to the nearest validation row. Embeddings are the model's own hidden states where
    the paper leaves them open. Where no validation row is left, picks are random.

    Draws come from a hash of seed, step, pool and candidate. Gains are P(x). Costs a forward up to one layer a row, of
    the validation rows too, then O(m N log N).
    """
    assert scores.target is not None
    target, num_candidates = scores.target, scores.num_candidates
    cosines = scores.values("hidden_cosines")
    is_known = cosines.diagonal() > 0
    remaining = scores.eligible() & is_known[:num_candidates]
    has_label = torch.tensor(target.label_tokens, dtype=torch.int64) > 0
    weights = target.weights(has_label & is_known[num_candidates:])
    rows, members = weights.nonzero().flatten(), remaining.nonzero().flatten()
    if not len(rows):
        return pick_random(scores, num_selected, options)
    distances = (2.0 - 2.0 * cosines).clamp_min(0.0).sqrt()
    chances = torch.zeros(num_candidates, dtype=torch.float64)
    if len(members):
        among = distances[members][:, members]
        chances[members] = transport(distances[num_candidates + rows][:, members], weights[rows], densities(among))
    nearest = distances[num_candidates + rows, :num_candidates].amin(dim=0)
    # The smallest of Exp(P) is drawn first, which is drawing by P without repetition.
    order = -(4.0 + nearest)
    for candidate in (chances > 0).nonzero().flatten().tolist():
        drawn = unit_from("tsds", scores.seed, scores.step, scores.pool, candidate)
        time = -math.log(drawn) / float(chances[candidate])
        order[candidate] = 1.0 / (1.0 + time)
    picks, room = Picks([], []), QuotaRoom(options.quotas)
    for _ in range(min(num_selected, len(members))):
        index = lowest_tied(order, room.among(remaining), 0.0)
        remaining[index] = False
        room.take(index)
        picks.indices.append(index)
        picks.gains.append(float(chances[index]))
    return picks


def densities(distances: Float64[Tensor, "N N"]) -> Float64[Tensor, " N"]:
    """How many rows, itself included, a row stands for: ρ of its distances to all."""
    kernel = (1.0 - distances.square() / WIDTH**2).clamp_min(0.0)
    # What rounding leaves of a row's distance to itself.
    kernel.fill_diagonal_(1.0)
    return kernel.sum(dim=1)


def transport(
    distances: Float64[Tensor, "m N"], weights: Float64[Tensor, " m"], density: Float64[Tensor, " N"]
) -> Float64[Tensor, " N"]:
    """P(x), by the largest s for which giving each neighbour at most 1/(s ρ) of a row's weight is worth its way.

    At s row j uses its neighbours up to the k-th, where Σ_{i<=k} 1/ρ_i reaches s, and one more unit of s would cost
    d_{k+1} s − Σ_{i<=k} d_i/ρ_i.
    """
    number = distances.shape[1]
    sorted_distances, neighbours = distances.sort(dim=1, stable=True)
    shares = 1.0 / density[neighbours]
    reached = shares.cumsum(dim=1)
    # What the k-th costs, when s has reached it; of the last neighbour nothing follows.
    costs = sorted_distances[:, 1:] * reached[:, :-1] - (sorted_distances * shares).cumsum(dim=1)[:, :-1]
    bound = (1.0 - DIVERSITY) * SCALE / DIVERSITY
    # Where the bound is never met everybody reaches every candidate.
    spread, last = float(reached[0, -1]), torch.full((len(distances),), number - 1)
    # Each event is a row's next neighbour, and changes the total by what it costs more than the one before.
    more = weights[:, None] * torch.diff(costs, dim=1, prepend=torch.zeros(len(costs), 1, dtype=torch.float64))
    order = torch.argsort(reached[:, :-1].flatten(), stable=True)
    exceeding = (more.flatten()[order].cumsum(0) >= bound).nonzero().flatten()
    if len(exceeding):
        event = int(exceeding[0])
        spread = float(reached[:, :-1].flatten()[order[event]])
        before = torch.div(order[:event], number - 1, rounding_mode="floor")
        last = (torch.bincount(before, minlength=len(distances)) - 1).clamp_min(0)
    chances = torch.zeros(number, dtype=torch.float64)
    for row, place in enumerate(last.tolist()):
        used = shares[row, : place + 1] / spread
        # Rounding may leave a little more than all.
        used = used * min(1.0, 1.0 / float(used.sum()))
        chances.index_add_(0, neighbours[row, : place + 1], weights[row] * used)
        left = max(1.0 - float(used.sum()), 0.0)
        chances[neighbours[row, min(place + 1, number - 1)]] += float(weights[row]) * left
    return chances


TSDS = Strategy("tsds", ("target", "hidden_cosines", "seed", "step", "pool"), pick_tsds)
