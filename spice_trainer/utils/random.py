"""Random states that come back as they were, whatever a user's collator or dataset draws in between."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Gives back the random states of Python, NumPy, torch and `device` as they were.

    The model draws nothing in evaluation mode, but a user's dataset transform or collator may, and the training run
    must not see that it was called for candidates.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def seeded_random_state(device: torch.device, seed: int) -> Iterator[None]:
    """Draws from a seed of its own within, and gives back the random states as they were.

    Torch's generators of the CPU and of `device` are seeded. Other devices' are left alone: they may be training.
    """
    with preserved_random_state(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def seed_from(*parts: object) -> int:
    """A seed that depends on all parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def unit_from(*parts: object) -> float:
    """A uniform number between 0 and 1, both excluded, that depends on all parts, the same on every machine."""
    return (int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little") + 0.5) / 2**48
