"""What commands share: their arguments, the rows that these name, and the model with a fresh adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from peft import LoraConfig

from spice_trainer.config import SpiceConfig
from spice_trainer.data.files import open_dataset
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.utils.random import seeded_random_state


@dataclass(frozen=True)
class Command:
    """What a command was given, parsed, with the rows opened."""

    model: Any
    config: SpiceConfig
    arguments: Any
    dataset: Any
    validation: Any


def parse_command(name: str, arguments_class: type, argv: list[str] | None) -> Command:
    """Parses the arguments, by default those of the command line, and opens the rows.

    Ends the command with a message where TRL is not installed, or something that it needs is not named.
    """
    try:
        from trl import ModelConfig, ScriptArguments, TrlParser
    except ImportError as error:
        raise SystemExit(f"This command needs TRL: pip install 'spice-trainer[sft]'. ({error})") from error
    parser = TrlParser((ScriptArguments, ModelConfig, SpiceConfig, arguments_class), prog=f"spice-trainer {name}")
    script, model, config, arguments = parser.parse_args_and_config(args=argv)
    if model.model_name_or_path is None or script.dataset_name is None:
        parser.error("--model_name_or_path and --dataset_name are needed")
    if config.needs_validation and arguments.validation_dataset_name is None:
        quotas = config.length_quotas == "validation"
        what = "--length_quotas validation" if quotas else f"--strategy {config.strategy}"
        parser.error(f"{what} needs --validation_dataset_name, the rows to compare candidates with")
    validation = None
    if arguments.validation_dataset_name is not None:
        validation = open_dataset(
            arguments.validation_dataset_name,
            script.dataset_test_split,
            name_flag="--validation_dataset_name",
            split_flag="--dataset_test_split",
        )
    dataset = open_dataset(script.dataset_name, script.dataset_train_split, script.dataset_config)
    return Command(model, config, arguments, dataset, validation)


def load_model(model: Any, config: SpiceConfig, *, accelerator: Accelerator, seed: int) -> ProxyModel:
    """Loads the model and puts LoRA on it, the same on every process and when the command is repeated."""
    from trl import get_quantization_config

    quantization = get_quantization_config(model)
    model_kwargs: dict[str, Any] = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        # TRL 1.16's ModelConfig no longer asks; who needs it works from Python.
        "trust_remote_code": getattr(model, "trust_remote_code", False),
    }
    if quantization is not None:
        model_kwargs |= {"quantization_config": quantization, "device_map": {"": accelerator.device}}
    lora = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        # `None` leaves them to the selector.
        target_modules=model.lora_target_modules,
        use_rslora=model.use_rslora,
        task_type="CAUSAL_LM",
    )
    with seeded_random_state(accelerator.device, seed):
        return ProxyModel.from_pretrained(
            model.model_name_or_path,
            lora_config=lora,
            model_kwargs=model_kwargs,
            learning_rate=config.proxy_learning_rate,
            update_every=config.proxy_update_every,
        )
