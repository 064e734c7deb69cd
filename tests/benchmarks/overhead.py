"""What a step takes beside scoring and training as a dataset grows, and what selecting from thousands takes.

    python -m tests.benchmarks.overhead --rows 100000 10000000
    python -m tests.benchmarks.overhead --pool-size 10000

CPU seconds of one thread, so that other programs on the machine count little. The pool has rows of random directions
and lengths.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from spice_trainer import SpiceConfig
from spice_trainer.data.rows import RowShape
from spice_trainer.sampling.replay import PickReplay
from spice_trainer.sampling.schedule import PoolSchedule, plan_step
from spice_trainer.scoring.features import OwnedFeatures
from spice_trainer.scoring.measure import from_features, from_shapes
from spice_trainer.scoring.sharing import share_micro_batches
from spice_trainer.selection.pool import select_pool


def seconds_of(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def step_overhead(num_rows: int, num_steps: int = 200) -> dict[str, float]:
    """Milliseconds of a step's own work at so many rows, medians; what comes once an epoch is told apart."""
    shape = plan_step(pool_size=120, num_selected=12, pools_per_step=10, samples_per_step=120, num_slots=4)
    schedule = PoolSchedule(num_rows, shape, pool_size=120, seed=0)
    replay = PickReplay(selection_epochs=1)
    found = {"permute the rows, once an epoch": seconds_of(lambda: schedule.pools(0, 0))}
    steps = random.Random(0).sample(range(schedule.steps_per_epoch), min(num_steps, schedule.steps_per_epoch))
    found["a step's pools"] = median(seconds_of(lambda step=step: schedule.pools(0, step)) for step in steps)
    picks = [range(start, start + 120) for start in range(0, 120 * schedule.steps_per_epoch, 120)]
    found["remember a step's picks"] = median(
        seconds_of(lambda step=step, rows=rows: replay.remember(0, step, rows)) for step, rows in enumerate(picks)
    )
    found["deal the picks, once a replayed epoch"] = seconds_of(lambda: replay.step(schedule, 1, 0, global_step=0))
    found["a replayed step"] = median(
        seconds_of(lambda step=step: replay.step(schedule, 1, step, global_step=0)) for step in steps
    )
    return {name: 1000 * seconds for name, seconds in found.items()}


def planning(num_pools: int) -> float:
    """Milliseconds of planning the micro-batches of so many pools of 120, least of 5."""
    generator = random.Random(0)
    lengths = [min(2048, int(generator.lognormvariate(5.5, 0.8)) + 1) for _ in range(120 * num_pools)]
    shapes = [RowShape(length, 1, True, ("input_ids",)) for length in lengths]
    return 1000 * min(seconds_of(lambda: share_micro_batches(shapes, 4096, num_shares=8)) for _ in range(5))


def large_pool(num_rows: int, num_selected: int, width: int, normalization: str) -> tuple[float, float, float]:
    """Seconds of measuring and selecting from one pool, and the memory it takes beside its features, in Grams."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.exp(0.6 * torch.randn(num_rows, generator=generator))
    features = torch.randn(num_rows, width, generator=generator)
    features.div_(features.norm(dim=1, keepdim=True)).mul_(lengths[:, None])
    shapes = [RowShape(200, 5 + place % 250, True, ("input_ids",)) for place in range(num_rows)]
    known = from_shapes(0, range(num_rows), shapes)
    norms, nothing = lengths.double(), torch.zeros(num_rows, dtype=torch.bool)
    found = OwnedFeatures({}, features, norms, norms.clone(), torch.ones(num_rows), nothing)
    config = SpiceConfig(pool_size=num_rows, num_selected=num_selected, gradient_normalization=normalization)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores: list[Any] = []
    measuring = seconds_of(lambda: scores.append(from_features(known, found, config)))
    selecting = seconds_of(lambda: select_pool(scores[0], num_selected, config))
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return measuring, selecting, peak / (8 * num_rows**2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[])
    parser.add_argument("--pool-size", type=int)
    parser.add_argument("--num-selected", type=int)
    parser.add_argument("--width", type=int, default=32_768)
    parser.add_argument("--normalizations", nargs="+", default=["sqrt_tokens"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.rows:
        sides = [step_overhead(num_rows) for num_rows in options.rows]
        for name, first in sides[0].items():
            values = ", ".join(f"{side[name]:.3f} ms" for side in sides)
            print(f"{name}: {values}; last to first {sides[-1][name] / max(first, 1e-6):.1f}")
        few, many = planning(10), planning(100)
        print(f"plan micro-batches of 10 and 100 pools: {few:.2f} ms, {many:.2f} ms; ratio {many / few:.1f}")
    if options.pool_size is not None:
        num_selected = options.num_selected or max(1, options.pool_size // 10)
        for name in options.normalizations:
            measuring, selecting, memory = large_pool(options.pool_size, num_selected, options.width, name)
            print(
                f"{num_selected:,} of {options.pool_size:,}, {name}: measuring {measuring:.1f} s, selecting "
                f"{selecting:.1f} s, peak beside the features {memory:.2f} of a float64 Gram matrix"
            )


if __name__ == "__main__":
    main()
