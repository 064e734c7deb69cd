"""Rules that give each candidate a number of its own and pick the largest, blind to what is picked already.

Their gains are these numbers. Numbers within `tie_tolerance` times the largest that is left are tied and go to the
lowest position.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

import hashlib
import sys

import torch

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Picks, Strategy, pick_largest


def pick_random(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks K sound candidates uniformly: what every other rule has to beat, at no cost.

        order of candidate i: SHA-256 of (seed, step, pool, i)

    A hash and no generator, so that it touches no random state and draws the same on any device, version and number of
    processes. Gains are 0.
    """
    prefix = f"spice_trainer/random/{scores.seed}/{scores.step}/{scores.pool}"
    candidates: list[int] = scores.eligible().nonzero().flatten().tolist()
    candidates.sort(key=lambda index: hashlib.sha256(f"{prefix}/{index}".encode()).digest())
    # The first of the order has the largest value.
    order = torch.zeros(scores.num_candidates, dtype=torch.float64)
    order[candidates] = torch.arange(len(candidates), 0, -1, dtype=torch.float64)
    picks = pick_largest(order, order > 0, num_selected, 0.0, quotas=options.quotas)
    return Picks(picks.indices, [0.0] * len(picks.indices))


def pick_top_norm(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks the largest raw gradient norms ‖g_i‖.

    Makes sense where a large gradient means that there is much to learn, and not just that an answer is short. "Deep
    Learning on a Data Diet: Finding Important Examples Early in Training" (2021) prunes by it (GraNd). Costs a forward
    and a backward a candidate, but no Gram matrix.
    """
    norms = scores.values("gradient_norms")
    return pick_largest(norms, scores.eligible(norms), num_selected, options.tie_tolerance, quotas=options.quotas)


def pick_loss(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks the largest total losses, −log p(answer | instruction) = mean loss × label tokens.

    A row's share in the Trainer's token-mean loss, so it makes sense where hard and long rows are what is missing;
    wrong and noisy answers have large losses too. `perplexity` is its counterpart per token. "Online Batch Selection
    for Faster Training of Neural Networks" (2015) trains on large losses. Costs a forward a candidate.
    """
    losses = scores.values("losses") * scores.values("label_tokens")
    return pick_largest(losses, scores.eligible(losses), num_selected, options.tie_tolerance, quotas=options.quotas)


def pick_perplexity(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks the largest perplexities, exp(mean loss): the same order as the mean loss.

    Makes sense to find answers that surprise the model whatever their length; the shortest ones surprise most. "When
    Less is More: Investigating Data Pruning for Pretraining LLMs at Scale" (2023) compares its high, middle and low
    parts on the whole text, here the label tokens count and the high part is taken. Costs a forward a candidate.
    """
    losses = scores.values("losses")
    picks = pick_largest(losses, scores.eligible(losses), num_selected, options.tie_tolerance, quotas=options.quotas)
    perplexities = losses.exp().clamp_max(sys.float_info.max)
    return Picks(picks.indices, [float(perplexities[index]) for index in picks.indices])


def pick_ifd(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks the largest Instruction-Following Difficulty below 1: answers for which the instruction helps, yet little.

        IFD_i = loss(answer | instruction) / loss(answer)

    "From Quantity to Quality: Boosting LLM Performance with Self-Guided Data Selection for Instruction Tuning" (2023).
    There rows with IFD >= 1, whose instruction does not help, are dropped; here they come after all others, smallest
    first, so that a pool still fills its share of the step. Costs two forwards a candidate. Makes sense for
    single-turn instruction data.
    """
    losses, alone = scores.values("losses"), scores.values("losses_without_instruction")
    ratios = (losses / alone.clamp_min(sys.float_info.min)).clamp_max(sys.float_info.max)
    eligible = scores.eligible(losses, alone)
    # Above 0 are those that the instruction helps.
    values = torch.where(ratios < 1, ratios, -ratios)
    picks = pick_largest(values, eligible, num_selected, options.tie_tolerance, quotas=options.quotas)
    return Picks(picks.indices, [abs(gain) for gain in picks.gains])


def pick_less(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks the gradients that point most like a validation set's mean gradient v.

        cos(g_i, v) = ⟨g_i, v⟩ / (‖g_i‖ ‖v‖)

    "LESS: Selecting Influential Data for Targeted Instruction Tuning" (2024). Makes sense when what is wanted is known
    by example. Left out: the sum over warm-up checkpoints (here the current weights are asked at every step) and the
    largest value over several subtasks (here one mean). Adam's preconditioning of g_i is a setting,
    `gradient_preconditioning`. Costs a forward and a backward for each candidate and, at every step, for each row of
    the validation set.
    """
    norms = scores.values("gradient_norms")
    cosines = scores.values("alignment") / norms / float(scores.reference_norm or 1.0)
    eligible = scores.eligible(norms, cosines)
    # Cosines near 0 are differences of large numbers, so ties are counted on their full range of 1.
    return pick_largest(
        cosines, eligible, num_selected, options.tie_tolerance, smallest_scale=1.0, quotas=options.quotas
    )


TOP_NORM = Strategy("top_norm", ("gradient_norms",), pick_top_norm)
LOSS = Strategy("loss", ("losses", "label_tokens"), pick_loss)
PERPLEXITY = Strategy("perplexity", ("losses",), pick_perplexity)
IFD = Strategy("ifd", ("losses", "losses_without_instruction"), pick_ifd)
LESS = Strategy("less", ("gradient_norms", "alignment", "reference_norm"), pick_less)
RANDOM = Strategy("random", ("seed", "step", "pool"), pick_random, has_gains=False)
