r"""Which settings change what is picked, on your own model and data?

```
python examples/sensitivity.py --model demo_output/model --data demo_output/train.jsonl
```

Trains a few steps on random rows, and at some of them takes the exact Gram matrix of a pool and of as many other rows.
From the pool it picks with every normalisation of the gradients, scale α of the information, conflict penalty λ,
conflict reference and rule. Of each it tells how many picks differ from those of the first line of its normalisation,
how long the picked answers are, and how near the gradient of a step on the picks is to that of the other rows, which
no rule saw:

    cos(Σ_S t_i g_i, Σ_R t_j g_j)  for their loss per token,      cos(Σ_S t_i g_i, Σ_R g_j)  for their loss per row

with S the picks, R the other rows, g the mean gradient of a row and t its label tokens. It costs a scoring of these
rows, and says no more than which settings are worth comparing with `examples/compare.py`: only training shows what
helps.
Needs `pip install 'spice-trainer[examples]'`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from theory import NORMALIZATIONS, build_parser, command_of, record, renormalized, settings_of
from torch import Tensor

from spice_trainer import SpiceConfig
from spice_trainer.selection import PickOptions, PoolScores, select_by_strategy

NUM_RANDOM_SUBSETS = 200
RULES = ("dpp", "matching", "facility_location")
COLUMNS = ("gradients", "picks", "other picks", "answer tokens", "cos per token", "cos per row")
console = Console()


@dataclass(frozen=True)
class Picks:
    """What a setting picks, in means over the pools.

    Args:
        normalization (`str`): Of the gradients.
        setting (`str`): The rule and its settings.
        num_other (`float`, *optional*): Picks that the normalisation's first setting does not make; `None` for chance.
        answer_tokens (`float`): Label tokens a pick.
        per_token (`float`): Cosine of a step on them with the gradient of the other rows' loss per token.
        per_row (`float`): The same of their loss per row.
    """

    normalization: str
    setting: str
    num_other: float | None
    answer_tokens: float
    per_token: float
    per_row: float


def settings_to_try(options: argparse.Namespace) -> Iterator[tuple[str, str, PickOptions]]:
    """Every setting with its name, its rule and its options; what the others are compared with comes first."""
    usual = PickOptions(fisher_alpha=1.0, conflict_penalty=0.1, conflict_reference="selected")
    yield "spice, α 1, λ 0.1", "spice", usual
    for alpha in options.fisher_alphas:
        yield f"α {alpha:g}", "spice", replace(usual, fisher_alpha=alpha)
    for penalty in options.conflict_penalties:
        yield f"λ {penalty:g}", "spice", replace(usual, conflict_penalty=penalty)
    penalty = max(options.conflict_penalties)
    for reference in ("candidates", "pool"):
        strong = replace(usual, conflict_reference=reference, conflict_penalty=penalty)
        yield f"λ {penalty:g}, with {reference}", "spice", strong
    for rule in RULES:
        yield rule, rule, usual


def look(scores: PoolScores, picks: Sequence[int]) -> tuple[float, float, float]:
    """Label tokens a pick, and both cosines of some picks, from the first half of the rows, with the second half."""
    tokens = torch.tensor(scores.label_tokens, dtype=torch.float64)
    raw = torch.where(scores.sound[:, None] & scores.sound, renormalized(scores, "none"), 0.0)
    step, others = torch.zeros_like(tokens), torch.ones_like(tokens)
    step[list(picks)] = tokens[list(picks)]
    others[: len(tokens) // 2] = 0.0

    def cosine(rest: Tensor) -> float:
        lengths = float(step @ raw @ step) * float(rest @ raw @ rest)
        return float(step @ raw @ rest) / lengths**0.5 if lengths > 0 else 0.0

    return float(step.sum()) / len(picks), cosine(others * tokens), cosine(others)


def compare(scored: Sequence[PoolScores], options: argparse.Namespace) -> list[Picks]:
    """Picks with every setting from the first half of what was scored at each step."""
    found = []

    def add(
        normalization: str, setting: str, num_other: float | None, subsets: Sequence[Sequence[Sequence[int]]]
    ) -> None:
        seen = [look(scores, picks) for scores, several in zip(scored, subsets, strict=True) for picks in several]
        found.append(Picks(normalization, setting, num_other, *(fmean(column) for column in zip(*seen, strict=True))))

    generator = torch.Generator().manual_seed(options.seed)
    halves = [slice(len(scores.candidates) // 2) for scores in scored]
    sound = [scores.sound[half].nonzero().flatten() for scores, half in zip(scored, halves, strict=True)]
    add(
        "",
        "random rows",
        None,
        [
            [
                places[torch.randperm(len(places), generator=generator)[: options.num_selected]].tolist()
                for _ in range(NUM_RANDOM_SUBSETS)
            ]
            for places in sound
        ],
    )
    norms = [scores.gradient_norms[places] for scores, places in zip(scored, sound, strict=True)]
    top = [places[one.argsort(descending=True)] for places, one in zip(sound, norms, strict=True)]
    add("", "top_norm", None, [[places[: options.num_selected].tolist()] for places in top])
    for normalization in NORMALIZATIONS:
        inputs = [
            PoolScores(sound=scores.sound[half], gram=renormalized(scores, normalization)[half, half])
            for scores, half in zip(scored, halves, strict=True)
        ]
        first: list[tuple[int, ...]] = []
        for setting, name, rules in settings_to_try(options):
            indices = [select_by_strategy(name, one, options.num_selected, rules).indices for one in inputs]
            first = first or indices
            other = fmean(len(set(ours) - set(theirs)) for ours, theirs in zip(indices, first, strict=True))
            add(normalization, setting, other, [[picks] for picks in indices])
    return found


def rows_of(found: Sequence[Picks]) -> list[list[str]]:
    return [
        [
            one.normalization,
            one.setting,
            "–" if one.num_other is None else f"{one.num_other:.3g}",
            f"{one.answer_tokens:.1f}",
            f"{one.per_token:.2f}",
            f"{one.per_row:.2f}",
        ]
        for one in found
    ]


def print_table(found: Sequence[Picks]) -> None:
    """A line a setting, a section a normalisation."""
    table = Table(title="What each setting picks, means over the pools")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in COLUMNS[:2] else "right", no_wrap=name in COLUMNS[:2])
    for place, (one, row) in enumerate(zip(found, rows_of(found), strict=True)):
        is_last = place + 1 == len(found) or found[place + 1].normalization != one.normalization
        table.add_row(*row, end_section=is_last)
    console.print(table)


def as_markdown(found: Sequence[Picks]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|---|{'---:|' * (len(COLUMNS) - 2)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows_of(found))]) + "\n"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--fisher-alphas", type=float, nargs="+", default=[0.01, 100.0])
    parser.add_argument("--conflict-penalties", type=float, nargs="+", default=[0.0, 1.0, 10.0])
    parser.set_defaults(output_dir=Path("runs/sensitivity"), steps=6, every=5, pool_size=120, num_selected=12)
    options = parser.parse_args(argv)
    if options.num_selected > options.pool_size:
        parser.error("--num-selected must be at most --pool-size, which the picks come from")
    return options


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    options = parse_arguments(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    # The pool, and as many rows that no rule sees.
    num_scored = 2 * options.pool_size
    config = SpiceConfig(strategy="random", pool_size=num_scored, num_selected=options.num_selected, sketch_dim=0)
    recorded = record(argparse.Namespace(**vars(options) | {"pool_size": num_scored}), config)
    found = compare([scores for _, scores in recorded], options)
    print_table(found)
    settings = settings_of(options)
    command = command_of(settings, "sensitivity")
    steps = [step for step, _ in recorded]
    written = {"command": command, "settings": settings, "steps": steps, "picks": [asdict(one) for one in found]}
    (options.output_dir / "sensitivity.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    markdown = f"Pools of steps {', '.join(map(str, steps))}. Made by\n\n```\n{command}\n```\n\n{as_markdown(found)}"
    (options.output_dir / "sensitivity.md").write_text(markdown, encoding="utf-8")
    console.print(f"Numbers: sensitivity.json and sensitivity.md in {options.output_dir}")


if __name__ == "__main__":
    main()
