"""A process that fails while scoring ends the run soon, with its error, and the checkpoint before stays good."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import setting
from tests.distributed.launch import Launched, fork, launch
from tests.support.trainers import trained_indices

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that every process loads."""
    return setting.save_model(tmp_path_factory.mktemp("model"))


def fail(
    config: str, folder: Path, *options: str, place: str, way: str, model_folder: Path, is_launched: bool = False
) -> Launched:
    """A run whose last process fails while scoring: all end soon, with an error, by a launcher or by themselves."""
    places = (f"model={model_folder}", f"place={place}", f"way={way}")
    start = launch if is_launched else fork
    launched = start(config, folder, "fail", *places, *options, timeout=150)
    ended = time.time()
    assert not launched.timed_out and launched.returncode != 0, launched.stdout
    # The launcher gives processes half a minute to end; the collective time-out is 30 minutes.
    assert ended - float((folder / "failed_at").read_text()) < 60
    checkpoints = sorted(path.name for path in (folder / "failing").glob("checkpoint-*"))
    assert checkpoints == [f"checkpoint-{setting.SAVED_STEP}"]
    return launched


@pytest.mark.parametrize("is_launched", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_error_while_scoring_ends_every_process(is_launched: bool, model_folder: Path, tmp_path: Path) -> None:
    stderr = fail(
        "multi_gpu", tmp_path, place="collator", way="raise", model_folder=model_folder, is_launched=is_launched
    ).stderr
    assert "ValueError: the user's own error" in stderr
    assert "SPICE: process 1 of 2 failed while reading candidates, so this one stops too" in stderr


@pytest.mark.parametrize(
    "spice",
    [{}, {"scoring_prefilter": 0.6}, {"strategy": "loss"}, {"strategy": "ifd"}, {"strategy": "less"}],
    ids=lambda spice: "-".join(map(str, spice.values())) or "spice",
)
def test_an_error_in_a_forward_reaches_the_others(spice: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    """Whichever forward it is: none may leave the others waiting for what this one found."""
    options = f"spice={json.dumps(spice)}"
    stderr = fail("multi_gpu", tmp_path, options, place="forward", way="raise", model_folder=model_folder).stderr
    assert "ValueError: the user's own error" in stderr
    assert "SPICE: process 1 of 2 failed while scoring candidates, so this one stops too" in stderr


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_the_checkpoint_before_is_good(model_folder: Path, tmp_path: Path) -> None:
    stderr = fail(
        "multi_gpu", tmp_path, place="forward", way="kill", model_folder=model_folder, is_launched=True
    ).stderr
    assert "SIGKILL" in stderr and "local_rank: 1" in stderr

    resumed = setting.single_trainer(model_folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "failing" / f"checkpoint-{setting.SAVED_STEP}"))
    assert resumed.state.global_step == setting.NUM_STEPS
    assert trained_indices(tmp_path / "resumed")[: setting.SAVED_STEP + 1] == trained_indices(tmp_path / "failing")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp2", "deepspeed_zero3"])
def test_an_error_within_a_sharded_forward_ends_every_process(config: str, model_folder: Path, tmp_path: Path) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    stderr = fail(config, tmp_path, place="forward", way="raise", model_folder=model_folder).stderr
    assert "ValueError: the user's own error" in stderr


def test_attaching_on_one_process_ends_soon_and_says_where(model_folder: Path, tmp_path: Path) -> None:
    launched = fork("multi_gpu", tmp_path, "attach_on_one", f"model={model_folder}", timeout=120)
    assert launched.returncode != 0 and not launched.timed_out
    assert "waiting for process 1 to attach too" in launched.stderr
    assert (
        "RuntimeError: attach_spice was called on process 0 of 2, and within 5 seconds not on process 1. Likely "
        "cause: a condition such as `if trainer.is_world_process_zero():`" in launched.stderr
    )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "detach",
            "The run with SPICE began on process 0 of 2, and within 5 seconds not on process 1. Likely cause: SPICE",
        ),
        (
            "bind",
            "SpiceSampler.bind was called on process 0 of 2, and within 5 seconds not on process 1. Likely cause",
        ),
        ("break", "SPICE: process 1 of 2 failed while building the run's loader, so this one stops too"),
    ],
)
def test_what_one_process_does_alone_ends_the_run_by_name(
    how: str, said: str, model_folder: Path, tmp_path: Path
) -> None:
    launched = fork("multi_gpu", tmp_path, "disagree", f"how={how}", f"model={model_folder}", timeout=120)
    assert launched.returncode != 0 and not launched.timed_out
    assert said in launched.stderr


def test_layers_frozen_on_one_process_end_the_run(model_folder: Path, tmp_path: Path) -> None:
    launched = fork("multi_gpu", tmp_path, "freeze", "where=last", f"model={model_folder}", timeout=120)
    assert launched.returncode != 0 and not launched.timed_out
    assert "RuntimeError: Process 1 of 2 trains 14 layers, and process 0 trains 28. Likely cause: a callback" in (
        launched.stderr
    )
