r"""Fine-tune with TRL's `SFTTrainer` while a smaller model selects, and see first whether it selects what yours would.

```
python examples/proxy.py --model_name_or_path demo_output/model --proxy_model_name_or_path SMALLER_MODEL \
    --dataset_name demo_output/train.jsonl --output_dir runs/proxy --max_steps 3 --max_length 256 --dtype float32 \
    --use_peft --lora_target_modules all-linear --per_device_train_batch_size 2 --gradient_accumulation_steps 4 \
    --pool_size 32 --num_selected 8 --proxy_check_pools 2
```

Your model scores the first `--proxy_check_pools` pools too. How far both agree is logged, and written pool by pool to
`transfer.jsonl`; a proxy whose picks retain little of the information is too small, or too far from your model.
Without `--use_peft` your model trains whole, and cannot be compared: leave `--proxy_check_pools` out.

`--proxy_model_name_or_path` alone would do: `attach_spice` then builds this proxy itself. Built here, it can have an
adapter, a precision and rows of its own.
"""

from __future__ import annotations

from pathlib import Path

from data import load_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from spice_trainer import ProxyModel, SpiceConfig, attach_spice


def load_proxy(spice_config: SpiceConfig, training_args: SFTConfig) -> ProxyModel:
    """Load the small model with its own tokenizer, and add the adapter whose gradients it scores with."""
    name_or_path = spice_config.proxy_model_name_or_path
    if name_or_path is None:
        raise ValueError("This example needs a small model that selects: pass --proxy_model_name_or_path.")
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype="auto")
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return ProxyModel(
        get_peft_model(model, lora).to(training_args.device),
        # Another tokenizer than the target's is no trouble: it reads the raw conversations of the training set.
        processing_class=AutoTokenizer.from_pretrained(name_or_path),
        learning_rate=spice_config.proxy_learning_rate,
        update_every=spice_config.proxy_update_every,
    )


def main(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, spice_config: SpiceConfig
) -> None:
    # Every process draws the same adapter.
    set_seed(training_args.seed)
    training_args.model_init_kwargs = {**(training_args.model_init_kwargs or {}), "dtype": model_args.dtype}
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=load_rows(script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config),
        peft_config=get_peft_config(model_args),
    )
    attach_spice(trainer, spice_config, proxy=load_proxy(spice_config, training_args))
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.accelerator.print(f"Model saved in {training_args.output_dir}")
    if spice_config.proxy_check_pools:
        transfer = Path(training_args.output_dir) / "spice" / "transfer.jsonl"
        trainer.accelerator.print(f"What the proxy and your model picked from the same pools: {transfer}")


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SpiceConfig))
    main(*parser.parse_args_and_config())
