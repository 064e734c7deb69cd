"""Tells from a few hundred rows whether a selection could help: `spice-trainer pilot`.

Arguments are flags or a YAML file (`--config`): those of TRL's `ScriptArguments` and `ModelConfig`, of `SpiceConfig`,
and [`PilotArguments`].

```
spice-trainer pilot --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name rows.jsonl \
    --validation_dataset_name wanted.jsonl
```
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from spice_trainer.cli.model import load_model, parse_command
from spice_trainer.pilot.run import run_pilot


@dataclass
class PilotArguments:
    """What `spice-trainer pilot` takes beside the arguments it shares with training scripts."""

    validation_dataset_name: str = field(
        metadata={"help": "File, folder or name of the rows that the model shall do well on."}
    )
    num_rows: int = field(default=240, metadata={"help": "Training rows that are scored, in whole pools."})
    num_warmup_steps: int = field(default=8, metadata={"help": "Steps on random rows beforehand."})
    max_length: int = field(default=1024, metadata={"help": "Tokens that a row is cut to."})
    completion_only_loss: bool | None = field(default=None, metadata={"help": "As in SFTConfig."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "As in SFTConfig."})
    seed: int = field(default=42, metadata={"help": "Seed of the rows, the adapter and the tests."})
    output_file: str | None = field(default=None, metadata={"help": "Where the report goes as JSON. None: nowhere."})


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, by default those of the command line, and prints the report."""
    command = parse_command("pilot", PilotArguments, argv)
    config, arguments = command.config, command.arguments
    accelerator = Accelerator()
    loaded = load_model(command.model, config, accelerator=accelerator, seed=arguments.seed)
    report = run_pilot(
        loaded.model.to(accelerator.device),
        command.dataset,
        command.validation,
        config,
        processing_class=loaded.processing_class,
        num_rows=arguments.num_rows,
        warmup_steps=arguments.num_warmup_steps,
        max_length=arguments.max_length,
        completion_only_loss=arguments.completion_only_loss,
        assistant_only_loss=arguments.assistant_only_loss,
        seed=arguments.seed,
    )
    print(report)
    if arguments.output_file is not None:
        Path(arguments.output_file).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
