"""What scoring a pool costs, as a ratio to the plain forward and backward of the same tokens in the same batches.

    python -m tests.benchmarks.scoring_cost --model smollm2 --data rows.jsonl[.gz] [--rows 24] [--threads 2]

In one process, every method on the same rows, the methods taken in turn `--repeats` times, each time in another order:

- `plain`: forward with labels and backward into the LoRA parameters' `.grad`, batch by batch: a training step's
  computation without its optimizer. All ratios are to this one, repeat by repeat.
- `plain, label columns`: the same with logits at the columns that carry a label only, which is what we compute.
- `batched, exact` and `batched, sketch`: ours, all of scoring but the Gram product.
- `one at a time`: a loop of single rows through autograd.
- `vmap(grad)`: `torch.func.vmap` over `grad` of one row's loss, on the padded batch, in chunks of `--vmap-chunk` rows.

The Gram product and the greedy selection are lines of their own. Medians over the repeats, with minimum and maximum.
Every method's gradients are compared with the loop's before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from spice_trainer import SpiceConfig
from spice_trainer.adapters import find_lora_modules
from spice_trainer.features import FeatureBuffer
from spice_trainer.gradients import sample_losses
from spice_trainer.gram import measure_rows
from spice_trainer.micro_batches import share_micro_batches
from spice_trainer.rows import CandidateRow, collate_row, pad_rows
from spice_trainer.scoring import GradientScorer
from spice_trainer.selection import select
from spice_trainer.sharing import SharedCandidates
from tests.benchmarks.real_model import add_lora, load_model, read_rows

Batch = tuple[dict[str, Tensor], Tensor]


class Contestants:
    """The methods, all on the same rows and micro-batches."""

    def __init__(self, model: nn.Module, rows: list[CandidateRow], tokens_per_batch: int, vmap_chunk: int) -> None:
        self.model, self.rows, self.tokens_per_batch, self.vmap_chunk = model, rows, tokens_per_batch, vmap_chunk
        self.modules = find_lora_modules(model)
        self.parameters = [module.weight for module in self.modules.values()]
        self.plan = share_micro_batches([row.shape for row in rows], tokens_per_batch)[0]
        self.batches: list[Batch] = [pad_rows([rows[position] for position in batch]) for batch in self.plan]
        self.gradients: Tensor | None = None

    def plain(self) -> None:
        for inputs, labels in self.batches:
            self.model(**inputs, labels=labels, use_cache=False).loss.backward()
        self._clear()

    def plain_label_columns(self) -> None:
        for inputs, labels in self.batches:
            targets = labels[:, 1:]
            columns = (targets != -100).any(0).nonzero().squeeze(1)
            logits = self.model(**inputs, use_cache=False, logits_to_keep=columns).logits
            targets = targets[:, columns]
            sample_losses(logits, targets, targets != -100).sum().backward()
        self._clear()

    def batched(self, sketch_dim: int) -> FeatureBuffer:
        """Ours: what `GradientScorer.score` does before the Gram product."""
        scorer = GradientScorer(
            lambda: self.model,
            self.modules,
            dataset=None,
            collate=dict,
            config=SpiceConfig(sketch_dim=sketch_dim, scoring_tokens_per_batch=self.tokens_per_batch),
            seed=0,
        )
        shared = SharedCandidates(
            pools={0: tuple(range(len(self.rows)))},
            shapes=tuple(row.shape for row in self.rows),
            owners=(0,) * len(self.rows),
            holders=(0,) * len(self.rows),
            held=tuple(range(len(self.rows))),
            batches=tuple(tuple(batch) for batch in self.plan),
            num_kept=len(self.plan),
            rows=dict(enumerate(self.rows)),
        )
        return scorer.compute(shared)

    def one_at_a_time(self) -> Tensor:
        gradients = torch.empty(len(self.rows), sum(parameter.numel() for parameter in self.parameters))
        for position, row in enumerate(self.rows):
            inputs, labels = pad_rows([row])
            logits = self.model(**inputs, use_cache=False).logits[:, :-1]
            loss = sample_losses(logits, labels[:, 1:], labels[:, 1:] != -100).sum()
            parts = torch.autograd.grad(loss, self.parameters)
            torch.cat([part.flatten() for part in parts], out=gradients[position])
        return gradients

    def vmap_grad(self) -> Tensor:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trainable = {names[id(parameter)]: parameter.detach() for parameter in self.parameters}

        def loss_of_one(weights: dict[str, Tensor], input_ids: Tensor, labels: Tensor) -> Tensor:
            # Right padding needs no attention mask in a causal model.
            outputs = torch.func.functional_call(
                self.model, weights, kwargs={"input_ids": input_ids[None], "use_cache": False}
            )
            mask = labels[1:] != -100
            losses = nn.functional.cross_entropy(outputs.logits[0, :-1].float(), labels[1:], reduction="none")
            return (losses * mask).sum() / mask.sum().clamp(min=1)

        per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
        gradients = torch.empty(len(self.rows), sum(parameter.numel() for parameter in self.parameters))
        for positions, (inputs, labels) in zip(self.plan, self.batches, strict=True):
            for start in range(0, len(positions), self.vmap_chunk):
                part = slice(start, start + self.vmap_chunk)
                found = per_sample(trainable, inputs["input_ids"][part], labels[part])
                flat = torch.cat([found[name].flatten(1) for name in trainable], dim=1)
                gradients[positions[part]] = flat
        return gradients

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a row."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    parser.add_argument("--vmap-chunk", type=int, default=4)
    parser.add_argument("--sketch-dim", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-vmap", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model, tokenizer = load_model(arguments.model)
    model = add_lora(model, seed=0).eval()
    raw = read_rows(arguments.data, tokenizer, seed=0, max_tokens=arguments.max_tokens, num_rows=arguments.rows)
    rows = [
        collate_row(row.index, row, lambda items: {"input_ids": torch.tensor([items[0].input_ids]),
                                                   "labels": torch.tensor([items[0].labels])})
        for row in raw
    ]  # fmt: skip
    contestants = Contestants(model, rows, arguments.tokens_per_batch, arguments.vmap_chunk)
    num_tokens = sum(row.num_tokens for row in rows)
    num_padded = sum(inputs["input_ids"].numel() for inputs, _ in contestants.batches)
    print(f"{len(rows)} rows, {num_tokens} tokens ({num_padded} padded), {len(contestants.batches)} micro-batches")

    reference = contestants.one_at_a_time()
    features = contestants.batched(0).features
    errors = {"batched, exact": largest_error(features, reference)}
    methods: dict[str, Callable[[], object]] = {
        "plain": contestants.plain,
        "plain, label columns": contestants.plain_label_columns,
        "batched, exact": lambda: contestants.batched(0),
        f"batched, sketch {arguments.sketch_dim}": lambda: contestants.batched(arguments.sketch_dim),
        "one at a time": contestants.one_at_a_time,
    }
    if not arguments.skip_vmap:
        try:
            errors["vmap(grad)"] = largest_error(contestants.vmap_grad(), reference)
            methods["vmap(grad)"] = contestants.vmap_grad
        except Exception as error:
            print(f"vmap(grad) does not run on this model: {type(error).__name__}: {error}")
    print("largest relative error against the loop:", {name: f"{error:.1e}" for name, error in errors.items()})
    del reference, features

    seconds: dict[str, list[float]] = {name: [] for name in methods}
    order = list(methods)
    for repeat in range(arguments.repeats):
        random.Random(repeat).shuffle(order)
        for name in order:
            started = time.perf_counter()
            methods[name]()
            seconds[name].append(time.perf_counter() - started)
            print(f"  repeat {repeat}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)] for name in methods}

    buffer = contestants.batched(0)
    started = time.perf_counter()
    geometry = measure_rows(buffer.features)
    gram_seconds = time.perf_counter() - started
    gram = geometry.cosines * torch.outer(buffer.norms, buffer.norms)
    started = time.perf_counter()
    select(gram, max(1, len(rows) // 10))
    select_seconds = time.perf_counter() - started

    print(f"\n{'method':<28}{'seconds':>9}{'ratio':>8}   min..max")
    for name in methods:
        middle, low, high = statistics.median(ratios[name]), min(ratios[name]), max(ratios[name])
        print(f"{name:<28}{statistics.median(seconds[name]):>9.2f}{middle:>8.3f}   {low:.3f}..{high:.3f}")
    plain = statistics.median(seconds["plain"])
    print(f"{'Gram product, exact':<28}{gram_seconds:>9.2f}{gram_seconds / plain:>8.3f}")
    print(f"{'greedy selection':<28}{select_seconds:>9.3f}{select_seconds / plain:>8.4f}")
    if arguments.output is not None:
        result = {"rows": len(rows), "tokens": num_tokens, "padded": num_padded, "seconds": seconds, "ratios": ratios,
                  "gram_seconds": gram_seconds, "select_seconds": select_seconds, "errors": errors,
                  "threads": arguments.threads}  # fmt: skip
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
