"""What is known of a pool's candidates one by one, for rules that compare no two of them.

Axes: N candidates of a pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from spice_trainer.data.rows import RowShape
from spice_trainer.scoring.features import OwnedFeatures
from spice_trainer.scoring.prefilter import WholePool


@dataclass(frozen=True)
class RowScores:
    """What is known of one pool's candidates. What nobody computed is missing.

    Args:
        pool (`int`): Which of the step's pools, from 0.
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        label_tokens (`tuple[int, ...]`): Label tokens per row.
        num_tokens (`tuple[int, ...]`): Tokens per row, as it trains.
        finite (`torch.Tensor` of shape `(N,)`): Whether the row fitted into memory, and what was computed is finite.
        nonzero (`torch.Tensor` of shape `(N,)`): Whether it is finite, and has label tokens and, if that is known, a
            gradient.
        out_of_memory (`torch.Tensor` of shape `(N,)`): Whether the row did not fit into memory.
        gradient_norms (`torch.Tensor` of shape `(N,)`, *optional*): Norms of the raw gradients.
        losses (`torch.Tensor` of shape `(N,)`, *optional*): Mean negative log-likelihood of the label tokens.
        losses_without_instruction (`torch.Tensor` of shape `(N,)`, *optional*): The same of the answer alone.
        alignment (`torch.Tensor` of shape `(N,)`, *optional*): Inner products of the gradients with a reference.
        reference_norm (`float`, *optional*): Its norm.
        num_dropped_tokens (`int`, *optional*, defaults to `0`): Tokens of all rows that were not scored.
        whole ([`WholePool`], *optional*): The pool that these candidates were left of, if
            others were dropped before.
    """

    pool: int
    candidates: tuple[int, ...]
    label_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    finite: Bool[Tensor, "N"]
    nonzero: Bool[Tensor, "N"]
    out_of_memory: Bool[Tensor, "N"]
    gradient_norms: Float64[Tensor, "N"] | None = None
    losses: Float64[Tensor, "N"] | None = None
    losses_without_instruction: Float64[Tensor, "N"] | None = None
    alignment: Float64[Tensor, "N"] | None = None
    reference_norm: float | None = None
    num_dropped_tokens: int = 0
    whole: WholePool | None = None


def from_shapes(pool: int, candidates: Sequence[int], shapes: Sequence[RowShape]) -> RowScores:
    """What the rows' lengths alone tell: all is sound that has a label.

    Args:
        pool (`int`): Which of the step's pools.
        candidates (`Sequence[int]`): Dataset rows.
        shapes (`Sequence[RowShape]`): Their lengths.

    Returns:
        [`RowScores`]
    """
    label_tokens = tuple(shape.num_label_tokens for shape in shapes)
    return RowScores(
        pool=pool,
        candidates=tuple(candidates),
        label_tokens=label_tokens,
        num_tokens=tuple(shape.num_tokens + shape.num_dropped_tokens for shape in shapes),
        num_dropped_tokens=sum(shape.num_dropped_tokens for shape in shapes),
        finite=torch.ones(len(shapes), dtype=torch.bool),
        nonzero=torch.tensor(label_tokens) > 0,
        out_of_memory=torch.zeros(len(shapes), dtype=torch.bool),
    )


def from_losses(
    pool: int,
    candidates: Sequence[int],
    shapes: Sequence[RowShape],
    losses: Sequence[float | None],
    losses_alone: Sequence[float | None] | None = None,
) -> RowScores:
    """What forwards tell.

    Args:
        pool (`int`): Which of the step's pools.
        candidates (`Sequence[int]`): Dataset rows.
        shapes (`Sequence[RowShape]`): Their lengths.
        losses (`Sequence[float]`): Their losses, 0 for rows without labels; `None` where memory did not suffice.
        losses_alone (`Sequence[float]`, *optional*): Losses of the answers without what precedes them; nan for an
            answer of which nothing is left to predict.

    Returns:
        [`RowScores`]
    """
    known = from_shapes(pool, candidates, shapes)
    others = losses_alone if losses_alone is not None else losses
    missing = torch.tensor([None in pair for pair in zip(losses, others, strict=True)])
    found = torch.tensor([math.nan if loss is None else loss for loss in losses], dtype=torch.float64)
    alone = torch.tensor([math.nan if loss is None else loss for loss in others], dtype=torch.float64)
    # A loss alone of nan says that there is none, not that the row is broken.
    finite = found.isfinite() & ~alone.isinf() & ~missing
    return replace(
        known,
        finite=finite,
        nonzero=known.nonzero & finite & alone.isfinite(),
        out_of_memory=missing,
        losses=found,
        losses_without_instruction=alone if losses_alone is not None else None,
    )


def from_gradients(
    pool: int,
    candidates: Sequence[int],
    shapes: Sequence[RowShape],
    found: OwnedFeatures,
    *,
    whole: WholePool | None,
    alignment: Float64[Tensor, "N"] | None = None,
    reference_norm: float | None = None,
) -> RowScores:
    """What backwards tell.

    Args:
        pool (`int`): Which of the step's pools.
        candidates (`Sequence[int]`): Dataset rows.
        shapes (`Sequence[RowShape]`): Their lengths.
        found ([`OwnedFeatures`]): Norms and losses.
        whole ([`WholePool`], *optional*): The pool that they were left of.
        alignment (`torch.Tensor` of shape `(N,)`, *optional*): Inner products with a reference.
        reference_norm (`float`, *optional*): Its norm.

    Returns:
        [`RowScores`]
    """
    known = from_shapes(pool, candidates, shapes)
    finite = found.norms.isfinite() & found.losses.isfinite() & ~found.out_of_memory
    if alignment is not None:
        finite &= alignment.isfinite()
    return replace(
        known,
        finite=finite,
        nonzero=finite & (found.norms > 0),
        out_of_memory=found.out_of_memory,
        gradient_norms=found.norms,
        losses=found.losses.double(),
        alignment=alignment,
        reference_norm=reference_norm,
        whole=whole,
    )
