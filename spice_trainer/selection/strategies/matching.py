"""Rules whose picks' gradient is as near as K rows can bring it to the pool's mean gradient μ, from the Gram matrix K.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.selection.greedy import PickOptions, check_options
from spice_trainer.selection.quotas import LengthQuotas, QuotaRoom
from spice_trainer.selection.results import Selection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Picks, Strategy, describe_picks, lowest_tied

# Eigenvalues smaller than this share of the largest cannot be told from rounding.
_FLAT = 1e-12


@dataclass(frozen=True)
class WeightedSelection:
    """Picks with a weight each.

    Args:
        selection ([`Selection`]): The picks in order.
        weights (`tuple[float, ...]`): Weight of each, at least 0, in the same order.
    """

    selection: Selection
    weights: tuple[float, ...]


def pick_matching(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks greedily the candidate that brings the picks' mean gradient nearest the mean μ of all sound ones.

        J(S) = ‖(1/|S|) Σ_S g_i − μ‖²,      gain(x|S) = J(S) − J(S∪x),      J(∅) = ‖μ‖²

    Greedy herding: "Super-Samples from Kernel Herding" (2010) with the term ‖g_x‖² that it drops for kernels of
    constant norm (here `gradient_normalization="unit"`). Makes sense when training on everything would be right and
    only too dear: a small batch with the gradient of a large one. A gain can be negative, and |S| = K is taken all the
    same. Costs the Gram matrix, then O(N²).

    What the Trainer's token-mean loss will apply is Σ tokens·g / Σ tokens: with `gradient_normalization="tokens"` its
    numerators are matched. Objectives within `tie_tolerance` times max(‖μ‖², the smallest) are tied.
    """
    gram = scores.sound_gram()
    eligible = scores.eligible()
    if not bool(eligible.any()):
        return Picks([], [])
    to_mean = gram[:, eligible].mean(dim=1)
    mean_square = float(to_mean[eligible].mean().clamp_min(0.0))
    return herd(gram, eligible, to_mean, mean_square, num_selected, options.tie_tolerance, options.quotas)


def herd(
    gram: Float64[Tensor, "N N"],
    eligible: Bool[Tensor, " N"],
    to_target: Float64[Tensor, " N"],
    target_square: float,
    num_selected: int,
    tie_tolerance: float,
    quotas: LengthQuotas | None = None,
) -> Picks:
    """Picks greedily the candidate that brings the mean of the picks nearest a target c, by ⟨g_x, c⟩ and |c|²."""
    remaining, room, picks = eligible.clone(), QuotaRoom(quotas), Picks([], [])
    squared_norms = gram.diagonal()
    to_sum = torch.zeros_like(to_target)
    sum_square, sum_to_target, objective = 0.0, 0.0, target_square
    for size in range(1, min(num_selected, int(remaining.sum())) + 1):
        objectives = (sum_square + 2.0 * to_sum + squared_norms) / size**2
        objectives = objectives - 2.0 * (sum_to_target + to_target) / size + target_square
        among = room.among(remaining)
        tolerance = tie_tolerance * max(target_square, float(objectives[among].min()))
        index = lowest_tied(-objectives, among, tolerance)
        remaining[index] = False
        room.take(index)
        sum_square += float(2.0 * to_sum[index] + squared_norms[index])
        sum_to_target += float(to_target[index])
        to_sum = to_sum + gram[:, index]
        picks.indices.append(index)
        picks.gains.append(objective - float(objectives[index]))
        objective = float(objectives[index])
    return picks


def match_with_weights(
    gram: Float[Tensor, "N N"],
    sound: Bool[Tensor, " N"],
    num_selected: int,
    *,
    fisher_alpha: float = 1.0,
    tie_tolerance: float = 1e-6,
) -> WeightedSelection:
    """Picks and weights rows so that Σ_S w_i g_i, w >= 0, is nearest the mean μ of all sound gradients.

        J(S) = min_{w >= 0} ‖Σ_S w_i g_i − μ‖²,      next pick: largest ⟨g_x, μ − Σ_S w_i g_i⟩ / ‖g_x‖

    Orthogonal matching pursuit with a refit of all weights after each pick, as in "GRAD-MATCH: Gradient Matching based
    Data Subset Selection for Efficient Deep Model Training" (2021), without its penalty on ‖w‖². Gradients are
    compared by direction, where GRAD-MATCH's own code prefers large ones: a weight makes up for any length. Costs the
    Gram matrix, then O(N K² + K⁴), mostly in the refits.

    How to use the weights: multiply each row's label losses by w_i / mean(w) in a `compute_loss` of your own. Picks
    with weight 0 pull the wrong way and can be left out. No `strategy` does so: the Trainer's loss takes no weights,
    and this package leaves loss and step as they are.

    Args:
        gram (`torch.Tensor` of shape `(N, N)`): Inner products of the gradients.
        sound (`torch.Tensor` of shape `(N,)`, boolean): Candidates that may be picked.
        num_selected (`int`): K, the most samples to pick.
        fisher_alpha (`float`, *optional*, defaults to 1.0): α of the information that is reported.
        tie_tolerance (`float`, *optional*, defaults to 1e-6): Slopes within this times ‖μ‖ of the best are tied.

    Returns:
        [`WeightedSelection`]: Gains are J(S) − J(S∪x).

    Raises:
        ValueError: If an argument is out of range or `gram` is not a Gram matrix.
    """
    check_options(num_selected, PickOptions(fisher_alpha=fisher_alpha, tie_tolerance=tie_tolerance))
    scores = PoolScores(sound=sound, gram=gram)
    gram = scores.sound_gram()
    remaining = scores.eligible()
    picks = Picks([], [])
    weights = torch.zeros(0, dtype=torch.float64)
    if bool(remaining.any()):
        # With rows of unit length no scale is lost: w_i ‖g_i‖ are the weights of directions.
        norms = torch.where(remaining, gram.diagonal(), 1.0).sqrt()
        cosines = gram / norms[:, None] / norms
        to_mean = gram[:, remaining].mean(dim=1) / norms
        mean_square = float((to_mean * norms)[remaining].mean().clamp_min(0.0))
        mean_norm = mean_square**0.5
        objective = mean_square
        for _ in range(min(num_selected, int(remaining.sum()))):
            slopes = to_mean - cosines[:, picks.indices] @ weights
            index = lowest_tied(slopes, remaining, tie_tolerance * mean_norm)
            remaining[index] = False
            picks.indices.append(index)
            chosen, target = cosines[picks.indices][:, picks.indices], to_mean[picks.indices]
            weights = nonnegative_weights(chosen, target)
            refitted = float(weights @ chosen @ weights - 2.0 * weights @ target) + mean_square
            picks.gains.append(objective - refitted)
            objective = refitted
        weights = weights / norms[picks.indices]
    return WeightedSelection(describe_picks(scores, picks, fisher_alpha), tuple(weights.tolist()))


def nonnegative_weights(gram: Float64[Tensor, "K K"], target: Float64[Tensor, " K"]) -> Float64[Tensor, " K"]:
    """Returns the w >= 0 with the smallest wᵀGw − 2 wᵀt, for a positive semi-definite G."""
    # Slow to import, and no other rule needs it.
    from scipy.optimize import nnls

    # ‖A w − b‖² with AᵀA = G and Aᵀb = t. Directions that rounding alone gives G would blow b up.
    eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = eigenvalues > _FLAT * float(eigenvalues.max())
    roots, directions = eigenvalues[kept].sqrt(), vectors[:, kept]
    matrix, right = roots[:, None] * directions.T, directions.T @ target / roots
    return torch.from_numpy(nnls(matrix.numpy(), right.numpy())[0])


MATCHING = Strategy("matching", ("gram",), pick_matching)
