"""A killed selection loses at most a minute."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from spice_trainer import SpiceConfig, select_subset
from spice_trainer.sampling.run import SelectionRun
from tests.support.models import tiny_lora_model
from tests.support.trainers import read_records, tiny_dataset

SECONDS_A_STEP = 25


def select(output_dir: Path) -> None:
    """Six steps; states by the number of steps would come too late."""
    config = SpiceConfig(pool_size=10, num_selected=4, gradient_normalization="sqrt_tokens", proxy_learning_rate=1e-2)
    select_subset(tiny_lora_model(), tiny_dataset(), config, output_dir=output_dir, samples_per_step=4, save_steps=100)


def test_a_killed_selection_loses_at_most_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select(tmp_path / "whole")
    original, clock, started = SelectionRun.select_step, time.monotonic, []

    def select_step(self: SelectionRun) -> Any:
        step_in_epoch = self.position.step_in_epoch
        if step_in_epoch == 5 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        started.append(step_in_epoch)
        return original(self)

    parent = os.getpid()
    monkeypatch.setattr(SelectionRun, "select_step", select_step)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + SECONDS_A_STEP * len(started))
    pid = os.fork()
    if pid == 0:
        try:
            select(tmp_path / "part")
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    select(tmp_path / "part")
    # Steps 0 to 3 are in the state that was written when another step would have made more than a minute of it.
    assert started == [4, 5]
    for name in ("selections", "pools", "trained"):
        assert read_records(tmp_path / "part", name) == read_records(tmp_path / "whole", name)
