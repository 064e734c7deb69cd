"""Adapters on models that differ in structure: all that trains is scored exactly, by which way the docs tell."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

from tests.support.adapters import ADAPTERS, FAMILIES, as_markdown, play_adapter
from tests.support.families import TOLERANCE, parts_of_the_docs

pytestmark = [pytest.mark.families, pytest.mark.slow]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_an_adapter_trains_is_scored_exactly(adapter: str, family: str) -> None:
    outcome = play_adapter(adapter, family)
    assert outcome.state in ("batches", "rows"), outcome
    assert 0 < outcome.error < TOLERANCE


def test_the_table_is_that_of_the_docs() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    if f"transformers=={version('transformers')}" not in pins:
        pytest.skip(f"the docs list the families of another transformers than {transformers.__version__}")
    assert parts_of_the_docs("tests.support.adapters")[1] == as_markdown(), "run `python -m tests.support.adapters`"
