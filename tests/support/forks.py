"""Processes forked from one that has imported everything, so that each begins at once instead of in ten seconds.

multiprocessing's fork server imports once a test process, and does nothing else: neither threads nor gradients are
alive in it when it forks. What runs in a fork is a module's function, named by module, with arguments that pickle.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
# No GPU: what a process has done with one does not survive a fork.
_SERVER = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.fork_imports"])


@dataclass(frozen=True)
class Ended:
    """How forked processes ended: exit codes (−9 where killed), what they printed, and whether time ran out."""

    codes: list[int]
    stdout: str
    stderr: str
    seconds: float
    timed_out: bool


def fork(
    function: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    folder: Path,
    *,
    environments: Sequence[Mapping[str, str]] | None = None,
    timeout: float = 240.0,
) -> Ended:
    """Runs the function once for each tuple of arguments, all at once, and waits for all; `folder` takes the output.

    The first environment is the whole environment of the first process; without any, all have this process's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    processes = []
    with mock.patch.dict(os.environ, _SERVER):
        for rank, own in enumerate(arguments):
            environment = dict(os.environ | {"PYTHONPATH": str(ROOT)} if environments is None else environments[rank])
            outputs = [str(folder / f"{name}.{rank}") for name in ("stdout", "stderr")]
            processes.append(_context.Process(target=_run, args=(function, own, environment, outputs)))
            processes[-1].start()
    left = [process.sentinel for process in processes]
    while left and (seconds := started + timeout - time.monotonic()) > 0:
        for sentinel in connection.wait(left, seconds):
            left.remove(sentinel)
    for process in processes:
        if process.sentinel in left:
            process.kill()
        process.join()
    texts = ["\n".join((folder / f"{name}.{rank}").read_text() for rank in range(len(processes)))
             for name in ("stdout", "stderr")]  # fmt: skip
    codes = [process.exitcode for process in processes]
    return Ended(codes, *texts, time.monotonic() - started, bool(left))


def process_environments(num_processes: int, environment: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """What torch's launcher adds to the environment of each of the processes that are to find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    given = dict(os.environ if environment is None else environment) | address | sizes
    return [given | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def _run(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], outputs: Sequence[str]
) -> None:
    """Ends by `os._exit`, as scripts with gloo do: its threads may abort a process that ends the usual way."""
    code = 1
    try:
        for stream, path in zip((1, 2), outputs, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ.clear()
        os.environ.update(environment)
        # What libraries announce would be a warning in a user's run too.
        warnings.simplefilter("ignore")
        function(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
