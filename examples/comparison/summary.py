"""Numbers of a report: means over seeds, their standard errors, and differences to random picks seed by seed.

mean ± s / √n      s² = Σ (x_i − mean)² / (n − 1), over n seeds
paired difference  the same of d_i = x_i(arm) − x_i(reference), over the seeds that both have
error over rows    per row √(Var(D_x / T_x) / n),  per token √(n / (n − 1) Σ (D_x − d T_x)²) / Σ T_x
                   d = Σ D_x / Σ T_x
                   D_x: row x's summed loss less the reference's, mean over the seeds; T_x: its answer's tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; its standard error is `None` for one seed."""

    mean: float
    error: float | None
    num_seeds: int


@dataclass(frozen=True)
class Difference:
    """A paired difference to the reference, and in how many seeds the arm was strictly better."""

    estimate: Estimate
    num_won: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of values, one a seed."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error, len(values))


def difference(
    values: Mapping[int, float], reference: Mapping[int, float], *, higher_is_better: bool = False
) -> Difference | None:
    """Compare an arm with the reference, seed by seed.

    Args:
        values (`Mapping[int, float]`): The arm's value of each seed.
        reference (`Mapping[int, float]`): The reference's.
        higher_is_better (`bool`, *optional*, defaults to `False`): Whether a positive difference is a seed won.

    Returns:
        [`Difference`], *optional*: `None` where no seed is in both.
    """
    gaps = [values[seed] - reference[seed] for seed in values if seed in reference]
    if not gaps:
        return None
    return Difference(estimate(gaps), sum(gap > 0 if higher_is_better else gap < 0 for gap in gaps))


def error_over_rows(
    lines: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], tokens: Sequence[int], metric: str
) -> float | None:
    """Standard error of a paired difference over the test rows, the seeds' mean being taken first.

    Args:
        lines (`Sequence[dict]`): The arm's results.
        reference (`Sequence[dict]`): The reference's.
        tokens (`Sequence[int]`): Tokens of each test row's answer.
        metric (`str`): `"loss_per_token"` or `"loss_per_row"`.

    Returns:
        `float`, *optional*: `None` where no seed is in both, or rows were not written.
    """
    losses, others = (
        {line["seed"]: line["test_row_losses"] for line in group if line.get("test_row_losses")}
        for group in (lines, reference)
    )
    seeds = losses.keys() & others.keys()
    if not seeds or len(tokens) < 2:
        return None
    gaps = [fmean(losses[seed][row] - others[seed][row] for seed in seeds) for row in range(len(tokens))]
    if metric == "loss_per_row":
        return stdev(gap / count for gap, count in zip(gaps, tokens, strict=True)) / math.sqrt(len(gaps))
    mean = sum(gaps) / sum(tokens)
    squares = sum((gap - mean * count) ** 2 for gap, count in zip(gaps, tokens, strict=True))
    return math.sqrt(len(gaps) / (len(gaps) - 1) * squares) / sum(tokens)


def measured(line: Mapping[str, Any], metric: str, split: str = "test") -> float | None:
    """A value of a line of results.

    Args:
        line (`Mapping[str, Any]`): A run of all steps.
        metric (`str`): `"loss_per_token"`, `"loss_per_row"`, either with `"/domain"` behind it, or `"accuracy/kind"`.
        split (`str`, *optional*, defaults to `"test"`): Held-out rows of a loss, `"test"` or `"validation"`.

    Returns:
        `float`, *optional*: `None` where the run has no such value.
    """
    name, _, group = metric.partition("/")
    if name == "accuracy":
        found: Any = (line["choices"] or {}).get(group)
    else:
        found = line[split]["domains"].get(group) if group else line[split]["all"]
    return None if found is None else found[name]


def by_seed(lines: Sequence[Mapping[str, Any]], metric: str, split: str = "test") -> dict[int, float]:
    """Values of an arm's runs by their seed."""
    found = {line["seed"]: measured(line, metric, split) for line in lines}
    return {seed: value for seed, value in found.items() if value is not None}


def format_estimate(value: Estimate | None, digits: int = 4) -> str:
    """`1.2345 ± 0.0067`; without an error for one seed."""
    if value is None:
        return "-"
    error = "" if value.error is None else f" ± {value.error:.{digits}f}"
    return f"{value.mean:.{digits}f}{error}"


def format_difference(value: Difference | None, digits: int = 4) -> str:
    """`−0.0123 ± 0.0045 (2/3)`: the sign always, and the seeds won."""
    if value is None:
        return "-"
    mean, error = value.estimate.mean, value.estimate.error
    sign = "+" if mean > 0 else "−" if mean < 0 else ""
    shown = "" if error is None else f" ± {error:.{digits}f}"
    return f"{sign}{abs(mean):.{digits}f}{shown} ({value.num_won}/{value.estimate.num_seeds})"
