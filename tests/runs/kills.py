"""A run that is killed at random moments, and resumed, against one that is not. Run by `test_kills.py`.

    python -m tests.runs.kills NUM_KILLS [SEED]

Each run is a process of its own, forked here after the imports and ended by SIGKILL, so that nothing of Python's
cleaning up happens. It is killed twice, at the first attempt and again while it continues, then left to end. The
moments are of three kinds:

    seconds   any time within the run, from outside
    files     before the n-th file is opened, renamed, linked or removed under the output directory
    lines     at the n-th line of the package that is executed
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

import spice_trainer
from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.recording import record_file
from tests.support.models import tiny_lora_model
from tests.support.trainers import SETTINGS, make_trainer, tiny_dataset

PACKAGE = str(Path(spice_trainer.__file__).parent)
RECORDS = ("selections.jsonl", "pools.jsonl", "trained.jsonl")
FILE_EVENTS = {"open", "os.rename", "os.truncate", "os.remove", "os.mkdir", "os.rmdir", "os.link"}
Moment = tuple[str, float]


def train(output_dir: Path, *, with_proxy: bool) -> Any:
    """Ten steps, two selecting epochs and one that replays, checkpoints every second step, the last two kept."""
    # Checkpoints of so short a run share segments too.
    record_file.SEALED_BYTES = 300
    trainer = make_trainer(
        output_dir,
        train_dataset=tiny_dataset(25),
        lora_dropout=0.3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=10,
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    proxy = ProxyModel(tiny_lora_model(seed=3), learning_rate=1e-2) if with_proxy else None
    config = SpiceConfig(**SETTINGS, selection_epochs=2, overlap_scoring=with_proxy)
    attach_spice(trainer, config, proxy=proxy, verify=False)
    try:
        trainer.train(resume_from_checkpoint=get_last_checkpoint(os.fspath(output_dir)) is not None)
    except ValueError as error:
        # The first checkpoint was not whole yet: what the message says is what a user does.
        if "Start the run anew, without resume_from_checkpoint" not in str(error):
            raise
        trainer.train()
    trainer.save_model(output_dir / "final")
    return trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file_event(number: int, output_dir: Path) -> None:
    counter = itertools.count(1)
    folder = os.fspath(output_dir)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if os.fspath(arguments[0]).startswith(folder) and next(counter) == number:
            die()

    sys.addaudithook(hook)


def die_at_line(number: int) -> None:
    counter = itertools.count(1)

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and next(counter) == number:
            die()
        return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(on_call)


def start(output_dir: Path, moment: Moment | None, *, with_proxy: bool) -> tuple[int, float]:
    """Runs in a forked process until its end or until the moment comes; returns its exit status and seconds."""
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if moment is not None and moment[0] == "files":
                die_at_file_event(int(moment[1]), output_dir)
            if moment is not None and moment[0] == "lines":
                die_at_line(int(moment[1]))
            train(output_dir, with_proxy=with_proxy)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if moment is not None and moment[0] == "seconds":
        time.sleep(moment[1])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return status, time.monotonic() - started


def count(run: Callable[[], Any], output_dir: Path) -> tuple[int, int]:
    """File events and lines of a whole run, in a forked process."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        files = lines = 0
        folder = os.fspath(output_dir)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal files
            if event in FILE_EVENTS and arguments and isinstance(arguments[0], str | os.PathLike):
                files += os.fspath(arguments[0]).startswith(folder)

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return on_line

        def on_call(frame: FrameType, event: str, argument: Any) -> Any:
            return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(hook)
        sys.settrace(on_call)
        run()
        sys.settrace(None)
        os.write(writer, json.dumps([files, lines]).encode())
        os._exit(0)
    files, lines = json.loads(os.read(reader, 1000))
    os.wait()
    os.close(reader), os.close(writer)
    return files, lines


def outcome(output_dir: Path) -> dict[str, Any]:
    """What a finished run left: its adapter and records, without clock readings."""
    found: dict[str, Any] = {name: (output_dir / "spice" / name).read_bytes() for name in RECORDS}
    found["adapter"] = (output_dir / "final" / "adapter_model.safetensors").read_bytes()
    costs = [json.loads(line) for line in (output_dir / "spice" / "costs.jsonl").read_text().splitlines()]
    found["costs"] = [{key: value for key, value in line.items() if "seconds" not in key} for line in costs]
    for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "spice/state.safetensors"):
        found[f"checkpoint {name}"] = (output_dir / "checkpoint-10" / name).read_bytes()
    for name in RECORDS:
        segments = sorted((output_dir / "checkpoint-10" / "spice" / "records").glob(f"{name[:-6]}.0*.jsonl"))
        assert len(segments) > 1, name
        assert b"".join(path.read_bytes() for path in segments) == found[name], f"checkpoint-10 lacks lines of {name}"
    # The Trainer does not rotate again where it was killed between the last checkpoint and rotating.
    names = {path.name for path in output_dir.iterdir()} - {"checkpoint-6", "checkpoint-8"}
    found["names"] = sorted(names)
    return found


def check(moments: list[Moment], expected: dict[str, Any], folder: Path, *, with_proxy: bool) -> int:
    """Kills a run at each moment in turn, lets it end, and compares. Returns how many kills met a living run."""
    output_dir = folder / "run"
    num_killed = 0
    for moment in moments:
        status, _ = start(output_dir, moment, with_proxy=with_proxy)
        assert status in (0, signal.SIGKILL), f"{moment} after {num_killed} kills: exit status {status}"
        num_killed += status == signal.SIGKILL
    status, _ = start(output_dir, None, with_proxy=with_proxy)
    assert status == 0, f"the run killed at {moments} did not continue: exit status {status}"
    found = outcome(output_dir)
    differing = [key for key, value in expected.items() if found[key] != value]
    assert not differing, f"after kills at {moments}: other {differing}"
    shutil.rmtree(output_dir)
    return num_killed


def main() -> None:
    num_kills, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    generator = random.Random(seed)
    num_killed = num_runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for with_proxy in (False, True):
            whole = folder / f"whole-{with_proxy}"
            status, seconds = start(whole, None, with_proxy=with_proxy)
            assert status == 0, f"the uninterrupted run failed: exit status {status}"
            expected = outcome(whole)
            counted = folder / f"counted-{with_proxy}"
            files, lines = count(lambda path=counted, proxy=with_proxy: train(path, with_proxy=proxy), counted)
            kinds = itertools.cycle((("seconds", seconds), ("files", files), ("lines", lines)))
            while num_killed < num_kills * (2 if with_proxy else 1) / 2:
                kind, most = next(kinds)
                # The second time there is less left to do.
                moments = [(kind, generator.uniform(0, most)), (kind, generator.uniform(0, 0.6 * most))]
                moments = [(kind, at if kind == "seconds" else float(int(at) + 1)) for kind, at in moments]
                num_killed += check(moments, expected, folder, with_proxy=with_proxy)
                num_runs += 1
                print(f"killed {num_killed}", [f"{kind} {at:.4g}" for kind, at in moments], flush=True)
    print(f"{num_runs} runs survived {num_killed} kills")


if __name__ == "__main__":
    main()
