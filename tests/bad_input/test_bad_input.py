"""The table of bad input: each mistake is noticed when it says, in its words, and alters nothing."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.scene import BadInput, Scene
from tests.bad_input.table import ERRORS, TABLE, as_markdown


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Every `train()` collects garbage, and goes through all that the libraries hold."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.mark.filterwarnings("ignore:The following arguments do not match the ones in the `trainer_state.json`")
# Adapters that PEFT itself warns of.
@pytest.mark.filterwarnings(
    "ignore:(Model has|Adapter cannot be set|Already found|Found missing|Model with):UserWarning"
)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_bad_input(
    row: BadInput, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if row.skip:
        pytest.skip("the installed libraries, or this system, don't know the case")
    folder = tmp_path / "scene"
    folder.mkdir()
    scene = Scene(folder, monkeypatch, cache)
    attempt = row.prepare(scene)
    caplog.clear()
    before = scene.state(row.when)
    if row.error is None:
        attempt()
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        (text,) = (message for message in warnings if message.startswith("SPICE: "))
    else:
        with pytest.raises(row.error) as caught:
            attempt()
        assert type(caught.value) is row.error
        text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    position = 0
    for words in row.says:
        assert words in text[position:], text
        position = text.index(words, position)
    after = scene.state(row.when)
    trained = scene.trainer is not None and scene.trainer.state.global_step > 0
    compared = before.keys() - ({"weights"} if trained else set())
    if row.error is None:
        # The run goes on: SPICE is attached, or has trained.
        compared = {"datasets"}
    assert [key for key in compared if before[key] != after[key]] == []


def test_the_table_is_that_of_the_docs() -> None:
    assert ERRORS.read_text(encoding="utf-8") == as_markdown(), "run `python -m tests.bad_input`"
    assert len({row.name for row in TABLE}) == len(TABLE) == len({row.wrong + row.when for row in TABLE})
