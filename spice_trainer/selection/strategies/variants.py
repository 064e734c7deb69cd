"""Variants of SPICE's objective that the Gram matrix K gives for nothing.

    per-token weights   K of tokens·g, `gradient_normalization="tokens"`: what the Trainer's token-mean loss will apply
    centred gradients   K of g − μ: what tells candidates apart, without the direction that all of them share
    other references    c = max(0, −cos(g_x, v)) against a fixed v: the pool's mean μ, or the optimizer's momentum

The first are a matter of module `gram`, the last of module `selection`. With v = μ a pick conflicts when it would undo
what training on the whole pool does; with momentum, when it would undo what the last steps did. The picks so far,
SPICE's own reference, see only what this step is about to do.

Axes: N candidates of a pool.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.selection.strategies.inputs import masked_gram

# What float64 rounding leaves of a squared norm that is 0, relative to the terms that it is the difference of.
_ROUNDING = 1e-13


def centred_gram(gram: Float[Tensor, "N N"], sound: Bool[Tensor, " N"]) -> Float64[Tensor, "N N"]:
    """Returns the Gram matrix of g_i − μ, μ being the mean of the sound gradients.

        C_ij = K_ij − a_i − a_j + ‖μ‖²,      a_i = ⟨g_i, μ⟩

    Makes sense where one direction that all candidates share drowns their differences. Costs O(N²).

    Args:
        gram (`torch.Tensor` of shape `(N, N)`): K.
        sound (`torch.Tensor` of shape `(N,)`, boolean): Candidates that may be picked.

    Returns:
        `torch.Tensor` of shape `(N, N)`: float64 on the CPU; 0 in rows and columns that are not sound, and in those of
        a gradient that is the mean itself (always so for a pool with one sound row), which no rule then picks.

    Raises:
        ValueError: If `gram` is not a Gram matrix.
    """
    gram = masked_gram(gram, sound)
    kept = gram.diagonal() > 0
    if not bool(kept.any()):
        return gram
    to_mean = gram[:, kept].mean(dim=1)
    mean_square = to_mean[kept].mean()
    centred = gram - to_mean[:, None] - to_mean + mean_square
    centred = (centred + centred.T) / 2.0
    squared_norms = centred.diagonal()
    lengths = gram.diagonal().sqrt()
    kept = kept & (squared_norms > _ROUNDING * (lengths + lengths[kept].mean()).square())
    return torch.where(kept[:, None] & kept, centred, 0.0)
