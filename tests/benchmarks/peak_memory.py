"""The memory that a piece of code takes at its peak, as the CPU's allocator tells torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run` held at a time, beyond those held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    result = profiler.profiler.kineto_results
    alive = most = 0
    for event in sorted((e for e in result.events() if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most
