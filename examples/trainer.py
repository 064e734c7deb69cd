r"""Fine-tune with the plain Hugging Face `Trainer` and SPICE, without TRL.

```
python examples/trainer.py --dataset_name demo_output/train.jsonl --model_name_or_path demo_output/model \
    --output_dir runs/trainer --max_steps 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 \
    --learning_rate 2e-4 --logging_steps 1 --pool_size 32 --num_selected 8
```

Every field of `ExampleArguments`, `TrainingArguments` and `SpiceConfig` is a flag.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from data import load_rows, tokenize_rows
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spice_trainer import SpiceConfig, attach_spice


@dataclass
class ExampleArguments:
    """Model and data of this example."""

    dataset_name: str = field(metadata={"help": "JSONL file, `save_to_disk` folder, or dataset on the Hub."})
    model_name_or_path: str = field(metadata={"help": "Model folder, or model on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    max_length: int = field(default=256, metadata={"help": "Longer rows are cut to this many tokens."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the LoRA matrices."})


def main(example_args: ExampleArguments, training_args: TrainingArguments, spice_config: SpiceConfig) -> None:
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(example_args.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(example_args.model_name_or_path)
    lora = LoraConfig(
        r=example_args.lora_rank,
        lora_alpha=2 * example_args.lora_rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    rows = load_rows(example_args.dataset_name, example_args.dataset_split)
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=training_args,
        train_dataset=tokenize_rows(rows, tokenizer, example_args.max_length),
        # Pads the labels too, with -100.
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    attach_spice(trainer, spice_config)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.print(f"Adapter saved in {training_args.output_dir}")


if __name__ == "__main__":
    parser = HfArgumentParser((ExampleArguments, TrainingArguments, SpiceConfig))
    main(*parser.parse_args_into_dataclasses())
