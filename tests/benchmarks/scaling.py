"""How much faster two processes score than one, and what they send each other.

    python -m tests.benchmarks.scaling --model smollm2 --data rows.jsonl[.gz] [--rows 48] [--repeats 3]

Two processes with gloo, each pinned to one core, on the same model and in the same run, in turn:

- `alone`: process 0 scores half of the rows while the other waits.
- `independent`: both score a half each, neither knowing of the other: what the two cores can do.
- `shared`: both score all rows together, as in training.

Throughput is tokens of rows over seconds: of the slower process when shared, of each for itself and then added up when
independent. The target is a ratio of shared to independent of at least 0.9. What collectives send is counted where
torch.distributed is called: payload times the number of receivers, feature rows that stay on their process left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spice_trainer import SpiceConfig
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import find_trained_modules
from tests.benchmarks.real_model import add_lora, load_model, read_rows
from tests.support.scorers import make_scorer

WORLD_SIZE = 2


class SentBytes:
    """Counts what this process sends, by kind, while it is in place."""

    def __init__(self) -> None:
        self.sent = {"features": 0, "objects": 0}

    @contextmanager
    def count(self) -> Iterator[None]:
        """Wraps the collectives that scoring uses."""
        module = dist.distributed_c10d
        originals = module.all_gather, module.broadcast, dist.all_to_all_single

        def all_gather(outputs: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent["objects"] += tensor.nbytes * (WORLD_SIZE - 1)
            return originals[0](outputs, tensor, *args, **kwargs)

        def broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == 0:
                self.sent["objects"] += tensor.nbytes * (WORLD_SIZE - 1)
            return originals[1](tensor, *args, **kwargs)

        def all_to_all(output: Any, tensor: torch.Tensor, receive: list[int], send: list[int], **kwargs: Any) -> Any:
            leaving = sum(send) - send[dist.get_rank()]
            self.sent["features"] += leaving * (tensor[0].nbytes if len(tensor) else 0)
            return originals[2](output, tensor, receive, send, **kwargs)

        module.all_gather, module.broadcast, dist.all_to_all_single = all_gather, broadcast, all_to_all
        try:
            yield
        finally:
            module.all_gather, module.broadcast, dist.all_to_all_single = originals


def work(rank: int, arguments: argparse.Namespace, results: Any) -> None:
    """One process: all phases in the same order, everyone waiting for everyone between them."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(arguments.port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    from accelerate import Accelerator

    together = Processes.of(Accelerator(cpu=True))
    assert together.world_size == WORLD_SIZE
    model, tokenizer = load_model(arguments.model)
    model = add_lora(model, seed=0).eval()
    rows = read_rows(arguments.data, tokenizer, seed=0, max_tokens=arguments.max_tokens, num_rows=arguments.rows)

    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([items[0].input_ids]), "labels": torch.tensor([items[0].labels])}

    modules = find_trained_modules(model)
    configs = {"exact": SpiceConfig(sketch_dim=0), "sketch": SpiceConfig(sketch_dim=arguments.sketch_dim)}
    pool_size = arguments.rows // arguments.pools
    pools = [list(range(start, start + pool_size)) for start in range(0, pool_size * arguments.pools, pool_size)]
    halves = pools[: len(pools) // 2], pools[len(pools) // 2 :]

    def tokens(chosen: list[list[int]]) -> int:
        return sum(len(rows[index].input_ids) for pool in chosen for index in pool)

    throughput: dict[str, list[float]] = {}
    sent: dict[str, dict[str, float]] = {}
    for repeat in range(arguments.repeats + 1):
        phases = [(mode, kind) for mode in ("alone", "independent", "shared") for kind in configs]
        random.Random(repeat).shuffle(phases)
        for mode, kind in phases:
            scorer = make_scorer(
                model,
                replace(configs[kind], scoring_tokens_per_batch=arguments.tokens_per_batch),
                modules=modules,
                rows=rows,
                collate=collate,
                seed=0,
                processes=together if mode == "shared" else Processes(),
            )
            mine = pools if mode == "shared" else halves[rank]
            counter = SentBytes()
            dist.barrier()
            started = time.perf_counter()
            if mode != "alone" or rank == 0:
                with counter.count():
                    for _ in scorer.score(mine):
                        pass
            taken = time.perf_counter() - started
            everyones = together.gather(taken)
            speeds = {
                "alone": tokens(halves[0]) / everyones[0],
                "independent": sum(tokens(half) / spent for half, spent in zip(halves, everyones, strict=True)),
                "shared": tokens(pools) / max(everyones),
            }
            if repeat > 0:  # the first is for warming up
                throughput.setdefault(f"{mode}, {kind}", []).append(speeds[mode])
            if mode == "shared":
                parts = together.gather(counter.sent)
                sent[kind] = {key: sum(part[key] for part in parts) / (pool_size * len(pools)) for key in counter.sent}
            if rank == 0:
                print(f"  repeat {repeat}: {mode}, {kind}: {speeds[mode]:.1f} tokens/s", flush=True)
    if rank == 0:
        results.put((throughput, sent, tokens(pools), sum(module.weight.numel() for module in modules.values())))
        results.close()
        results.join_thread()
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--pools", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    parser.add_argument("--sketch-dim", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=29587)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < WORLD_SIZE:
        raise SystemExit("This needs two cores.")

    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=work, args=(rank, arguments, results)) for rank in range(WORLD_SIZE)]
    for worker in workers:
        worker.start()
    throughput, sent, num_tokens, dimension = results.get()
    for worker in workers:
        worker.join()

    report: dict[str, Any] = {"tokens": num_tokens, "dimension": dimension, "bytes_per_candidate": sent}
    report["tokens_per_second"] = throughput
    print(f"\n{num_tokens} tokens, {dimension:,} gradient numbers a candidate")
    print(f"{'':<24}{'tokens/s':>10}")
    for name, values in throughput.items():
        print(f"{name:<24}{statistics.median(values):>10.1f}")
    for kind in ("exact", "sketch"):
        shared, independent, alone = (throughput[f"{mode}, {kind}"] for mode in ("shared", "independent", "alone"))
        efficiency = [a / b for a, b in zip(shared, independent, strict=True)]
        speedup = [a / b for a, b in zip(shared, alone, strict=True)]
        report[f"shared to independent, {kind}"] = efficiency
        report[f"speed-up over one process, {kind}"] = speedup
        print(
            f"{kind}: shared to independent {statistics.median(efficiency):.3f} "
            f"({min(efficiency):.3f} to {max(efficiency):.3f}), over one process {statistics.median(speedup):.2f}; "
            f"sent per candidate: {sent[kind]['features']:,.0f} bytes of features, "
            f"{sent[kind]['objects']:,.0f} bytes of lengths and states"
        )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
