"""Which runs a comparison needs: the learning rates' grid first, then every arm and seed at the rate chosen.

rate of an arm = the one of its grid with the lowest mean validation loss over the grid's seeds
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from comparison.settings import Arm, Settings


@dataclass(frozen=True)
class Run:
    """An arm with a seed and a learning rate. `num_steps` counts the steps of an arm that selects."""

    arm: str
    seed: int
    learning_rate: float
    num_steps: int

    @classmethod
    def of(cls, line: dict[str, Any]) -> Run:
        """The run of a line of results."""
        return cls(line["arm"], line["seed"], line["learning_rate"], line["num_steps"])

    @property
    def folder(self) -> str:
        """The run's folder name."""
        return f"{self.arm}-seed{self.seed}-lr{self.learning_rate:g}-steps{self.num_steps}"

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}, learning rate {self.learning_rate:g}, {self.num_steps} steps"


@dataclass(frozen=True)
class ChosenRate:
    """An arm's learning rate.

    Args:
        value (`float`): The rate.
        source (`str`): The arm whose grid chose it.
        grid (`dict[float, float]`): Mean validation loss of each rate; empty where there was only one.
    """

    value: float
    source: str
    grid: dict[float, float]


def wanted_steps(arm: Arm, num_steps: int) -> int:
    """Steps of an arm's whole run: its own, or the comparison's."""
    return arm.num_steps or num_steps


def grid_runs(settings: Settings, arm: Arm, num_steps: int) -> list[Run]:
    """Runs that choose an arm's learning rate; none for a grid of one rate."""
    source, rates = settings.grid_of(arm)
    seeds = settings.seeds[:1] if settings.learning_rate_seeds == "first" else settings.seeds
    num_steps = wanted_steps(settings.arm(source), num_steps)
    steps = min(num_steps, settings.learning_rate_steps or num_steps)
    return [Run(source, seed, rate, steps) for seed in seeds for rate in rates] if len(rates) > 1 else []


def chosen_rate(settings: Settings, arm: Arm, lines: Iterable[dict[str, Any]], num_steps: int) -> ChosenRate | None:
    """The learning rate of an arm, or `None` while runs that choose it are missing."""
    source, rates = settings.grid_of(arm)
    runs = grid_runs(settings, arm, num_steps)
    if not runs:
        return ChosenRate(rates[0], source, {})
    losses = {Run.of(line): line["validation"]["all"][settings.evaluation.metric] for line in lines}
    if any(run not in losses for run in runs):
        return None
    grid = {rate: fmean(losses[run] for run in runs if run.learning_rate == rate) for rate in rates}
    # A run that diverged is the worst.
    best = min(rates, key=lambda rate: grid[rate] if math.isfinite(grid[rate]) else math.inf)
    return ChosenRate(best, source, grid)


def final_runs(settings: Settings, arm: Arm, lines: Sequence[dict[str, Any]], num_steps: int) -> list[Run]:
    """An arm's runs that the report compares, one a seed; none while its learning rate is not chosen."""
    rate = chosen_rate(settings, arm, lines, num_steps)
    if rate is None:
        return []
    runs = [Run(arm.name, seed, rate.value, wanted_steps(arm, num_steps)) for seed in settings.seeds]
    if arm.seconds_of is None:
        return runs
    # How long it is, the other arm's run of the same seed and one of random rows say.
    done = {Run.of(line) for line in lines}
    others = [settings.arm(arm.seconds_of), *([settings.reference] if settings.reference else [])]
    needed = {run for other in others for run in final_runs(settings, other, lines, num_steps)}
    return [
        run
        for run in runs
        if len({one for one in needed & done if one.seed == run.seed}) == len({other.name for other in others})
    ]


def missing_runs(
    settings: Settings,
    lines: Sequence[dict[str, Any]],
    num_steps: int,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[Run]:
    """Runs that can be started now and are not finished, the next one first.

    Args:
        settings ([`Settings`]): The comparison.
        lines (`Sequence[dict]`): Results so far.
        num_steps (`int`): Steps of a whole run.
        arms (`Sequence[str]`, *optional*): Only these arms, and the grids that they need.
        seeds (`Sequence[int]`, *optional*): Only these seeds; a grid that is missing is run whole.

    Yields:
        [`Run`]: Grids first; then seed by seed, so that results so far are always of as many seeds for every arm.
    """
    done = {Run.of(line) for line in lines}
    wanted = [arm for arm in settings.arms if arms is None or arm.name in arms]
    # An arm of as many seconds as another comes behind it.
    wanted.sort(key=lambda arm: arm.seconds_of is not None)
    grids = dict.fromkeys(run for arm in wanted for run in grid_runs(settings, arm, num_steps))
    yield from (run for run in grids if run not in done)
    for seed in settings.seeds if seeds is None else seeds:
        for arm in wanted:
            runs = final_runs(settings, arm, lines, num_steps)
            yield from (run for run in runs if run.seed == seed and run not in done)
