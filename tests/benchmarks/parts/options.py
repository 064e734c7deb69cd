"""What scoring less than everything saves, and what it still picks.

Time: scoring the first moment's pools under each option, on its own path with the default sketch, over full scoring of
the same pools in the same run. Fidelity, at moments of a fine-tuning on random rows, for each gradient normalisation:
the overlap of the picks with those of full exact scoring, and `retained`, both from exact gradients (module
`module_grams`); `as timed` is what the timed, sketched scoring itself retains at the first moment.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spice_trainer import SpiceConfig
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.scores import PoolScores
from tests.benchmarks.clock import ratios, shown, spread, time_in_turn
from tests.benchmarks.fidelity import normalized, pick, random_subsets, retained
from tests.benchmarks.finetuning import Finetuning
from tests.benchmarks.methods import Contestants, always
from tests.benchmarks.module_grams import ModuleGrams, kept_candidates, measure_module_grams, picks_under
from tests.benchmarks.option_specs import ScoringOption, default_options, kept_modules, parse_option
from tests.benchmarks.tables import Table
from tests.benchmarks.workload import Workload

FULL = ScoringOption()
# Above it, in bf16 too, the timed scoring is not of the gradients that the option says.
ERROR_LIMIT = 0.1


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Times once, then measures fidelity at every moment."""
    model = workload.make_model()
    num_layers = model.config.num_hidden_layers
    options = [parse_option(text) for text in arguments.scoring_options] or default_options(num_layers)
    names = Contestants(workload, model).modules
    options = [option for option in options if option != FULL and any(kept_modules(names, option))]
    moments = sorted(arguments.moments)
    num_training = moments[-1] * workload.batch_size
    per_moment = workload.num_candidates
    # Candidates of each moment, then the rows that are trained on in between.
    rows = workload.rows(per_moment * len(moments) + num_training)
    finetuning = Finetuning(workload, model, rows[per_moment * len(moments) :])

    result: dict[str, Any] = {"moments": moments, "normalizations": list(arguments.normalizations)}
    records: list[dict[str, Any]] = []
    for number, moment in enumerate(moments):
        losses = finetuning.advance(moment)
        if losses:
            report(f"  trained to step {moment}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
        scored: dict[str, list[PoolScores]] = {}
        pools = [[row + number * per_moment for row in pool] for pool in workload.pools]
        if number == 0:
            seconds, scored = time_options(workload, model, [FULL, *options], pools, arguments, report)
            result["seconds"] = seconds
            result["ratios"] = ratios(seconds, seconds[FULL.name])
        for place, pool in enumerate(pools):
            grams = {
                tokens: measure_module_grams(workload, model, pool, max_tokens=tokens)
                for tokens in dict.fromkeys((None, *(option.tokens for option in options)))
            }
            by_name = {name: scores[place] for name, scores in scored.items()}
            for normalization in arguments.normalizations:
                found = compare(grams, by_name, options, workload.num_selected, normalization, seed=place)
                records += [{"moment": moment, "pool": place} | record for record in found]
            report(f"  step {moment}, pool {place + 1} of {len(pools)}: fidelity measured")
    result["records"] = records
    result["summary"] = summarize(records, result["ratios"])
    return result


def time_options(
    workload: Workload,
    model: Any,
    options: Sequence[ScoringOption],
    pools: list[list[int]],
    arguments: argparse.Namespace,
    report: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, list[PoolScores]]]:
    """Seconds of each option's own path, and what it found out with raw gradients (the last time)."""
    scored: dict[str, list[PoolScores]] = {}
    methods = {}
    for option in options:
        scorer = workload.make_scorer(model, **option.settings)

        def score(name: str = option.name, scorer: Any = scorer) -> None:
            scored[name] = workload.score(scorer, pools)

        methods[option.name] = always(score)
    # The first pass of a process is slower: sketches are drawn, memory is taken.
    workload.score(workload.make_scorer(model), pools[:1])
    return time_in_turn(methods, arguments.repeats, workload.device, report=report), scored


def compare(
    grams: dict[int | None, ModuleGrams],
    timed: dict[str, PoolScores],
    options: Sequence[ScoringOption],
    num_selected: int,
    normalization: str,
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """One record for each option in one pool."""
    full = grams[None]
    reference = normalized(full.gram(FULL), full.label_tokens, normalization)
    best = pick(reference, num_selected)
    subsets = random_subsets(len(reference), num_selected, seed)
    records = []
    for option in (FULL, *options):
        picks = best if option == FULL else picks_under(option, grams[option.tokens], num_selected, normalization)
        record: dict[str, Any] = {
            "option": option.name,
            "normalization": normalization,
            "overlap": len(set(picks.tolist()) & set(best.tolist())) / len(best),
            "retained": retained(reference, picks, best, subsets),
            "mean_tokens_of_picks": float(full.label_tokens[picks].mean()),
        }
        if option.name in timed and normalization == "none":
            scores = timed[option.name]
            config = SpiceConfig(pool_size=len(reference), num_selected=num_selected)
            theirs = np.array(select_pool(scores, num_selected, config).selection.indices)
            record["retained_as_timed"] = retained(reference, theirs, best, subsets)
            record["norm_error"] = norm_error(scores, grams[option.tokens], option)
        records.append(record)
    return records


def norm_error(scores: PoolScores, grams: ModuleGrams, option: ScoringOption) -> float:
    """Largest relative difference between the norms of the timed scoring and of the gradients it should be of.

    A sketch keeps norms exactly, so this shows whether what is timed is what `retained` is told of. A filter that lets
    other rows through is infinitely wrong.
    """
    expected = np.sqrt(np.diag(grams.gram(option)))
    kept = np.arange(len(expected)) if scores.whole is None else np.array(scores.kept)
    if option.prefilter is not None:
        ours = kept_candidates(grams.losses, grams.label_tokens, option.prefilter, "none")
        # Rounding may turn two neighbours of the filter's edge around.
        if len(kept) != len(ours) or len(np.setdiff1d(kept, ours)) > 0.2 * len(ours):
            return float("inf")
    return float((np.abs(scores.gradient_norms.numpy() - expected[kept]) / expected[kept]).max())


def summarize(records: list[dict[str, Any]], time_ratios: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Means over the pools of each moment, and over all; with the option's time."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["option"], record["normalization"]), []).append(record)
    summary = []
    for (option, normalization), group in groups.items():
        by_moment: dict[int, list[dict[str, Any]]] = {}
        for record in group:
            by_moment.setdefault(record["moment"], []).append(record)
        line: dict[str, Any] = {
            "option": option,
            "normalization": normalization,
            "time": spread(time_ratios[option])["median"],
            "overlap": statistics.mean(record["overlap"] for record in group),
            "retained": statistics.mean(record["retained"] for record in group),
            "retained_min": min(record["retained"] for record in group),
            "moments": {
                str(moment): {key: statistics.mean(record[key] for record in found) for key in ("overlap", "retained")}
                for moment, found in by_moment.items()
            },
        }
        as_timed = [record["retained_as_timed"] for record in group if "retained_as_timed" in record]
        if as_timed:
            line["retained_as_timed"] = statistics.mean(as_timed)
            line["norm_error"] = max(record["norm_error"] for record in group if "norm_error" in record)
        summary.append(line)
    return summary


def frontier(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Options that none beats in both time and `retained`, fastest first."""
    kept, best = [], float("-inf")
    for line in sorted(lines, key=lambda line: (line["time"], -line["retained"])):
        if line["retained"] > best:
            kept.append(line["option"])
            best = line["retained"]
    return kept


def tables(result: dict[str, Any]) -> list[Table]:
    """One table a normalisation, fastest options first."""
    found = []
    moments = [str(moment) for moment in result["moments"]]
    for normalization in result["normalizations"]:
        lines = [line for line in result["summary"] if line["normalization"] == normalization]
        edge = frontier(lines)
        table = Table(
            f"Scoring less, gradient_normalization={normalization!r}",
            ["option", "time / full", *(f"overlap, retained at {moment}" for moment in moments), "retained", "least",
             "as timed", "frontier"],
        )  # fmt: skip
        for line in sorted(lines, key=lambda line: line["time"]):
            table.add(
                line["option"],
                shown(result["ratios"][line["option"]]),
                *(
                    f"{line['moments'][moment]['overlap']:.2f}, {line['moments'][moment]['retained']:.3f}"
                    for moment in moments
                ),
                f"{line['retained']:.3f}",
                f"{line['retained_min']:.3f}",
                f"{line['retained_as_timed']:.3f}" if "retained_as_timed" in line else "",
                "*" if line["option"] in edge else "",
            )
            if line.get("norm_error", 0.0) > ERROR_LIMIT:
                table.notes.append(
                    f"{line['option']}: WRONG, other gradients were timed: norms differ by {line['norm_error']:.1e}"
                )
        cheap = [line for line in lines if line["time"] <= 0.5]
        if cheap:
            best = max(cheap, key=lambda line: line["retained"])
            words = "reached" if best["retained"] >= 0.9 else "MISSED"
            table.notes.append(
                f"at 0.5 times the floor or less, {best['option']!r} retains most: {best['retained']:.3f} at "
                f"{best['time']:.3f} times; target 0.9: {words}"
            )
        else:
            table.notes.append("no option takes at most 0.5 times the floor; target MISSED")
        found.append(table)
    return found
