"""Variants of SPICE's objective that the Gram matrix K gives for nothing.

    per-token weights   K of tokens·g, `gradient_normalization="tokens"`: what the Trainer's token-mean loss will apply
    centred gradients   K of g − μ: what tells candidates apart, without the direction that all of them share
    other references    c = max(0, −cos(g_x, v)) against a fixed v: the pool's mean μ, or the optimizer's momentum

With v = μ a pick conflicts when it would undo what training on the whole pool does; with momentum, when it would undo
what the last steps did. The picks so far, SPICE's own reference, see only what this step is about to do.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.checks import check_rules
from spice_trainer.fisher import ExactInformation
from spice_trainer.selection import Selection
from spice_trainer.strategies.inputs import StrategyInputs, lowest_tied, masked_gram

_COSINE_EPSILON = 1e-8

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


def pool_mean(gram: Float[Tensor, "N N"], sound: Bool[Tensor, " N"]) -> tuple[Float64[Tensor, " N"], float]:
    """Returns ⟨g_i, μ⟩ and ‖μ‖ for the mean μ of the sound gradients: a reference for [`select_against_reference`].

    Args:
        gram (`torch.Tensor` of shape `(N, N)`): K.
        sound (`torch.Tensor` of shape `(N,)`, boolean): Candidates that may be picked.

    Returns:
        `tuple[torch.Tensor, float]`: Inner products, float64 of shape (N,), and the norm; zeros for a pool with none.

    Raises:
        ValueError: If `gram` is not a Gram matrix.
    """
    gram = masked_gram(gram, sound)
    kept = gram.diagonal() > 0
    if not bool(kept.any()):
        return torch.zeros(gram.shape[0], dtype=torch.float64), 0.0
    to_mean = gram[:, kept].mean(dim=1)
    return to_mean, math.sqrt(max(0.0, float(to_mean[kept].mean())))


def select_against_reference(
    gram: Float[Tensor, "N N"],
    sound: Bool[Tensor, " N"],
    num_selected: int,
    *,
    alignment: Float[Tensor, " N"],
    reference_norm: float,
    fisher_alpha: float = 1.0,
    conflict_penalty: float = 0.1,
    tie_tolerance: float = 1e-6,
) -> Selection:
    """Picks by SPICE's score with the conflict against a fixed gradient v.

        s(x|S) = Δ(x|S) − λ c(x),      c(x) = max(0, −⟨g_x, v⟩ / (‖g_x‖‖v‖ + 1e-8))

    For the optimizer's momentum v is Adam's `exp_avg` (or SGD's `momentum_buffer`), a mean of past gradients with the
    gradient's own sign, and ⟨g_x, v⟩ costs one product with each candidate's gradient.

    Args:
        gram (`torch.Tensor` of shape `(N, N)`): Inner products of the gradients.
        sound (`torch.Tensor` of shape `(N,)`, boolean): Candidates that may be picked.
        num_selected (`int`): K, the most samples to pick.
        alignment (`torch.Tensor` of shape `(N,)`): ⟨g_x, v⟩, of gradients normalised as those of `gram`.
        reference_norm (`float`): ‖v‖; before the first step v is 0, and nothing conflicts.
        fisher_alpha (`float`, *optional*, defaults to 1.0): α.
        conflict_penalty (`float`, *optional*, defaults to 0.1): λ.
        tie_tolerance (`float`, *optional*, defaults to 1e-6): See [`~spice_trainer.selection.select`].

    Returns:
        [`~spice_trainer.selection.Selection`]

    Raises:
        ValueError: If an argument is out of range or lengths differ.
    """
    check_rules(num_selected, conflict_penalty, None, None, tie_tolerance)
    if not 0 <= reference_norm < math.inf:
        raise ValueError(f"reference_norm is a length and must be finite and >= 0, got {reference_norm}.")
    inputs = StrategyInputs(sound=sound, gram=gram, alignment=alignment)
    products = inputs.values("alignment")
    gram = inputs.sound_gram()
    remaining = inputs.eligible(products)
    cosines = products / (gram.diagonal().sqrt() * reference_norm + _COSINE_EPSILON)
    # Adding 0 turns -0.0 into 0.0.
    conflicts = (-cosines).clamp(0.0, 1.0) + 0.0
    measure = ExactInformation(gram, fisher_alpha=fisher_alpha)
    indices: list[int] = []
    gains: list[float] = []
    for _ in range(min(num_selected, int(remaining.sum()))):
        current = measure.gains()
        scores = torch.where(remaining, current - conflict_penalty * conflicts, -torch.inf)
        best = int(scores.argmax())
        scale = max(abs(float(scores[best])), gains[0] if gains else float(current[best]))
        index = lowest_tied(scores, remaining, tie_tolerance * scale)
        remaining[index] = False
        indices.append(index)
        gains.append(measure.add(index))
    picked = tuple(float(conflicts[index]) for index in indices)
    penalised = tuple(gain - conflict_penalty * conflict for gain, conflict in zip(gains, picked, strict=True))
    return Selection(tuple(indices), tuple(gains), picked, penalised, measure.information, stopped_early=False)
