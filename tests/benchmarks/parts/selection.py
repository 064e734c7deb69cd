"""Selecting alone: on the Gram matrix, and greedily with vectors of all D dimensions; and its share in scoring.

Random gradients with norms that vary as real ones do. The direct way takes time in proportion to D; it is measured at
a smaller D (`--direct-dim`) than a model's, which favours it. K = N / 10.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from spice_trainer import select
from spice_trainer.selection.gram import measure_rows
from tests.benchmarks.clock import shown, spread, timed
from tests.benchmarks.direct_greedy import direct_greedy
from tests.benchmarks.methods import gram_clock
from tests.benchmarks.parts.scoring import select_all
from tests.benchmarks.tables import Table, passed
from tests.benchmarks.workload import Workload


def random_gradients(num_rows: int, dimension: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Rows that share a direction, with norms between about 0.3 and 3."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dimension, generator=generator)
    rows += 0.3 * torch.randn(dimension, generator=generator)
    norms = torch.exp(0.7 * torch.randn(num_rows, 1, generator=generator))
    return (rows * norms / dimension**0.5).to(device)


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Both ways on the same gradients, then the share in scoring."""
    points = []
    for num_rows in arguments.pool_sizes:
        num_selected = max(1, num_rows // 10)
        gradients = random_gradients(num_rows, arguments.direct_dim, workload.device)
        direct = [
            timed(workload.device, direct_greedy, gradients, num_selected) for _ in range(arguments.direct_repeats)
        ]
        product, selecting, picks = [], [], ()
        for _ in range(arguments.repeats):
            # It overwrites what it measures.
            seconds, geometry = timed(workload.device, measure_rows, gradients.clone())
            product.append(seconds)
            norms = geometry.norms.double().cpu()
            gram = geometry.cosines.cpu() * torch.outer(norms, norms)
            seconds, selection = timed(workload.device, select, gram, num_selected)
            selecting.append(seconds)
            picks = selection.indices
        points.append(
            {
                "pool_size": num_rows,
                "num_selected": num_selected,
                "dimension": arguments.direct_dim,
                "direct_seconds": [seconds for seconds, _ in direct],
                "gram_seconds": product,
                "select_seconds": selecting,
                "same_picks": [int(pick) for pick in picks] == direct[0][1],
            }
        )
        spent = {"direct": direct[0][0], "Gram": product[0], "selecting": selecting[0]}
        report(f"  N = {num_rows}: " + ", ".join(f"{name} {value:.3g} s" for name, value in spent.items()))
        del gradients
    return {"points": points, "share": share_in_scoring(workload, arguments.repeats)}


def share_in_scoring(workload: Workload, num_repeats: int) -> dict[str, Any]:
    """Seconds of scoring the workload's pools, of their Gram products and of selecting from them."""
    model = workload.make_model()
    found: dict[str, Any] = {}
    for name, sketch_dim in (("exact", 0), ("sketch", -1)):
        scorer = workload.make_scorer(model, sketch_dim=sketch_dim)
        lists: dict[str, list[float]] = {"scoring": [], "gram": [], "selecting": []}
        for _ in range(num_repeats):
            with gram_clock(workload.device) as gram:
                seconds, scores = timed(workload.device, workload.score, scorer)
            lists["scoring"].append(seconds)
            lists["gram"].append(sum(gram))
            lists["selecting"].append(timed(workload.device, select_all, scores, workload)[0])
        lists["select_share"] = [a / b for a, b in zip(lists["selecting"], lists["scoring"], strict=True)]
        lists["gram_share"] = [a / b for a, b in zip(lists["gram"], lists["scoring"], strict=True)]
        found[name] = lists
    return found


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a pool size, one a kind of features."""
    points = result["points"]
    dimension = points[0]["dimension"] if points else 0
    alone = Table(
        f"Selecting alone, D = {dimension:,}, seconds",
        ["N", "K", "Gram product", "selecting on it", "direct, D dimensions", "direct / ours", "same picks"],
    )
    for point in points:
        gram, selecting, direct = (spread(point[f"{key}_seconds"])["median"] for key in ("gram", "select", "direct"))
        alone.add(
            point["pool_size"], point["num_selected"], f"{gram:.4f}", f"{selecting:.4f}", f"{direct:.2f}",
            f"{direct / (gram + selecting):,.0f}", "yes" if point["same_picks"] else "NO",
        )  # fmt: skip
    alone.notes.append("direct / ours: with our Gram product. It and the direct way grow with D, selecting does not.")
    share = Table("Selecting in scoring", ["features", "scoring, s", "Gram products / scoring", "selecting / scoring"])
    for name, lists in result["share"].items():
        share.add(
            name, f"{spread(lists['scoring'])['median']:.3g}", shown(lists["gram_share"], 4),
            shown(lists["select_share"], 5),
        )  # fmt: skip
        share.notes.append(f"{name}: {passed(spread(lists['select_share'])['median'], 0.005)}")
    return [alone, share]
