"""Starts the worker with a shipped configuration, on CPU processes: under `accelerate launch`, or forked.

A launch imports everything in every process, which takes most of its quarter of a minute; a fork begins at once, in
the environment that the launcher would have set.

The shipped configurations are for GPUs. [`cpu_config`] changes in them what a machine without one cannot do, and
nothing else; what differs is listed there, with reasons.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import psutil
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from tests.distributed import worker
from tests.distributed.setting import TIMEOUT
from tests.support import forks

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FOLDER = ROOT / "accelerate_configs"
CONFIG_NAMES = (
    "single_gpu",
    "multi_gpu",
    "fsdp1",
    "fsdp2",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
)


def load_config(name: str) -> dict[str, Any]:
    """A shipped configuration as it is."""
    values: dict[str, Any] = yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text())
    return values


def cpu_config(name: str, *, num_processes: int) -> dict[str, Any]:
    """A shipped configuration as processes on a CPU can run it."""
    values = load_config(name)
    # No GPU. The worker sets TrainingArguments(use_cpu=True) as well, without which every process trains by itself.
    values["use_cpu"] = True
    values.pop("gpu_ids", None)
    # The comparisons are in float32.
    values["mixed_precision"] = "no"
    values["num_processes"] = num_processes
    # A free port, so that launches don't meet.
    values["main_process_port"] = 0
    if num_processes == 1 and values["distributed_type"] == "MULTI_GPU":
        values["distributed_type"] = "NO"
    fsdp = values.get("fsdp_config", {})
    if fsdp.get("fsdp_version") == 1:
        # accelerate 1.15 looks for a current GPU as soon as FSDP1 broadcasts rank 0's weights
        # (FullyShardedDataParallelPlugin.__post_init__), which loading on rank 0 alone needs.
        fsdp["fsdp_sync_module_states"] = False
        fsdp["fsdp_cpu_ram_efficient_loading"] = False
    return values


def gpu_config(name: str, *, num_processes: int) -> dict[str, Any]:
    """A shipped configuration on this machine's GPUs: as it is, but for their number."""
    return load_config(name) | {"num_processes": num_processes, "main_process_port": 0}


@dataclass(frozen=True)
class Launched:
    """What a launch left behind."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool = False

    def check(self) -> Launched:
        """Fails with the processes' own words unless the launch succeeded."""
        if self.returncode != 0 or self.timed_out:
            state = "timed out" if self.timed_out else f"ended with {self.returncode}"
            raise AssertionError(
                f"The launch {state} after {self.seconds:.0f} s.\n"
                f"--- stdout\n{self.stdout[-4000:]}\n--- stderr\n{first_error(self.stderr)}"
            )
        return self


def first_error(stderr: str) -> str:
    """The part of the processes' stderr that tells the cause: the first traceback, then the end."""
    start = stderr.find("Traceback (most recent call last)")
    if start < 0 or len(stderr) - start <= 6000:
        return stderr[-6000:]
    return f"{stderr[start : start + 4000]}\n[...]\n{stderr[-2000:]}"


def write_config(config: str, folder: Path, *, num_processes: int, device: str = "cpu") -> Path:
    """Writes what a shipped configuration becomes on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    build = cpu_config if device == "cpu" else gpu_config
    path = folder / f"{config}.yaml"
    path.write_text(yaml.safe_dump(build(config, num_processes=num_processes)))
    return path


def clean_environment() -> dict[str, str]:
    """This process's environment without what another launch may have left in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(key, None)
    return kept | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.fspath(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def fork(config: str, folder: Path, *arguments: str, num_processes: int = 2, timeout: float = TIMEOUT) -> Launched:
    """What [`launch`] does, in forked processes without a launcher: nobody ends them but themselves.

    Their environment is the one that `accelerate launch` makes of the configuration, and torch's launcher of it.
    """
    config_file = write_config(config, folder, num_processes=num_processes)
    parsed = launch_command_parser().parse_args(["--config_file", os.fspath(config_file), "worker"])
    settings, defaults, has_precision = _validate_launch_command(parsed)
    with mock.patch.dict(os.environ, clean_environment(), clear=True):
        if settings.use_deepspeed:
            fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
            settings.deepspeed_fields_from_accelerate_config = ",".join(fields)
            environment = prepare_deepspeed_cmd_env(settings)[1]
        else:
            environment = prepare_multi_gpu_env(settings)
    ended = forks.fork(
        worker.main,
        [(config, os.fspath(folder), "cpu", *arguments)] * num_processes,
        folder,
        environments=forks.process_environments(num_processes, environment),
        timeout=timeout,
    )
    return Launched(max(map(abs, ended.codes)), ended.stdout, ended.stderr, ended.seconds, ended.timed_out)


def launch(
    config: str,
    folder: Path,
    *arguments: str,
    num_processes: int = 2,
    device: Literal["cpu", "cuda"] = "cpu",
    timeout: float = TIMEOUT,
) -> Launched:
    """Runs `tests.distributed.worker` under `accelerate launch` and waits for it.

    Args:
        config (`str`): Name of a shipped configuration.
        folder (`Path`): Where the derived configuration is written; the worker's first argument.
        arguments (`str`): More arguments of the worker.
        num_processes (`int`): Processes to start.
        device (`str`): Whether they run on the CPU or each on a GPU; the worker's second argument.
        timeout (`float`): Seconds after which all processes are killed.
    """
    config_file = write_config(config, folder, num_processes=num_processes, device=device)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", os.fspath(config_file)]
    command += ["--module", "tests.distributed.worker", config, os.fspath(folder), device, *arguments]
    environment = clean_environment() | {
        # transformers 5 announces FSDP1's end, and others their own; a user's run would only warn too.
        "PYTHONWARNINGS": "ignore",
    }
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    started = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            stdout, stderr = process.communicate(timeout=timeout)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            # The processes too, which torch's launcher starts in sessions of their own: one left over would keep the
            # pipes open and this one waiting.
            launcher = psutil.Process(process.pid)
            for started_process in [*launcher.children(recursive=True), launcher]:
                started_process.kill()
            stdout, stderr = process.communicate()
    return Launched(process.returncode, stdout, stderr, time.monotonic() - started, timed_out)
