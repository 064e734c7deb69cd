"""Imports point down: a room sees the layers below its own, and none beside it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import spice_trainer

PACKAGE = Path(spice_trainer.__file__).parent
# From the top. Rooms on one line may not see each other. The picture with its reasons is in docs/architecture.md.
LAYERS = """
__init__ __main__
cli
trainer subset pilot
reporting
recording
sampling
proxy
scoring
theory
gradients selection
data config
distributed utils
"""
FLOORS = {room: number for number, line in enumerate(LAYERS.split("\n")) for room in line.split()}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str) -> list[tuple[int, str]]:
    """Line and room of every import within the package, those in functions and for type checkers included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            is_package = node.module == "spice_trainer"
            modules = [f"spice_trainer.{alias.name}" for alias in node.names] if is_package else [node.module or ""]
        for module in modules:
            first, _, rest = module.partition(".")
            if first == "spice_trainer":
                found.append((node.lineno, rest.partition(".")[0] or "__init__"))
    return found


def arrows_up(room: str, source: str, name: str) -> list[str]:
    return [
        f"{name}:{line}: {room} imports {other}"
        for line, other in imported_rooms(source)
        if other != room and FLOORS.get(other, 0) <= FLOORS[room]
    ]


@pytest.mark.parametrize("room", sorted({room_of(path) for path in PACKAGE.rglob("*.py")}))
def test_imports_point_down(room: str) -> None:
    found = []
    for path in sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) == room):
        found += arrows_up(room, path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE.parent)))
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "from spice_trainer.scoring.scorer import GradientScorer",
        "import spice_trainer.trainer.attach",
        "def f():\n    from spice_trainer.sampling import schedule",
        "from spice_trainer import SpiceConfig",
        "from spice_trainer.gradients.sketch import GradientSketch",
    ],
)
def test_an_arrow_up_or_aside_is_seen(source: str) -> None:
    (arrow,) = arrows_up("selection", source, "file.py")
    line = source.count("\n") + 1
    assert arrow.startswith(f"file.py:{line}: selection imports ")
    assert arrows_up("selection", "from spice_trainer.config import SpiceConfig\nimport torch", "file.py") == []


def test_no_two_modules_import_each_other() -> None:
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }
    waiting = {}
    for name, path in names.items():
        seen = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                # Either the module itself, or modules of the package that it is.
                seen |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        waiting[name] = {other for other in seen if other in names and other != name}
    # Take away whoever imports nobody that is left, until nobody can be taken away.
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert waiting == {}
