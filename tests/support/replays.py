"""Trains with scoring, then with its picks replayed, for any trainer: nothing of training may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_side_effects import random_state, replay
from tests.support.trainers import same_weights, trainable_weights, trained_indices


def train_and_replay(
    make: Callable[[Path], Any], output_dir: Path, monkeypatch: pytest.MonkeyPatch, *, num_steps: int
) -> Any:
    """Trains two trainers that `make` builds, the second on the first one's picks, and compares them bit for bit.

    Returns the first trainer, trained.
    """
    scored = make(output_dir / "scored")
    before = trainable_weights(scored.model)
    scored.train()
    scored_random = random_state()
    steps = trained_indices(output_dir / "scored")
    assert len(steps) == num_steps and len({tuple(step) for step in steps}) == num_steps
    assert not same_weights(before, trainable_weights(scored.model)), "nothing was trained"
    with monkeypatch.context() as context:
        replay(context, steps)
        replayed = make(output_dir / "replayed")
        assert same_weights(before, trainable_weights(replayed.model)), "the runs don't start from the same weights"
        replayed.train()
        assert random_state() == scored_random, "scoring changed the random state"
    assert trained_indices(output_dir / "replayed") == steps
    assert logged_losses(scored) == logged_losses(replayed), "losses differ"
    assert same_weights(trainable_weights(scored.model), trainable_weights(replayed.model)), "weights differ"
    return scored


def logged_losses(trainer: Any) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
