"""Rules that aim at rows which the user wants to do well on, and keep to their answer lengths.

Axes: N candidates of a pool, m target rows, K picked.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from spice_trainer.selection.greedy import PickOptions
from spice_trainer.selection.quotas import LengthQuotas, quotas_by_pool, quotas_by_reference
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.matching import herd
from spice_trainer.selection.strategies.ranking import pick_random
from spice_trainer.selection.strategies.strategy import Picks, Strategy
from spice_trainer.selection.target import SHIFT_LEVEL, Target, lengths_differ, measure_shift
from spice_trainer.utils.random import seed_from


def pick_targeted_matching(scores: PoolScores, num_selected: int, options: PickOptions, *, features: str) -> Picks:
    """Picks greedily so that the mean of the picks' unit features is nearest a shrunken target c.

        c = p + ρ (v̄ − p),      next x: smallest ‖(Σ_S u + u_x) / (|S| + 1) − c‖²

    p is the mean of the pool and v̄ that of the validation rows; ρ is 0 unless a permutation test finds that they
    differ, and then as much of the difference as the rows warrant ([`measure_shift`]). Picks keep to the answer
    lengths of the validation rows where ρ > 0, else to those of the pool, in `length_bins` bins. Makes sense where the
    pool holds more of other things than what is wanted. Without validation rows it matches the pool. Costs a forward
    (hidden states) or a forward and a backward a row, then O((N + m)²).

    Gains are what each pick brings the mean nearer, as in `matching`.
    """
    matrix, target, num_candidates = scores.values(features), scores.target or Target(()), scores.num_candidates
    sound = _sound_rows(scores, target) & (matrix.diagonal() > 0)
    eligible = sound[:num_candidates]
    if not bool(eligible.any()):
        return Picks([], [])
    shift = measure_shift(matrix, sound, target, seed=seed_from(scores.seed, scores.step, scores.pool))
    quotas = options.quotas
    if quotas is None:
        quotas = _own_quotas(scores, target, sound, shift.shrinkage > 0, num_selected, options.length_bins)
    products = matrix @ shift.target_weights
    picks = herd(
        matrix[:num_candidates, :num_candidates],
        eligible,
        products[:num_candidates],
        max(float(shift.target_weights @ products), 0.0),
        num_selected,
        options.tie_tolerance,
        quotas,
    )
    if not target.num_rows:
        return picks
    facts = {"shift_p_value": shift.p_value, "shift_shrinkage": shift.shrinkage, "shift_distance": shift.distance}
    return picks._replace(facts=facts)


def pick_length_matched(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Picks random rows whose answers are as long as the validation rows', or the pool's where these do not differ.

    The control for every rule that aims: often length is most of what such a rule sees, and this asks no model.
    Whether lengths differ is told by a permutation test, at the level of `targeted_matching`'s gate. Gains are 0.
    """
    target, quotas, facts = scores.target or Target(()), options.quotas, dict[str, float]()
    if quotas is None:
        sound = _sound_rows(scores, target)
        lengths = torch.tensor([*(scores.label_tokens or ()), *target.label_tokens])
        is_candidate = torch.arange(len(lengths)) < scores.num_candidates
        of_both = (lengths[sound & is_candidate].tolist(), lengths[sound & ~is_candidate].tolist())
        p_value = lengths_differ(*of_both, seed=seed_from(scores.seed, scores.step, scores.pool))
        quotas = _own_quotas(scores, target, sound, p_value <= SHIFT_LEVEL, num_selected, options.length_bins)
        facts = {"shift_p_value": p_value} if target.num_rows else {}
    return pick_random(scores, num_selected, replace(options, quotas=quotas))._replace(facts=facts)


def _sound_rows(scores: PoolScores, target: Target) -> Bool[Tensor, " M"]:
    """Which candidates may be picked, and behind them which validation rows have a label."""
    return torch.cat([scores.eligible(), torch.tensor(target.label_tokens, dtype=torch.int64) > 0])


def _own_quotas(
    scores: PoolScores,
    target: Target,
    sound: Bool[Tensor, " M"],
    is_shifted: bool,
    num_selected: int,
    num_bins: int,
) -> LengthQuotas:
    """Quotas by the validation rows' answer lengths if the pool is another, else by the pool's."""
    lengths, num_candidates = scores.label_tokens or (), scores.num_candidates
    if not is_shifted:
        return quotas_by_pool(lengths, sound[:num_candidates], num_selected, num_bins=num_bins)
    weights = target.weights(sound[num_candidates:])
    return quotas_by_reference(lengths, target.label_tokens, weights, num_selected, num_bins=num_bins)


_ON_HIDDEN_STATES = Strategy(
    "targeted_matching",
    ("hidden_cosines", "label_tokens", "seed", "step", "pool"),
    partial(pick_targeted_matching, features="hidden_cosines"),
    reads_target=True,
    has_own_quotas=True,
)
TARGETED_MATCHING = Strategy(
    "targeted_matching",
    ("gradient_cosines", "label_tokens", "seed", "step", "pool"),
    partial(pick_targeted_matching, features="gradient_cosines"),
    reads_target=True,
    has_own_quotas=True,
    on_hidden_states=_ON_HIDDEN_STATES,
)
LENGTH_MATCHED = Strategy(
    "length_matched",
    ("label_tokens", "seed", "step", "pool"),
    pick_length_matched,
    has_gains=False,
    reads_target=True,
    has_own_quotas=True,
)
