"""A finished selection held against SPICE's definition, pick by pick, for pools that no float64 loop could decide.

Instead of running the greedy loop a second time, which would part from the first at every near tie, each pick is
checked beside the picks before it: its gain and conflict are those of the definition, no candidate was better by more
than a tie, none before it in the pool was as good, and the pass ended where the rules say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mpmath
import torch
from torch import Tensor

from spice_trainer.selection.results import Selection

EPSILON = 2.0**-52

# Gains of some candidates beside some picks, and how far each may be off. `None` where the definition says nothing
# more: rounding has made the Gram matrix of the picks one that no gradients have.
Gains = Callable[[list[int], list[int]], list[tuple[float, float]] | None]


def log_det_gains(rows: Tensor, alpha: float) -> Gains:
    """F(S + x) − F(S) with F(S) = log det(I + α Σ g gᵀ) in D dimensions, float64."""

    def information(indices: list[int]) -> float:
        chosen = rows[indices]
        return float(torch.linalg.slogdet(torch.eye(rows.shape[1]).double() + alpha * chosen.T @ chosen)[1])

    def gains(picks: list[int], candidates: list[int]) -> list[tuple[float, float]]:
        before = information(picks)
        return [(information([*picks, index]) - before, 2e-6) for index in candidates]

    return gains


def gram_gains(gram: Tensor, alpha: float) -> Gains:
    """The same from determinants of I + α K_SS with as many digits as it takes.

    Entries of `gram` are rounded, so at extreme scales it may not be the Gram matrix of any gradients: then some
    residual is lower than e_x / (1 + e_s), the least that adding pick s can leave of it, and which then stands for it.
    Of what further picks leave of such a candidate nothing is known.
    """
    entries = [[mpmath.mpf(value) for value in row] for row in gram.tolist()]
    squares = [value for value in gram.diagonal().tolist() if 0 < value < math.inf] or [1.0]
    largest, smallest = (math.log10(alpha) + math.log10(value) for value in (max(squares), min(squares)))
    # Residuals far below 1 are read off a determinant near 1; far above, what the picks cover cancels.
    digits = 60 + math.ceil(6 * max(0.0, largest) + max(0.0, -smallest))
    residuals: dict[tuple[int, ...], dict[int, mpmath.mpf]] = {}

    def determinant(indices: Sequence[int]) -> mpmath.mpf:
        matrix = mpmath.eye(len(indices)) if indices else mpmath.eye(1)
        for row, first in enumerate(indices):
            for column, second in enumerate(indices):
                matrix[row, column] += alpha * entries[first][second]
        return mpmath.det(matrix)

    def answer(index: int, residual: mpmath.mpf) -> tuple[float, float]:
        gain, tolerance = float(mpmath.log1p(residual)), 0.0
        if largest <= 8.01:
            # The float64 recurrence loses what cancels between A_xx and the part of it that the picks cover.
            square, left = alpha * float(gram[index, index]), float(residual)
            tolerance = 200 * EPSILON * (square + math.sqrt(square * left * 10**largest)) / (1 + left)
        return gain, tolerance + 1e-9 * gain

    def gains(picks: list[int], candidates: list[int]) -> list[tuple[float, float]] | None:
        with mpmath.workdps(digits):
            before = determinant(picks)
            known = residuals.get(tuple(picks[:-1]), {})
            if picks and picks[-1] not in known:
                return None
            answers, certain = [], {}
            for index in candidates:
                residual = determinant([*picks, index]) / before - 1
                if picks and index not in known:
                    answers.append((0.0, math.inf))
                    continue
                least = known[index] / (1 + known[picks[-1]]) if picks else mpmath.mpf(0)
                if residual < least * (1 - mpmath.mpf(10) ** -20):
                    residual = least
                else:
                    certain[index] = residual
                answers.append(answer(index, residual))
            residuals[tuple(picks)] = certain
        return answers

    return gains


def coordinate_gains(rows: Tensor, alpha: float, information: str) -> Gains:
    """The diagonal and the released measure, from their formulas."""

    def gains(picks: list[int], candidates: list[int]) -> list[tuple[float, float]]:
        power = 2 if information == "diagonal" else 4
        denominators = 1 + alpha * rows[picks].pow(power).sum(dim=0)
        answers = []
        for index in candidates:
            ratios = alpha * rows[index].square() / denominators
            gain = float(torch.log1p(ratios).sum() if information == "diagonal" else torch.log1p(ratios.sum()))
            answers.append((gain, 1e-9 * gain))
        return answers

    return gains


def conflicts_from_gram(
    gram: Tensor, reference: Sequence[int], candidates: Sequence[int]
) -> list[tuple[float, float]]:
    """max(0, −cos(g_x, ḡ)) of the candidates, and how far each may be off: ḡ may nearly vanish."""
    if not reference:
        return [(0.0, 0.0) for _ in candidates]
    values = gram.tolist()
    products = {
        index: math.fsum(values[index][other] for other in reference) / len(reference)
        for index in {*candidates, *reference}
    }
    square = max(0.0, math.fsum(products[index] for index in reference) / len(reference))
    largest = max(values[index][index] for index in reference)
    answers = []
    for index in candidates:
        length = math.sqrt(values[index][index])
        cosine = products[index] / (length * math.sqrt(square) + 1e-8)
        # Beside the formula's 1e-8 the products of tiny gradients vanish, whatever their rounding.
        is_certain = square > 1e-6 * largest or length * math.sqrt(largest) < 1e-18
        uncertainty = 1e-9 if is_certain else 1.0
        answers.append((min(max(-cosine, 0.0), 1.0), uncertainty))
    return answers


def check_selection(
    selection: Selection,
    gains: Gains,
    gram: Tensor,
    sound: Sequence[int],
    num_selected: int,
    *,
    conflict_penalty: float,
    conflict_reference: str,
    stop_ratio: float | None,
    min_gain: float | None,
    tie_tolerance: float,
) -> int:
    """Raises an `AssertionError` where a selection is not what the definition says.

    Args:
        selection: What was found.
        gains: The measure.
        gram: Inner products of the candidates, float64.
        sound: The candidates that may be picked, in pool order.
        num_selected: The budget.

    Returns:
        `int`: How many picks were held against exact gains.
    """
    values = (*selection.gains, *selection.conflicts, *selection.scores, selection.information)
    assert all(math.isfinite(value) for value in values)
    assert all(gain >= 0 for gain in selection.gains) and all(0 <= value <= 1 for value in selection.conflicts)
    assert len(set(selection.indices)) == len(selection.indices) and set(selection.indices) <= set(sound)
    assert math.isclose(selection.information, sum(selection.gains), rel_tol=1e-12)
    for gain, conflict, score in zip(selection.gains, selection.conflicts, selection.scores, strict=True):
        assert score == gain - conflict_penalty * conflict

    first_gain = selection.gains[0] if selection.gains else None
    for order in range(len(selection.indices) + 1):
        picks = list(selection.indices[:order])
        remaining = [index for index in sound if index not in picks]
        if not remaining or order == num_selected:
            assert order == len(selection.indices) and not selection.stopped_early
            return order
        answers = gains(picks, remaining)
        if answers is None:
            return order
        opposed = conflicts_from_gram(gram, picks if conflict_reference == "selected" else remaining, remaining)
        scores = [
            (gain - conflict_penalty * conflict, tolerance + conflict_penalty * off)
            for (gain, tolerance), (conflict, off) in zip(answers, opposed, strict=True)
        ]
        best, off = max(((score, off) for score, off in scores if math.isfinite(off)), default=(-math.inf, 0.0))
        scale = max(abs(best), first_gain if first_gain is not None else max(gain for gain, _ in answers))
        if best == -math.inf:
            return order
        window = tie_tolerance * scale
        if order == len(selection.indices):
            assert selection.stopped_early, "the pass ended for no reason"
            reachable = [
                gain - off
                for (gain, off), (score, score_off) in zip(answers, scores, strict=True)
                if score + score_off + 2 * window >= best - off
            ]
            lowest = min(reachable)
            stops = min_gain is not None and lowest < min_gain
            stops |= stop_ratio is not None and first_gain is not None and lowest <= stop_ratio * first_gain
            assert stops, (lowest, first_gain)
            return order
        place = remaining.index(selection.indices[order])
        (gain, tolerance), (conflict, conflict_off) = answers[place], opposed[place]
        found = selection.gains[order]
        if math.isfinite(tolerance):
            assert abs(found - gain) <= tolerance, (order, found, gain, tolerance)
        assert abs(selection.conflicts[order] - conflict) <= conflict_off, (order, conflict)
        score, score_off = scores[place]
        if math.isfinite(score_off):
            assert score + score_off >= best - off - 2 * window, (order, score, best, window)
            for earlier, earlier_off in scores[:place]:
                assert earlier - earlier_off <= best + off - window / 2, (order, earlier, score)
        if min_gain is not None:
            assert found >= min_gain
        if stop_ratio is not None and order:
            assert first_gain is not None and found > stop_ratio * first_gain
    raise AssertionError("unreachable")
