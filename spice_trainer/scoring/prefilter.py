"""A filter before the gradients: of each pool only the candidates of largest loss go on.

    kept = the ⌈share · N⌉ candidates of largest c_x ℓ_x,    c_x = 1, √tokens or tokens, as gradients are normalised

ℓ_x is the mean negative log-likelihood of x's label tokens. A row that the model predicts well has a small gradient,
so what is dropped is what would add little information. Losses take a forward of all candidates, which is about half
of the work: by that count a share of a half saves nothing, and one of a tenth 40 %.

Axes: N candidates of a pool.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from spice_trainer.config import GradientNormalization
from spice_trainer.scoring.measure import from_losses
from spice_trainer.scoring.sharing import SharedCandidates
from spice_trainer.selection.gram import normalization_weights
from spice_trainer.selection.scores import PoolScores


class FilteredPool(NamedTuple):
    """A pool as its losses tell it, and the positions of the candidates that go on, in order."""

    whole: PoolScores
    kept: tuple[int, ...]


def filter_by_loss(
    shared: SharedCandidates,
    losses: Mapping[int, float | None],
    *,
    share: float,
    gradient_normalization: GradientNormalization,
) -> dict[int, FilteredPool]:
    """Chooses which candidates of some pools go on, by pool.

    `losses` are those of the candidates that have label tokens, by their position among all pools' candidates, `None`
    for one that did not fit into memory. A pool in which no loss is finite is not in the result: it goes on as it is.
    """
    pools: dict[int, FilteredPool] = {}
    for pool, known, positions in shared.by_pool():
        found = [losses.get(position, 0.0) for position in positions]
        whole = from_losses(known, found)
        kept = _largest(found, whole.label_tokens or (), share, gradient_normalization)
        if kept:
            pools[pool] = FilteredPool(whole, tuple(kept))
    return pools


def _largest(
    losses: Sequence[float | None],
    label_tokens: Sequence[int],
    share: float,
    gradient_normalization: GradientNormalization,
) -> list[int]:
    """Positions of the candidates of largest weighted loss, in order."""
    tokens = torch.tensor(label_tokens, dtype=torch.float64)
    # A gradient of length 1 says nothing of the loss.
    normalization = "none" if gradient_normalization == "unit" else gradient_normalization
    weights = normalization_weights(torch.ones_like(tokens), tokens, normalization).tolist()
    usable = {
        place: weights[place] * loss
        for place, loss in enumerate(losses)
        if loss is not None and math.isfinite(loss) and label_tokens[place]
    }
    # The earlier of two alike, as in the selection.
    order = sorted(usable, key=lambda place: (-usable[place], place))
    return sorted(order[: math.ceil(share * len(losses))])
