"""What aiming costs: hidden states beside exact gradients of the same rows, and matching a pool to validation rows.

Scoring is timed in turn, as ratios to exact scoring repeat by repeat. Hidden states are computed anew each time, as
where training changes them; where it does not each row is computed once a run. Matching is timed on one pool of random
features, what hidden states' cosines take included, beside random picks of the same pool.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from spice_trainer import SpiceConfig
from spice_trainer.scoring.measure import from_hidden_states
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.target import Target
from tests.benchmarks.clock import ratios, shown, spread, time_in_turn
from tests.benchmarks.methods import always
from tests.benchmarks.tables import Table
from tests.benchmarks.workload import Workload

EXACT = "exact gradients"
POOL, WANTED, WIDTH = 120, 32, 576
LIMIT, MOST_MILLISECONDS = 0.4, 10.0
_TIMES = 20


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Times scoring, then matching on one thread."""
    model = workload.make_model(random_b=True)
    settings: dict[str, dict[str, Any]] = {
        EXACT: {"sketch_dim": 0},
        "sketched gradients": {},
        "hidden states": {"strategy": "targeted_matching"},
    }
    methods, layer = {}, None
    for name, spice in settings.items():
        scorer = workload.make_scorer(model, **spice)
        layer = layer if scorer.hidden is None else scorer.hidden.layer
        workload.score(scorer, workload.pools[:1])
        methods[name] = always(lambda scorer=scorer: workload.score(scorer))
    seconds = time_in_turn(methods, arguments.repeats, workload.device, report=report)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        milliseconds = {name: _matching(name) for name in ("targeted_matching", "length_matched", "random")}
    finally:
        torch.set_num_threads(threads)
    return {"layer": layer, "seconds": seconds, "milliseconds": milliseconds}


def _matching(strategy: str) -> list[float]:
    """Milliseconds that a pool takes from its rows' states to its picks, repeat by repeat."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(POOL + WANTED, WIDTH, generator=generator)
    states[POOL:] += 0.3
    lengths = torch.randint(5, 200, (POOL + WANTED,), generator=generator).tolist()
    target = Target(tuple(lengths[POOL:]))
    known = PoolScores(
        sound=torch.ones(POOL, dtype=torch.bool), label_tokens=lengths[:POOL], num_tokens=tuple(lengths[:POOL]),
        pool=0, target=target,
    )  # fmt: skip
    config, found = SpiceConfig(strategy=strategy), []
    for step in range(_TIMES + 1):
        started = time.perf_counter()
        scores = known
        if config.takes_hidden_states:
            scores = from_hidden_states(known, states[:POOL], target, states[POOL:])
        select_pool(scores, POOL // 10, config, seed=1, step=step)
        found.append(1000 * (time.perf_counter() - started))
    return found[1:]


def tables(found: dict[str, Any]) -> list[Table]:
    """Both, with what was asked for."""
    relative = ratios(found["seconds"], found["seconds"][EXACT])
    scoring = [
        [name, shown(values), f"{spread(found['seconds'][name])['median']:.2f} s"] for name, values in relative.items()
    ]
    matching = [[name, shown(values, 1)] for name, values in found["milliseconds"].items()]
    aimed, drawn = (spread(found["milliseconds"][name])["median"] for name in ("targeted_matching", "random"))
    return [
        Table(
            f"Scoring for an aim, hidden states that layer {found['layer']} takes (asked for: at most {LIMIT})",
            ["", f"of {EXACT}", "median"],
            scoring,
        ),
        Table(
            f"From states to picks, a pool of {POOL} + {WANTED} rows on one thread: targeted matching adds "
            f"{aimed - drawn:.1f} ms to random picks (asked for: at most {MOST_MILLISECONDS:.0f})",
            ["", "ms"],
            matching,
        ),
    ]
