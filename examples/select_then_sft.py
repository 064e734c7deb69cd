r"""The paper's recipe in two steps: a small model selects a tenth once, a larger one trains three epochs on it.

```
python examples/select_then_sft.py --model_name_or_path Qwen/Qwen2.5-7B --use_peft \
    --proxy_model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name rows.jsonl --output_dir output
```

Only the first step is SPICE's: the subset in `<output_dir>/subset` is an ordinary dataset, with JSONL for TRL and for
LLaMA-Factory beside it. Interrupted, the script goes on where it was. Under `accelerate launch` every process scores.
"""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import set_seed
from data import load_rows
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from spice_trainer import ProxyModel, SpiceConfig, select_subset


def main(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig, spice_config: SpiceConfig
) -> None:
    if spice_config.proxy_model_name_or_path is None:
        raise ValueError("Pass --proxy_model_name_or_path, the small model that selects.")
    dataset = load_rows(script_args.dataset_name, script_args.dataset_train_split, script_args.dataset_config)

    set_seed(training_args.seed)  # the selector's fresh adapter
    selector = ProxyModel.from_pretrained(
        spice_config.proxy_model_name_or_path,
        learning_rate=spice_config.proxy_learning_rate,
        update_every=spice_config.proxy_update_every,
    )
    subset = select_subset(
        selector,
        dataset,
        spice_config,
        output_dir=Path(training_args.output_dir) / "subset",
        max_length=training_args.max_length,
        seed=training_args.seed,
    )

    training_args.model_init_kwargs = {**(training_args.model_init_kwargs or {}), "dtype": model_args.dtype}
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=subset.dataset,
        peft_config=get_peft_config(model_args),
    )
    trainer.accelerator.print(f"Training on {len(subset.dataset):,} of {len(dataset):,} rows")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SpiceConfig))
    parser.set_defaults(num_train_epochs=3)
    main(*parser.parse_args_and_config())
