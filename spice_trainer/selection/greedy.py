"""Greedy choice of the samples with most Fisher information and least conflict.

    s(x|S) = Δ(x|S) − λ c(x|S),    c(x|S) = max(0, −cos(g_x, ḡ)),    cos = g·ḡ / (‖g‖‖ḡ‖ + 1e-8)

Δ is the marginal gain of an information measure, ḡ the mean gradient of the samples already picked (or of the
candidates not yet picked, or of all). Conflicts come from the Gram matrix K alone, whatever the measure, unless ḡ is a
gradient that is no mean of candidates: then its cosines are given. Nothing here knows about models or trainers.

Axes: N candidates, K picked, D gradient dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from spice_trainer.config import ConflictReference, Information
from spice_trainer.selection.checks import check_alpha, check_choice, check_gram, check_matrix, sound_rows
from spice_trainer.selection.conflict import GivenConflicts, MeanConflicts
from spice_trainer.selection.gram import measure_rows, normalized_gram, scale_rows
from spice_trainer.selection.information import ExactInformation, InformationMeasure, build_information
from spice_trainer.selection.large_pool import LARGE_POOL, GramRows, LargePoolConflicts, LargePoolInformation
from spice_trainer.selection.quotas import LengthQuotas, QuotaRoom
from spice_trainer.selection.results import Selection

GramReference = Literal["selected", "candidates", "pool"]
"""Conflict references that a pool's Gram matrix holds; an optimizer's momentum is none of its rows."""


class Conflicts(Protocol):
    """Conflicts of candidates with something that may change with each pick."""

    def bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns lower bounds on the current conflicts, and which of them are the conflicts themselves."""

    def of(self, indices: Int64[Tensor, " R"]) -> Float64[Tensor, " R"]:
        """Returns the current conflicts of candidates whose gains were asked for since the last pick."""

    def add(self, index: int) -> None:
        """Takes a pick, before the measure of information does."""


@dataclass(frozen=True)
class PickOptions:
    """Settings of a pick that are the same for all pools of a run, but for α.

    Args:
        fisher_alpha (`float`): α, for picks by information, and for the information of everyone's.
        conflict_penalty (`float`): λ, for rules that have a conflict penalty.
        conflict_reference (`str`): What a conflict is with; see [`SpiceConfig`].
        stop_ratio (`float`, *optional*): See [`select`]; for picks by information alone.
        min_gain (`float`, *optional*): Likewise.
        tie_tolerance (`float`): How near scores are that go by pool position; relative to what a rule's docstring
            says.
        new_measure (`Callable[[], InformationMeasure]`, *optional*): Makes what picks by information maximise, with
            nothing added; by default the exact information of the Gram matrix.
        quotas ([`LengthQuotas`], *optional*): How many picks each range of answer lengths gets; by default the rule's
            own quotas, if it has any.
        length_bins (`int`): Number of bins of a rule's own quotas.
    """

    fisher_alpha: float = 1.0
    conflict_penalty: float = 0.1
    conflict_reference: ConflictReference = "selected"
    stop_ratio: float | None = None
    min_gain: float | None = None
    tie_tolerance: float = 1e-6
    new_measure: Callable[[], InformationMeasure] | None = None
    quotas: LengthQuotas | None = None
    length_bins: int = 4


def select(
    gram: Float[Tensor, "N N"],
    num_selected: int,
    *,
    fisher_alpha: float = 1.0,
    conflict_penalty: float = 0.1,
    conflict_reference: GramReference = "selected",
    stop_ratio: float | None = None,
    min_gain: float | None = None,
    tie_tolerance: float = 1e-6,
) -> Selection:
    """Picks samples greedily with the exact information log det(I + α Σ g gᵀ), from their Gram matrix.

    Args:
        gram (`Tensor`): Inner products of the N candidates' gradients, shape (N, N), any floating dtype and device;
            computed in float64 on the CPU. Rows with a non-finite or zero diagonal are never picked.
        num_selected (`int`): K, the most samples to pick. Fewer are returned only if fewer rows are sound or a
            stopping rule fires.
        fisher_alpha (`float`, *optional*, defaults to 1.0): α.
        conflict_penalty (`float`, *optional*, defaults to 0.1): λ; 0 leaves the information alone.
        conflict_reference (`str`, *optional*, defaults to "selected"): Whose mean gradient a conflict is against:
            the samples already "selected" (no conflict for the first), the sound "candidates" not yet picked, or
            all sound candidates of the "pool".
        stop_ratio (`float`, *optional*): Stops before the first pick whose gain is at most this share of the
            first gain.
        min_gain (`float`, *optional*): Stops before the first pick whose gain is below this; may pick nothing at all.
        tie_tolerance (`float`, *optional*, defaults to 1e-6): Scores within this, times the larger of |best score| and
            first gain, of the best are tied and go to the lowest position. 0 is strict.

    Returns:
        [`Selection`]: The picks in order; empty if no row is sound.

    Raises:
        ValueError: If an argument is out of range or `gram` is not a Gram matrix.

    Example:
    ```python
    >>> gradients = torch.randn(120, 1000)
    >>> select(gradients @ gradients.T, 12).indices
    ```
    """
    options = PickOptions(
        fisher_alpha=fisher_alpha,
        conflict_penalty=conflict_penalty,
        conflict_reference=conflict_reference,
        stop_ratio=stop_ratio,
        min_gain=min_gain,
        tie_tolerance=tie_tolerance,
    )
    return greedy(ExactInformation(gram, fisher_alpha=fisher_alpha), gram, num_selected, options)


def select_from_gradients(
    gradients: Float[Tensor, "N D"],
    num_selected: int,
    *,
    information: Information = "exact",
    fisher_alpha: float = 1.0,
    conflict_penalty: float = 0.1,
    conflict_reference: GramReference = "selected",
    stop_ratio: float | None = None,
    min_gain: float | None = None,
    tie_tolerance: float = 1e-6,
) -> Selection:
    """Picks samples greedily from their gradients, with any of the three information measures.

    Args:
        gradients (`Tensor`): One gradient per row, shape (N, D), any floating dtype and device. Not modified: a
            copy of the same size is made. Rows that are zero or hold a non-finite entry are never picked.
        num_selected (`int`): K, the most samples to pick.
        information (`str`, *optional*, defaults to "exact"): "exact", "diagonal" or "adafisher".
        fisher_alpha (`float`, *optional*, defaults to 1.0): α.
        conflict_penalty (`float`, *optional*, defaults to 0.1): λ.
        conflict_reference (`str`, *optional*, defaults to "selected"): See [`select`].
        stop_ratio (`float`, *optional*): See [`select`].
        min_gain (`float`, *optional*): See [`select`].
        tie_tolerance (`float`, *optional*, defaults to 1e-6): See [`select`].

    Returns:
        [`Selection`]: The picks in order; empty if no row is sound.

    Raises:
        ValueError: If an argument is out of range or `gradients` is not a floating point matrix.
    """
    options = PickOptions(
        fisher_alpha=fisher_alpha,
        conflict_penalty=conflict_penalty,
        conflict_reference=conflict_reference,
        stop_ratio=stop_ratio,
        min_gain=min_gain,
        tie_tolerance=tie_tolerance,
    )
    check_options(num_selected, options, GramReference)
    check_choice("information", information, Information)
    check_matrix(gradients, "gradients")
    rows = gradients.detach().clone()
    gram: Tensor | GramRows
    if len(rows) >= LARGE_POOL and information == "exact":
        lengths = scale_rows(rows, product_dtype=torch.float64)
        gram = GramRows(rows.cpu(), lengths, lengths.norms, product_dtype=torch.float64)
    else:
        geometry = lengths = measure_rows(rows, product_dtype=torch.float64)
        gram = normalized_gram(geometry.cosines, geometry.norms, torch.ones_like(geometry.norms), unit=False)
    measure = build_information(
        information, gram=gram, gradients=rows, fisher_alpha=fisher_alpha, row_weights=lengths.scales
    )
    return greedy(measure, gram, num_selected, options)


def check_options(num_selected: int, options: PickOptions, references: object = ConflictReference) -> None:
    """Raises a `ValueError` for the first number out of range, or a conflict's reference not in `references`."""
    if isinstance(num_selected, bool) or not isinstance(num_selected, int) or num_selected < 1:
        raise ValueError(
            f"num_selected is the number of samples to pick and must be an integer >= 1, got {num_selected!r}."
        )
    penalty, stop_ratio, min_gain = options.conflict_penalty, options.stop_ratio, options.min_gain
    if not 0 <= penalty < math.inf:
        raise ValueError(f"conflict_penalty must be finite and >= 0 (0 switches it off), got {penalty}.")
    if stop_ratio is not None and not 0 < stop_ratio < 1:
        raise ValueError(
            f"stop_ratio is a share of the first gain and must lie strictly between 0 and 1, got {stop_ratio}."
        )
    if min_gain is not None and not 0 <= min_gain < math.inf:
        raise ValueError(f"min_gain must be finite and >= 0, got {min_gain}.")
    if not 0 <= options.tie_tolerance < 1:
        raise ValueError(f"tie_tolerance must lie in [0, 1) (0 is strict), got {options.tie_tolerance}.")
    check_choice("conflict_reference", options.conflict_reference, references)
    check_alpha(options.fisher_alpha)


def greedy(
    measure: InformationMeasure,
    gram: Float[Tensor, "N N"] | GramRows,
    num_selected: int,
    options: PickOptions,
    reference_cosines: Float[Tensor, " N"] | None = None,
) -> Selection:
    """Runs the greedy loop on any measure with nothing added, to which the picks are added; K is for the conflicts.

    With `reference_cosines`, of each candidate's gradient with one that is no mean of candidates (the optimizer's
    momentum), c(x) = max(0, −cos) is the same after every pick, whatever `conflict_reference`.
    """
    check_options(num_selected, options, GramReference if reference_cosines is None else ConflictReference)
    if isinstance(gram, GramRows) and not isinstance(measure, LargePoolInformation):
        gram = gram.whole
    gram = gram if isinstance(gram, GramRows) else check_gram(gram)
    if measure.num_candidates != len(gram):
        raise ValueError(f"measure is for {measure.num_candidates} candidates but gram has {len(gram)} rows.")
    if measure.information != 0.0:
        raise ValueError("greedy needs a measure with nothing added, but this one holds picks. Build a new one.")

    remaining = gram.lengths > 0 if isinstance(gram, GramRows) else sound_rows(gram)
    known: Conflicts
    if reference_cosines is not None:
        known = GivenConflicts(reference_cosines, remaining)
    elif isinstance(measure, LargePoolInformation):
        known = LargePoolConflicts(measure, options.conflict_reference, remaining)
    else:
        assert isinstance(gram, Tensor)
        known = MeanConflicts(gram, options.conflict_reference, remaining)
    room = QuotaRoom(options.quotas)
    indices: list[int] = []
    gains: list[float] = []
    conflicts: list[float] = []
    stopped_early = False
    while len(indices) < num_selected and bool(remaining.any()):
        first_gain = gains[0] if gains else None
        index, gain, conflict = _best(measure, known, room.among(remaining), first_gain, options)
        stopped_early = options.min_gain is not None and gain < options.min_gain
        if options.stop_ratio is not None and first_gain is not None:
            stopped_early |= gain <= options.stop_ratio * first_gain
        if stopped_early:
            break
        known.add(index)
        measure.add(index)
        remaining[index] = False
        room.take(index)
        indices.append(index)
        gains.append(gain)
        conflicts.append(conflict)
    scores = tuple(gain - options.conflict_penalty * conflict for gain, conflict in zip(gains, conflicts, strict=True))
    return Selection(tuple(indices), tuple(gains), tuple(conflicts), scores, measure.information, stopped_early)


def information_of(measure: InformationMeasure, indices: Sequence[int]) -> float:
    """Returns F of distinct candidates, added in the given order to a measure with nothing added, which is used up."""
    if measure.information != 0.0:
        raise ValueError(
            "information_of needs a measure with nothing added, but this one holds picks. Build a new one."
        )
    if len(set(indices)) != len(indices) or not all(0 <= index < measure.num_candidates for index in indices):
        raise ValueError(f"indices must be distinct positions in [0, {measure.num_candidates}), got {list(indices)}.")
    for index in indices:
        measure.add(index)
    return measure.information


def _best(
    measure: InformationMeasure,
    known: Conflicts,
    remaining: Bool[Tensor, " N"],
    first_gain: float | None,
    options: PickOptions,
) -> tuple[int, float, float]:
    """Returns position, gain and conflict of the next pick, evaluating only those whose bound reaches the best."""
    penalty = options.conflict_penalty
    gains, are_gains = measure.gain_bounds()
    conflicts, are_conflicts = known.bounds()
    gains, conflicts = gains.clone(), conflicts.clone()
    scores = torch.where(remaining, gains - penalty * conflicts, -math.inf)
    evaluated = remaining & are_gains & are_conflicts
    pending = remaining & ~evaluated
    block_size = measure.block_size
    while True:
        threshold = -math.inf
        if bool(evaluated.any()):
            best = int(torch.where(evaluated, scores, -math.inf).argmax())
            scale = float(gains[best]) if first_gain is None else first_gain
            threshold = float(scores[best]) - options.tie_tolerance * max(abs(float(scores[best])), scale)
        if not bool((pending & (scores >= threshold)).any()):
            break
        chosen = torch.where(pending, scores, -math.inf).topk(min(block_size, int(pending.sum()))).indices
        gains[chosen] = measure.gains(chosen.tolist())
        conflicts[chosen] = known.of(chosen)
        scores[chosen] = gains[chosen] - penalty * conflicts[chosen]
        evaluated[chosen], pending[chosen] = True, False
        # Few where bounds are near, many where they are far.
        block_size *= 1 if block_size == 1 else 2
    index = int((evaluated & (scores >= threshold)).nonzero()[0])
    return index, float(gains[index]), float(conflicts[index])
