"""Weights that are not finite end a run at the step that notices them, and name the checkpoint that is still sound."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from spice_trainer.distributed import Processes
from spice_trainer.sampling.empty_steps import EmptyStepWatch, find_broken_weight
from tests.support.trainers import make_trainer

PICKED = [SimpleNamespace(indices=(0,))]
BROKEN = [SimpleNamespace(indices=(), candidates=(1, 2), nonfinite=(1, 2), zero=(), out_of_memory=())] * 2


class BreaksWeights(TrainerCallback):
    """Makes a trained weight NaN in the update of a step, as a diverging run does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            weight = next(weight for weight in kwargs["model"].parameters() if weight.requires_grad)
            weight.data[0, 0] = math.nan


def test_a_run_ends_where_its_weights_break(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, spice={"pools_per_step": 1}, save_strategy="steps", save_steps=1, max_steps=8)
    trainer.add_callback(BreaksWeights())
    error = (
        r"no candidate of step 3 .* such as '.*lora_A.*'. They have been so since the update of step 2: training "
        r"diverged\. Resume from checkpoint-2 "
    )
    with pytest.raises(RuntimeError, match=error):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    resumed = make_trainer(tmp_path, spice={"pools_per_step": 1}, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_what_the_error_says() -> None:
    watch = EmptyStepWatch(min_gain=None)
    with pytest.raises(
        RuntimeError, match="had been so before step 7, the first that this run scored. Resume from an"
    ):
        watch.note(7, BROKEN, broken_weight=lambda: "a")
    watch.note(3, PICKED, broken_weight=lambda: pytest.fail("a sound step looks at the weights"))
    with pytest.raises(RuntimeError, match="since the updates of steps 3 to 8: .* Resume from checkpoint-3 "):
        watch.note(9, BROKEN, broken_weight=lambda: "a")


def test_rows_alone_that_are_not_finite_are_an_empty_step() -> None:
    watch = EmptyStepWatch(min_gain=None)
    watch.note(0, BROKEN, broken_weight=lambda: None)
    some = [*BROKEN[:1], SimpleNamespace(indices=(), candidates=(1, 2), nonfinite=(1,), zero=(2,), out_of_memory=())]
    watch.note(1, some, broken_weight=lambda: pytest.fail("looks at the weights though a gradient is finite"))
    with pytest.raises(RuntimeError, match="3 of the last 3"):
        watch.note(2, BROKEN, broken_weight=lambda: None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_broken_weight_is_named(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    assert find_broken_weight(model, Processes()) is None
    model[1].bias.data[1] = math.inf
    assert find_broken_weight(model, Processes()) == "1.bias"
