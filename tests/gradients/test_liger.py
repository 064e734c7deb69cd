"""Liger's kernels: layers and loss replaced by Triton kernels, on the CPU through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spice_trainer.gradients.backends import changes_when_training_begins
from spice_trainer.gradients.label_head import sample_losses

LIGER_FORWARD = "liger_kernel.transformers.model.llama"
needs_liger = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("liger_kernel", "triton")),
    reason="needs liger-kernel and triton",
)


def run(task: str) -> dict[str, Any]:
    """A task of `liger_on_cpu.py` in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.gradients.liger_on_cpu", task],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@needs_liger
@pytest.mark.slow
def test_sample_gradients_equal_one_at_a_time_autograd() -> None:
    found = run("gradients")
    assert found["forward"] == LIGER_FORWARD
    assert found["error_of_loop"] < 1e-5 and found["losses_finite"]
    # Liger's own rounding.
    assert found["error_of_plain"] < 1e-4
    assert not found["logits_in_training"], "training does not run the fused loss, so nothing is tested"


@needs_liger
@pytest.mark.slow
def test_training_with_scoring_equals_training_without() -> None:
    found = run("train")
    assert found["forward"] == LIGER_FORWARD
    # Both trainers: when SPICE is attached, when training begins with the kernels in place, and after its first step.
    assert len(found["verified"]) == 6
    assert found["verified"][1:3] == found["verified"][4:6] == [LIGER_FORWARD] * 2


def test_liger_is_known_to_change_the_model_late() -> None:
    assert changes_when_training_begins(SimpleNamespace(use_liger_kernel=True))
    assert not changes_when_training_begins(SimpleNamespace(use_liger_kernel=False))
    assert not changes_when_training_begins(SimpleNamespace())


def test_losses_do_not_use_a_replaced_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`liger_kernel_config={"cross_entropy": True}` replaces torch's for the whole process."""
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, 4, -100], [-100, -100, 2]])
    expected = [
        torch.nn.functional.cross_entropy(logits[0, :2], targets[0, :2]),
        torch.nn.functional.cross_entropy(logits[1, 2:], targets[1, 2:]),
    ]

    def replaced(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called the replaced function")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", replaced)
    losses = sample_losses(logits, targets, targets != -100)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-6, atol=0)
