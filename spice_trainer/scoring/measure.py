"""What scoring found out about one pool, put together from lengths, losses or features.

    lengths      which rows have a label
    losses       a forward: the mean loss of each row, and of its answer alone
    features     a forward and a backward: norms, and what the rule needs of
                 K_xy = c_x c_y ⟨g_x, g_y⟩ (c_x the normalisation of x's gradient) and ⟨g_x, v⟩

Axes: N candidates of a pool, m features kept per candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import RowShape
from spice_trainer.scoring.features import OwnedFeatures
from spice_trainer.selection.gram import (
    RowGeometry,
    centred_gram,
    cosines_with,
    float64_device,
    measure_rows,
    normalization_weights,
    normalized_gram,
    scale_rows,
)
from spice_trainer.selection.large_pool import LARGE_POOL, GramRows
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.target import Target

# Float64 numbers that are converted at a time.
_CHUNK = 2**24


def from_shapes(pool: int, candidates: Sequence[int], shapes: Sequence[RowShape]) -> PoolScores:
    """What the rows' lengths alone tell: all is sound that has a label."""
    label_tokens = tuple(shape.num_label_tokens for shape in shapes)
    return PoolScores(
        sound=torch.tensor(label_tokens) > 0,
        finite=torch.ones(len(shapes), dtype=torch.bool),
        pool=pool,
        candidates=tuple(candidates),
        label_tokens=label_tokens,
        num_tokens=tuple(shape.num_tokens + shape.num_dropped_tokens for shape in shapes),
        num_dropped_tokens=sum(shape.num_dropped_tokens for shape in shapes),
        references=tuple(shape.reference for shape in shapes),
    )


def from_losses(
    known: PoolScores, losses: Sequence[float | None], losses_alone: Sequence[float | None] | None = None
) -> PoolScores:
    """What forwards tell.

    Losses are 0 for rows without labels and `None` where memory did not suffice; those of answers alone, without what
    precedes them, nan where nothing is left to predict.
    """
    others = losses_alone if losses_alone is not None else losses
    missing = torch.tensor([None in pair for pair in zip(losses, others, strict=True)])
    found = torch.tensor([math.nan if loss is None else loss for loss in losses], dtype=torch.float64)
    alone = torch.tensor([math.nan if loss is None else loss for loss in others], dtype=torch.float64)
    # A loss alone of nan says that there is none, not that the row is broken.
    finite = found.isfinite() & ~alone.isinf() & ~missing
    return replace(
        known,
        finite=finite,
        sound=known.sound & finite & alone.isfinite(),
        out_of_memory=missing,
        losses=found,
        losses_without_instruction=alone if losses_alone is not None else None,
    )


def from_hidden_states(
    known: PoolScores,
    states: Float[Tensor, "N H"],
    target: Target | None,
    target_states: Float[Tensor, "m H"] | None,
    *,
    is_last: bool = False,
) -> PoolScores:
    """What hidden states of the candidates and the validation rows tell; −inf stands where memory did not suffice.

    Those of the last layer are compared as they are, others less their mean.
    """
    rows = states if target_states is None else torch.cat([states, target_states])
    finite = rows.isfinite().all(dim=1)
    rows = rows.double()
    if not is_last and bool(finite.any()):
        rows = rows - rows[finite].mean(dim=0)
    cosines = measure_rows(rows.masked_fill(~finite[:, None], 0.0)).cosines
    has_label = torch.tensor(known.label_tokens, dtype=torch.int64) > 0
    of_pool = finite[: len(states)]
    return replace(
        known,
        finite=known.finite & (of_pool | ~has_label),
        sound=known.sound & of_pool,
        out_of_memory=known.out_of_memory | (states.isneginf().all(dim=1) & has_label),
        target=target,
        hidden_cosines=None if is_last else cosines,
        last_hidden_cosines=cosines if is_last else None,
    )


def from_logits(known: PoolScores, told: Float64[Tensor, "N W"], past: Float[Tensor, "P F"] | None) -> PoolScores:
    """What logits tell, norm and sketch, beside sketches of past picks; −inf stands where memory did not suffice."""
    finite, has_label = told.isfinite().all(dim=1), torch.tensor(known.label_tokens, dtype=torch.int64) > 0
    return replace(
        known,
        finite=known.finite & (finite | ~has_label),
        sound=known.sound & finite,
        out_of_memory=known.out_of_memory | (told.isneginf().all(dim=1) & has_label),
        logit_norms=told[:, 0],
        logit_features=told[:, 1:],
        past_features=told.new_zeros(0, told.shape[1] - 1) if past is None else past,
    )


def from_features(
    known: PoolScores,
    found: OwnedFeatures,
    config: SpiceConfig,
    reference: Float64[Tensor, " m"] | None = None,
    target: Target | None = None,
    target_features: Float[Tensor, "m F"] | None = None,
) -> PoolScores:
    """What backwards tell, with `reference` v, the mean gradient of a validation set seen through the same features.

    `target` is what is known of the validation rows, and `target_features` their gradients.

    **Overwrites `found.features`**: with its rows divided by their largest magnitude where there is a Gram matrix,
    else with unit rows.
    """
    # A model may give a row an infinite loss and yet a finite gradient: a label that it masks out of the vocabulary.
    finite = found.norms.isfinite() & found.losses.isfinite() & ~found.out_of_memory
    known = replace(
        known,
        finite=finite,
        sound=finite & (found.norms > 0),
        out_of_memory=found.out_of_memory,
        gradient_norms=found.norms,
        losses=found.losses.double(),
    )
    if config.takes_gradient_cosines:
        rows = found.features.clone()
        if target_features is not None:
            rows = torch.cat([rows, target_features.to(rows)])
        known = replace(known, target=target, gradient_cosines=measure_rows(rows).cosines)
        del rows
        known = replace(known, gradient_lengths=found.lengths.double())
    known = replace(known, target=target)
    if config.takes_gram:
        known = _with_gram(known, found, config)
    if reference is None:
        return known
    length = float(reference.norm())
    if config.takes_gram:
        alignment = cosines_with(found.features, reference) * found.norms * length
    else:
        alignment = align(found.features, found.norms, reference)
    finite = known.finite & alignment.isfinite()
    return replace(known, finite=finite, sound=known.sound & finite, alignment=alignment, reference_norm=length)


def _with_gram(known: PoolScores, found: OwnedFeatures, config: SpiceConfig) -> PoolScores:
    features, keeps_gradients = found.features, config.information != "exact"
    unit = config.gradient_normalization == "unit"
    tokens = torch.tensor(known.label_tokens, dtype=torch.float64)
    weights = normalization_weights(found.lengths, tokens, config.gradient_normalization)
    is_large = len(features) >= LARGE_POOL and features.device.type == "cpu" and config.reads_gram_by_rows
    geometry = scale_rows(features) if is_large else measure_rows(features)
    finite = known.finite & geometry.finite
    sound = known.sound & finite & geometry.nonzero
    gram: Tensor | GramRows
    if not isinstance(geometry, RowGeometry):
        lengths = torch.ones_like(weights) if unit else weights * found.lengths.cpu().double()
        gram = GramRows(features, geometry, torch.where(sound, lengths, 0.0))
    else:
        gram = normalized_gram(geometry.cosines, found.lengths, weights, unit=unit)
        if config.gradient_centering:
            centred = centred_gram(gram, sound)
            # A pool of which that leaves nothing stays as it is.
            gram = centred if bool(centred.diagonal().any()) else gram
    return replace(
        known,
        finite=finite,
        sound=sound,
        gram=gram,
        # Measures other than the exact one need the gradients' coordinates, not only their inner products.
        gradients=features if keeps_gradients else None,
        row_weights=weights * geometry.scales.cpu() if keeps_gradients else None,
        momentum_cosines=None if found.momentum is None else cosines_with(features, found.momentum),
    )


def align(
    features: Float[Tensor, "N m"], norms: Float64[Tensor, " N"], reference: Float64[Tensor, " m"]
) -> Float64[Tensor, " N"]:
    """Returns ⟨g_x, v⟩ of each candidate, 0 for a zero gradient. **Overwrites `features`** with unit rows."""
    units, lengths = unit_rows(features)
    device = float64_device(units.device)
    reference = reference.to(device)
    chunk = max(1, _CHUNK // max(1, units.shape[1]))
    cosines = torch.cat([part.to(device, torch.float64) @ reference for part in units.split(chunk)]).cpu()
    return torch.where(lengths > 0, cosines * norms, 0.0)


def unit_rows(features: Float[Tensor, "N m"]) -> tuple[Float[Tensor, "N m"], Float64[Tensor, " N"]]:
    """Divides rows by their lengths, in place, by their largest magnitude first: 1e-30 squared would be 0.

    Returns the same rows, zeros where they were zero, and their lengths, float64, on the CPU.
    """
    if not len(features):
        return features, torch.zeros(0, dtype=torch.float64)
    largest = features.abs().amax(dim=1, keepdim=True)
    features /= torch.where(largest > 0, largest, 1.0)
    relative = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    features /= torch.where(relative > 0, relative, 1.0)
    return features, largest.cpu().double()[:, 0] * relative.cpu().double()[:, 0]
