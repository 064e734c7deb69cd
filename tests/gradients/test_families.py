"""Every causal family of the installed transformers that stock trains is scored exactly, or refused by name."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

from tests.support.families import (
    FAMILIES,
    REFUSED,
    TOLERANCE,
    TRAINED,
    UNTRAINED,
    as_markdown,
    parts_of_the_docs,
    play,
)

pytestmark = [pytest.mark.families, pytest.mark.slow]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stock_trains_is_scored_exactly_or_refused_by_name(family: str, trained: str) -> None:
    outcome = play(family, trained)
    expected = {"untrained": UNTRAINED, "refused": REFUSED}
    for state, table in expected.items():
        assert (outcome.state == state) == ((family, trained) in table), outcome
    for table in expected.values():
        assert table.get((family, trained), ("",))[0] in outcome.text
    assert outcome.error < TOLERANCE


def test_few_are_refused() -> None:
    assert len({family for family, _ in REFUSED}) <= 3


def test_the_list_is_that_of_the_docs() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    if f"transformers=={version('transformers')}" not in pins:
        pytest.skip(f"the docs list the families of another transformers than {transformers.__version__}")
    assert parts_of_the_docs()[1] == as_markdown(), "run `python -m tests.support.families`"
