"""The tables and figures of `theory.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

# Figures go to files; no display is asked for.
matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from spice_trainer.theory import Estimate, PoolTheory

Summaries = Mapping[str, Mapping[str, Estimate]]

# What a row says, and the number it shows.
DECOMPOSITION = (
    ("pools", "num_candidates"),
    ("base gains of the picks, Σ Δ(x|∅)", "base_gain"),
    ("ε of the picks, Σ ε", "epsilon"),
    ("information F", "information"),
    ("identity residual, largest", "identity_residual"),
    ("largest gradient norm G_max", "largest_norm"),
    ("mean overlap ρ of candidate and picks", "mean_overlap"),
    ("share of base gain lost, ε / Δ(x|∅)", "mean_decay"),
    ("overlap bound: violated", "bound/overlap/violation_rate"),
    ("overlap bound: Σ ε / Σ bound", "bound/overlap/tightness"),
    ("overlap bound: smallest C", "bound/overlap/constant"),
    ("coherence bound: violated", "bound/coherence/violation_rate"),
    ("mean floor: violated", "bound/mean_floor/violation_rate"),
    ("mean floor: Σ floor / Σ ε", "bound/mean_floor/tightness"),
    ("conflict in ρ's place: violated", "bound/conflict/violation_rate"),
    ("|cos| in ρ's place: violated", "bound/alignment/violation_rate"),
    ("total curvature c", "curvature"),
    ("guarantee (1 − e^−c) / c", "curvature_ratio"),
    ("certified share of the optimum", "certified_ratio"),
    ("true share of the optimum", "optimum_ratio"),
    ("half-life", "half_life"),
    ("AUMG", "aumg"),
)
CORRELATIONS = (
    ("candidates in conflict, share", "conflict_rate"),
    ("conflict and gain", "spearman/conflict_gain"),
    ("conflict and ε", "spearman/conflict_epsilon"),
    ("−cos and gain", "spearman/opposition_gain"),
    ("−cos and ε", "spearman/opposition_epsilon"),
    ("|cos| and ε", "spearman/alignment_epsilon"),
    ("conflict and ε / Δ(x|∅)", "spearman/conflict_loss"),
    ("|cos| and ε / Δ(x|∅)", "spearman/alignment_loss"),
)
GROUPS = tuple(
    (f"{group} conflict: {label}", f"{kind}/{group}/{key}")
    for group in ("low", "medium", "high")
    for label, kind, key in (
        ("pairs", "group", "size"),
        ("mean cosine", "group", "mean_cosine"),
        ("mean conflict", "group", "mean_conflict"),
        ("mean gain", "group", "mean_gain"),
        ("mean decay ε / Δ(x|∅)", "group", "mean_decay"),
        ("AUMG of picks within", "decay", "aumg"),
        ("half-life of picks within", "decay", "half_life"),
    )
)
TABLES = (
    ("Decomposition, bounds and guarantees (compare Table 4)", DECOMPOSITION),
    ("Spearman correlations over candidates (compare Table 5)", CORRELATIONS),
    ("Conflict groups: pairs in thirds, and picks within thirds of the pool (compare Table 5)", GROUPS),
)
# Told apart by readers of any colour vision.
COLORS = {"low": "#4477AA", "medium": "#CCBB44", "high": "#EE6677"}
LINES = ("#4477AA", "#EE6677", "#228833", "#AA3377")


@dataclass(frozen=True)
class Moment:
    """One pool at one moment of the run.

    Args:
        step (`int`): Optimizer steps done.
        theory ([`~spice_trainer.theory.PoolTheory`]): What the theory says of it.
    """

    step: int
    theory: PoolTheory


def _cell(summary: Mapping[str, Estimate], label: str, key: str) -> str:
    estimate = summary.get(key)
    if estimate is None:
        return "–"
    if label == "pools":
        return str(estimate.num_pools)
    if "largest" in label and "residual" in label:
        return f"{estimate.maximum:.1e}"
    number = f"{estimate.mean:.4g}"
    # Below that it is rounding.
    if estimate.standard_error is not None and estimate.standard_error > 1e-12 * abs(estimate.mean):
        number += f" ± {estimate.standard_error:.1g}"
    pools = summary["num_candidates"].num_pools
    # Some numbers do not exist in every pool: a half-life that was not reached, a correlation of equal conflicts.
    return number if estimate.num_pools == pools else f"{number} ({estimate.num_pools} of {pools})"


def _rows(summaries: Summaries, table: Sequence[tuple[str, str]]) -> list[list[str]]:
    return [[label, *(_cell(summary, label, key) for summary in summaries.values())] for label, key in table]


def print_tables(summaries: Summaries, console: Console) -> None:
    """Print means over the pools and their standard errors, a column a normalisation."""
    for title, table in TABLES:
        shown = Table(title=title)
        shown.add_column("")
        for name in summaries:
            shown.add_column(name, justify="right")
        for row in _rows(summaries, table):
            shown.add_row(*row)
        console.print(shown)


def tables_as_markdown(summaries: Summaries) -> str:
    """The same tables in Markdown."""
    parts = []
    for title, table in TABLES:
        lines = [f"## {title}", "", f"| | {' | '.join(summaries)} |", f"|---|{'---:|' * len(summaries)}"]
        # A bar would end the cell.
        lines += [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in _rows(summaries, table)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def draw_figures(moments: Mapping[str, Sequence[Moment]], folder: Path) -> list[Path]:
    """Draw the four figures.

    Args:
        moments (`Mapping[str, Sequence[Moment]]`): Analysed pools by normalisation.
        folder (`Path`): Where the files go.

    Returns:
        `list[Path]`: The files.
    """
    figures = {
        "gain_against_conflict.png": lambda: _draw_pairs(moments, "pair_gains", "gain Δ(x|S)"),
        "epsilon_against_conflict.png": lambda: _draw_pairs(moments, "pair_epsilons", "|ε(x|S)|"),
        "gain_decay.png": lambda: _draw_decay(moments),
        "curvature_and_conflict.png": lambda: _draw_training(moments),
    }
    paths = []
    for name, draw in figures.items():
        figure = draw()
        paths.append(folder / name)
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _panels(moments: Mapping[str, Sequence[Moment]], title: str) -> tuple[plt.Figure, list[Axes]]:
    figure, axes = plt.subplots(1, len(moments), figsize=(4 * len(moments), 3.6), squeeze=False, layout="constrained")
    figure.suptitle(title)
    panels = list(axes[0])
    for axis, name in zip(panels, moments, strict=True):
        axis.set_title(f'gradient_normalization="{name}"', fontsize=9)
    return figure, panels


def _draw_pairs(moments: Mapping[str, Sequence[Moment]], column: str, label: str) -> plt.Figure:
    figure, panels = _panels(moments, f"{label} against conflict, every candidate beside the picks of its step")
    for axis, seen in zip(panels, moments.values(), strict=True):
        found = [moment.theory.decomposition for moment in seen]
        opposition = -torch.cat([one.pair_cosines for one in found])
        picks = torch.cat([one.pair_picks for one in found])
        values = torch.cat([getattr(one, column) for one in found])
        shown = axis.scatter(opposition, values, c=picks, s=10, cmap="viridis", alpha=0.8, linewidths=0)
        axis.axvspan(0.0, max(0.02, 1.05 * float(opposition.max())), color=COLORS["high"], alpha=0.12, zorder=0)
        axis.set_xlabel("−cos with the picks' mean (shaded: conflict)")
        axis.set_ylabel(label)
        steps = sorted(set(picks.tolist()))
        figure.colorbar(shown, ax=axis, label="picks before", ticks=steps)
    return figure


def _draw_decay(moments: Mapping[str, Sequence[Moment]]) -> plt.Figure:
    figure, panels = _panels(
        moments, "Gains of greedy picks from thirds of the pool by conflict, as shares of the first"
    )
    for axis, seen in zip(panels, moments.values(), strict=True):
        for place, group in enumerate(("low", "medium", "high")):
            decays = [moment.theory.group_decays[place] for moment in seen if moment.theory.group_decays]
            if not decays:
                continue
            shares = torch.tensor([[gain / decay.gains[0] for gain in decay.gains] for decay in decays])
            picks = range(1, shares.shape[1] + 1)
            lives = [decay.half_life for decay in decays if decay.half_life is not None]
            life = (
                f"half-life {sum(lives) / len(lives):.1f} in {len(lives)} of {len(decays)}"
                if lives
                else "no half-life"
            )
            axis.plot(picks, shares.mean(dim=0), "o-", color=COLORS[group], label=f"{group}: {life}")
            if len(decays) > 1:
                error = shares.std(dim=0) / len(decays) ** 0.5
                low, high = shares.mean(dim=0) - error, shares.mean(dim=0) + error
                axis.fill_between(picks, low, high, color=COLORS[group], alpha=0.2, linewidth=0)
        axis.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axis.set_ylim(bottom=0.0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("pick")
        axis.set_ylabel("gain / first gain")
        axis.legend(fontsize=7, loc="lower left")
    return figure


def _draw_training(moments: Mapping[str, Sequence[Moment]]) -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    figure.suptitle("Total curvature and conflict over the run")
    for color, (name, seen) in zip(LINES, moments.items(), strict=False):
        steps = [moment.step for moment in seen]
        numbers = [moment.theory.as_numbers() for moment in seen]
        for axis, key in zip(axes, ("curvature", "mean_conflict"), strict=True):
            values = [float("nan") if one[key] is None else one[key] for one in numbers]
            axis.plot(steps, values, "o-", color=color, label=name)
    for axis, label in zip(axes, ("total curvature c of the pool", "mean conflict c(x|S)"), strict=True):
        axis.set_xlabel("optimizer steps done")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0.0)
        axis.legend(fontsize=8)
    return figure
