"""The greedy selection with vectors of all D dimensions, as one writes the method down first.

    Δ(x|S) = log(1 + α g_xᵀ (I + α G_Sᵀ G_S)⁻¹ g_x),     (I + α G_Sᵀ G_S)⁻¹ = I − α G_Sᵀ (I + α G_S G_Sᵀ)⁻¹ G_S
    c(x|S) = max(0, −cos(g_x, mean of S)),               s = Δ − λ c

For every candidate and every pick this multiplies |S| gradients of D numbers by one. Selecting on the Gram matrix
needs these products once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def direct_greedy(
    gradients: Tensor,
    num_selected: int,
    *,
    fisher_alpha: float = 1.0,
    conflict_penalty: float = 0.1,
    tie_tolerance: float = 1e-6,
) -> list[int]:
    """Positions of the picks, in order, from gradients `(N, D)`."""
    picks: list[int] = []
    first_gain = 0.0
    total = torch.zeros_like(gradients[0])
    for _ in range(min(num_selected, len(gradients))):
        chosen = gradients[picks]
        inner = (chosen @ chosen.T).double()
        inverse = torch.linalg.inv(torch.eye(len(picks), dtype=torch.float64).to(inner) + fisher_alpha * inner)
        length_of_mean = float(total.norm())
        scores: dict[int, float] = {}
        gains: dict[int, float] = {}
        for position, gradient in enumerate(gradients):
            if position in picks:
                continue
            across = (chosen @ gradient).double()
            squared = float(gradient @ gradient)
            left = squared - fisher_alpha * float(across @ inverse @ across)
            gains[position] = float(torch.log1p(torch.tensor(fisher_alpha * max(left, 0.0), dtype=torch.float64)))
            conflict = 0.0
            if picks:
                cosine = float(gradient @ total) / (squared**0.5 * length_of_mean + 1e-8)
                conflict = max(0.0, -cosine)
            scores[position] = gains[position] - conflict_penalty * conflict
        best = max(scores.values())
        scale = max(abs(best), first_gain or max(gains.values()))
        pick = min(position for position, score in scores.items() if score >= best - tie_tolerance * scale)
        first_gain = first_gain or gains[pick]
        picks.append(pick)
        total += gradients[pick]
    return picks
