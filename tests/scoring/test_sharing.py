"""Several processes score together: the same scores and picks as one, forwards in step, errors that reach all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_score_together(num_processes: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.sharing", str(num_processes)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
