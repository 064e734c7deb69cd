"""What a process holds on its device: read without resetting anything, and told after the first scored step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spice_trainer.trainer.callback
from spice_trainer.recording.summary import describe_peak
from spice_trainer.scoring.memory import MemoryUse, memory_use
from tests.support.trainers import make_trainer

# In a process of its own: this one's peak is that of every test before, which the other's must not begin with.
SCRIPT = """
import torch
from spice_trainer.scoring.memory import memory_use

def print_use():
    use = memory_use(torch.device("cpu"))
    print(use.held, use.peak)

print_use()
block = torch.ones(50_000_000)
print_use()
del block
print_use()
"""


def test_the_peak_of_a_process_outlasts_what_made_it() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    before, during, after = (tuple(map(int, line.split())) for line in found.stdout.splitlines())
    # The block has 200 MB; what else a process does meanwhile takes far less.
    assert 190e6 < during[0] - before[0] < 230e6
    assert during[0] <= during[1] < before[1] + 230e6
    assert after[0] < before[0] + 40e6 and after[1] > during[1] - 5e6


def test_devices_that_tell_nothing() -> None:
    assert memory_use(torch.device("meta")) is None


def test_what_is_said_of_a_peak() -> None:
    before = MemoryUse(held=2_000_000, peak=3_000_000)
    assert describe_peak(before, MemoryUse(2_500_000, 5_000_000)) == "5 MB, 3 MB of it for scoring"
    # Scoring did not reach the earlier peak, so all that is known is that it took less.
    assert describe_peak(before, MemoryUse(2_500_000, 3_000_000)) == "less than 3 MB (an earlier peak)"


@pytest.mark.parametrize("strategy", ["spice", "random"])
def test_the_log_says_it_once_and_the_summary_again(
    strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(tmp_path, spice={"strategy": strategy}, max_steps=3)
    uses = iter([MemoryUse(10**9, 2 * 10**9), MemoryUse(10**9, 3 * 10**9)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spice_trainer.trainer.callback, "memory_use", lambda device: next(uses))
        trainer.train()
    lines = [record.getMessage() for record in caplog.records]
    told = "SPICE: peak memory while scoring the first step: 3 GB, 2 GB of it for scoring."
    [first] = [line for line in lines if "optimizer steps" in line]
    printed = " ".join(capsys.readouterr().out.split())
    if strategy == "random":
        assert told not in lines and "memory" not in printed and next(uses)
        return
    assert "; scoring holds 148 KB of gradient features. " in first
    assert lines.count(told) == 1 and lines.index(first) < lines.index(told) and next(uses, None) is None
    assert "Peak memory of the first scoring" in printed and "3 GB, 2 GB of it for scoring" in printed
