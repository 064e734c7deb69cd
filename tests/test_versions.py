"""The ranges of `pyproject.toml` begin with what `make test-oldest` runs, and hold what `make test` runs."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.oldest

ROOT = Path(__file__).parents[1]


def read_pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): Version(release) for package, release in pins}


def read_ranges(*extras: str) -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    ranges = {requirement.name.lower(): requirement for requirement in map(Requirement, lines)}
    ranges.pop("spice-trainer", None)  # an extra that has other extras in it
    return ranges


RANGES = read_ranges("sft", "rich", "test-core")


@pytest.mark.parametrize("name", RANGES)
def test_a_range_begins_with_the_oldest_version_that_is_tested(name: str) -> None:
    bounds = [bound for bound in RANGES[name].specifier if bound.operator == ">="]
    assert len(bounds) == 1, f"{RANGES[name]} has no oldest version"
    oldest = read_pins("constraints-oldest.txt")[name]
    if name == "torch":
        assert oldest == read_pins("constraints.txt")[name] >= Version(bounds[0].version)
    else:
        assert oldest == Version(bounds[0].version)


@pytest.mark.parametrize("name", read_ranges("sft", "rich", "demo", "test-core", "test", "lint"))
def test_a_range_holds_the_pinned_version(name: str) -> None:
    ranges = read_ranges("sft", "rich", "demo", "test-core", "test", "lint")
    assert ranges[name].specifier.contains(read_pins("constraints.txt")[name])


def test_what_the_package_imports_is_required() -> None:
    """A library that only comes along with another may stop to."""
    imported = {
        module
        for path in (ROOT / "spice_trainer").rglob("*.py")
        for module in re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    }
    libraries = imported - sys.stdlib_module_names - {"spice_trainer"}
    assert "torch" in libraries
    assert libraries <= read_ranges("sft", "rich").keys()
