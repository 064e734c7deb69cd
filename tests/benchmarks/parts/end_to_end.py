"""Seconds of an optimizer step of a Trainer with SPICE: scoring, selecting, training; and beside plain Trainers.

    SPICE           T pools of N candidates are scored, K of each are trained on
    random          a plain Trainer on T·K rows a step, drawn at random
    all the data    a plain Trainer on the T·N candidates of one SPICE step, in N / K steps of T·K rows

The runs take turns; the first step of each is left out. Growth: see module `growth`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from tests.benchmarks.clock import rotated, shown
from tests.benchmarks.growth import growth_table, run_sweeps, sweeps
from tests.benchmarks.tables import Table, passed
from tests.benchmarks.trainer_runs import train
from tests.benchmarks.workload import Workload

SPICE, RANDOM, ALL = "SPICE", "random", "all the data"


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Trains in turn, then sweeps."""
    # Plain steps that train on as many rows as a SPICE step scores.
    steps_of_all = workload.pool_size / workload.num_selected
    number_of_all = max(1, round(steps_of_all))
    # Enough for every SPICE step to see new candidates; the plain runs draw from the same rows.
    num_rows = workload.num_candidates * (arguments.trainer_steps + 1)
    runs: dict[str, list[list[dict[str, Any]]]] = {SPICE: [], RANDOM: [], ALL: []}
    for repeat in range(arguments.repeats):
        for name in rotated(list(runs), repeat, arguments.repeats):
            steps = number_of_all if name == ALL else arguments.trainer_steps
            runs[name].append(train(workload, steps, num_rows=num_rows, spice=name == SPICE))
            whole = statistics.mean(step["whole"] for step in runs[name][-1])
            report(f"  repeat {repeat + 1}: {name}: {whole:.3g} s a step")
    result: dict[str, Any] = {"steps": runs, "steps_of_all": steps_of_all, "rows_a_step": rows_a_step(workload)}
    result["repeats"] = [compare(*(runs[name][repeat] for name in runs), steps_of_all)
                         for repeat in range(arguments.repeats)]  # fmt: skip
    points = sweeps(
        workload, pool_sizes=arguments.growth_pool_sizes, lengths=arguments.growth_lengths,
        ranks=arguments.growth_ranks, num_pools=arguments.growth_pools, length_rows=arguments.growth_length_rows,
    )  # fmt: skip
    result["growth"] = run_sweeps(points, arguments.repeats, report)
    return result


def rows_a_step(workload: Workload) -> dict[str, int]:
    """Rows that are scored and trained on."""
    return {"scored": workload.num_candidates, "trained": workload.num_selected * workload.num_pools}


def compare(
    spice: list[dict[str, Any]], plain: list[dict[str, Any]], everything: list[dict[str, Any]], steps_of_all: float
) -> dict[str, float]:
    """Means of one repeat's steps, and their ratios. `steps_of_all`: plain steps for as many rows as are scored."""
    means = {
        key: statistics.mean(step[key] for step in spice) for key in ("whole", "scoring", "selecting", "training")
    }
    plain_step = statistics.mean(step["whole"] for step in plain)
    all_of_them = steps_of_all * statistics.mean(step["whole"] for step in everything)
    tokens = {key: statistics.mean(step[key] for step in spice) for key in ("tokens_scored", "tokens_trained")}
    return {
        **means,
        "other": means["whole"] - means["scoring"] - means["selecting"] - means["training"],
        "random": plain_step,
        "all": all_of_them,
        "over_random": means["whole"] / plain_step,
        "over_all": means["whole"] / all_of_them,
        "scoring_over_all": means["scoring"] / all_of_them,
        "select_share": means["selecting"] / means["scoring"],
        **tokens,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """The split of a step, and growth."""
    rows, repeats = result["rows_a_step"], result["repeats"]

    def values(key: str) -> list[float]:
        return [repeat[key] for repeat in repeats]

    table = Table(
        f"An optimizer step of a Trainer: {rows['scored']} rows scored, {rows['trained']} trained on",
        ["what", "seconds", "share of the step"],
    )
    for key in ("whole", "scoring", "selecting", "training", "other"):
        shares = [part / whole for part, whole in zip(values(key), values("whole"), strict=True)]
        table.add(f"SPICE: {key}", shown(values(key)), shown(shares))
    table.add(f"plain, {rows['trained']} random rows", shown(values("random")), "")
    table.add(f"plain, all {rows['scored']} rows", shown(values("all")), "")
    table.notes += [
        f"a SPICE step takes {shown(values('over_random'), 2)} times a plain step on random rows, and "
        f"{shown(values('over_all'))} times plain training on all its candidates; its scoring alone "
        f"{shown(values('scoring_over_all'))} times the latter",
        f"tokens: {statistics.mean(values('tokens_scored')):,.0f} scored and "
        f"{statistics.mean(values('tokens_trained')):,.0f} trained on a step",
        f"selecting with its records {shown(values('select_share'), 5)} of scoring; "
        f"{passed(statistics.median(values('select_share')), 0.005)}",
    ]
    return [table, growth_table(result["growth"])]
