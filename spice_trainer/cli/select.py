"""Selects a subset from the command line: `spice-trainer select`, or `accelerate launch -m spice_trainer select`.

Arguments are flags or a YAML file (`--config`): those of TRL's `ScriptArguments` (`--dataset_name`) and `ModelConfig`
(`--model_name_or_path`, `--lora_r`, `--load_in_4bit`), of `SpiceConfig`, and [`SubsetArguments`].

```
spice-trainer select --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name rows.jsonl \
    --output_dir subset
```
"""

from __future__ import annotations

from dataclasses import dataclass, field

from accelerate import Accelerator

from spice_trainer.cli.model import load_model, parse_command
from spice_trainer.subset.select import select_subset


@dataclass
class SubsetArguments:
    """What `spice-trainer select` takes beside the arguments it shares with training scripts."""

    output_dir: str = field(metadata={"help": "Where the subset, its manifest, records and states go."})
    validation_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "File, folder or name of rows to do well on, for strategies that aim; of its dataset_test_split."
        },
    )
    samples_per_step: int | None = field(
        default=None, metadata={"help": "Rows picked between two updates of the selector. None: 10 pools' picks."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens that a row is cut to while scoring."})
    completion_only_loss: bool | None = field(default=None, metadata={"help": "As in SFTConfig."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "As in SFTConfig."})
    seed: int = field(default=42, metadata={"help": "Seed of the pools and of the fresh adapter."})
    save_steps: int = field(
        default=10, metadata={"help": "Steps between two states, from which an interrupted selection continues."}
    )
    subset_name: str = field(default="spice_subset", metadata={"help": "Name of the JSONL file and of its entry."})
    overwrite: bool = field(default=False, metadata={"help": "Begin anew where there is another selection."})


def main(argv: list[str] | None = None) -> None:
    """Parses the arguments, by default those of the command line, and selects."""
    command = parse_command("select", SubsetArguments, argv)
    config, arguments = command.config, command.arguments
    accelerator = Accelerator()
    selector = load_model(command.model, config, accelerator=accelerator, seed=arguments.seed)
    subset = select_subset(
        selector,
        command.dataset,
        config,
        output_dir=arguments.output_dir,
        validation_dataset=command.validation,
        samples_per_step=arguments.samples_per_step,
        max_length=arguments.max_length,
        completion_only_loss=arguments.completion_only_loss,
        assistant_only_loss=arguments.assistant_only_loss,
        seed=arguments.seed,
        save_steps=arguments.save_steps,
        name=arguments.subset_name,
        overwrite=arguments.overwrite,
        accelerator=accelerator,
    )
    accelerator.print(
        f"{len(subset.dataset):,} rows selected. They are in {arguments.output_dir}, with their manifest."
    )
    accelerator.end_training()
