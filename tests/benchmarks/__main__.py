"""What SPICE's scoring and selecting cost: one command, tables on the terminal and all raw figures as JSON.

    python -m tests.benchmarks --model smollm2 --data rows.jsonl[.gz] --output results.json [--parts scoring options]

Everything is measured in one process run, methods taken in turn, as ratios to the plain forward and backward of the
same rows. tests/benchmarks/README.md says what each part measures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.conditions import conditions
from tests.benchmarks.fidelity import NORMALIZATIONS
from tests.benchmarks.tables import print_table
from tests.benchmarks.workload import open_workload

PARTS = ("scoring", "selection", "end_to_end", "options", "sketch", "aim", "gpu")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = parser.add_argument_group("what is measured, and on what")
    whole.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    whole.add_argument("--model", default="smollm2", help="`smollm2`, `tiny` (random weights), or a model's folder")
    whole.add_argument("--data", type=Path, help="rows with `instruction` and `response`; `tiny` makes its own")
    whole.add_argument("--output", type=Path, help="where the figures go, as JSON, after every part")
    whole.add_argument("--device", default="cpu")
    whole.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    whole.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    whole.add_argument("--rows", type=int, default=120, help="candidates, of all pools together")
    whole.add_argument("--pools", type=int, default=2)
    whole.add_argument("--repeats", type=int, default=3)
    whole.add_argument("--max-tokens", type=int, default=256, help="rows are cut there")
    whole.add_argument("--tokens-per-batch", type=int, default=2048, help="of a scoring pass and of the plain ones")
    whole.add_argument("--batch-size", type=int, default=8, help="rows of a Trainer's batch, in order of arrival")

    scoring = parser.add_argument_group("scoring, options")
    scoring.add_argument("--scoring-options", nargs="*", default=[], metavar="SETTING",
                         help="such as 'layers=10 modules=q_proj+v_proj tokens=32 prefilter=0.5'")  # fmt: skip
    scoring.add_argument("--skip", nargs="*", default=[], metavar="WORD", help="methods whose name holds one of these")
    scoring.add_argument("--skip-memory", action="store_true", help="without the profiler, whose account takes time")
    scoring.add_argument("--vmap-chunk", type=int, default=4)
    scoring.add_argument("--moments", type=int, nargs="+", default=[0, 20, 60], help="optimizer steps done before")
    scoring.add_argument("--normalizations", nargs="+", choices=NORMALIZATIONS, default=["none", "sqrt_tokens"])

    selection = parser.add_argument_group("selection, sketch")
    selection.add_argument("--pool-sizes", type=int, nargs="+", default=[60, 120, 480])
    selection.add_argument("--direct-dim", type=int, default=262_144, help="D of the direct greedy")
    selection.add_argument("--direct-repeats", type=int, default=1)
    selection.add_argument("--sketch-dims", type=int, nargs="+", default=[2**power for power in range(10, 19)])

    trainer = parser.add_argument_group("end_to_end")
    trainer.add_argument("--trainer-steps", type=int, default=2, help="beside a first one that is not counted")
    trainer.add_argument("--growth-pool-sizes", type=int, nargs="+", default=[10, 20, 40])
    trainer.add_argument("--growth-lengths", type=int, nargs="+", default=[64, 128, 256])
    trainer.add_argument("--growth-length-rows", type=int, default=8)
    trainer.add_argument("--growth-ranks", type=int, nargs="+", default=[4, 16, 64])
    trainer.add_argument("--growth-pools", type=int, nargs="+", default=[1, 2, 4])

    gpu = parser.add_argument_group("gpu")
    gpu.add_argument("--gpu-shapes", nargs="+", choices=["0.5B", "7B"], default=["0.5B", "7B"])
    gpu.add_argument("--gpu-pools", type=int, default=4)
    gpu.add_argument("--gpu-pool-size", type=int, default=120)
    gpu.add_argument("--gpu-tokens-per-batch", type=int, nargs="+", default=[16384])
    gpu.add_argument("--gpu-loop-rows", type=loop_rows, default={"0.5B": 60, "7B": 0}, metavar="0.5B=60,7B=0")
    gpu.add_argument("--gpu-exact", action="store_true", help="also exact features, pool by pool")
    gpu.add_argument("--profile", action="store_true", help="where our time goes, here and in `scoring`")
    return parser


def loop_rows(text: str) -> dict[str, int]:
    """Rows of the one-row loop for each shape."""
    found = {"0.5B": 0, "7B": 0}
    for word in text.split(","):
        name, _, number = word.partition("=")
        if name not in found or not number.isdigit():
            raise argparse.ArgumentTypeError(f"{word!r} is not SHAPE=ROWS with a shape of {', '.join(found)}")
        found[name] = int(number)
    return found


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked together."""
    parser = make_parser()
    arguments = parser.parse_args(words)
    if arguments.data is None and arguments.model != "tiny" and set(arguments.parts) - {"gpu"}:
        parser.error("--data is needed for a real model: JSON lines with `instruction` and `response`.")
    if arguments.parts == ["gpu"] and arguments.data is None:
        # It makes its own model and rows.
        arguments.model = "tiny"
    if arguments.rows % arguments.pools or arguments.rows < 2 * arguments.pools:
        parser.error(f"--rows {arguments.rows} do not make {arguments.pools} even pools of at least two.")
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1.")
    return arguments


def report(line: str) -> None:
    print(line, flush=True)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts that were asked for, and returns what is written."""
    arguments = parse(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workload = open_workload(arguments)
    results: dict[str, Any] = {
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
        "conditions": conditions(workload.device, workload.dtype) | {"workload": workload.describe()},
        "parts": {},
        "part_seconds": {},
    }  # fmt: skip
    report(json.dumps(results["conditions"]))
    found_tables = []
    for name in arguments.parts:
        module = importlib.import_module(f".parts.{name}", __package__)
        report(f"{name} ...")
        started = time.perf_counter()
        found = module.run(workload, arguments, report)
        results["parts"][name] = found
        results["part_seconds"][name] = time.perf_counter() - started
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        found_tables.append(module.tables(found))
        for table in found_tables[-1]:
            print_table(table)
    return results


if __name__ == "__main__":
    main()
