"""TRL's path for models that read images, with its own defaults: a processor, its collator, checkpointing, LoRA."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from spice_trainer.data.rows import collate_row, pad_rows
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.gradient_loop import CollectingSink
from tests.support.multimodal import MULTIMODAL, tiny_multimodal_model
from tests.support.replays import train_and_replay
from tests.support.trainers import (
    attach,
    read_records,
    same_weights,
    trainable_weights,
    trained_indices,
    training_options,
)
from tests.support.versions import before

pytest.importorskip("PIL")
from tests.support.processors import conversations, tiny_processor

pytestmark = pytest.mark.skipif(before("transformers", "5.18"), reason="processors are made otherwise")

TARGETS = {
    "all": "all-linear",
    "language": r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)",
    "vision": r".*vis.*\.(q_proj|v_proj|qkv|fc1|linear_fc1)",
}
NUM_ROWS = 24
# Text rows, rows with an image, rows with two.
NUM_IMAGES = [number % 3 for number in range(NUM_ROWS)]
SETTINGS = {"pool_size": 8, "num_selected": 4}


def build(
    output_dir: Path,
    architecture: str,
    *,
    spice: Mapping[str, Any] | None = SETTINGS,
    targets: str = "all",
    form: str = "messages",
    lora_dropout: float = 0.0,
    **arguments: Any,
) -> Any:
    """An SFTTrainer that makes the adapter and the collator itself."""
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    trainer = SFTTrainer(
        model=tiny_multimodal_model(architecture),
        args=SFTConfig(**training_options(output_dir, bf16=False, max_length=None, **arguments)),
        train_dataset=conversations([1] * NUM_ROWS if form == "image" else NUM_IMAGES, form=form),
        processing_class=tiny_processor(architecture),
        peft_config=LoraConfig(r=4, target_modules=TARGETS[targets], lora_dropout=lora_dropout, task_type="CAUSAL_LM"),
    )
    assert type(trainer.data_collator).__name__ == "DataCollatorForVisionLanguageModeling"
    attach(trainer, spice, verify=True)
    return trainer


def loss_gradients(trainer: Any, row: Any) -> tuple[float, Tensor]:
    """Of the trainer's own loss of one row, and its adapter, by plain autograd."""
    weights = [weight for layer in scored_layers(find_trained_modules(trainer.model)) for weight in layer.parameters]
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
    # A row that uses none of them has a loss without a graph.
    loss = loss + 0.0 * weights[0].sum()
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return float(loss.detach()), torch.cat([gradient.flatten() for gradient in found])


def randomize(trainer: Any) -> None:
    """B is zero at first, and with it every gradient of A."""
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


CASES = [
    pytest.param(*case, marks=() if case[1:] == ("all", "messages") else pytest.mark.slow)
    for case in itertools.product(MULTIMODAL, TARGETS, ("messages", "prompt", "image"))
    # TRL 1.16 lengthens the tokens and not their mask of the cross-attention.
    if (case[0], case[2]) != ("mllama", "prompt")
]


@pytest.mark.parametrize(("architecture", "targets", "form"), CASES)
def test_rows_score_as_they_train(tmp_path: Path, architecture: str, targets: str, form: str) -> None:
    trainer = build(tmp_path, architecture, targets=targets, form=form, max_steps=2)
    randomize(trainer)
    dataset = trainer.train_dataset
    rows = [collate_row(number, dataset[number], trainer.data_collator) for number in range(6)]
    assert [row.can_be_padded for row in rows] == [number == 0 and form != "image" for number in NUM_IMAGES[:6]]
    # Rows without images share a micro-batch, others are alone.
    batches = [[0, 3], [1], [2], [4], [5]] if form != "image" else [[number] for number in range(6)]
    expected = [loss_gradients(trainer, dataset[number]) for number in range(6)]
    largest = max(float(gradient.norm()) for _, gradient in expected)
    modules = find_trained_modules(trainer.model)
    with SampleGradients(trainer.model, modules) as sample_gradients:
        for batch in batches:
            sink = CollectingSink()
            losses = sample_gradients.compute(*pad_rows([rows[number] for number in batch]), sink)
            for place, number in enumerate(batch):
                loss, gradient = expected[number]
                found = torch.cat([of_layer[place] for of_layer in sink.by_module(modules, len(batch))])
                assert float(losses[place]) == pytest.approx(loss, rel=1e-5)
                assert float((found - gradient).norm()) < 1e-5 * largest
    trainer.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
    assert [len(step) for step in trained_indices(tmp_path)] == [4, 4]
    for pick in read_records(tmp_path, "selections"):
        row = collate_row(pick["index"], dataset[pick["index"]], trainer.data_collator)
        assert pick["id"] == f"row {pick['index']}" and pick["label_tokens"] == row.num_label_tokens
        assert pick["gradient_norm"] > 0


@pytest.mark.parametrize("architecture", ["qwen2_vl", pytest.param("mllama", marks=pytest.mark.slow)])
def test_scoring_images_leaves_no_trace(tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(output_dir: Path) -> Any:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        return build(output_dir, architecture, lora_dropout=0.3, **options)

    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)


# The second one's loss is a mean per micro-batch, whatever their number.
@pytest.mark.parametrize("architecture", ["llava", "qwen3_vl"])
def test_picking_every_image_trains_like_the_stock_trainer(tmp_path: Path, architecture: str) -> None:
    if architecture not in MULTIMODAL:
        pytest.skip("this transformers has no such model")
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = build(tmp_path / "ours", architecture, spice={"pool_size": 4, "num_selected": 4}, **options)
    ours.train()
    steps = trained_indices(tmp_path / "ours")
    assert sorted(row for step in steps for row in step) == list(range(NUM_ROWS))
    stock = build(tmp_path / "stock", architecture, spice=None, **options)
    batches = [step[start : start + 2] for step in steps for start in (0, 2)]
    loader = DataLoader(stock.train_dataset, batch_sampler=batches, collate_fn=stock.data_collator)
    stock.get_train_dataloader = lambda: stock.accelerator.prepare(loader)
    stock.train()
    ours_weights, theirs = trainable_weights(ours.model), trainable_weights(stock.model)
    assert all(float((ours_weights[name] - theirs[name]).abs().max()) <= 1e-6 for name in theirs)
    first, second = ([line["loss"] for line in run.state.log_history if "loss" in line] for run in (ours, stock))
    assert len(first) == 6 and first == pytest.approx(second, abs=1e-6)


def test_a_run_on_images_resumes(tmp_path: Path) -> None:
    def make(output_dir: Path) -> Any:
        return build(output_dir, "gemma3", lora_dropout=0.3, save_strategy="steps", save_steps=1, num_train_epochs=2)

    whole = make(tmp_path)
    whole.train()
    weights, names = trainable_weights(whole.model), ("selections", "pools", "trained")
    records = {name: (tmp_path / "spice" / f"{name}.jsonl").read_bytes() for name in names}
    assert len(trained_indices(tmp_path)) == math.ceil(NUM_ROWS / SETTINGS["pool_size"]) * 2
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(trainable_weights(resumed.model), weights)
    assert {name: (tmp_path / "spice" / f"{name}.jsonl").read_bytes() for name in names} == records
