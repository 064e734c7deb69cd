"""What a run costs with a proxy, and what scoring ahead of the training saves.

    python -m tests.benchmarks.proxy_cost --model smollm2 --proxy FOLDER --data rows.jsonl[.gz] --output results.json

The plain `Trainer` fine-tunes the same model on the same rows, a few steps each time:

- `target`: the model that trains scores its own candidates,
- `proxy`: the model in `--proxy` scores instead, with its own tokenizer, and learns from every step's picks,
- `overlap`: the same with `overlap_scoring=True`,

the latter two again with every number of `--threads` (0 is torch's own choice). The seconds are those of
`costs.jsonl`; `ahead` is what scoring took in its thread, hidden behind training or not. `whole` is a step's by the
clock. The table leaves out the first step, whose pools nothing could score ahead, and the last, beside which nothing
is scored: what is left is how a long run goes. Picks must be the same with and without overlap, which is checked.
Only rows with odd numbers in the file are used, on which `tests.benchmarks.small_model` has not trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from tests.benchmarks.proxy_transfer import read_common_rows
from tests.benchmarks.real_model import Row, add_lora, load_model

PARTS = ("scoring", "ahead", "selecting", "learning", "training")


class StepsClock(TrainerCallback):
    """Seconds from one step's end to the next."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.ends)]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Right-pads rows; labels with −100."""
    length = max(len(row["input_ids"]) for row in rows)
    return {
        key: torch.tensor([list(row[key]) + [value] * (length - len(row[key])) for row in rows])
        for key, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }


def as_dataset(rows: list[Row]) -> Dataset:
    """The rows as a Trainer reads them."""
    return Dataset.from_list(
        [
            {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
            for row in rows
        ]
    )


def run(kind: str, arguments: argparse.Namespace, datasets: list[Dataset], output_dir: str) -> dict[str, Any]:
    """One short run: its costs step by step, its picks and the ledger's sentence."""
    model, _ = load_model(arguments.model)
    proxy = None
    if kind != "target":
        small, tokenizer = load_model(arguments.proxy)
        proxy = ProxyModel(add_lora(small, arguments.seed), processing_class=tokenizer, dataset=datasets[1])
    clock = StepsClock()
    trainer = Trainer(
        model=add_lora(model, arguments.seed),
        args=TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=arguments.batch_size,
            gradient_accumulation_steps=arguments.accumulation,
            max_steps=arguments.steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=datasets[0],
        data_collator=collate,
        callbacks=[clock],
    )
    config = SpiceConfig(
        pool_size=arguments.pool_size,
        num_selected=arguments.num_selected,
        gradient_normalization=arguments.normalization,
        overlap_scoring=kind == "overlap",
    )
    attach_spice(trainer, config, proxy=proxy, verify=False)
    trainer.train()
    folder = Path(output_dir) / "spice"
    return {
        "steps": [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()],
        "picks": (folder / "selections.jsonl").read_text(),
        "seconds": clock.seconds,
        "ledger": trainer._spice.callback._ledger().describe(),
    }


def print_run(name: str, result: dict[str, Any]) -> None:
    """Mean seconds of a step, without the first and the last."""
    steps, seconds = result["steps"][1:-1], result["seconds"][1:-1]
    means = [sum(step[f"seconds_{part}"] for step in steps) / len(steps) for part in PARTS]
    tokens = [sum(step[f"tokens_{part}"] for step in steps) / len(steps) for part in ("scored", "trained")]
    print(f"{name:<22}" + "".join(f"{value:>11.2f}" for value in means), end="")
    print(f"{sum(seconds) / len(seconds):>11.2f}" + "".join(f"{value:>9.0f}" for value in tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the target: a model folder, or `smollm2`")
    parser.add_argument("--proxy", required=True, help="a model folder with a tokenizer of its own")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pool-size", type=int, default=60)
    parser.add_argument("--num-selected", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a micro-batch of the training")
    parser.add_argument("--accumulation", type=int, default=3)
    parser.add_argument("--normalization", default="sqrt_tokens")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error("--steps must be at least 3: the first and the last are left out.")

    tokenizers = [load_model(source)[1] for source in (arguments.model, arguments.proxy)]
    pools_per_step = max(1, round(arguments.batch_size * arguments.accumulation / arguments.num_selected))
    rows = read_common_rows(
        arguments.data, tokenizers, arguments.steps * pools_per_step * arguments.pool_size,
        seed=arguments.seed, max_tokens=arguments.max_tokens,
    )  # fmt: skip
    datasets = [as_dataset(part) for part in rows]
    default_threads = torch.get_num_threads()
    results: dict[str, dict[str, Any]] = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads or default_threads)
        for kind in ("target", "proxy", "overlap"):
            if kind == "target" and "target" in {name.split(",")[0] for name in results}:
                continue
            with tempfile.TemporaryDirectory() as folder:
                name = f"{kind}, {threads or default_threads} thread{'s' if (threads or default_threads) > 1 else ''}"
                results[name] = run(kind, arguments, datasets, os.fspath(folder))
            print(name, results[name]["steps"], flush=True)
            arguments.output.write_text(
                json.dumps({"arguments": vars(arguments), "runs": results}, indent=1, default=str) + "\n"
            )
    print(f"\nmean seconds of steps 2 to {arguments.steps - 1} of {arguments.steps}, {len(datasets[0])} rows")
    print(f"{'':<22}" + "".join(f"{name:>11}" for name in (*PARTS, "whole")) + f"{'scored':>9}{'trained':>9} tokens")
    for name, result in results.items():
        print_run(name, result)
    for name, result in results.items():
        print(f"{name}: {result['ledger']}")
    for name, result in results.items():
        if name.startswith("overlap"):
            other = name.replace("overlap", "proxy")
            same = result["picks"] == results[other]["picks"]
            whole, alone = sum(result["seconds"]), sum(results[other]["seconds"])
            print(f"{name!r} took {whole:.1f} s, {other!r} {alone:.1f} s: {whole / alone:.2f} times as much")
            print(f"selections.jsonl of {name!r} and {other!r}: {'identical' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
