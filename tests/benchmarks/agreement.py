"""Whether a method's result is that of the loop: relative errors of gradients, or of the Gram matrices made of them.

gradients: max_n ‖g_n − g*_n‖ / ‖g*_n‖           Gram matrices: max_ij |K_ij − ⟨g*_i, g*_j⟩| / (‖g*_i‖ ‖g*_j‖)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spice_trainer.selection.scores import PoolScores

CHUNK = 2**18


def gradient_error(found: Tensor, expected: Tensor, order: Sequence[int] | None = None) -> float:
    """Largest relative error of a row. `order`: which row of `expected` each row of `found` is."""
    errors = []
    for place, position in enumerate(order if order is not None else range(len(found))):
        length = expected[position].norm()
        errors.append(float((found[place] - expected[position]).norm() / length.clamp(min=1e-30)))
    return max(errors)


def gram_matrix(gradients: Tensor) -> Tensor:
    """⟨g_i, g_j⟩ in float64."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    for start in range(0, gradients.shape[1], CHUNK):
        block = gradients[:, start : start + CHUNK].double()
        gram.addmm_(block, block.T)
    return gram.cpu()


def gram_error(scores: Sequence[PoolScores], gradients: Tensor, *, among: Sequence[Tensor] | None = None) -> float:
    """Largest relative error over the pools. `among`: for each pool, which candidates are compared."""
    worst = 0.0
    for number, pool in enumerate(scores):
        expected = gram_matrix(gradients[list(pool.candidates)])
        lengths = expected.diagonal().sqrt().clamp(min=1e-30)
        errors = ((pool.gram - expected) / torch.outer(lengths, lengths)).abs()
        if among is not None:
            errors = errors[among[number]][:, among[number]]
        worst = max(worst, float(errors.max()) if errors.numel() else 0.0)
    return worst


def norm_error(scores: Sequence[PoolScores], gradients: Tensor) -> float:
    """Largest relative error of the gradient norms, which a sketch keeps exactly."""
    worst = 0.0
    for pool in scores:
        lengths = gradients[list(pool.candidates)].norm(dim=1).double().cpu()
        worst = max(worst, float(((pool.gradient_norms - lengths) / lengths.clamp(min=1e-30)).abs().max()))
    return worst
