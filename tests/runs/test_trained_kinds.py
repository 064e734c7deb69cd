"""What trains beside LoRA, and models in full: no side effects, resume bit for bit, parity with the plain Trainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from tests.runs.test_resume import Run, build, compare
from tests.runs.test_side_effects import compare_with_replay
from tests.support.models import tiny_lora_model, tiny_model
from tests.support.trainers import make_trainer, read_records, same_weights, tiny_dataset, trainable_weights

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: tiny_model(tie_word_embeddings=True),
    "dora": lambda: tiny_lora_model(use_dora=True, lora_dropout=0.3),
    "modules_to_save": lambda: tiny_lora_model(modules_to_save=["lm_head", "norm"], lora_dropout=0.3),
    "experts": lambda: tiny_lora_model("mixtral", target_modules=["q_proj"], target_parameters=EXPERTS),
    "tokens": lambda: tiny_lora_model(trainable_token_indices=[3, 4, 9], lora_dropout=0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_run_with_scoring_equals_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    compare_with_replay(tmp_path, monkeypatch, build=KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_equals_the_uninterrupted_run(tmp_path: Path, kind: str) -> None:
    whole = tmp_path / "whole"
    trainer = build(whole, model=KINDS[kind]())
    trainer.train()
    shutil.copytree(whole, tmp_path / "run")
    resumed = build(tmp_path / "run", model=KINDS[kind](), save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    compare(Run(resumed, tmp_path / "run"), Run(trainer, whole), step=4)


def _without_dropout(kind: str) -> nn.Module:
    model = KINDS[kind]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_picking_everything_trains_like_the_plain_trainer(tmp_path: Path, kind: str) -> None:
    dataset = tiny_dataset(24)
    trainer = make_trainer(
        tmp_path,
        model=_without_dropout(kind),
        spice={"pool_size": 4, "num_selected": 4},
        train_dataset=dataset,
        num_train_epochs=1,
    )
    before = trainable_weights(trainer.model)
    trainer.train()
    rows = [index for line in read_records(tmp_path, "trained") for index in line["indices"]]
    plain = make_trainer(
        tmp_path / "plain", model=_without_dropout(kind), train_dataset=dataset.select(rows), num_train_epochs=1
    )
    plain._get_train_sampler = lambda *args: range(len(rows))
    plain.train()
    after = trainable_weights(trainer.model)
    assert not same_weights(before, after)
    for name, value in trainable_weights(plain.model).items():
        assert float((after[name] - value).abs().max()) < 1e-6, name


def test_a_model_that_trains_in_full_is_sketched_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tie_word_embeddings=True)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, model=model, spice={"sketch_dim": 512}, max_steps=1).train()
    num_parameters = sum(weight.numel() for weight in model.parameters())
    assert f"512 numbers a sample, a sketch of {num_parameters:,}" in caplog.text
