"""Fine-tune in a loop of your own with Accelerate and `SpiceSampler`; no Trainer.

```
python examples/accelerate_loop.py --dataset demo_output/train.jsonl --model demo_output/model --max_steps 3
accelerate launch --config_file accelerate_configs/multi_gpu.yaml examples/accelerate_loop.py ...
```
"""

from __future__ import annotations

import argparse
import itertools

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from data import load_rows, tokenize_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from spice_trainer import SpiceConfig, SpiceSampler


def main(options: argparse.Namespace) -> None:
    set_seed(options.seed)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    dataset = tokenize_rows(load_rows(options.dataset), tokenizer, options.max_length)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=options.learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)

    sampler = SpiceSampler(SpiceConfig(pool_size=options.pool_size, num_selected=options.num_selected))
    # Don't pass the loader to `accelerator.prepare`: its look-ahead would score a step's pools one update too early.
    loader = sampler.bind(
        model,
        dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        accelerator=accelerator,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        seed=options.seed,
    )

    model.train()
    step = 0
    while step < options.max_steps:
        batches = iter(loader)  # one epoch
        # Asking for a step's first batch scores its pools at the current weights and picks what the step trains on.
        while micro_batches := list(itertools.islice(batches, options.accumulation)):
            # A step's micro-batches may differ in size. The loss is the mean over all label tokens of the step, not a
            # mean of the micro-batches' means.
            num_tokens = sum((batch["labels"] != -100).sum() for batch in micro_batches)
            num_tokens = accelerator.reduce(num_tokens, reduction="sum")
            step_loss = 0.0
            for batch in micro_batches:
                loss = model(**batch, num_items_in_batch=num_tokens).loss
                # Several processes average their gradients, where this loss wants their sum.
                accelerator.backward(loss * accelerator.num_processes)
                step_loss += loss.detach()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            accelerator.print(f"step {step}: loss {accelerator.reduce(step_loss, reduction='sum').item():.4f}")
            if step == options.max_steps:
                break

    accelerator.unwrap_model(model).save_pretrained(options.output_dir)
    accelerator.print(f"Adapter saved in {options.output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="JSONL file, `save_to_disk` folder, or dataset on the Hub")
    parser.add_argument("--model", required=True, help="model folder, or model on the Hub")
    parser.add_argument("--output_dir", default="runs/accelerate_loop")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--pool_size", type=int, default=32)
    parser.add_argument("--num_selected", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
