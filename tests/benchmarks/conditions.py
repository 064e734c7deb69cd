"""Under which conditions something was measured: versions, processor, threads, device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "trl", "datasets", "spice-trainer",
    "opacus", "bergson", "dattri-llm",
)  # fmt: skip


def processor_name() -> str:
    """The CPU's own name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version_of(package: str) -> str | None:
    """Its version, or nothing where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def conditions(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All that a reader of the figures needs to know of the machine."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in PACKAGES},
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found
