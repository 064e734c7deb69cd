"""Fine-tune with TRL's `SFTTrainer` and SPICE: every argument in one YAML file, or as a flag.

```
python examples/sft.py --config examples/sft.yaml
python examples/sft.py --config examples/sft.yaml --num_selected 16 --learning_rate 1e-4
accelerate launch --config_file accelerate_configs/multi_gpu.yaml examples/sft.py --config examples/sft.yaml
```

`--dataset_name` takes a local JSONL file, a folder written by `Dataset.save_to_disk`, or a dataset on the Hub. Flags
override the file.
"""

from __future__ import annotations

from data import load_rows
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from spice_trainer import SpiceConfig, attach_spice


def main(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, spice_config: SpiceConfig
) -> None:
    if not model_args.use_peft:
        raise ValueError("SPICE reads the gradients of LoRA layers: pass --use_peft, or `use_peft: true` in the file.")
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
        "revision": model_args.model_revision,
    }
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_rows(script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config),
        peft_config=get_peft_config(model_args),
    )
    attach_spice(trainer, spice_config)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.print(f"Adapter saved in {training_args.output_dir}")


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SpiceConfig))
    main(*parser.parse_args_and_config())
