"""Rules that spread their picks over the pool's gradients, from the Gram matrix K alone.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

import torch

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.quotas import QuotaRoom
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Picks, Strategy, lowest_tied

# What float32 products leave of a squared norm that is 0: less than this is no direction of its own.
_DEPENDENT = 1e-6


def pick_dpp(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks greedily the largest det K_S, the squared volume that the picks' gradients span.

        gain(x|S) = log det K_{S∪x} − log det K_S = log e_x,      e_x = K_xx − K_xS K_SS⁻¹ K_Sx

    "Fast Greedy MAP Inference for Determinantal Point Process to Improve Recommendation Diversity" (2018). The first
    pick is the largest gradient, and the rule is `fisher` for α → ∞: without its 1 in log(1 + α e), diversity alone
    counts, however small a gradient. Makes sense to avoid near-duplicates. Costs the Gram matrix, then O(N K²).

    Gains within `tie_tolerance` (nats) of the best are tied. e_x counts as at least 1e-6 K_xx: below that float32
    products tell nothing, and a pool with fewer directions than K goes on with the largest gradients.
    """
    gram = scores.sound_gram()
    remaining = scores.eligible()
    squared_norms = gram.diagonal().clone()
    floors = _DEPENDENT * squared_norms
    residuals = squared_norms.clone()
    # The Cholesky factor of K_SS, continued for every candidate; a dependent pick adds no column. Its width is not
    # num_selected's: BLAS may round otherwise for another width, and the first picks of more must be the same.
    factor = torch.empty_like(gram)
    num_columns = 0
    picks, room = Picks([], []), QuotaRoom(options.quotas)
    for _ in range(min(num_selected, int(remaining.sum()))):
        gains = torch.maximum(residuals, floors).log()
        index = lowest_tied(gains, room.among(remaining), options.tie_tolerance)
        remaining[index] = False
        room.take(index)
        picks.indices.append(index)
        picks.gains.append(float(gains[index]))
        if residuals[index] > floors[index]:
            previous = factor[:, :num_columns]
            column = (gram[:, index] - previous @ previous[index]) / residuals[index].sqrt()
            factor[:, num_columns] = column
            num_columns += 1
            residuals = residuals - column.square()
    return picks


def pick_facility_location(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks greedily so that every sound candidate's gradient has a pick's gradient near it.

        F(S) = Σ_i max_{s∈S} (d_max − ‖g_i − g_s‖),      ‖g_i − g_s‖² = K_ii + K_ss − 2 K_is

    "Coresets for Data-efficient Training of Machine Learning Models" (2020, CRAIG): d_max is the largest distance in
    the pool, and the first pick is the medoid. Makes sense when a pool has clusters that should all be heard. CRAIG
    also weights each pick by the candidates it stands for, which a Trainer's loss has no place for. Costs the Gram
    matrix, then O(N² K). Gains within `tie_tolerance` times the first gain of the best are tied.
    """
    gram = scores.sound_gram()
    remaining = scores.eligible()
    sound = remaining.nonzero().flatten()
    squared_norms = gram.diagonal()[sound]
    distances = (squared_norms[:, None] + squared_norms - 2.0 * gram[sound][:, sound]).clamp_min(0.0).sqrt()
    distances.fill_diagonal_(0.0)
    similarities = torch.zeros(len(sound), len(gram), dtype=torch.float64)
    similarities[:, sound] = distances.max() - distances if len(sound) else distances
    covered = torch.zeros(len(sound), dtype=torch.float64)
    picks, room = Picks([], []), QuotaRoom(options.quotas)
    for _ in range(min(num_selected, len(sound))):
        gains = (similarities - covered[:, None]).clamp_min(0.0).sum(dim=0)
        first_gain = picks.gains[0] if picks.gains else float(gains.max())
        index = lowest_tied(gains, room.among(remaining), options.tie_tolerance * first_gain)
        remaining[index] = False
        room.take(index)
        covered = torch.maximum(covered, similarities[:, index])
        picks.indices.append(index)
        picks.gains.append(float(gains[index]))
    return picks


DPP = Strategy("dpp", ("gram",), pick_dpp)
FACILITY_LOCATION = Strategy("facility_location", ("gram",), pick_facility_location)
