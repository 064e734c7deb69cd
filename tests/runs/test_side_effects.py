"""Scoring leaves no trace: with the picks fixed beforehand, a run with it equals a run without it bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from spice_trainer.sampling.run import SelectionRun
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.results import StepSelection
from tests.support.models import enable_checkpointing
from tests.support.trainers import (
    checkpointing_options,
    collate,
    make_trainer,
    same_weights,
    tiny_dataset,
    trainable_weights,
    trained_indices,
)
from tests.support.versions import before

pytestmark = pytest.mark.oldest


def random_state() -> tuple[Any, Any, bytes]:
    """The random states of Python, NumPy and torch."""
    numpy_state = np.random.get_state()
    return random.getstate(), (numpy_state[1].tolist(), *numpy_state[2:]), torch.get_rng_state().numpy().tobytes()


def module_state(model: nn.Module) -> dict[str, Any]:
    """Per module its mode, hooks and checkpointing; per parameter whether it trains and has a gradient."""
    modules = {
        name: (
            module.training,
            [tuple(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)],
            getattr(module, "gradient_checkpointing", None),
            "forward" in vars(module),
        )
        for name, module in model.named_modules()
    }
    parameters = {name: (value.requires_grad, value.grad is None) for name, value in model.named_parameters()}
    return {"modules": modules, "parameters": parameters, "config": model.config.to_dict()}


def without_hook_ids(state: dict[str, Any]) -> dict[str, Any]:
    """Hook ids are numbered over the process, so two runs can be compared by their number only."""
    modules = {
        name: (mode, [len(ids) for ids in hooks], *rest) for name, (mode, hooks, *rest) in state["modules"].items()
    }
    return state | {"modules": modules}


class Snapshots(TrainerCallback):
    """Everything that training depends on, at the beginning of each step and after each micro-batch."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, ...]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.taken.append((state.global_step, random_state(), without_hook_ids(module_state(model))))
        self.weights.append(trainable_weights(model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert all(value.grad is None for value in model.parameters() if not value.requires_grad)
        self.gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
        )


def noisy_collate(rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
    """A user's collator that draws from every random state and lets the draws decide the first token."""
    batch = collate(rows)
    drawn = random.randint(0, 9) + int(np.random.randint(10)) + int(torch.randint(10, ()))
    batch["input_ids"][:, 0] = 3 + drawn
    return batch


def run(
    output_dir: Any, *, build: Callable[[], nn.Module] | None = None, **options: Any
) -> tuple[Snapshots, dict[str, Tensor], tuple[Any, ...]]:
    """Two epochs with everything on that draws random numbers, and all random states seeded before it."""
    random.seed(1)
    np.random.seed(1)
    snapshots = Snapshots()
    if build is not None:
        options["model"] = build()
    trainer = make_trainer(
        output_dir,
        spice={"scoring_tokens_per_batch": 64},
        train_dataset=tiny_dataset(33),
        data_collator=noisy_collate,
        callbacks=[snapshots],
        lora_dropout=0.3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=2,
        neftune_noise_alpha=5.0,
        **options,
    )
    if before("transformers", "5"):
        # Without it no gradient passes a reentrant checkpoint of a PEFT model; later versions do it themselves.
        trainer.model.enable_input_require_grads()
    trainer.train()
    return snapshots, trainable_weights(trainer.model), random_state()


def replay(monkeypatch: pytest.MonkeyPatch, steps: Sequence[Sequence[int]]) -> None:
    """Hands out recorded picks instead of scoring."""

    def recorded_step(self: SelectionRun, epoch: int, step_in_epoch: int) -> StepSelection:
        return StepSelection(step=self.global_step, epoch=epoch, indices=tuple(steps[self.global_step]))

    def refuse(self: GradientScorer, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scored while replaying")

    monkeypatch.setattr(SelectionRun, "_score_step", recorded_step)
    monkeypatch.setattr(GradientScorer, "score", refuse)


def compare_with_replay(output_dir: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Runs with scoring, then with its picks replayed, and compares everything."""
    scored, scored_weights, scored_random = run(output_dir / "scored", **options)
    steps = trained_indices(output_dir / "scored")
    assert len(steps) == 8
    with monkeypatch.context() as context:
        replay(context, steps)
        replayed, replayed_weights, replayed_random = run(output_dir / "replayed", **options)
    assert trained_indices(output_dir / "replayed") == steps
    for (step, numbers, state), (_, other_numbers, other_state) in zip(scored.taken, replayed.taken, strict=True):
        assert numbers == other_numbers, f"scoring changed the random state before step {step}"
        assert state == other_state, f"scoring changed modes, hooks or gradients before step {step}"
    for step, (first, second) in enumerate(zip(scored.gradients, replayed.gradients, strict=True)):
        assert same_weights(first, second), f"gradients of step {step} differ"
    for step, (first, second) in enumerate(zip(scored.weights, replayed.weights, strict=True)):
        assert same_weights(first, second), f"weights before step {step} differ"
    assert same_weights(scored_weights, replayed_weights), "final weights differ"
    assert scored_random == replayed_random


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["off", "non-reentrant", "reentrant"])
def test_run_with_scoring_equals_run_without(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, checkpointing: bool | None
) -> None:
    options = {} if checkpointing is None else checkpointing_options(use_reentrant=checkpointing)
    compare_with_replay(tmp_path, monkeypatch, **options)


def test_the_comparison_sees_a_random_number_drawn(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    score = GradientScorer.score

    def careless_score(self: GradientScorer, *args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return score(self, *args, **kwargs)

    monkeypatch.setattr(GradientScorer, "score", careless_score)
    with pytest.raises(AssertionError, match="changed the random state before step 0"):
        compare_with_replay(tmp_path, monkeypatch)


def bound_scorer(output_dir: Any, **options: Any) -> tuple[Any, GradientScorer]:
    """A trainer's model in training and its scorer."""
    trainer = make_trainer(output_dir, spice={}, data_collator=noisy_collate, lora_dropout=0.3, **options)
    trainer._spice.begin_run()
    trainer.model.train()
    return trainer.model, trainer._spice.sampler.scorer


def test_gradients_modes_and_hooks_of_the_user_stay(tmp_path: Any) -> None:
    model, scorer = bound_scorer(tmp_path)
    enable_checkpointing(model, use_reentrant=True)
    calls = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: calls.append(None))
    # Parts a user froze into evaluation mode stay there; the others stay in training.
    model.base_model.model.model.layers[0].eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = random_state(), module_state(model)

    scores = list(scorer.score([range(10), range(10, 15)]))

    assert [len(pool.candidates) for pool in scores] == [10, 5] and all(pool.sound.all() for pool in scores)
    assert (random_state(), module_state(model)) == before
    assert calls, "the user's hook did not run, so nothing is tested"
    assert same_weights({name: value.grad for name, value in model.named_parameters() if name in gradients}, gradients)
    assert same_weights(model.state_dict(), weights)


def test_the_loader_draws_from_no_random_state(tmp_path: Any) -> None:
    trainer = make_trainer(tmp_path, spice={}, lora_dropout=0.3)
    before = random_state()
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 6 and random_state() == before


@pytest.mark.parametrize("place", ["collator", "forward"])
def test_an_error_while_scoring_leaves_no_trace(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model, scorer = bound_scorer(tmp_path)
    before = random_state(), module_state(model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        random.random()
        torch.rand(1)
        raise RuntimeError("user's own error")

    if place == "collator":
        monkeypatch.setattr(scorer, "rows", replace(scorer.rows, collate=fail))
    else:
        monkeypatch.setattr(type(model.base_model.model.model.layers[1]), "forward", fail)
    with pytest.raises((RuntimeError, ValueError), match="user's own error"):
        list(scorer.score([range(10)]))
    monkeypatch.undo()
    assert (random_state(), module_state(model)) == before
