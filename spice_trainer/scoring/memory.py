"""Memory of scoring: the features checked against what is free before a run, the whole measured once it scores."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from spice_trainer.config import SpiceConfig
from spice_trainer.scoring.scorer import GradientScorer

if sys.platform != "win32":
    import resource


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of this process on a device, now and at most so far: tensors on CUDA, resident memory on a CPU."""

    held: int
    peak: int


def memory_use(device: torch.device) -> MemoryUse | None:
    """What this process holds on a device; `None` where neither CUDA nor the operating system tells its peak.

    Only reads: resetting the peak would change the statistics of the user's own script. So a peak that came before
    says no more of what follows than that it took less.
    """
    if device.type == "cuda":
        return MemoryUse(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device))
    peak = _peak_resident() if device.type == "cpu" else None
    held = psutil.Process().memory_info().rss
    return None if peak is None else MemoryUse(held, max(peak, held))


def _peak_resident() -> int | None:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's own `ru_maxrss` may be that of the process which launched this one.
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def check_memory(scorer: GradientScorer, num_rows: int, config: SpiceConfig) -> None:
    """Refuses features of a pool of `num_rows` candidates that exceed free memory, naming the setting that fits."""
    needed, free = scorer.feature_bytes(1, num_rows), free_memory(scorer.device)
    if needed <= free:
        return
    # A quarter of what is free: activations, the optimizer and the data need room too.
    fitting = int(free / 4 / num_rows / 4)
    power = 2 ** max(4, fitting.bit_length() - 1)
    if config.information == "exact":
        fix = f"set sketch_dim={min(power, scorer.dimension)}, which fits, or a smaller pool_size"
    else:
        largest = max(2, int(free / 2 / scorer.num_features / 4))
        fix = f'set a pool_size of at most {largest}, or information="exact", which can be sketched'
    raise ValueError(
        f"Scoring a pool of {num_rows} candidates with {scorer.num_features:,} gradient numbers each needs "
        f"{needed / 1e9:.1f} GB on {scorer.device}, where {free / 1e9:.1f} GB are free. To fix it, {fix}."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    # The processes of a machine share its memory.
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
