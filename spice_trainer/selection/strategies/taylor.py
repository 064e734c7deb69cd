"""Rules that pick what a step would take most off the validation rows' loss, by a Taylor expansion of it.

    one descent step on S:  θ' = θ − η Σ_S u_x,      L_val(θ) − L_val(θ') ≈ η Σ_S ⟨u_x, v⟩ − redundancy of the picks

u_x is the update that candidate x would make (its gradient, or as Adam would apply it), v = Σ_j w_j h_j the mean
gradient of the validation rows, η the learning rate. Mean losses of rows have the gradients, and their lengths count.

Axes: N candidates of a pool, m validation rows, K picked.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.quotas import QuotaRoom
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Picks, Strategy, lowest_tied
from spice_trainer.utils.random import unit_from

TEMPERATURE = 0.9
"""OPUS's, in standard deviations of a pool's utilities."""


def pick_greats(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks greedily what takes most off the validation rows' loss, to second order.

        gain(x|S) = ⟨g_x, v⟩ − η Σ_{s∈S} ⟨g_x, g_s⟩

    "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration" (2024), with its Hessian taken
    for the identity. Makes sense where what is wanted is known by example and the gradients of single rows can be
    trusted. Gains are per unit of η, the optimizer's learning rate of the step, which changes no pick and keeps the
    first step of a warm-up, whose rate is 0, from being a tie.

    With the learning rates of fine-tuning the second term is small, and the rule near the K largest ⟨g_x, v⟩: unlike
    `less` it prefers long gradients, so short answers, unless `length_quotas` keep it from it. The released code
    halves each batch and takes two validation rows a step; here K and `validation_rows` say how many. With
    `gradient_preconditioning="adam"` candidates' gradients are as Adam would apply them, which the paper leaves open.

    Gains within `tie_tolerance` times the largest first term are tied. Costs a forward and a backward a row, of the
    validation rows too, then O(N K).
    """
    alignment, products, remaining = _utilities(scores)
    room, picks = QuotaRoom(options.quotas), Picks([], [])
    tolerance = options.tie_tolerance * _largest(alignment, remaining)
    gains = alignment
    for _ in range(min(num_selected, int(remaining.sum()))):
        index = lowest_tied(gains, room.among(remaining), tolerance)
        _take(index, float(gains[index]), remaining, room, picks)
        gains = gains - float(scores.learning_rate or 0.0) * products[:, index]
    return picks


def pick_opus(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Draws picks, one by one, likelier the more they take off the validation rows' loss in the optimizer's geometry.

        U(x|S) = ⟨u_x, v⟩ − η ⟨u_x, Σ_{s∈S} u_s⟩,      P(x) ∝ exp(U(x|S) / (τ σ)),  τ = 0.9

    "OPUS: Towards Efficient and Principled Data Selection in Large Language Model Pre-training in Every Iteration"
    (2026), whose Algorithm 1 this is: v stays as it is, u_x is the update that the optimizer would make of x. That is
    Adam's with `gradient_preconditioning="adam"`, which belongs to the rule, and the raw gradient's without. A draw
    keeps the picks from hanging on a few noisy validation rows.

    What the paper leaves open is the unit of U: written with η, as there, it is far below τ at the learning rates of
    fine-tuning, and draws would be uniform. So U is per unit of η and σ the standard deviation of the pool's first
    terms. Adapted: Adam's second moment takes in each candidate's own square, as elsewhere in this package; the sketch
    is the package's own; validation rows are given, where the paper retrieves rows like a benchmark's from the
    training corpus.

    Draws are the largest of U / (τ σ) plus Gumbel noise from a hash of seed, step, pool, pick and candidate: the same
    on any machine. Gains are U. Costs a forward and a backward a row, of the validation rows too, then O(N K).
    """
    alignment, products, remaining = _utilities(scores)
    room, picks = QuotaRoom(options.quotas), Picks([], [])
    scale = TEMPERATURE * _deviation(alignment, remaining)
    gains = alignment
    for order in range(min(num_selected, int(remaining.sum()))):
        among = room.among(remaining)
        noisy = torch.full_like(gains, -math.inf)
        for candidate in among.nonzero().flatten().tolist():
            noise = _gumbel(scores.seed, scores.step, scores.pool, order, candidate)
            noisy[candidate] = (float(gains[candidate]) / scale if scale > 0 else 0.0) + noise
        index = int(noisy.argmax())
        _take(index, float(gains[index]), remaining, room, picks)
        gains = gains - float(scores.learning_rate or 0.0) * products[:, index]
    return picks


def _utilities(scores: PoolScores) -> tuple[Float64[Tensor, " N"], Float64[Tensor, "N N"], Bool[Tensor, " N"]]:
    """⟨u_x, v⟩ of each candidate, ⟨u_x, u_y⟩ of all pairs, and who may be picked."""
    target, num_candidates = scores.target, scores.num_candidates
    if target is None or target.gradient_norms is None:
        raise ValueError("The validation rows' gradient norms are missing. Pass Target(..., gradient_norms=...).")
    cosines, lengths = scores.values("gradient_cosines"), scores.values("gradient_lengths")
    eligible = scores.eligible(lengths) & (cosines.diagonal()[:num_candidates] > 0)
    lengths = torch.where(eligible, lengths, 0.0)
    norms = target.gradient_norms.to(torch.float64)
    has_label = torch.tensor(target.label_tokens, dtype=torch.int64) > 0
    weights = target.weights(has_label & (norms > 0) & (cosines.diagonal()[num_candidates:] > 0))
    alignment = lengths * (cosines[:num_candidates, num_candidates:] @ (weights * norms))
    products = cosines[:num_candidates, :num_candidates] * lengths[:, None] * lengths
    return alignment, products, eligible


def _take(index: int, gain: float, remaining: Bool[Tensor, " N"], room: QuotaRoom, picks: Picks) -> None:
    remaining[index] = False
    room.take(index)
    picks.indices.append(index)
    picks.gains.append(gain)


def _largest(values: Float64[Tensor, " N"], among: Bool[Tensor, " N"]) -> float:
    return float(values[among].abs().max()) if bool(among.any()) else 0.0


def _deviation(values: Float64[Tensor, " N"], among: Bool[Tensor, " N"]) -> float:
    """The standard deviation; 0 where rounding alone tells the values apart."""
    found = values[among]
    deviation = float(found.std(correction=0)) if len(found) else 0.0
    return deviation if deviation > 1e-12 * _largest(values, among) else 0.0


def _gumbel(*parts: object) -> float:
    return -math.log(-math.log(unit_from("opus", *parts)))


_NEEDS = ("target", "gradient_cosines", "gradient_lengths", "learning_rate")
GREATS = Strategy("greats", _NEEDS, pick_greats, target_is_raw=True)
OPUS = Strategy("opus", (*_NEEDS, "seed", "step", "pool"), pick_opus, target_is_raw=True)
