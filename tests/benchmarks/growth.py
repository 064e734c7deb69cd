"""How scoring and selecting grow with pool size, row length, gradient dimension and the number of pools.

Every sweep is timed in turn, and each of its points is a ratio to the first. Rows of the length sweep are random
tokens, all of one length; the others use the workload's own rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from spice_trainer import SpiceConfig
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.selection.pool import select_pool
from tests.benchmarks.clock import ratios, rotated, shown, timed
from tests.benchmarks.methods import gram_clock
from tests.benchmarks.real_model import Row
from tests.benchmarks.tables import Table
from tests.benchmarks.workload import Workload

PARTS = ("scoring", "gram", "selecting")


class Point:
    """One point of a sweep: a scorer and its pools."""

    def __init__(self, workload: Workload, value: int, scorer: Any, pools: list[list[int]]) -> None:
        self.workload, self.value, self.scorer, self.pools = workload, value, scorer, pools
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def measure(self) -> None:
        config, device = SpiceConfig(), self.workload.device
        with gram_clock(device) as gram:
            whole, scores = timed(device, self.workload.score, self.scorer, self.pools)
        self.seconds["scoring"].append(whole)
        self.seconds["gram"].append(sum(gram))

        def select_all() -> None:
            for pool in scores:
                select_pool(pool, max(1, len(pool.candidates) // 10), config)

        self.seconds["selecting"].append(timed(device, select_all)[0])

    @property
    def tokens(self) -> int:
        return sum(len(self.scorer.rows.dataset[row].input_ids) for pool in self.pools for row in pool)


def rows_of_length(length: int, num_rows: int, vocab_size: int) -> list[Row]:
    """Random tokens, the second half of each row with labels."""
    generator = random.Random(length)
    rows = []
    for index in range(num_rows):
        ids = [generator.randrange(vocab_size) for _ in range(length)]
        rows.append(Row(index, ids, [-100] * (length // 2) + ids[length // 2 :]))
    return rows


def sweeps(
    workload: Workload, *, pool_sizes: Sequence[int], lengths: Sequence[int], ranks: Sequence[int],
    num_pools: Sequence[int], length_rows: int,
) -> dict[str, list[Point]]:  # fmt: skip
    """The points of all four."""
    model = workload.make_model()
    vocab_size, small = model.config.vocab_size, min(pool_sizes)
    rows = workload.rows(max(max(pool_sizes), max(num_pools) * small))

    def point(value: int, model: Any, rows: list[Row], pools: list[list[int]], **spice: Any) -> Point:
        return Point(workload, value, workload.make_scorer(model, rows=rows, **spice), pools)

    by_rank = []
    for rank in ranks:
        other = workload.make_model(rank=rank)
        dimension = sum(module.weight.numel() for module in find_trained_modules(other).values())
        # Exact features: with a sketch nothing but the projection would grow.
        by_rank.append(point(dimension, other, rows, [list(range(small))], sketch_dim=0))
    return {
        "pool size N": [point(size, model, rows, [list(range(size))]) for size in pool_sizes],
        "tokens a row": [
            point(length, model, rows_of_length(length, length_rows, vocab_size), [list(range(length_rows))])
            for length in lengths
        ],
        "gradient dimension D": by_rank,
        "number of pools": [
            point(number, model, rows, [list(range(first * small, (first + 1) * small)) for first in range(number)])
            for number in num_pools
        ],
    }


def run_sweeps(points: dict[str, list[Point]], num_repeats: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Seconds and ratios to each sweep's first point."""
    result = {}
    for name, sweep in points.items():
        sweep[0].measure()  # memory is taken
        for part in PARTS:
            sweep[0].seconds[part].clear()
        for repeat in range(num_repeats):
            for index in rotated([str(place) for place in range(len(sweep))], repeat, num_repeats):
                sweep[int(index)].measure()
        values = [str(point.value) for point in sweep]
        result[name] = {
            part: {
                "seconds": {value: point.seconds[part] for value, point in zip(values, sweep, strict=True)},
                "ratios": ratios(
                    {value: point.seconds[part] for value, point in zip(values, sweep, strict=True)},
                    sweep[0].seconds[part],
                ),
            }
            for part in PARTS
        } | {"tokens": {value: point.tokens for value, point in zip(values, sweep, strict=True)}}
        report(f"  growth with {name}: measured")
    return result


def growth_table(result: dict[str, Any]) -> Table:
    """One line a point."""
    table = Table(
        "Growth, each point as a ratio to the first of its sweep",
        ["sweep", "value", "tokens", *PARTS, "scoring, s"],
    )
    for name, sweep in result.items():
        for value, seconds in sweep["scoring"]["seconds"].items():
            table.add(
                name, f"{int(value):,}", f"{sweep['tokens'][value]:,}",
                *(shown(sweep[part]["ratios"][value], 2) for part in PARTS), shown(seconds, 3),
            )  # fmt: skip
    return table
