"""Processes whose datasets differ in content or order, and in nothing that can be counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import setting
from tests.distributed.launch import fork

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that every process loads."""
    return setting.save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("when", "kind"),
    [
        ("attaching", "stored"),
        ("attaching", "map_style"),
        ("starting", "stored"),
        ("starting", "map_style"),
        ("binding", "map_style"),
        ("selecting", "stored"),
    ],
)
def test_other_rows_on_one_process_are_refused(when: str, kind: str, model_folder: Path, tmp_path: Path) -> None:
    """Each with the same numbers of tokens: before, such a run went to its end."""
    fork("multi_gpu", tmp_path, "other_rows", f"when={when}", f"{kind}=1", f"model={model_folder}").check()
    for rank in range(2):
        found = json.loads((tmp_path / f"other_rows.{rank}.json").read_text())
        assert "don't see the same: the fingerprint of the rows' content is" in found["error"], found
        assert "on process 1. They must build the same dataset" in found["error"]
