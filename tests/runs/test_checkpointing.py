"""Gradient checkpointing: both kinds under SFTTrainer (under `Trainer` see `test_side_effects.py`), and FSDP's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from spice_trainer.gradients.per_sample import SampleGradients
from tests.gradients.test_verification_sharded import verify_two_rows
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients, relative_error
from tests.support.models import tiny_lora_model
from tests.support.replays import train_and_replay
from tests.support.trainers import checkpointing_options, make_sft_trainer

LAYER = "base_model.model.model.layers.1"


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_run_under_sft(use_reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"training": 0, "scoring": 0}
    while_scoring: list[bool] = []
    compute = SampleGradients.compute

    def watched(self: SampleGradients, *args: Any, **kwargs: Any) -> Any:
        while_scoring.append(True)
        losses = compute(self, *args, **kwargs)
        while_scoring.pop()
        return losses

    def count(module: nn.Module, *args: Any) -> None:
        calls["scoring" if while_scoring else "training"] += 1

    def make(output_dir: Path) -> Any:
        trainer = make_sft_trainer(
            output_dir,
            model=tiny_lora_model(lora_dropout=0.3),
            spice={"scoring_tokens_per_batch": 10_000},
            # Without it nothing is measured for the memory plan, so that every pass that is counted scores.
            verify=False,
            max_steps=3,
            **checkpointing_options(use_reentrant=use_reentrant),
        )
        trainer.model.get_submodule(LAYER).input_layernorm.register_forward_hook(count)
        return trainer

    monkeypatch.setattr(SampleGradients, "compute", watched)
    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)
    # Every layer runs twice a step under checkpointing; two runs of three steps. Scoring has it off, and looks at the
    # model's head once.
    assert calls == {"training": 2 * 3 * 2, "scoring": 3 + 1}


def test_checkpointing_that_evaluation_mode_does_not_switch_off() -> None:
    """FSDP's `activation_checkpointing` wraps layers, which then run again in every backward."""
    model = tiny_lora_model(lora_dropout=0.3).train()
    _, expected = looped_gradients(model, example_rows())
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda m: isinstance(m, LlamaDecoderLayer)
    )
    calls: list[nn.Module] = []
    model.get_submodule(f"{LAYER}._checkpoint_wrapped_module.input_layernorm").register_forward_hook(
        lambda m, *_: calls.append(m)
    )
    _, found = batched_gradients(model, example_rows())
    # One forward looks at the head; the next runs again within the backward.
    assert len(calls) == 1 + 2, "nothing was checkpointed"
    assert relative_error(found, expected) < 1e-5
    assert verify_two_rows(model) < 1e-5
