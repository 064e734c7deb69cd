r"""What the theory of information and conflict says of a real run: tables and figures.

```
python examples/theory.py --model demo_output/model --data demo_output/train.jsonl
```

Trains a few steps with SPICE, and takes the exact Gram matrix of the pools of every few steps, at the weights that
score them. Each is looked at under several normalisations of the gradients. Prints what the paper's Tables 4 and 5 are
about (decomposition and bounds, correlations and conflict groups) and draws what its Figures 2(b), 2(c), 4 and 5 are
about, with the definitions of `spice_trainer.theory`; the paper's own text was not at hand.
Needs `pip install 'spice-trainer[examples]'`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from data import load_rows, tokenize_rows
from peft import LoraConfig, get_peft_model
from rich.console import Console
from theory_report import Moment, draw_figures, print_tables, tables_as_markdown
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spice_trainer import PoolScores, SpiceConfig, SpiceSampler, attach_spice
from spice_trainer.selection import StepSelection, normalization_weights, normalized_gram, scaled_alpha
from spice_trainer.theory import analyse_pool, summarise

NORMALIZATIONS = ("none", "sqrt_tokens", "tokens", "unit")
console = Console()


class PoolRecorder:
    """Scores the pools of every few steps once more, at the very weights that picked from them.

    Args:
        sampler ([`SpiceSampler`]): That of the run.
        every (`int`): Steps from one look to the next.
    """

    def __init__(self, sampler: SpiceSampler, *, every: int) -> None:
        self.sampler = sampler
        self.every = every
        self.pools: list[tuple[int, PoolScores]] = []
        sampler.add_listener(self)

    def __call__(self, selection: StepSelection) -> None:
        """Hear of a step's picks, before it trains. Scoring leaves no trace in the model or the random states."""
        if selection.step % self.every == 0:
            # By whole gradients, whatever picks the rows that train: a rule that asks for less is scored by less.
            config = replace(self.sampler.config, strategy="fisher")
            scorer = self.sampler.scorer.with_config(config)
            found = scorer.score([pool.candidates for pool in selection.pools])
            self.pools.extend((selection.step, scores) for scores in found)


def renormalized(scores: PoolScores, gradient_normalization: str) -> Tensor:
    """The pool's Gram matrix as another normalisation would have it."""
    lengths = scores.gram.diagonal().sqrt()
    cosines = scores.gram / torch.where(lengths > 0, torch.outer(lengths, lengths), 1.0)
    weights = normalization_weights(scores.gradient_norms, torch.tensor(scores.label_tokens), gradient_normalization)
    return normalized_gram(cosines, scores.gradient_norms, weights, unit=gradient_normalization == "unit")


def analyse(pools: list[tuple[int, PoolScores]], options: argparse.Namespace) -> dict[str, list[Moment]]:
    """Hold the theory against every recorded pool under every normalisation."""
    moments: dict[str, list[Moment]] = {name: [] for name in options.normalizations}
    for name, seen in moments.items():
        for step, scores in pools:
            gram = renormalized(scores, name)
            alpha = scaled_alpha(
                gram, scores.finite, fisher_alpha=options.fisher_alpha, alpha_scaling=options.alpha_scaling
            )
            theory = analyse_pool(
                gram,
                options.num_selected,
                fisher_alpha=alpha,
                conflict_penalty=options.conflict_penalty,
                conflict_reference=options.conflict_reference,
            )
            seen.append(Moment(step, theory))
    return moments


def build_trainer(options: argparse.Namespace) -> Trainer:
    """An ordinary Trainer of a fresh LoRA adapter."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    lora = LoraConfig(
        r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    rows = load_rows(options.data).shuffle(seed=options.seed)
    # Rows that are too long to keep their answer drop out: a few more than the run draws.
    num_rows = min(len(rows), 2 * options.steps * options.pool_size)
    return Trainer(
        model=get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=str(options.output_dir / "run"),
            max_steps=options.steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=options.num_selected,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
        ),
        train_dataset=tokenize_rows(rows.select(range(num_rows)), tokenizer, options.max_length),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def config_of(options: argparse.Namespace) -> SpiceConfig:
    """How the run itself picks."""
    return SpiceConfig(
        pool_size=options.pool_size,
        num_selected=options.num_selected,
        fisher_alpha=options.fisher_alpha,
        alpha_scaling=options.alpha_scaling,
        conflict_penalty=options.conflict_penalty,
        conflict_reference=options.conflict_reference,
        gradient_normalization=options.gradient_normalization,
        # The theory is of exact gradients.
        sketch_dim=0,
    )


def record(options: argparse.Namespace, config: SpiceConfig) -> list[tuple[int, PoolScores]]:
    """Train, and return the pools that were looked at with the step they belong to."""
    trainer = build_trainer(options)
    sampler = SpiceSampler(config)
    recorder = PoolRecorder(sampler, every=options.every)
    attach_spice(trainer, sampler)
    trainer.train()
    return recorder.pools


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of the run whose pools are looked at."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo_output/model", help="model folder, or model on the Hub")
    parser.add_argument("--data", default="demo_output/train.jsonl", help="JSONL file, folder, or dataset on the Hub")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/theory"))
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps")
    parser.add_argument("--every", type=int, default=3, help="steps from one look at the pools to the next")
    parser.add_argument("--pool-size", type=int, default=24)
    parser.add_argument("--num-selected", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_parser(__doc__)
    parser.add_argument("--fisher-alpha", type=float, default=1.0)
    parser.add_argument("--alpha-scaling", choices=("fixed", "pool"), default="fixed")
    parser.add_argument("--conflict-penalty", type=float, default=0.1)
    parser.add_argument("--conflict-reference", choices=("selected", "candidates"), default="selected")
    parser.add_argument(
        "--gradient-normalization", choices=NORMALIZATIONS, default="sqrt_tokens", help="of the run's own picks"
    )
    parser.add_argument(
        "--normalizations", nargs="+", choices=NORMALIZATIONS, default=list(NORMALIZATIONS), help="to look under"
    )
    options = parser.parse_args(argv)
    if options.num_selected < 2:
        parser.error("--num-selected must be at least 2: after a single pick there is nothing to decompose")
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings by their flags, of files only the names."""
    settings = {key: value for key, value in vars(options).items() if key != "output_dir"}
    return settings | {"model": Path(options.model).name, "data": Path(options.data).name}


def command_of(settings: dict[str, Any], script: str = "theory") -> str:
    flags = []
    for key, value in settings.items():
        values = " ".join(map(str, value)) if isinstance(value, list) else value
        flags.append(f"--{key.replace('_', '-')} {values}")
    return f"python examples/{script}.py {' '.join(flags)}"


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    options = parse_arguments(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    moments = analyse(record(options, config_of(options)), options)
    summaries = {name: summarise(moment.theory for moment in seen) for name, seen in moments.items()}
    print_tables(summaries, console)
    settings = settings_of(options)
    written = {
        "command": command_of(settings),
        "settings": settings,
        "summary": {
            name: {key: asdict(value) for key, value in summary.items()} for name, summary in summaries.items()
        },
        "pools": {
            name: [{"step": moment.step} | moment.theory.as_numbers() for moment in seen]
            for name, seen in moments.items()
        },
    }
    (options.output_dir / "theory.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    markdown = f"Made by\n\n```\n{written['command']}\n```\n\n{tables_as_markdown(summaries)}"
    (options.output_dir / "theory.md").write_text(markdown, encoding="utf-8")
    figures = draw_figures(moments, options.output_dir)
    console.print(f"Numbers and figures: {', '.join(path.name for path in figures)} in {options.output_dir}")


if __name__ == "__main__":
    main()
