"""Whole runs in reduced precision: attached with the check on, scored as they train, and not disturbed by it.

Gradients alone are compared with fp32 in `tests/gradients`, features and Gram matrices in `tests/scoring`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.models import tiny_lora_model
from tests.support.replays import train_and_replay
from tests.support.trainers import make_trainer, trained_indices

pytestmark = pytest.mark.oldest

# Training arguments, dtype of the base, dtype that its linear layers compute in.
PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype, torch.dtype]] = {
    "bf16": ({"bf16": True}, torch.float32, torch.bfloat16),
    "bf16_base": ({"bf16": True}, torch.bfloat16, torch.bfloat16),
    "pure_bf16": ({}, torch.bfloat16, torch.bfloat16),
    # On a CPU accelerate takes `fp16=True` and does nothing: a float16 run needs a GPU, but for a float16 base.
    "fp16_base": ({"fp16": True}, torch.float16, torch.float16),
}
BASE_LAYER = "base_model.model.model.layers.1.mlp.down_proj.base_layer"


def cast_base(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts all but the adapter, which PEFT keeps in float32 above a half-precision base."""
    for value in model.parameters():
        if not value.requires_grad:
            value.data = value.data.to(dtype)
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, base, computed = PRECISIONS[precision]
    seen: dict[bool, set[torch.dtype]] = {False: set(), True: set()}
    is_scoring = False
    compute = SampleGradients.compute

    def watched(self: SampleGradients, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_scoring
        is_scoring = True
        losses = compute(self, *args, **kwargs)
        is_scoring = False
        assert losses.dtype == torch.float32 and bool(losses.isfinite().all())
        return losses

    def make(output_dir: Path) -> Any:
        model = cast_base(tiny_lora_model(lora_dropout=0.3), base)
        trainer = make_trainer(output_dir, model=model, spice={}, verify=True, max_steps=3, **arguments)
        # Now, so that the check's own forwards are not counted.
        model.get_submodule(BASE_LAYER).register_forward_hook(
            lambda module, args, output: seen[is_scoring].add(output.dtype)
        )
        return trainer

    monkeypatch.setattr(SampleGradients, "compute", watched)
    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)
    assert seen == {False: {computed}, True: {computed}}


@pytest.mark.parametrize(
    "settings", [{}, {"sketch_dim": 64}, {"information": "diagonal"}, {"gradient_preconditioning": "adam"}]
)
def test_a_default_precision_of_float64_changes_no_pick(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of new tensors, by which numerical code is written; the model's own stays what it is."""
    picks = []
    for dtype in (torch.float32, torch.float64):
        trainer = make_trainer(tmp_path / str(dtype), spice=settings, max_steps=4)
        torch.set_default_dtype(dtype)
        try:
            trainer.train()
        finally:
            torch.set_default_dtype(torch.float32)
        picks.append(trained_indices(tmp_path / str(dtype)))
    assert len(picks[0]) == 4 and picks[0] == picks[1]
