"""The report of a comparison: tables on the terminal and as Markdown, and three plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from comparison.json_lines import read_lines
from comparison.plan import Run, chosen_rate, final_runs
from comparison.settings import Settings
from comparison.summary import by_seed, difference, estimate, format_difference, format_estimate

# Before training: a row of the table, though no arm.
BASE = "before training"
ORDERED_LOSSES = ("loss_per_token", "loss_per_row")


@dataclass(frozen=True)
class ReportTable:
    """A table with its title; the first column is text."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [f"**{self.title}**", "", _row(self.columns), _row(["---", *["---:"] * (len(self.columns) - 1)])]
        return "\n".join([*lines, *(_row(row) for row in self.rows)])

    def rich(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.title)
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_report(settings: Settings) -> None:
    """Write `report.md` and the plots into the output directory, and print the tables.

    Raises:
        FileNotFoundError: If nothing has been run.
    """
    output_dir = Path(settings.output_dir)
    lines = read_lines(output_dir / "results.jsonl")
    if not lines:
        raise FileNotFoundError(f"There are no results in {output_dir} yet. `compare.py run` makes them.")
    shared = json.loads((output_dir / "settings.json").read_text(encoding="utf-8"))
    base_file = output_dir / "base.json"
    base = json.loads(base_file.read_text(encoding="utf-8")) if base_file.exists() else None
    tables = build_tables(settings, lines, shared["prepared"]["num_steps"], base)
    notes = build_notes(settings, lines, shared)
    console = Console()
    for table in tables:
        console.print(table.rich())
    for note in notes:
        console.print(f"- {note}", highlight=False, markup=False)
    text = [*(table.markdown() for table in tables), "\n".join(f"- {note}" for note in notes)]
    try:
        from comparison.plots import write_plots
    except ModuleNotFoundError as error:
        console.print(f"No plots: {error}. `pip install matplotlib` for them.")
    else:
        names = write_plots(output_dir, finished_runs(settings, lines, shared["prepared"]["num_steps"]), base)
        text.append("\n".join(f"![{name}]({name})" for name in names))
    (output_dir / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    console.print(f"Report: {output_dir / 'report.md'}")


def finished_runs(
    settings: Settings, lines: Sequence[dict[str, Any]], num_steps: int
) -> dict[str, list[dict[str, Any]]]:
    """The lines that the report compares, by arm: whole runs at the arm's chosen learning rate."""
    by_run = {Run.of(line): line for line in lines}
    found = {
        arm.name: [by_run[run] for run in final_runs(settings, arm, lines, num_steps) if run in by_run]
        for arm in settings.arms
    }
    return {name: runs for name, runs in found.items() if runs}


def build_tables(
    settings: Settings, lines: Sequence[dict[str, Any]], num_steps: int, base: dict[str, Any] | None
) -> list[ReportTable]:
    """The report's tables.

    Args:
        settings ([`Settings`]): The comparison.
        lines (`Sequence[dict]`): Its results.
        num_steps (`int`): Steps of a whole run.
        base (`dict`, *optional*): The model before training.

    Returns:
        `list[ReportTable]`: Losses on the test rows and on the validation rows; losses by domain; accuracy; seconds;
        learning rates.
    """
    runs = finished_runs(settings, lines, num_steps)
    domains = sorted({name for group in runs.values() for line in group for name in line["test"]["domains"]})
    kinds = sorted({name for group in runs.values() for line in group for name in line["choices"] or {}})
    tables = [
        _metric_table("Held-out loss (test)", settings, runs, base, ORDERED_LOSSES),
        _metric_table(
            "Held-out loss (validation: what choices go by)",
            settings,
            runs,
            base,
            ORDERED_LOSSES,
            "validation",
        ),
        *(
            _metric_table(f"Held-out loss by domain, {name.replace('_', ' ')} (test)", settings, runs, base, group)
            for name in ORDERED_LOSSES
            if len(group := [f"{name}/{domain}" for domain in domains]) > 1
        ),
        _metric_table("Multiple-choice accuracy (test)", settings, runs, base, [f"accuracy/{kind}" for kind in kinds]),
        _seconds_table(runs),
        _rates_table(settings, lines, num_steps, runs),
    ]
    return [table for table in tables if len(table.columns) > 2 and table.rows]


def _metric_table(
    title: str,
    settings: Settings,
    runs: dict[str, list[dict[str, Any]]],
    base: dict[str, Any] | None,
    metrics: Sequence[str],
    split: str = "test",
) -> ReportTable:
    reference = settings.reference
    against = runs.get(reference.name, []) if reference else []
    columns = ["arm", "seeds"]
    for metric in metrics:
        short = metric.partition("/")[2] or metric.replace("_", " ")
        columns += [short, f"{short} − {reference.name}"] if reference else [short]
    rows = []
    for name, lines in runs.items():
        cells = [name, str(len(lines))]
        for metric in metrics:
            values = by_seed(lines, metric, split)
            cells.append(format_estimate(estimate(list(values.values())) if values else None))
            if reference:
                is_accuracy = metric.startswith("accuracy")
                found = difference(values, by_seed(against, metric, split), higher_is_better=is_accuracy)
                cells.append("" if name == reference.name else format_difference(found))
        rows.append(tuple(cells))
    if base is not None:
        cells = [BASE, ""]
        for metric in metrics:
            values = by_seed([{"seed": 0, **base}], metric, split)
            cells += [
                format_estimate(estimate(list(values.values())) if values else None),
                *([""] if reference else []),
            ]
        rows.append(tuple(cells))
    return ReportTable(title, tuple(columns), rows)


def _seconds_table(runs: dict[str, list[dict[str, Any]]]) -> ReportTable:
    columns = (
        "arm",
        "rows trained",
        "answer tokens a row",
        "scoring",
        "selecting",
        "training",
        "evaluation",
        "its share",
    )
    rows = []
    for name, lines in runs.items():
        seconds = {part: fmean(line["seconds"][part] for line in lines) for part in columns[3:7]}
        trained = fmean(line["rows_trained"] for line in lines)
        answer = fmean(line["label_tokens_trained"] / line["rows_trained"] for line in lines)
        shown = [f"{value:.1f}" for value in seconds.values()]
        share = seconds["evaluation"] / sum(seconds.values())
        rows.append((name, f"{trained:,.0f}", f"{answer:.1f}", *shown, f"{share:.0%}"))
    return ReportTable("Seconds of a run (mean over seeds)", columns, rows)


def _rates_table(
    settings: Settings, lines: Sequence[dict[str, Any]], num_steps: int, runs: dict[str, list[dict[str, Any]]]
) -> ReportTable:
    rows = []
    for arm in settings.arms:
        rate = chosen_rate(settings, arm, lines, num_steps)
        if rate is not None and arm.name in runs:
            grid = ", ".join(f"{value:g}: {loss:.4f}" for value, loss in rate.grid.items()) or "one value, no grid"
            rows.append((arm.name, f"{rate.value:g}", "own" if rate.source == arm.name else rate.source, grid))
    name = settings.evaluation.metric.replace("_", " ")
    return ReportTable("Learning rates", ("arm", "chosen", "grid of", f"validation {name}"), rows)


def build_notes(settings: Settings, lines: Sequence[dict[str, Any]], shared: dict[str, Any]) -> list[str]:
    """What the tables mean, and under which conditions they were made."""
    prepared = shared["prepared"]
    num_steps = prepared["num_steps"]
    runs = finished_runs(settings, lines, num_steps)
    num_finished = sum(len(group) for group in runs.values())
    wanted = len(settings.arms) * len(settings.seeds)
    seconds = [line["seconds"] for line in lines]
    share = sum(one["evaluation"] for one in seconds) / max(1e-9, sum(sum(one.values()) for one in seconds))
    steps = settings.learning_rate_steps or num_steps
    seeds = f"seed {settings.seeds[0]}" if settings.learning_rate_seeds == "first" else "all seeds"
    adapter = {name: value for name, value in shared["adapter"].items() if value is not None}
    rows = prepared["rows"]
    dropped = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in prepared["dropped"].items())
    choice_rows = ", ".join(f"{name} {count}" for name, count in prepared["choice_rows"].items())
    devices = sorted({line["where"]["device"] for line in lines if "where" in line})
    notes = [
        f"{num_finished} of {wanted} runs are finished." if num_finished < wanted else "",
        "Mean ± standard error over seeds. Differences are paired by seed; in brackets the seeds in which the arm was "
        "better. The errors say nothing of other held-out rows: every seed is read on the same ones.",
        f"Model {settings.model}, {shared['dtype']}, adapter {adapter}; {num_steps} steps of {shared['batch_size']} "
        f"rows, {shared['num_selected']} of every {shared['pool_size']} (the arm `full`: one epoch of all "
        f"{rows['train']:,} rows); training {shared['training'] or 'defaults, constant learning rate'}; "
        f"{', '.join(devices)}.",
        f"Rows: train {rows['train']:,}, validation {rows['validation']:,}, test {rows['test']:,}, split by hash of "
        f"the instruction. Dropped: {dropped}.",
        f"Multiple choice: {choice_rows or 'none'} rows. given: the row's own choices; options: the few answers that "
        "all rows of its source share; contrast: answers of other test rows of the domain, of like length. Right is "
        "what has the highest log-probability a token.",
        f"Learning rates: the lowest validation loss after {steps} steps with {seeds}."
        + (
            f" All arms take that of {settings.learning_rates_from} unless the table says otherwise: a shared rate "
            "may favour the arm that it was chosen with."
            if settings.learning_rates_from
            else ""
        ),
        f"Evaluation took {share:.0%} of all seconds, and is in no arm's curve.",
    ]
    return [note for note in notes if note]
