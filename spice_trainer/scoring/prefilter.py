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
from dataclasses import dataclass

import torch

from spice_trainer.config import GradientNormalization
from spice_trainer.scoring.sharing import SharedCandidates
from spice_trainer.selection.gram import normalization_weights


@dataclass(frozen=True)
class WholePool:
    """A pool of which only some candidates were scored by their gradients.

    Args:
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        kept (`tuple[int, ...]`): Positions of those whose gradients were computed, in order.
        label_tokens (`tuple[int, ...]`): Label tokens of all candidates.
        num_tokens (`tuple[int, ...]`): Tokens of all candidates.
        nonfinite (`tuple[int, ...]`): Dataset rows whose loss is not finite.
        zero (`tuple[int, ...]`): Dataset rows without label tokens.
        out_of_memory (`tuple[int, ...]`): Dataset rows that did not fit into memory alone.
    """

    candidates: tuple[int, ...]
    kept: tuple[int, ...]
    label_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    nonfinite: tuple[int, ...]
    zero: tuple[int, ...]
    out_of_memory: tuple[int, ...]

    @property
    def filtered(self) -> tuple[int, ...]:
        """Dataset rows that the filter dropped."""
        other = {*self.nonfinite, *self.zero, *self.out_of_memory, *(self.candidates[place] for place in self.kept)}
        return tuple(row for row in self.candidates if row not in other)


def filter_by_loss(
    shared: SharedCandidates,
    losses: Mapping[int, float | None],
    *,
    share: float,
    gradient_normalization: GradientNormalization,
) -> dict[int, WholePool]:
    """Chooses which candidates of some pools go on.

    Args:
        shared ([`SharedCandidates`]): The pools.
        losses (`Mapping[int, float]`): Loss of each candidate that has label tokens, by its position among all pools'
            candidates; `None` for one that did not fit into memory.
        share (`float`): Of each pool.
        gradient_normalization (`str`): See [`SpiceConfig`].

    Returns:
        `dict[int, WholePool]`: By pool. A pool in which no loss is finite is not among them: it goes on as it is.
    """
    pools: dict[int, WholePool] = {}
    start = 0
    for pool, candidates in shared.pools.items():
        shapes = shared.shapes[start : start + len(candidates)]
        found = [losses.get(position, 0.0) for position in range(start, start + len(candidates))]
        start += len(candidates)
        label_tokens = tuple(shape.num_label_tokens for shape in shapes)
        kept = _largest(found, label_tokens, share, gradient_normalization)
        if not kept:
            continue
        labelled = [(row, loss) for row, loss, count in zip(candidates, found, label_tokens, strict=True) if count]
        pools[pool] = WholePool(
            candidates=tuple(candidates),
            kept=tuple(kept),
            label_tokens=label_tokens,
            num_tokens=tuple(shape.num_tokens for shape in shapes),
            nonfinite=tuple(row for row, loss in labelled if loss is not None and not math.isfinite(loss)),
            zero=tuple(row for row, count in zip(candidates, label_tokens, strict=True) if not count),
            out_of_memory=tuple(row for row, loss in labelled if loss is None),
        )
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
