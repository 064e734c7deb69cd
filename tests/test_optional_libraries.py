"""What the package does without the libraries that it does not require, in a process that has none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.oldest

SCRIPT = """
import sys
# `None` makes a library look as if it were not installed, to `import` and to `importlib.util.find_spec`.
for name in ("trl", "datasets", "rich", "pandas", "pyarrow", "bitsandbytes", "deepspeed", "liger_kernel"):
    sys.modules[name] = None

import importlib
import pkgutil
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import spice_trainer
from spice_trainer import ProxyModel, SpiceConfig, attach_spice

for module in pkgutil.walk_packages(spice_trainer.__path__, "spice_trainer."):
    if not module.name.endswith((".sft", ".__main__")):
        importlib.import_module(module.name)
print("imported:", spice_trainer.select_subset)
from spice_trainer import *
try:
    spice_trainer.SpiceSFTTrainer
except ImportError as error:
    print("SpiceSFTTrainer:", error)
try:
    spice_trainer.select_subset(None, [{"input_ids": [1]}], output_dir="subset")
except ImportError as error:
    print("select_subset:", error)
try:
    spice_trainer.cli.main.main(["select", "--config", "none.yaml"])
except SystemExit as error:
    print("main:", error)

def build_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

rows = [{"input_ids": [3 + n % 50, 4 + n % 40, 5 + n % 30]} for n in range(24)]
def collate(rows):
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}

for use_proxy in (False, True):
    arguments = TrainingArguments(output_dir=f"run-{use_proxy}", per_device_train_batch_size=2, report_to="none",
                                  use_cpu=True, max_steps=2, save_steps=1)
    trainer = Trainer(model=build_model(), args=arguments, train_dataset=rows, data_collator=collate)
    config = SpiceConfig(pool_size=6, num_selected=2)
    attach_spice(trainer, config, proxy=ProxyModel(build_model()) if use_proxy else None)
    trainer.train()
    trainer.train(resume_from_checkpoint=f"run-{use_proxy}/checkpoint-1")
print("trained")
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path_factory.mktemp("without"),
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_is_imported(printed: str) -> None:
    assert "imported: <function select_subset" in printed


def test_runs_with_and_without_a_proxy_and_their_resumes(printed: str) -> None:
    assert "trained" in printed.splitlines()
    # The table of rich has a frame.
    assert printed.count("SPICE summary") == 4 and "┌" not in printed


def test_what_needs_a_library_says_so(printed: str) -> None:
    assert "SpiceSFTTrainer: SpiceSFTTrainer needs TRL: pip install trl." in printed
    assert "select_subset: select_subset writes a `datasets.Dataset`. Fix: pip install spice-trainer[sft]." in printed
    assert "main: This command needs TRL: pip install 'spice-trainer[sft]'." in printed
