"""Runs that aim at validation rows go on from a checkpoint bit for bit, or say that the aim is another."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.gradients.hidden_states import HiddenStates
from spice_trainer.scoring.hidden import HiddenScorer
from tests.runs.test_targeted import TRAINING, WANTED
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.trainers import make_trainer, same_weights, trainable_weights

# Two epochs of four steps.
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}
SETTINGS: dict[str, Any] = {
    "strategy": "targeted_matching", "pool_size": 16, "num_selected": 4, "pools_per_step": 2,
    "scoring_tokens_per_batch": 64,
}  # fmt: skip


def last_layer_lora() -> Any:
    """A model whose first layer never changes."""
    return add_lora(tiny_model("llama"), layers_to_transform=[1], target_modules=["q_proj", "down_proj"])


def build(output_dir: Path, *, validation: Any = WANTED, model: Any = None, proxy: Any = None, **options: Any) -> Any:
    spice = options.pop("spice", {})
    trainer = make_trainer(
        output_dir,
        model=tiny_lora_model(lora_dropout=0.3) if model is None else model,
        train_dataset=TRAINING,
        **OPTIONS | options,
    )
    config = SpiceConfig(**SETTINGS | spice)
    attach_spice(trainer, config, validation_dataset=validation, proxy=proxy, verify=False)
    return trainer


def compare(resumed: Any, whole: Any) -> None:
    assert same_weights(trainable_weights(resumed.model), trainable_weights(whole.model))
    for name in ("selections", "pools", "trained"):
        ours, theirs = (Path(trainer.args.output_dir) / "spice" / f"{name}.jsonl" for trainer in (resumed, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


CASES = {
    "gradients": ({"matching_features": "gradients", "validation_every": 3}, 5),
    "hidden states that change": ({"validation_every": 3}, 5),
    "lengths": ({"strategy": "length_matched"}, 5),
    "quotas": ({"strategy": "fisher", "length_quotas": "validation"}, 5),
}


@pytest.mark.parametrize(("spice", "step"), CASES.values(), ids=CASES)
def test_resume_is_bit_identical(spice: dict[str, Any], step: int, tmp_path: Path) -> None:
    whole, resumed = build(tmp_path / "whole", spice=spice), build(tmp_path / "resumed", spice=spice)
    whole.train()
    assert whole.state.global_step == 8
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    compare(resumed, whole)


def kept_states(trainer: Any) -> dict[int, torch.Tensor]:
    return trainer._spice.sampler.scorer.hidden._kept


@pytest.mark.parametrize("step", [2, 5])
def test_kept_states_are_those_of_the_run_that_kept_them(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed anew in other micro-batches they differ in rounding, here much, and so do picks."""
    compute = HiddenStates.compute

    def round_by_batch(self: HiddenStates, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
        states = compute(self, inputs, labels)
        return states * (1 + 0.01 * ((torch.arange(states.shape[1]) * len(labels)) % 5))

    monkeypatch.setattr(HiddenStates, "compute", round_by_batch)
    whole = build(tmp_path / "whole", model=last_layer_lora(), bf16=True)
    whole.train()
    assert len(kept_states(whole)) == len(TRAINING)
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    resumed = build(tmp_path / "resumed", model=last_layer_lora(), bf16=True)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    compare(resumed, whole)
    assert all(torch.equal(kept_states(whole)[row], states) for row, states in kept_states(resumed).items())
    assert kept_states(resumed).keys() == kept_states(whole).keys()
    # Without them it is not so, and this test compares something.
    monkeypatch.setattr(HiddenScorer, "load", lambda self, tensors: None)
    without = build(tmp_path / "without", model=last_layer_lora(), bf16=True)
    without.train(resume_from_checkpoint=str(checkpoint))
    assert any(not torch.equal(kept_states(whole)[row], states) for row, states in kept_states(without).items())


def test_a_run_that_scores_each_row_once_keeps_none(tmp_path: Path) -> None:
    for name, options in (("once", {"num_train_epochs": 1}), ("replayed", {"spice": {"selection_epochs": 1}})):
        trainer = build(tmp_path / name, model=last_layer_lora(), **options)
        trainer.train()
        assert not kept_states(trainer)
        tensors = load_file(tmp_path / name / "checkpoint-4" / "spice" / "state.safetensors")
        assert not any("hidden.states" in key for key in tensors)


@pytest.mark.parametrize("features", ["hidden_states", "gradients"])
def test_with_a_proxy(features: str, tmp_path: Path) -> None:
    spice = {"matching_features": features, "validation_every": 3}

    def build_with_proxy(name: str) -> Any:
        proxy = ProxyModel(last_layer_lora(), learning_rate=1e-2)
        return build(tmp_path / name, spice=spice, proxy=proxy)

    whole, resumed = build_with_proxy("whole"), build_with_proxy("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    compare(resumed, whole)


def resume(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> Any:
    build(tmp_path / "first", max_steps=2, **first).train()
    trainer = build(tmp_path / "second", max_steps=3, **second)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    return trainer


@pytest.mark.parametrize(
    ("other", "settings"),
    [
        (WANTED[1:], {}),
        (WANTED, {"validation_rows": 20}),
        ([{**WANTED[0], "labels": [-100, -100, *WANTED[0]["labels"][2:]]}, *WANTED[1:]], {}),
        ({"wanted": WANTED}, {}),
    ],
    ids=["fewer", "fewer that are read", "other labels", "another name"],
)
def test_other_validation_rows_are_refused(other: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"aimed at other validation rows \(24 of 'validation', fingerprint \w+; now"):
        resume(tmp_path, {}, {"validation": other, "spice": settings})
    assert not (tmp_path / "second" / "spice" / "trained.jsonl").exists()


def test_the_same_rows_in_another_kind_of_dataset_are_the_same(tmp_path: Path) -> None:
    from datasets import Dataset

    assert resume(tmp_path, {}, {"validation": Dataset.from_list(WANTED)}).state.global_step == 3


@pytest.mark.parametrize(("first", "second"), [(WANTED, None), (None, WANTED)], ids=["lost", "gained"])
def test_an_aim_that_is_lost_or_gained_is_said(first: Any, second: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = resume(tmp_path, {"validation": first}, {"validation": second})
    assert trainer.state.global_step == 3
    words = "24 validation rows, and this one has none" if first else "none validation rows, and this one has some"
    assert f"compared candidates with {words.replace('none validation', 'no validation')}" in caplog.text


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path: Path, caplog: Any) -> None:
    build(tmp_path / "first", max_steps=2).train()
    path = tmp_path / "first" / "checkpoint-2" / "spice" / "state.json"
    state = json.loads(path.read_text())
    del state["sampler"]["selector"]["validation"]
    path.write_text(json.dumps(state))
    trainer = build(tmp_path / "second", max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert trainer.state.global_step == 3 and "compared candidates with" not in caplog.text
