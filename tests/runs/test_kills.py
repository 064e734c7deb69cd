"""SIGKILL at random moments, an incomplete checkpoint, the end of a run: resuming gives the uninterrupted run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from spice_trainer.recording.checkpoint import last_complete_checkpoint
from spice_trainer.utils.files import replace_file
from tests.support.trainers import make_trainer, read_records, same_weights, trainable_weights, trained_indices

NUM_KILLS = 30


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_runs_survive_being_killed() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.runs.kills", str(NUM_KILLS)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert f"runs survived {NUM_KILLS}" in result.stdout or f"runs survived {NUM_KILLS + 1}" in result.stdout


def make_checkpoint(folder: Path, step: int, *, state: str | None = '{"global_step": 1}') -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"...")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_the_latest_complete_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_complete_checkpoint(tmp_path / "none") is None
    assert last_complete_checkpoint(tmp_path) is None
    for step in (2, 9, 10):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-99").write_text("a file")
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not caplog.records
    make_checkpoint(tmp_path, 11, state='{"global_st')
    make_checkpoint(tmp_path, 12, state=None)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    said = f"SPICE: checkpoint-12, checkpoint-11 in {tmp_path} are not complete, its writing was interrupted. The run"
    assert (
        caplog.messages[0].startswith(said.replace("its", "their")) and "continues from checkpoint-10" in caplog.text
    )


def test_without_a_complete_checkpoint_the_way_out_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1, state="")
    with pytest.raises(
        ValueError, match="No checkpoint in .* is complete: checkpoint-1 without a readable trainer_stat"
    ):
        last_complete_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="Start the run anew, without resume_from_checkpoint"):
        make_trainer(tmp_path, spice={}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        make_trainer(tmp_path / "empty", spice={}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("positional", [False, True])
def test_resuming_past_an_incomplete_checkpoint(positional: bool, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    first = make_trainer(tmp_path, spice={}, **options)
    first.train()
    expected = (trainable_weights(first.model), read_records(tmp_path, "selections"))
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-5" / "spice")
    shutil.rmtree(tmp_path / "checkpoint-5")
    second = make_trainer(tmp_path, spice={}, **options)
    if positional:
        second.train(True)
    else:
        second.train(resume_from_checkpoint=True)
    assert same_weights(trainable_weights(second.model), expected[0])
    assert read_records(tmp_path, "selections") == expected[1]


class SavesBest(TrainerCallback):
    """Saves the model where a checkpoint is kept, as scripts do for their best one."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name in ("checkpoint-best", "checkpoint-1", f"checkpoint-{state.global_step}"):
            self.trainer.save_model(os.path.join(args.output_dir, "mine", name))


def test_a_users_folder_loses_nothing(tmp_path: Path) -> None:
    callback = SavesBest()
    names = ("checkpoint-best", "checkpoint-1", "checkpoint-2")
    for name in names:
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "trainer_state.json").write_text('{"mine": 1}')
    callback.trainer = make_trainer(tmp_path, spice={}, max_steps=2, callbacks=[callback])
    callback.trainer.train()
    for name in names:
        assert (tmp_path / "mine" / name / "trainer_state.json").read_text() == '{"mine": 1}', name
        assert (tmp_path / "mine" / name / "adapter_model.safetensors").exists()


def test_an_incomplete_checkpoint_that_is_named(tmp_path: Path) -> None:
    """As `resume_from_checkpoint=get_last_checkpoint(output_dir)` does: the complete one before it is named."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, spice={}, **options).train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    latest = get_last_checkpoint(os.fspath(tmp_path))
    fix = f"checkpoint-2 is not complete: .*Fix: resume_from_checkpoint='{tmp_path / 'checkpoint-1'}', the latest"
    with pytest.raises(ValueError, match=fix):
        make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=latest)
    with pytest.raises(ValueError, match=f"The checkpoint {tmp_path} is not complete: .*checkpoint-1', the latest"):
        make_trainer(tmp_path, spice={}, **options).train(os.fspath(tmp_path))
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="Fix: start the run anew, without resume_from_checkpoint: none beside it"):
        make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=latest)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, spice={}, **options).train()
    folder = tmp_path / "checkpoint-1" / "spice"
    for name in ("state.json", "state.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ValueError, match=r"SPICE's state in .* cannot be read .*damaged, or its writing was interr"
        ):
            make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=True)
        (folder / name).write_bytes(whole)


def test_a_checkpoint_that_is_overwritten_is_incomplete_until_its_last_file(tmp_path: Path) -> None:
    """A run resumed from before an existing checkpoint writes over it: killed there, half of it is the old one."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    make_trainer(tmp_path, spice={}, **options).train()
    trainer = make_trainer(tmp_path, spice={}, **options)
    seen: list[bool] = []
    save_optimizer = trainer._save_optimizer_and_scheduler

    def watched(output_dir: str) -> None:
        seen.append((Path(output_dir) / "trainer_state.json").exists())
        save_optimizer(output_dir)

    trainer._save_optimizer_and_scheduler = watched
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert seen == [False] and (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    # Saving elsewhere removes nothing.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "trainer_state.json").write_text("{}")
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "trainer_state.json").exists()


def test_a_run_resumed_at_its_last_step_trains_no_further(tmp_path: Path) -> None:
    """The stock trainer would train one step more, beyond `max_steps`, where that is within an epoch."""
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "num_train_epochs": 3}
    first = make_trainer(tmp_path, spice={}, **options)
    first.train()
    second = make_trainer(tmp_path, spice={}, **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4 and len(trained_indices(tmp_path)) == 4
    assert same_weights(trainable_weights(first.model), trainable_weights(second.model))


def test_a_state_that_cannot_be_written_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer would count it as whole and remove the one before for it, so the run ends as on its own files."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 1}

    def fail(path: Path, content: Any) -> None:
        if path.name == "state.json" and path.parts[-3] == "checkpoint-2":
            raise OSError(28, "No space left on device")
        replace_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("spice_trainer.recording.checkpoint.replace_file", fail)
        with pytest.raises(OSError, match=r"state cannot be written to .*checkpoint-2.*\(No space left on device\)"):
            make_trainer(tmp_path, spice={}, **options).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=True)
    assert len(trained_indices(tmp_path)) == 3


def test_a_second_run_in_the_same_place_trains_nothing(tmp_path: Path) -> None:
    class Second(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            second = make_trainer(tmp_path, spice={}, max_steps=1)
            before = trainable_weights(second.model)
            with pytest.raises(RuntimeError, match=f"Another run .this very process {os.getpid()} on .* writes to"):
                second.train()
            assert same_weights(trainable_weights(second.model), before)

    make_trainer(tmp_path, spice={}, max_steps=2, callbacks=[Second()]).train()
    assert [line["step"] for line in read_records(tmp_path, "trained")] == [0, 1]
    assert not list((tmp_path / "spice").glob("trained.*.jsonl"))


@pytest.mark.parametrize("kind", ["fifo", "link", "folder's link"])
def test_a_state_that_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, spice={}, **options).train()
    folder = tmp_path / "checkpoint-1" / "spice"
    path = folder if kind == "folder's link" else folder / "state.json"
    path.rename(tmp_path / "real")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "real")
    said = "it is no regular file" if kind == "fifo" else "link, which is not followed.*tree of links.*local_dir"
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-1"))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    (tmp_path / "fifo").rename(tmp_path / "checkpoint-1" / "trainer_state.json")
    with pytest.raises(ValueError, match="No checkpoint in .* is complete"):
        last_complete_checkpoint(tmp_path)


def test_what_a_state_says_is_escaped(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, spice={}, **options).train()
    path = tmp_path / "checkpoint-1" / "spice" / "state.json"
    state = json.loads(path.read_text())
    for change in ({"format_version": "\x1b[2J"}, {"schedule": state["schedule"] | {"pool_seed": "\x1b]0;x\x07"}}):
        path.write_text(json.dumps(state | change))
        with pytest.raises(ValueError, match=r"\\x1b") as error:
            make_trainer(tmp_path, spice={}, **options).train(resume_from_checkpoint=True)
        assert "\x1b" not in str(error.value)
