"""Picks by what rows' logits say, and by how new that is beside what was picked before.

Axes: N candidates of a pool, M past picks, K picked.
"""

from __future__ import annotations

import torch

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Picks, Strategy, pick_largest

# What the released code's 2.5e-3 comes to: its projection lengthens distances by √(V T) / 2, T = 512 and V = 152,000.
DIVERSITY_WEIGHT = 11.0


def pick_uds(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks the largest sums of a row's nuclear norm of logits and its distance from past picks.

        s(x) = ‖Z_x‖_* + α mean_{m in memory} ‖f_x − f_m‖,      α = 11

    Z_x are the logits at the row's label positions, ‖·‖_* the sum of their singular values (large where they are large
    and unlike each other), f_x a sketch of them, and the memory the last 1,024 picks of earlier steps: "Utility-
    Diversity Aware Online Batch Selection for LLM Supervised Fine-tuning" (2025). Makes sense where rows repeat
    themselves and nothing is known of what is wanted. Long answers have large norms: see `length_quotas`.

    The released code takes the logits of all positions, padding included; here those of the labels, which is what
    trains. Its random projection is not an isometry; a count sketch is, so α is its 2.5e-3 in that scale. All pools of
    a step see the same memory. Picks of one pool are not held against each other, as in the paper.

    Gains are s. Costs a forward a row, with the logits of a micro-batch in memory, and O(M N).
    """
    norms, features, past = (
        scores.values("logit_norms"),
        scores.values("logit_features"),
        scores.values("past_features"),
    )
    values = norms
    if len(past):
        values = norms + DIVERSITY_WEIGHT * torch.cdist(features, past).mean(dim=1)
    return pick_largest(values, scores.eligible(values), num_selected, options.tie_tolerance, quotas=options.quotas)


UDS = Strategy("uds", ("logit_norms", "logit_features", "past_features"), pick_uds)
