"""Time and fidelity as the sketch shrinks, from exact gradients to 1,024 numbers a row.

Each dimension scores the same pools on its own path; picks and `retained` are of the Gram matrices that come out of
the timed scoring, against those of the exact one, for every gradient normalisation.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.benchmarks.clock import ratios, shown, time_in_turn
from tests.benchmarks.fidelity import NORMALIZATIONS, normalized, pick, random_subsets, retained
from tests.benchmarks.methods import SORTED, Contestants, always, gram_clock
from tests.benchmarks.tables import Table, bytes_shown
from tests.benchmarks.workload import Workload


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Times the plain passes and every dimension in turn."""
    model = workload.make_model(random_b=True)
    contestants = Contestants(workload, model)
    dimension = sum(parameter.numel() for parameter in contestants.parameters)
    dims = [0, *(dim for dim in sorted(set(arguments.sketch_dims), reverse=True) if 0 < dim < dimension)]
    scored: dict[str, list[Any]] = {}
    gram_seconds: dict[str, list[float]] = {str(dim): [] for dim in dims}
    methods = {SORTED: always(lambda: contestants.plain(contestants.batches))}
    for dim in dims:
        scorer = workload.make_scorer(model, sketch_dim=dim)

        def score(name: str = str(dim), scorer: Any = scorer) -> None:
            with gram_clock(workload.device) as seconds:
                scored[name] = workload.score(scorer)
            gram_seconds[name].append(sum(seconds))

        methods[str(dim)] = always(score)
        workload.score(scorer, workload.pools[:1])  # draws the sketch
    seconds = time_in_turn(methods, arguments.repeats, workload.device, report=report)
    records = []
    for place, exact in enumerate(scored["0"]):
        tokens = np.array(exact.label_tokens)
        for normalization in NORMALIZATIONS:
            reference = normalized(exact.gram.numpy(), tokens, normalization)
            best = pick(reference, workload.num_selected)
            subsets = random_subsets(len(reference), workload.num_selected, place)
            for dim in dims:
                gram = normalized(scored[str(dim)][place].gram.numpy(), tokens, normalization)
                picks = pick(gram, workload.num_selected)
                records.append(
                    {
                        "dim": dim,
                        "pool": place,
                        "normalization": normalization,
                        "overlap": len(set(picks.tolist()) & set(best.tolist())) / len(best),
                        "retained": retained(reference, picks, best, subsets),
                    }
                )
    return {
        "dimension": dimension,
        "seconds": seconds,
        "ratios": ratios(seconds, seconds[SORTED]),
        "gram_seconds": gram_seconds,
        "records": records,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a dimension."""
    table = Table(
        f"The sketch: time over the plain forward and backward, and picks (exact: D = {result['dimension']:,})",
        ["numbers a row", "bytes a row", "time / plain", "Gram, s",
         *(f"overlap, retained ({normalization})" for normalization in NORMALIZATIONS)],
    )  # fmt: skip
    for name, values in result["ratios"].items():
        if name == SORTED:
            continue
        dim = int(name)
        cells = []
        for normalization in NORMALIZATIONS:
            found = [r for r in result["records"] if r["dim"] == dim and r["normalization"] == normalization]
            overlap, kept = (statistics.mean(record[key] for record in found) for key in ("overlap", "retained"))
            cells.append(f"{overlap:.2f}, {kept:.3f}")
        table.add(
            f"{dim:,}" if dim else "exact", bytes_shown(4 * (dim or result["dimension"])), shown(values),
            f"{statistics.median(result['gram_seconds'][name]):.3g}", *cells,
        )  # fmt: skip
    return [table]
