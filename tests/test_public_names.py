"""The package's public names: imported when asked for, seen by type checkers, and no module's name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import spice_trainer
from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.subset.manifest import SelectedRow, SubsetManifest

ROOT = Path(__file__).parents[1]
SLOW_LIBRARIES = ["transformers", "peft", "accelerate", "trl", "datasets"]
USES = {
    "import": "import spice_trainer; dir(spice_trainer); spice_trainer.SpiceConfig()",
    "manifest": """
import sys
from spice_trainer.subset.manifest import SubsetManifest, rebuild_subset
manifest = SubsetManifest.load(sys.argv[1])
assert rebuild_subset(manifest, [{"text": "a"}, {"text": "b"}]) == [{"text": "b"}]
""",
    "select": "import torch; from spice_trainer import select; assert select(torch.eye(4), 2).indices == (0, 1)",
}


@pytest.fixture(scope="module")
def manifest_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    rows = [{"text": "a"}, {"text": "b"}]
    SubsetManifest(
        rows=(
            SelectedRow(
                index=1,
                step=0,
                epoch=0,
                pool=0,
                order=0,
                gain=None,
                conflict=None,
                score=None,
                gradient_norm=None,
                label_tokens=3,
            ),
        ),
        num_rows=2,
        dataset_fingerprint=fingerprint_dataset(rows),
        model={},
        config={},
        samples_per_step=1,
        seed=0,
    ).save(folder)
    return folder


@pytest.mark.parametrize("use", USES)
def test_what_needs_no_trainer_does_not_import_its_libraries(use: str, manifest_folder: Path) -> None:
    script = f"{USES[use]}\nimport sys\nprint([name for name in {SLOW_LIBRARIES} if name in sys.modules])"
    command = [sys.executable, "-c", script, str(manifest_folder)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout.strip()) == (0, "[]"), found.stderr


def test_the_function_is_not_replaced_by_a_module() -> None:
    """Importing a module sets its name on the package, which must not be a public one's."""
    modules = {module.name for module in pkgutil.iter_modules(spice_trainer.__path__)}
    assert "selection" in modules and not modules & set(spice_trainer.__all__)


def test_type_checkers_see_the_names_where_they_are() -> None:
    tree = ast.parse(Path(spice_trainer.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    declared = {
        alias.name: node.module
        for node in [*tree.body, *block.body]
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("spice_trainer.")
        for alias in node.names
    }
    assert declared.keys() | {"__version__"} == set(spice_trainer.__all__) <= set(dir(spice_trainer))
    for name, module in declared.items():
        assert getattr(spice_trainer, name) is getattr(importlib.import_module(str(module)), name), name


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'spice_trainer' has no attribute 'selct'"):
        _ = spice_trainer.selct


def test_a_source_tree_that_is_not_installed_can_be_imported() -> None:
    program = """
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name == "spice-trainer":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import spice_trainer
assert spice_trainer.__version__ == "0+unknown", spice_trainer.__version__
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
