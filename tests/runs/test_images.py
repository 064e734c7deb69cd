"""TRL's path for models that read images, with its own defaults: a processor, its collator, checkpointing, LoRA."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.data.rows import collate_row, pad_rows
from spice_trainer.data.tokenized_rows import TokenizedRows
from spice_trainer.distributed import Processes
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.trainer.checks import check_kinds
from tests.support.gradient_loop import CollectingSink
from tests.support.multimodal import IMAGE, MULTIMODAL, tiny_multimodal_model
from tests.support.replays import train_and_replay
from tests.support.trainers import read_records, same_weights, tiny_tokenizer, trainable_weights, trained_indices
from tests.support.versions import before

pytest.importorskip("PIL")
from tests.support.processors import NUM_IMAGES, POOL_SIZE, TARGETS, conversations, make_image_trainer, tiny_processor

pytestmark = pytest.mark.skipif(before("transformers", "5.18"), reason="processors are made otherwise")


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
    trainer = make_image_trainer(tmp_path, architecture, targets=targets, form=form, max_steps=2)
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
        return make_image_trainer(output_dir, architecture, lora_dropout=0.3, **options)

    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)


# The second one's loss is a mean per micro-batch, whatever their number.
@pytest.mark.parametrize("architecture", ["llava", "qwen3_vl"])
def test_picking_every_image_trains_like_the_stock_trainer(tmp_path: Path, architecture: str) -> None:
    if architecture not in MULTIMODAL:
        pytest.skip("this transformers has no such model")
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = make_image_trainer(tmp_path / "ours", architecture, spice={"pool_size": 4, "num_selected": 4}, **options)
    ours.train()
    steps = trained_indices(tmp_path / "ours")
    assert sorted(row for step in steps for row in step) == list(range(len(NUM_IMAGES)))
    stock = make_image_trainer(tmp_path / "stock", architecture, spice=None, **options)
    batches = [step[start : start + 2] for step in steps for start in (0, 2)]
    loader = DataLoader(stock.train_dataset, batch_sampler=batches, collate_fn=stock.data_collator)
    stock.get_train_dataloader = lambda: stock.accelerator.prepare(loader)
    stock.train()
    ours_weights, theirs = trainable_weights(ours.model), trainable_weights(stock.model)
    assert all(float((ours_weights[name] - theirs[name]).abs().max()) <= 1e-6 for name in theirs)
    first, second = ([line["loss"] for line in run.state.log_history if "loss" in line] for run in (ours, stock))
    assert len(first) == 6 and first == pytest.approx(second, abs=1e-6)


def test_a_stream_of_images_trains_like_the_stock_trainer_and_resumes(tmp_path: Path) -> None:
    def make(name: str, **settings: Any) -> Any:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8}
        return make_image_trainer(tmp_path / name, "llava", is_stream=True, **options, **settings)

    ours, stock = make("ours", spice={"pool_size": 4}, save_strategy="steps", save_steps=3), make("stock", spice=None)
    ours.train()
    stock.train()
    weights, theirs = trainable_weights(ours.model), trainable_weights(stock.model)
    # Within a step the rows are the same, in another order.
    assert all(float((weights[name] - theirs[name]).abs().max()) <= 1e-5 for name in theirs)
    first, second = ([line["loss"] for line in run.state.log_history if "loss" in line] for run in (ours, stock))
    assert len(first) == 8 and first == pytest.approx(second, abs=1e-6)
    resumed = make("resumed", spice={"pool_size": 4})
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    assert same_weights(trainable_weights(resumed.model), weights)
    assert trained_indices(tmp_path / "resumed") == trained_indices(tmp_path / "ours")


def test_a_run_on_images_resumes(tmp_path: Path) -> None:
    def make(output_dir: Path) -> Any:
        return make_image_trainer(
            output_dir, "gemma3", lora_dropout=0.3, save_strategy="steps", save_steps=1, num_train_epochs=2
        )

    whole = make(tmp_path)
    whole.train()
    weights, names = trainable_weights(whole.model), ("selections", "pools", "trained")
    records = {name: (tmp_path / "spice" / f"{name}.jsonl").read_bytes() for name in names}
    assert len(trained_indices(tmp_path)) == math.ceil(len(NUM_IMAGES) / POOL_SIZE) * 2
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(trainable_weights(resumed.model), weights)
    assert {name: (tmp_path / "spice" / f"{name}.jsonl").read_bytes() for name in names} == records


def test_a_proxy_that_reads_images_scores_as_the_target_would(tmp_path: Path) -> None:
    picks = []
    for name in ("itself", "proxy"):
        trainer = make_image_trainer(tmp_path / name, "qwen2_vl", spice=None, max_steps=1)
        model = make_image_trainer(tmp_path / "copy", "qwen2_vl", spice=None).model
        settings = SpiceConfig(pool_size=POOL_SIZE, num_selected=4)
        attach_spice(trainer, settings, proxy=ProxyModel(model) if name == "proxy" else None)
        trainer.train()
        picks.append(trained_indices(tmp_path / name))
    assert picks[0] == picks[1]


def test_a_proxy_of_another_tokenizer_says_that_it_reads_text(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    with caplog.at_level(logging.WARNING, "spice_trainer"):
        TokenizedRows(conversations([0]), tokenizer)
        assert "scored by their text alone: images is not read" in caplog.text
        caplog.clear()
        TokenizedRows(conversations([0]).remove_columns("images"), tokenizer)
    assert not caplog.records


def test_rows_of_both_kinds_are_refused_where_weights_are_sharded(tmp_path: Path) -> None:
    trainer = make_image_trainer(tmp_path, "llava", spice=None)
    rows = [collate_row(number, trainer.train_dataset[number], trainer.data_collator) for number in range(3)]
    sharded = Processes(world_size=2, lockstep=True)
    with pytest.raises(ValueError, match=r"Row 2 .* has pixel_values and row 0 has not.*ZeRO-3.*blank image"):
        check_kinds(rows, sharded)
    check_kinds(rows[1:], sharded)
    check_kinds(rows, Processes(world_size=2))


def test_a_whole_graph_reaches_a_vision_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP1 and ZeRO-3 need it, where checkpointing lets the images' embeddings require a gradient."""
    monkeypatch.setattr("spice_trainer.gradients.per_sample.needs_whole_graph", lambda model: True)
    trainer = make_image_trainer(tmp_path, "qwen2_vl", spice=None)
    randomize(trainer)
    for row in trainer.train_dataset.select(range(3)):
        _, gradient = loss_gradients(trainer, row)
        sink = CollectingSink()
        modules = find_trained_modules(trainer.model)
        with SampleGradients(trainer.model, modules) as sample_gradients:
            sample_gradients.compute(*pad_rows([collate_row(0, row, trainer.data_collator)]), sink)
        found = torch.cat([of_layer[0] for of_layer in sink.by_module(modules, 1)])
        assert float((found - gradient).norm()) < 1e-5 * float(gradient.norm())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llava", "gemma3"])
def test_a_script_of_the_shape_of_trls_example_runs_with_one_line_more(tmp_path: Path, architecture: str) -> None:
    """Model and processor by name, a collator of its own, no preparation, flags: as in TRL's `sft_vlm.py`."""
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config
    from trl.data_utils import prepare_multimodal_messages

    tiny_multimodal_model(architecture).save_pretrained(tmp_path / "model")
    tiny_processor(architecture).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    conversations([1] * 24).to_parquet(tmp_path / "data" / "train-00000.parquet")
    flags = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(tmp_path / "model")]
    flags += ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "4", "--max_steps", "2"]
    flags += ["--use_peft", "--lora_target_modules", "all-linear", "--use_cpu", "--bf16", "False"]
    flags += ["--save_strategy", "no", "--report_to", "none", "--gradient_checkpointing"]
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config(flags)
    training_args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    training_args.remove_unused_columns = False
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(model_args.model_name_or_path)

    def collate_fn(examples: list[dict[str, Any]]) -> Any:
        images = [example["images"] for example in examples]
        messages = [
            prepare_multimodal_messages(example["messages"], images=seen)
            for example, seen in zip(examples, images, strict=True)
        ]
        texts = [processor.apply_chat_template(each, tokenize=False) for each in messages]
        batch = processor(images=images, text=texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].clone()
        labels[(labels == processor.tokenizer.pad_token_id) | (labels == IMAGE)] = -100
        batch["labels"] = labels
        return batch

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        data_collator=collate_fn,
        train_dataset=load_dataset(script_args.dataset_name, split=script_args.dataset_train_split),
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    attach_spice(trainer, SpiceConfig(pool_size=POOL_SIZE, num_selected=4))
    trainer.train()
    trainer.save_model(training_args.output_dir)
    assert [len(step) for step in trained_indices(tmp_path / "run")] == [4, 4]
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
