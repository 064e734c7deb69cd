"""Plots of a comparison: validation loss against steps, rows trained, and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

AXES = {
    "steps": ("step", "optimizer steps"),
    "rows": ("rows", "rows trained"),
    "seconds": ("seconds", "seconds (scoring, selecting, training)"),
}

# Where one arm's curve is so many times as long as another's, the axis is logarithmic behind the shorter one.
_LONG = 4


def mean_curve(
    lines: Sequence[dict[str, Any]], axis: str, metric: str = "loss_per_token", base: dict[str, Any] | None = None
) -> tuple[list[float], list[float]]:
    """An arm's curve, point by point the mean over its seeds.

    Args:
        lines (`Sequence[dict]`): The arm's results; all have as many points.
        axis (`str`): `"step"`, `"rows"` or `"seconds"`.
        metric (`str`, *optional*, defaults to `"loss_per_token"`): Which loss.
        base (`dict`, *optional*): The model before training, the curve's first point.

    Returns:
        `tuple[list[float], list[float]]`: Places and losses.
    """
    curves = [line["curve"] for line in lines]
    places, losses = ([0.0], [base["validation"]["all"][metric]]) if base else ([], [])
    for points in zip(*curves, strict=True):
        places.append(fmean(point[axis] for point in points))
        losses.append(fmean(point["losses"]["all"][metric] for point in points))
    return places, losses


def write_plots(output_dir: Path, runs: dict[str, list[dict[str, Any]]], base: dict[str, Any] | None) -> list[str]:
    """Draw a plot for each axis, two losses side by side.

    Args:
        output_dir (`Path`): Where they go.
        runs (`dict[str, list[dict]]`): Results by arm.
        base (`dict`, *optional*): The model before training.

    Returns:
        `list[str]`: Names of the files.
    """
    names = []
    for name, (axis, label) in AXES.items():
        ends = [mean_curve(lines, axis)[0][-1] for lines in runs.values()]
        shortest, longest = min(ends), max(ends)
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for panel, metric in zip(panels, ("loss_per_token", "loss_per_row"), strict=True):
            for number, (arm, lines) in enumerate(runs.items()):
                places, losses = mean_curve(lines, axis, metric, base)
                style = "--" if number >= 10 else "-"
                panel.plot(places, losses, style, marker=".", label=arm)
            panel.set_xlabel(label)
            panel.set_ylabel(f"validation {metric.replace('_', ' ')}")
            if longest > _LONG * shortest:
                # An arm that goes on for long, as `full` does, would press the others together.
                panel.set_xscale("symlog", linthresh=max(1e-9, shortest))
        panels[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        names.append(f"loss_{name}.png")
        figure.savefig(output_dir / names[-1], dpi=120)
        pyplot.close(figure)
    return names
