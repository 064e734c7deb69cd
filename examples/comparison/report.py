"""The report of a comparison: tables on the terminal and as Markdown, and three plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from comparison.json_lines import read_lines
from comparison.plan import Run, chosen_rate, final_runs
from comparison.settings import Settings
from comparison.summary import (
    Difference,
    Estimate,
    by_seed,
    difference,
    error_over_rows,
    estimate,
    format_difference,
    format_estimate,
)

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


def write_report(settings: Settings, regimes: Sequence[str] | None = None) -> None:
    """Write `report.md` and the plots into the output directory, and print the tables; of regimes, one more of all.

    Args:
        settings ([`Settings`]): The comparison.
        regimes (`Sequence[str]`, *optional*): Only these regimes.

    Raises:
        FileNotFoundError: If nothing has been run.
    """
    comparisons = settings.by_regime(regimes)
    if not settings.regimes:
        _write_one(settings)
        return
    begun = [one for one in comparisons if (Path(one.output_dir) / "results.jsonl").exists()]
    if not begun:
        raise FileNotFoundError(f"There are no results in {settings.output_dir} yet. `compare.py run` makes them.")
    for one in begun:
        _write_one(one)
    tables = [table for metric in ORDERED_LOSSES if (table := _regimes_table(settings, begun, metric)).rows]
    console = Console()
    for table in tables:
        console.print(table.rich())
    text = "\n\n".join(table.markdown() for table in tables)
    (Path(settings.output_dir) / "report.md").write_text(text + "\n", encoding="utf-8")
    console.print(f"Report: {Path(settings.output_dir) / 'report.md'}")


def _regimes_table(settings: Settings, comparisons: Sequence[Settings], metric: str) -> ReportTable:
    """Differences to random rows, a column a regime."""
    cells: dict[str, dict[str, str]] = {arm.name: {} for arm in settings.arms}
    names = []
    for one in comparisons:
        assert one.regime is not None
        names.append(one.regime.name)
        output_dir = Path(one.output_dir)
        shared = json.loads((output_dir / "settings.json").read_text(encoding="utf-8"))
        runs = finished_runs(one, read_lines(output_dir / "results.jsonl"), shared["prepared"]["num_steps"])
        against = runs.get(one.reference.name, []) if one.reference else []
        for name, lines in runs.items():
            found = difference(by_seed(lines, metric), by_seed(against, metric))
            if found is not None and one.reference and name != one.reference.name:
                cells[name][names[-1]] = format_difference(found)
    rows = [(name, *(found.get(regime, "-") for regime in names)) for name, found in cells.items() if found]
    title = f"{metric.replace('_', ' ').capitalize()} on the test rows less that of random rows (seeds won)"
    return ReportTable(title, ("arm", *names), rows)


def _write_one(settings: Settings) -> None:
    output_dir = Path(settings.output_dir)
    lines = read_lines(output_dir / "results.jsonl")
    if not lines:
        raise FileNotFoundError(f"There are no results in {output_dir} yet. `compare.py run` makes them.")
    shared = json.loads((output_dir / "settings.json").read_text(encoding="utf-8"))
    base_file = output_dir / "base.json"
    base = json.loads(base_file.read_text(encoding="utf-8")) if base_file.exists() else None
    test_tokens = shared["prepared"].get("test_label_tokens")
    tables = build_tables(settings, lines, shared["prepared"]["num_steps"], base, test_tokens)
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
    settings: Settings,
    lines: Sequence[dict[str, Any]],
    num_steps: int,
    base: dict[str, Any] | None,
    test_tokens: Sequence[int] | None = None,
) -> list[ReportTable]:
    """The report's tables.

    Args:
        settings ([`Settings`]): The comparison.
        lines (`Sequence[dict]`): Its results.
        num_steps (`int`): Steps of a whole run.
        base (`dict`, *optional*): The model before training.
        test_tokens (`Sequence[int]`, *optional*): Answer tokens of each test row.

    Returns:
        `list[ReportTable]`: Losses on the test rows and on the validation rows; differences to random rows with
        their errors over seeds and over test rows, where runs have them; losses by domain; accuracy; what was
        picked; seconds; learning rates.
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
        _errors_table(settings, runs, test_tokens),
        *(
            _metric_table(f"Held-out loss by domain, {name.replace('_', ' ')} (test)", settings, runs, base, group)
            for name in ORDERED_LOSSES
            if len(group := [f"{name}/{domain}" for domain in domains]) > 1
        ),
        _metric_table("Multiple-choice accuracy (test)", settings, runs, base, [f"accuracy/{kind}" for kind in kinds]),
        _picks_table(runs),
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


def _errors_table(
    settings: Settings, runs: dict[str, list[dict[str, Any]]], test_tokens: Sequence[int] | None
) -> ReportTable:
    """Differences to random rows with both errors; no rows where test rows' own losses were not written."""
    reference = settings.reference
    columns = ["arm", "seeds"]
    for metric in ORDERED_LOSSES:
        columns += [metric.replace("_", " "), "± over seeds", "± over test rows"]
    rows = []
    for name, lines in runs.items():
        against = runs.get(reference.name, []) if reference else []
        cells = [name, str(len(lines))]
        for metric in ORDERED_LOSSES:
            found = difference(by_seed(lines, metric), by_seed(against, metric))
            over_rows = error_over_rows(lines, against, test_tokens, metric) if test_tokens else None
            if found is None or over_rows is None:
                break
            over_seeds = found.estimate.error
            mean = format_difference(Difference(Estimate(found.estimate.mean, None, len(lines)), found.num_won))
            cells += [mean, "-" if over_seeds is None else f"{over_seeds:.4f}", f"{over_rows:.4f}"]
        if reference and name != reference.name and len(cells) == len(columns):
            rows.append(tuple(cells))
    against_name = reference.name if reference else ""
    return ReportTable(f"Difference to {against_name} (test)", tuple(columns), rows)


def _picks_table(runs: dict[str, list[dict[str, Any]]]) -> ReportTable:
    """What was trained on, by what a regime knows of its rows."""
    columns = ("arm", "wanted", "corrupt", "unique", "answer tokens: quartiles", "by domain")
    rows = []
    for name, lines in runs.items():
        if not all("picks" in line for line in lines):
            continue
        picks = [line["picks"] for line in lines]
        shares = [f"{fmean(one[part] for one in picks):.2f}" for part in ("wanted", "corrupt", "unique")]
        lengths = ", ".join(f"{fmean(one['label_tokens'][place] for one in picks):.0f}" for place in range(3))
        domains = sorted({domain for line in lines for domain in line["rows_trained_by_domain"]})
        trained = sum(line["rows_trained"] for line in lines)
        by_domain = [(d, sum(line["rows_trained_by_domain"].get(d, 0) for line in lines) / trained) for d in domains]
        rows.append((name, *shares, lengths, ", ".join(f"{domain} {share:.2f}" for domain, share in by_domain)))
    return ReportTable("Rows trained on (shares; mean over seeds)", columns, rows)


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
        "better. Errors over seeds say nothing of other held-out rows: every seed is read on the same ones. Those "
        "over test rows, where there are any, say nothing of other seeds.",
        f"Model {settings.model}, {shared['dtype']}, adapter {adapter}; {num_steps} steps of {shared['batch_size']} "
        f"rows, {shared['num_selected']} of every {shared['pool_size']} (the arm `full`: one epoch of all "
        f"{rows['train']:,} rows); training {shared['training'] or 'defaults, constant learning rate'}; "
        f"{', '.join(devices)}.",
        f"Rows: {', '.join(f'{name} {count:,}' for name, count in rows.items())}, split by hash of the instruction. "
        f"Dropped: {dropped}.",
        _note_on_regime(settings, prepared),
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
        *_notes_on_chance(settings, runs),
        f"Evaluation took {share:.0%} of all seconds, and is in no arm's curve.",
    ]
    return [note for note in notes if note]


def _note_on_regime(settings: Settings, prepared: dict[str, Any]) -> str:
    if settings.regime is None:
        return ""
    given = {name: value for name, value in asdict(settings.regime).items() if value}
    domains = {name: counts for name, counts in prepared["rows_by_domain"].items() if counts}
    return (
        f"Regime {given}; rows by domain {domains}; quartiles of answer tokens "
        f"{prepared['label_tokens']}; share of wanted rows {prepared['wanted_share']:.2f}; damage "
        f"{prepared['damage'] or 'none'}. Seed of the draws {settings.data.seed}, test split "
        f"{settings.data.test_split}."
    )


def _notes_on_chance(settings: Settings, runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """How large a difference has to be where several rules were tried."""
    reference = settings.reference
    tried = [name for name in runs if settings.arm(name).kind == "spice" and (not reference or name != reference.name)]
    if settings.regime is None or not tried:
        return []
    limit = NormalDist().inv_cdf(1 - 0.05 / (2 * len(tried)))
    return [
        f"{len(tried)} rules were compared with random rows here. For the best of so many a difference means "
        f"something at 5 % above {limit:.1f} errors (Bonferroni, normal; more with few seeds)."
    ]
