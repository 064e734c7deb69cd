"""What a rule may know of a pool, and what its picks look like in the records.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.selection.checks import check_gram, check_matrix, sound_rows
from spice_trainer.selection.conflict import conflicts_with_mean
from spice_trainer.selection.greedy import information_of
from spice_trainer.selection.information import ExactInformation
from spice_trainer.selection.results import Selection

_VECTORS = ("gradient_norms", "losses", "losses_without_instruction", "alignment", "momentum_cosines")


@dataclass(frozen=True, eq=False)
class StrategyInputs:
    """What is known of a pool's N candidates. A rule reads what it needs, and the rest may be missing.

    Args:
        sound (`torch.Tensor` of shape `(N,)`, boolean): Candidates that may be picked. Where no gradients were
            computed these are the rows with at least one label token and, if it is known, a finite loss.
        gram (`torch.Tensor` of shape `(N, N)`, *optional*): Inner products of the normalised gradients. Also what
            conflicts and information are computed from, whatever the rule.
        gradient_norms (`torch.Tensor` of shape `(N,)`, *optional*): Norms of the raw gradients.
        losses (`torch.Tensor` of shape `(N,)`, *optional*): Mean negative log-likelihood of each row's label tokens.
        losses_without_instruction (`torch.Tensor` of shape `(N,)`, *optional*): The same of the label tokens alone,
            without what precedes them.
        label_tokens (`Sequence[int]`, *optional*): Label tokens of each row.
        alignment (`torch.Tensor` of shape `(N,)`, *optional*): Inner products of the raw gradients with a reference
            gradient v, such as the mean gradient of a validation set.
        reference_norm (`float`, *optional*): ‖v‖.
        momentum_cosines (`torch.Tensor` of shape `(N,)`, *optional*): Cosines of the gradients with the optimizer's
            momentum, for conflicts with it.
        seed (`int`, *optional*): Seed of the run.
        step (`int`, *optional*): Optimizer step of the run, from 0.
        pool (`int`, *optional*): Pool of the step, from 0.

    Raises:
        ValueError: If lengths differ, or something is not of its type.
    """

    sound: Bool[Tensor, " N"]
    gram: Float[Tensor, "N N"] | None = None
    gradient_norms: Float[Tensor, " N"] | None = None
    losses: Float[Tensor, " N"] | None = None
    losses_without_instruction: Float[Tensor, " N"] | None = None
    label_tokens: Sequence[int] | None = None
    alignment: Float[Tensor, " N"] | None = None
    reference_norm: float | None = None
    momentum_cosines: Float[Tensor, " N"] | None = None
    seed: int | None = None
    step: int | None = None
    pool: int | None = None

    def __post_init__(self) -> None:
        """Checks everything that is there, so that a mistake shows whichever rule is asked for."""
        check_mask(self.sound)
        if self.gram is not None:
            masked_gram(self.gram, self.sound)
        for name in _VECTORS:
            value = getattr(self, name)
            if value is not None:
                _check_vector(name, value, self.num_candidates)
        if self.label_tokens is not None and len(self.label_tokens) != self.num_candidates:
            raise ValueError(
                f"label_tokens has {len(self.label_tokens)} entries, but sound is for {self.num_candidates} "
                "candidates. Give one number per candidate, in pool order."
            )
        if self.reference_norm is not None and not 0 < self.reference_norm < math.inf:
            raise ValueError(
                f"reference_norm is the length of the reference gradient and must be positive and finite, got "
                f"{self.reference_norm}. A reference of length 0 points nowhere: check the rows it was computed from."
            )

    @property
    def num_candidates(self) -> int:
        """N, the number of candidates."""
        return self.sound.shape[0]

    def values(self, name: str) -> Float64[Tensor, " N"]:
        """Returns a field that holds one number a candidate as float64 on the CPU, shape (N,)."""
        return torch.as_tensor(getattr(self, name)).detach().to("cpu").to(torch.float64)

    def eligible(self, *values: Float64[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Tells which candidates may be picked: sound, with a sound row in the Gram matrix, and finite `values`."""
        eligible = self.sound.to("cpu").clone()
        if self.gram is not None:
            eligible &= sound_rows(masked_gram(self.gram, self.sound))
        for value in values:
            eligible &= value.isfinite()
        return eligible

    def sound_gram(self) -> Float64[Tensor, "N N"]:
        """Returns the Gram matrix with rows and columns of 0 for candidates that may not be picked.

        Raises:
            ValueError: If there is none.
        """
        if self.gram is None:
            raise ValueError("gram is None, but conflicts, information and gradients' geometry are computed from it.")
        return masked_gram(self.gram, self.sound)


class Picks(NamedTuple):
    """Positions in the order of picking, and each one's gain in the rule's own units."""

    indices: list[int]
    gains: list[float]


def describe_picks(inputs: StrategyInputs, picks: Picks, *, fisher_alpha: float) -> Selection:
    """Returns the picks with their conflicts and information, which mean the same for every rule.

    Args:
        inputs ([`StrategyInputs`]): What is known of the pool.
        picks ([`Picks`]): Picks and gains.
        fisher_alpha (`float`): α of the information log det(I + α Σ_S g gᵀ).

    Returns:
        [`Selection`]: Scores are the gains. Conflicts are against the mean of the picks so
        far. Without a Gram matrix conflicts and information are nan: nobody knows them.
    """
    gains = tuple(picks.gains)
    conflicts, information = (math.nan,) * len(gains), math.nan
    if inputs.gram is not None:
        gram = inputs.sound_gram()
        picked = enumerate(picks.indices)
        conflicts = tuple(conflicts_with_mean(gram, picks.indices[:order])[index] for order, index in picked)
        information = information_of(ExactInformation(gram, fisher_alpha=fisher_alpha), picks.indices)
    return Selection(tuple(picks.indices), gains, conflicts, gains, information, stopped_early=False)


def lowest_tied(scores: Float64[Tensor, " N"], remaining: Bool[Tensor, " N"], tolerance: float) -> int:
    """Returns the lowest position among the remaining ones whose score is at most `tolerance` below the best."""
    best = scores[remaining].max()
    return int(((scores >= best - tolerance) & remaining).nonzero()[0])


def masked_gram(gram: Float[Tensor, "N N"], sound: Bool[Tensor, " N"]) -> Float64[Tensor, "N N"]:
    """Returns a checked Gram matrix as float64 on the CPU, with rows and columns of 0 for rows that are not sound.

    Args:
        gram (`torch.Tensor` of shape `(N, N)`): Inner products. What it holds for other rows doesn't matter.
        sound (`torch.Tensor` of shape `(N,)`, boolean): Rows that may be picked.

    Raises:
        ValueError: If it is not a Gram matrix of as many candidates.
    """
    check_mask(sound)
    check_matrix(gram, "gram")
    if gram.shape != (sound.shape[0], sound.shape[0]):
        raise ValueError(
            f"gram must have one row and one column for each of the {sound.shape[0]} candidates of sound, got shape "
            f"{tuple(gram.shape)}."
        )
    mask = sound.to(gram.device)
    gram = check_gram(torch.where(mask[:, None] & mask, gram.detach(), 0.0))
    mask = sound_rows(gram)
    return torch.where(mask[:, None] & mask, gram, 0.0)


def check_mask(sound: Bool[Tensor, " N"]) -> None:
    """Raises a `ValueError` unless `sound` is a boolean vector with at least one entry."""
    if not isinstance(sound, Tensor) or sound.dtype != torch.bool or sound.ndim != 1 or sound.numel() == 0:
        got = f"{sound.dtype} of shape {tuple(sound.shape)}" if isinstance(sound, Tensor) else type(sound).__name__
        raise ValueError(
            f"sound must be a boolean torch.Tensor with one entry per candidate, got {got}. It tells which candidates "
            "may be picked: torch.ones(N, dtype=torch.bool) if all of them."
        )


def _check_vector(name: str, value: object, num_candidates: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != (num_candidates,):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be a floating point torch.Tensor with one entry for each of the {num_candidates} candidates "
            f"of sound, in pool order, got {got}."
        )
