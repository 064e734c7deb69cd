"""Settings and fixtures shared by all tests: no network, one seed, no GPU unless there is one."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping
import pytest
import torch

# `--jaxtyping-packages` in pyproject.toml names it.
import tests.support.array_types  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def wrong_arrays(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays are checked against their annotations, but where a test is about the message of a wrong one."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", "wrong_arrays" in request.keywords)
