"""What is known of a pool's candidates: one class, from which every rule reads what it needs.

Axes: N candidates of a pool, D gradient dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from spice_trainer.data.rows import RowReference
from spice_trainer.selection.checks import check_mask, masked_gram, sound_rows
from spice_trainer.selection.large_pool import GramRows
from spice_trainer.selection.target import Target

_VECTORS = (
    "gradient_norms",
    "gradient_lengths",
    "logit_norms",
    "losses",
    "losses_without_instruction",
    "alignment",
    "momentum_cosines",
)

NEEDS_IN_WORDS = {
    "gram": "the Gram matrix of the candidates' gradients",
    "gradient_norms": "the norms of the candidates' raw gradients",
    "gradient_lengths": "the lengths of the candidates' gradients as gradient_cosines compare them",
    "learning_rate": "the optimizer's learning rate",
    "losses": "the candidates' mean losses",
    "losses_without_instruction": "the losses of the answers without what precedes them",
    "label_tokens": "the number of label tokens of each candidate",
    "alignment": "the products of the candidates' gradients with a validation set's mean gradient",
    "reference_norm": "the norm of the validation set's mean gradient",
    "gradient_cosines": "the cosines of the candidates' and the validation rows' gradients",
    "hidden_cosines": "the cosines of the candidates' and the validation rows' hidden states",
    "last_hidden_cosines": "the cosines of the candidates' and the validation rows' last hidden states",
    "logit_norms": "the nuclear norms of the logits at the candidates' labels",
    "logit_features": "sketches of the logits at the candidates' labels",
    "past_features": "sketches of the logits of earlier steps' picks",
    "target": "validation rows (validation_dataset)",
    "seed": "the run's seed",
    "step": "the optimizer step",
    "pool": "the number of the pool in its step",
}
"""What a rule may need: fields of [`PoolScores`] beside `sound`, in words."""


@dataclass(frozen=True, eq=False)
class PoolScores:
    """What is known of a pool's N candidates. What nobody computed is `None`.

    A rule reads what it `needs` (see [`Strategy`]). Scoring fills all of it that the run's rule needs; in a test or a
    notebook the mask and the fields that a rule reads are enough.

    Args:
        sound (`torch.Tensor` of shape `(N,)`, boolean): Candidates that may be picked: those whose gradient is finite
            and not zero, or, where no gradients were computed, the rows with a label token and a finite loss.
        gram (`torch.Tensor` of shape `(N, N)`, *optional*): Inner products of the normalised gradients. Also what
            conflicts and information are computed from, whatever the rule. Of a large pool it may be a `GramRows`,
            which computes what is read; [`PoolScores.sound_gram`] returns the matrix.
        gradient_norms (`torch.Tensor` of shape `(N,)`, *optional*): Norms of the raw gradients.
        losses (`torch.Tensor` of shape `(N,)`, *optional*): Mean negative log-likelihood of each row's label tokens.
        losses_without_instruction (`torch.Tensor` of shape `(N,)`, *optional*): The same of the label tokens alone,
            without what precedes them.
        label_tokens (`Sequence[int]`, *optional*): Label tokens of each row.
        alignment (`torch.Tensor` of shape `(N,)`, *optional*): Inner products of the raw gradients with a reference
            gradient v, such as the mean gradient of a validation set.
        reference_norm (`float`, *optional*): ‖v‖.
        gradient_cosines (`torch.Tensor` of shape `(N + m, N + m)`, *optional*): Inner products of the unit gradients
            of the candidates and, behind them, of the m rows of `target`; rows and columns of 0 for what is not
            finite.
        hidden_cosines (`torch.Tensor` of shape `(N + m, N + m)`, *optional*): The same of their hidden states, less
            the mean of all.
        last_hidden_cosines (`torch.Tensor` of shape `(N + m, N + m)`, *optional*): The same of the hidden states that
            the model's head reads, as they are.
        logit_norms (`torch.Tensor` of shape `(N,)`, *optional*): Nuclear norms of the logits at each row's labels.
        logit_features (`torch.Tensor` of shape `(N, F)`, *optional*): Sketches of these logits.
        past_features (`torch.Tensor` of shape `(P, F)`, *optional*): The same of the last picks of earlier steps.
        gradient_lengths (`torch.Tensor` of shape `(N,)`, *optional*): Norms of the candidates' gradients that
            `gradient_cosines` compares: the raw ones, or as Adam would apply them.
        learning_rate (`float`, *optional*): The optimizer's, of the step that is picked for.
        target ([`Target`], *optional*): The validation rows.
        momentum_cosines (`torch.Tensor` of shape `(N,)`, *optional*): Cosines of the gradients with the optimizer's
            momentum, for conflicts with it; never of centred gradients.
        gradients (`torch.Tensor` of shape `(N, D)`, *optional*): Rows divided by their largest magnitude, for measures
            of information that need coordinates.
        row_weights (`torch.Tensor` of shape `(N,)`, *optional*): Multipliers that turn `gradients` into normalised
            gradients.
        candidates (`tuple[int, ...]`, *optional*): Dataset rows in pool order; by default 0 to N − 1.
        num_tokens (`tuple[int, ...]`, *optional*): Tokens per row, as it trains.
        num_dropped_tokens (`int`, *optional*, defaults to `0`): Tokens of all rows that were not scored.
        references (`tuple[RowReference, ...]`, *optional*): What records say of each row beside its number.
        finite (`torch.Tensor` of shape `(N,)`, *optional*): Whether the row fitted into memory, and all that was
            computed of it is finite. By default `sound`.
        out_of_memory (`torch.Tensor` of shape `(N,)`, *optional*): Whether the row did not fit into memory, so that
            nothing is known of it. By default none.
        whole ([`PoolScores`], *optional*): The pool that these candidates are left of, where others were dropped by
            their loss before gradients were computed.
        kept (`tuple[int, ...]`, *optional*): Their positions in it.
        seed (`int`, *optional*): Seed of the run.
        step (`int`, *optional*): Optimizer step of the run, from 0.
        pool (`int`, *optional*): Pool of the step, from 0.
        allowed (`torch.Tensor` of shape `(N,)`, boolean, *optional*): Sound candidates that may be picked, where a
            setting such as `max_repeats` rules some out. By default all.

    Raises:
        ValueError: If lengths differ, or something is not of its type.
    """

    sound: Bool[Tensor, " N"]
    gram: Float[Tensor, "N N"] | GramRows | None = None
    gradient_norms: Float[Tensor, " N"] | None = None
    losses: Float[Tensor, " N"] | None = None
    losses_without_instruction: Float[Tensor, " N"] | None = None
    label_tokens: Sequence[int] | None = None
    alignment: Float[Tensor, " N"] | None = None
    reference_norm: float | None = None
    gradient_cosines: Float[Tensor, "M M"] | None = None
    hidden_cosines: Float[Tensor, "M M"] | None = None
    last_hidden_cosines: Float[Tensor, "M M"] | None = None
    logit_norms: Float[Tensor, " N"] | None = None
    logit_features: Float[Tensor, "N F"] | None = None
    past_features: Float[Tensor, "P F"] | None = None
    gradient_lengths: Float[Tensor, " N"] | None = None
    learning_rate: float | None = None
    target: Target | None = None
    momentum_cosines: Float[Tensor, " N"] | None = None
    gradients: Float[Tensor, "N D"] | None = None
    row_weights: Float64[Tensor, " N"] | None = None
    candidates: tuple[int, ...] = ()
    num_tokens: tuple[int, ...] = ()
    num_dropped_tokens: int = 0
    references: tuple[RowReference, ...] = ()
    finite: Bool[Tensor, " N"] = None  # type: ignore[assignment]
    out_of_memory: Bool[Tensor, " N"] = None  # type: ignore[assignment]
    whole: PoolScores | None = None
    kept: tuple[int, ...] = ()
    seed: int | None = None
    step: int | None = None
    pool: int | None = None
    allowed: Bool[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        """Checks everything that is there, so that a mistake shows whichever rule is asked for."""
        check_mask(self.sound)
        if isinstance(self.gram, Tensor):
            masked_gram(self.gram, self.sound)
        for name in _VECTORS:
            value = getattr(self, name)
            if value is not None:
                _check_vector(name, value, self.num_candidates)
        expected = self.num_candidates + (0 if self.target is None else self.target.num_rows)
        for name in ("gradient_cosines", "hidden_cosines", "last_hidden_cosines"):
            matrix = getattr(self, name)
            if matrix is not None and tuple(matrix.shape) != (expected, expected):
                raise ValueError(
                    f"{name} must have a row and a column for each of {self.num_candidates} candidates and, behind "
                    f"them, of {expected - self.num_candidates} target rows, got {tuple(matrix.shape)}."
                )
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
        # A frozen instance is written to only while it is made.
        if not self.candidates:
            object.__setattr__(self, "candidates", tuple(range(self.num_candidates)))
        if self.finite is None:
            object.__setattr__(self, "finite", self.sound)
        if self.out_of_memory is None:
            object.__setattr__(self, "out_of_memory", torch.zeros_like(self.sound))

    @property
    def num_candidates(self) -> int:
        """N, the number of candidates."""
        return self.sound.shape[0]

    def values(self, name: str) -> Float64[Tensor, " *N"]:
        """Returns a field of numbers, one a candidate or a matrix, as float64 on the CPU."""
        return torch.as_tensor(getattr(self, name)).detach().to("cpu").to(torch.float64)

    def eligible(self, *values: Float64[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Tells which candidates may be picked: sound, with a sound row in the Gram matrix, and finite `values`."""
        eligible = self._may_be_picked()
        if isinstance(self.gram, GramRows):
            eligible &= self.gram.lengths > 0
        elif self.gram is not None:
            eligible &= sound_rows(masked_gram(self.gram, self.sound))
        for value in values:
            eligible &= value.isfinite()
        return eligible

    def _may_be_picked(self) -> Bool[Tensor, " N"]:
        sound = self.sound.to("cpu").clone()
        return sound if self.allowed is None else sound & self.allowed.to("cpu")

    def sound_gram(self) -> Float64[Tensor, "N N"]:
        """Returns the Gram matrix with rows and columns of 0 for candidates that may not be picked."""
        gram = self.sound_products()
        return gram.whole if isinstance(gram, GramRows) else gram

    def sound_products(self) -> Float64[Tensor, "N N"] | GramRows:
        """Returns the same as it is kept."""
        if self.gram is None:
            raise ValueError("gram is None, but conflicts, information and gradients' geometry are computed from it.")
        if isinstance(self.gram, GramRows):
            return self.gram.masked(self._may_be_picked())
        return masked_gram(self.gram, self._may_be_picked())

    def gram_of(self, indices: Sequence[int]) -> Float64[Tensor, "K K"]:
        """Returns the Gram matrix of some candidates that may be picked."""
        gram, members = self.sound_products(), torch.tensor(list(indices), dtype=torch.int64)
        return gram.block(members, members) if isinstance(gram, GramRows) else gram[members][:, members]


def _check_vector(name: str, value: object, num_candidates: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != (num_candidates,):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{name} must be a floating point torch.Tensor with one entry for each of the {num_candidates} candidates "
            f"of sound, in pool order, got {got}."
        )
