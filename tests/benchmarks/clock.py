"""Seconds and bytes: methods taken in turn in one process, and ratios of what was measured beside each other.

    ratio_r(m) = seconds_r(m) / seconds_r(reference)          repeat by repeat; reported as median, minimum, maximum

The order is rotated from repeat to repeat, so that no method is always the one that runs on a warm machine.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from tests.benchmarks.peak_memory import peak_bytes

Open = Callable[[], AbstractContextManager[Callable[[], Any]]]


def synchronize(device: torch.device) -> None:
    """Waits for the device: its kernels run after the call that starts them has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """Seconds of one call, the device's work included, and what it returned."""
    synchronize(device)
    started = time.perf_counter()
    result = run(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - started, result


def rotated(names: Sequence[str], repeat: int, num_repeats: int) -> list[str]:
    """The order of one repeat; over all of them every name is early, in the middle and late."""
    start = repeat * len(names) // max(num_repeats, 1)
    return [*names[start:], *names[:start]]


def time_in_turn(
    methods: Mapping[str, Open],
    num_repeats: int,
    device: torch.device,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, list[float]]:
    """Seconds of every method in every repeat. What a method does once for a model is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(num_repeats):
        for name in rotated(list(methods), repeat, num_repeats):
            with methods[name]() as run:
                seconds[name].append(timed(device, run)[0])
            report(f"  repeat {repeat + 1}: {name}: {seconds[name][-1]:.3g} s")
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], reference: Sequence[float]) -> dict[str, list[float]]:
    """Each method's seconds over the reference's of the same repeat."""
    return {
        name: [mine / theirs for mine, theirs in zip(values, reference, strict=True)]
        for name, values in seconds.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def shown(values: Sequence[float], digits: int = 3) -> str:
    """`1.023 (0.998 to 1.041)`, or the value alone where there is one."""
    found = spread(values)
    middle = f"{found['median']:.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keeps what the profiler's library prints on the process's standard error out of the report."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that a call held on the device at a time, beyond those held before it."""
    if device.type != "cuda":
        with quiet_profiler():
            return peak_bytes(run)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
