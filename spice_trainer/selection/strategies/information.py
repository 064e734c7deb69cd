"""The paper's own rules: most Fisher information, with and without the penalty on conflict.

    s(x|S) = Δ(x|S) − λ c(x|S)

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

from dataclasses import replace

from spice_trainer.selection.greedy import PickOptions, greedy
from spice_trainer.selection.information import build_information
from spice_trainer.selection.results import Selection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.strategy import Strategy


def pick_spice(scores: PoolScores, num_selected: int, options: PickOptions) -> Selection:
    """Picks most information, least conflict: the paper's rule. Costs the Gram matrix, then O(N K²)."""
    gram = scores.sound_products()
    with_momentum = options.conflict_reference == "momentum"
    if with_momentum and scores.momentum_cosines is None:
        raise ValueError(
            "conflict_reference=\"momentum\" needs the cosines of the candidates' gradients with the optimizer's "
            "momentum, but momentum_cosines is None. Pass PoolScores(momentum_cosines=...)."
        )
    new_measure = options.new_measure
    return greedy(
        build_information("exact", gram=gram, fisher_alpha=options.fisher_alpha)
        if new_measure is None
        else new_measure(),
        gram,
        num_selected,
        options,
        reference_cosines=scores.momentum_cosines if with_momentum else None,
    )


def pick_fisher(scores: PoolScores, num_selected: int, options: PickOptions) -> Selection:
    """Picks most information, λ = 0. Conflicts are known all the same."""
    return pick_spice(scores, num_selected, replace(options, conflict_penalty=0.0))


SPICE = Strategy(
    "spice", ("gram",), pick_spice, maximizes_information=True, has_conflict_penalty=True, reads_whole_gram=False
)
FISHER = Strategy("fisher", ("gram",), pick_fisher, maximizes_information=True, reads_whole_gram=False)
