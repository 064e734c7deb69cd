"""Older versions of libraries, on which some tests expect less."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def before(library: str, release: str) -> bool:
    """Whether the installed version of a library is older than a release."""
    return Version(version(library)) < Version(release)
