"""Does a proxy pick what the target would pick? Rank correlation, shared picks and information retained.

    python -m tests.benchmarks.proxy_transfer --model smollm2 --proxy FOLDER --data rows.jsonl[.gz] --output out.json

What it does
    The target (LoRA r 16, alpha 32, every linear layer, float32) and its proxies score the same pools, with fresh
    adapters and after `--steps` AdamW steps (lr 2e-4, batch 8) of every model on the same random rows. Each pool is
    scored once a model, in the default sketch; the other gradient normalizations follow from its Gram matrix.

The proxies
    - the model in `--proxy` with its own tokenizer, such as the one of `tests.benchmarks.small_model`,
    - the target's own first `--layers` layers with all its vocabulary, as they are (0 leaves it out),
    - no model at all: candidates at right angles whose squared norms are 1 / label tokens. What this one retains is
      what the lengths of the answers tell.

What it reports, over the pools of a moment, for each normalization: what `proxy_check_pools` logs, see
`spice_trainer.proxy.transfer`.
Only rows with odd numbers in the file are used, on which `small_model` has not trained.
Results are written after every pool. On one CPU core a pool of 60 rows takes the 135M model about 104 s, its first 10
layers 40 s and the model of `small_model` 11 s.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer import SpiceConfig
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.proxy.transfer import compare_pools
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.gram import normalization_weights, normalized_gram
from spice_trainer.selection.scores import PoolScores
from tests.benchmarks.fidelity import NORMALIZATIONS
from tests.benchmarks.real_model import Row, add_lora, load_model, read_rows
from tests.benchmarks.sketch_fidelity import train
from tests.benchmarks.small_model import slice_model
from tests.support.scorers import make_scorer

MOMENTS = ("fresh", "trained")
MEASURES = ("rank_correlation", "overlap", "retained")


@dataclass
class Contender:
    """The target, or a proxy: a model, the rows as it reads them, and what scoring them took."""

    name: str
    model: nn.Module
    rows: list[Row]
    scorer: GradientScorer | None = None
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def score(self, pool: Sequence[int], config: SpiceConfig) -> PoolScores:
        """Scores a pool of places in `rows`, gradients as they are."""
        if self.scorer is None:
            modules = find_trained_modules(self.model)
            self.scorer = make_scorer(self.model, config, modules=modules, rows=self.rows, collate=collate, seed=0)
        started = time.perf_counter()
        (scores,) = self.scorer.score([pool])
        self.seconds.append(time.perf_counter() - started)
        self.tokens.append(sum(scores.num_tokens))
        print(f"  {self.name}: {self.tokens[-1]:,} tokens, {self.seconds[-1]:.1f} s", flush=True)
        return scores


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """One row, as the scorer asks for them."""
    return {"input_ids": torch.tensor([rows[0].input_ids]), "labels": torch.tensor([rows[0].labels])}


def read_common_rows(path: Path, tokenizers: Sequence[Any], num_rows: int, **options: Any) -> list[list[Row]]:
    """The first odd rows that every tokenizer can use, in the same order for each."""
    # As many again for the even ones, and some for those that one tokenizer cuts before their answer.
    lists = [
        read_rows(path, tokenizer, num_rows=2 * num_rows + num_rows // 2 + 40, **options) for tokenizer in tokenizers
    ]
    by_index = [{row.index: row for row in rows if row.index % 2 == 1} for rows in lists]
    common = [index for index in by_index[0] if all(index in rows for rows in by_index)][:num_rows]
    if len(common) < num_rows:
        raise SystemExit(f"{path} has {len(common)} rows that every model can use, {num_rows} are needed.")
    return [[rows[index] for index in common] for rows in by_index]


def renormalized(scores: PoolScores, normalization: Any) -> PoolScores:
    """Scores made without normalization, as they would have been with one."""
    norms = scores.gradient_norms
    lengths = torch.where(scores.sound, norms, 1.0)
    cosines = scores.gram / torch.outer(lengths, lengths)
    cosines.diagonal().copy_(scores.sound)
    weights = normalization_weights(norms, torch.tensor(scores.label_tokens), normalization)
    return replace(scores, gram=normalized_gram(cosines, norms, weights, unit=normalization == "unit"))


def lengths_alone(scores: PoolScores) -> PoolScores:
    """What scoring would say of gradients at right angles, each of a squared norm of 1 / label tokens."""
    squared = 1.0 / torch.tensor(scores.label_tokens, dtype=torch.float64)
    everything = torch.ones(len(squared), dtype=torch.bool)
    return replace(
        scores, gram=torch.diag(squared), gradient_norms=squared.sqrt(), finite=everything, sound=everything
    )


def compare(target: PoolScores, proxies: dict[str, PoolScores], config: SpiceConfig) -> list[dict[str, Any]]:
    """One record for each normalization and proxy."""
    records = []
    for normalization in NORMALIZATIONS:
        theirs = renormalized(target, normalization)
        for name, scores in proxies.items():
            transfer = compare_pools(theirs, renormalized(scores, normalization), config.num_selected, config)
            record = {"normalization": normalization, "proxy": name, "overlap": transfer.overlap}
            records.append(record | asdict(transfer))
    return records


def summarize(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and minimum over the pools of each moment, and of both."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        for moment in (record["moment"], "both"):
            groups.setdefault((record["normalization"], record["proxy"], moment), []).append(record)
    rows = []
    for (normalization, proxy, moment), group in groups.items():
        row: dict[str, Any] = {"normalization": normalization, "proxy": proxy, "moment": moment, "pools": len(group)}
        for name in MEASURES:
            values = [record[name] for record in group if record[name] is not None]
            row[f"{name}_mean"] = sum(values) / len(values) if values else None
            row[f"{name}_min"] = min(values, default=None)
        rows.append(row)
    names, moments = list(dict.fromkeys(record["proxy"] for record in records)), (*MOMENTS, "both")
    return sorted(
        rows,
        key=lambda row: (
            NORMALIZATIONS.index(row["normalization"]), names.index(row["proxy"]), moments.index(row["moment"])
        ),
    )  # fmt: skip


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Means, and the worst pool's in brackets."""
    print(f"{'normalization':<15}{'proxy':<24}{'moment':<9}{'pools':>5}", end="")
    print("".join(f"{name.replace('_', ' '):>18}{'(min)':>8}" for name in MEASURES))
    for row in rows:
        cells = [row[f"{name}_{kind}"] for name in MEASURES for kind in ("mean", "min")]
        shown = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        print(f"{row['normalization']:<15}{row['proxy']:<24}{row['moment']:<9}{row['pools']:>5}", end="")
        print("".join(f"{cell:>{width}}" for cell, width in zip(shown, (18, 8) * 3, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the target: a model folder, or `smollm2`")
    parser.add_argument("--proxy", required=True, help="a model folder with a tokenizer of its own")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--pools", type=int, default=5, help="pools per moment")
    parser.add_argument("--pool-size", type=int, default=60)
    parser.add_argument("--num-selected", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20, help="AdamW steps of batch 8 before the second moment")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    config = SpiceConfig(
        pool_size=arguments.pool_size, num_selected=arguments.num_selected, gradient_normalization="none"
    )
    model, tokenizer = load_model(arguments.model)
    small, small_tokenizer = load_model(arguments.proxy)
    num_training, num_pools = 8 * arguments.steps, 2 * arguments.pools
    rows, small_rows = read_common_rows(
        arguments.data, [tokenizer, small_tokenizer], num_training + num_pools * arguments.pool_size,
        seed=arguments.seed, max_tokens=arguments.max_tokens,
    )  # fmt: skip
    layers = f"first {arguments.layers} layers"
    proxies = [Contender("the proxy", small, small_rows)]
    if arguments.layers:
        proxies.append(Contender(layers, slice_model(model, arguments.layers), rows))
    contenders = [Contender("the target", model, rows), *proxies]
    for contender in contenders:
        contender.model = add_lora(contender.model, arguments.seed).eval()

    pools = [
        list(range(start, start + arguments.pool_size))
        for start in range(num_training, num_training + num_pools * arguments.pool_size, arguments.pool_size)
    ]
    chosen = {"fresh": pools[: arguments.pools], "trained": pools[arguments.pools :]}
    records: list[dict[str, Any]] = []
    for moment in arguments.moments:
        if moment == "trained":
            for contender in contenders:
                print(f"training {contender.name}", flush=True)
                train(contender.model, contender.rows[:num_training], batch_size=8, seed=arguments.seed)
                contender.model.eval()
        for place, pool in enumerate(chosen[moment]):
            print(f"{moment}, pool {place}", flush=True)
            scores = {contender.name: contender.score(pool, config) for contender in contenders}
            target = scores.pop("the target")
            scores["label tokens alone"] = lengths_alone(target)
            where = {"moment": moment, "place": place}
            records += [where | record for record in compare(target, scores, config)]
            costs = [{"name": each.name, "seconds": each.seconds, "tokens": each.tokens} for each in contenders]
            report = {"arguments": vars(arguments), "costs": costs, "summary": summarize(records), "pools": records}
            arguments.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print()
    for each in contenders:
        size = sum(parameter.numel() for parameter in each.model.get_base_model().parameters())
        speed = sum(each.tokens) / sum(each.seconds)
        print(
            f"{each.name}: {size:,} parameters with the adapter, {sum(each.seconds) / len(each.seconds):.1f} s a pool "
            f"({sum(each.tokens) / len(each.tokens):,.0f} of its own tokens, {speed:.0f} a second)"
        )
    print_table(summarize(records))


if __name__ == "__main__":
    main()
