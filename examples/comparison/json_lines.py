"""Files of JSON and of JSON lines that survive being killed while they are written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a line, on the disk before this returns. What an interrupted writer left of a line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(values).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read whole lines; one without its end was never finished, and is left out. No file has no lines.

    Raises:
        ValueError: If a finished line is no JSON; the message names it.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}). Remove the line: what it was of is done again."
            ) from error
    return found


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only some lines of a file, whole or not at all when this is interrupted."""
    kept = [line for line in read_lines(path) if keep(line)]
    if path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)


def write_json(path: Path, values: Any) -> None:
    """Write a file of JSON, whole or not at all when this is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
