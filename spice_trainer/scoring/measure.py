"""What scoring found out about one pool: from its candidates' features to the normalised Gram matrix.

    K_xy = c_x c_y ⟨g_x, g_y⟩,      c_x = normalisation of x's gradient

where gradients may be preconditioned (module `preconditioning`).

Axes: N candidates of a pool, D gradient dimension, m features kept per candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.data.rows import RowShape
from spice_trainer.scoring.prefilter import WholePool
from spice_trainer.selection.gram import cosines_with, measure_rows, normalization_weights, normalized_gram
from spice_trainer.selection.strategies.variants import centred_gram


@dataclass(frozen=True)
class PoolScores:
    """What scoring found out about one pool.

    Args:
        pool (`int`): Which of the step's pools, from 0.
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        gram (`torch.Tensor` of shape `(N, N)`): Normalised inner products of sample gradients, float64, on the CPU.
        gradient_norms (`torch.Tensor` of shape `(N,)`): Norms of the raw gradients, float64.
        finite (`torch.Tensor` of shape `(N,)`): Whether the gradient is known, and it and the loss are finite.
        nonzero (`torch.Tensor` of shape `(N,)`): Whether it is finite and not zero.
        losses (`torch.Tensor` of shape `(N,)`): Mean negative log-likelihood of each row's label tokens.
        label_tokens (`tuple[int, ...]`): Label tokens per row.
        num_tokens (`tuple[int, ...]`): Tokens per row, as it trains.
        out_of_memory (`torch.Tensor` of shape `(N,)`): Whether the row did not fit into memory, so that nothing is
            known of its gradient.
        gradients (`torch.Tensor` of shape `(N, D)`, *optional*): Rows divided by their largest magnitude, for measures
            that need coordinates.
        row_weights (`torch.Tensor` of shape `(N,)`, *optional*): Multipliers that turn `gradients` into normalised
            gradients.
        num_dropped_tokens (`int`, *optional*, defaults to `0`): Tokens of all rows that were not scored.
        whole ([`WholePool`], *optional*): The pool that these candidates were left of, if
            others were dropped before.
        momentum_cosines (`torch.Tensor` of shape `(N,)`, *optional*): Cosines of the gradients with the optimizer's
            momentum, float64, on the CPU; never of centred gradients.
    """

    pool: int
    candidates: tuple[int, ...]
    gram: Float64[Tensor, "N N"]
    gradient_norms: Float64[Tensor, "N"]
    finite: Bool[Tensor, "N"]
    nonzero: Bool[Tensor, "N"]
    losses: Float[Tensor, "N"]
    label_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    out_of_memory: Bool[Tensor, "N"]
    gradients: Float[Tensor, "N D"] | None = None
    row_weights: Float64[Tensor, "N"] | None = None
    num_dropped_tokens: int = 0
    whole: WholePool | None = None
    momentum_cosines: Float64[Tensor, "N"] | None = None


def measure_pool(
    features: Float[Tensor, "N m"],
    norms: Float64[Tensor, "N"],
    *,
    pool: int,
    candidates: Sequence[int],
    shapes: Sequence[RowShape],
    losses: Float[Tensor, "N"],
    gradient_normalization: Literal["none", "sqrt_tokens", "tokens", "unit"],
    keep_gradients: bool,
    gradient_centering: bool = False,
    out_of_memory: Bool[Tensor, "N"] | None = None,
    lengths: Float64[Tensor, "N"] | None = None,
    momentum: Float[Tensor, " m"] | None = None,
) -> PoolScores:
    """Measures one pool. **Overwrites `features`** with its rows divided by their largest magnitude.

    Args:
        features (`torch.Tensor` of shape `(N, m)`): Features of the candidates.
        norms (`torch.Tensor` of shape `(N,)`): Exact norms of their raw gradients.
        pool (`int`): Which of the step's pools.
        candidates (`Sequence[int]`): Dataset rows.
        shapes (`Sequence[RowShape]`): Their lengths.
        losses (`torch.Tensor` of shape `(N,)`): Their losses.
        gradient_normalization (`str`): See [`SpiceConfig`].
        keep_gradients (`bool`): Whether the features are kept for measures that need coordinates.
        gradient_centering (`bool`, *optional*, defaults to `False`): Whether the mean of the sound normalised
            gradients is taken off each. A pool of which that leaves nothing stays as it is.
        out_of_memory (`torch.Tensor` of shape `(N,)`, *optional*): Candidates that did not fit into memory. Their
            features are zero.
        lengths (`torch.Tensor` of shape `(N,)`, *optional*): Exact norms of what the features are of, where that is
            not the raw gradients.
        momentum (`torch.Tensor` of shape `(m,)`, *optional*): Features of the optimizer's momentum.

    Returns:
        [`PoolScores`]
    """
    geometry = measure_rows(features)
    if out_of_memory is None:
        out_of_memory = torch.zeros(len(candidates), dtype=torch.bool)
    # A model may give a row an infinite loss and yet a finite gradient: a label that it masks out of the vocabulary.
    finite = geometry.finite.cpu() & norms.isfinite() & losses.cpu().isfinite() & ~out_of_memory
    nonzero = finite & geometry.nonzero.cpu() & (norms > 0)
    lengths = norms if lengths is None else lengths
    label_tokens = tuple(shape.num_label_tokens for shape in shapes)
    weights = normalization_weights(lengths, torch.tensor(label_tokens, dtype=torch.float64), gradient_normalization)
    gram = normalized_gram(geometry.cosines.cpu(), lengths, weights, unit=gradient_normalization == "unit")
    if gradient_centering:
        centred = centred_gram(gram, nonzero)
        gram = centred if bool(centred.diagonal().any()) else gram
    return PoolScores(
        pool=pool,
        candidates=tuple(candidates),
        gram=gram,
        gradient_norms=norms,
        finite=finite,
        nonzero=nonzero,
        losses=losses,
        label_tokens=label_tokens,
        num_tokens=tuple(shape.num_tokens + shape.num_dropped_tokens for shape in shapes),
        num_dropped_tokens=sum(shape.num_dropped_tokens for shape in shapes),
        out_of_memory=out_of_memory,
        gradients=features if keep_gradients else None,
        row_weights=weights * geometry.scales.cpu() if keep_gradients else None,
        momentum_cosines=None if momentum is None else cosines_with(features, momentum),
    )
