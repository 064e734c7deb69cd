"""The whole table, and its place in README."""

from __future__ import annotations

from pathlib import Path

from tests.bad_input import (
    arguments,
    collators,
    datasets,
    exports,
    files,
    models,
    proxies,
    resuming,
    settings,
    subsets,
)
from tests.bad_input.scene import BadInput

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- `python -m tests.bad_input` writes what follows. -->"
END = "</details>"

TOPICS: dict[str, tuple[BadInput, ...]] = {
    "Settings": settings.ROWS,
    "The trainer's arguments": arguments.ROWS,
    "Datasets": datasets.ROWS,
    "Collators": collators.ROWS,
    "Models and adapters": models.ROWS,
    "Proxies": proxies.ROWS,
    "Resuming": resuming.ROWS,
    "The output directory": files.ROWS,
    "`select_subset`": subsets.ROWS,
    "Manifests, exports and `spice-trainer select`": exports.ROWS,
}
TABLE = tuple(row for rows in TOPICS.values() for row in rows)


def as_markdown() -> str:
    """The table as README shows it."""
    lines = [
        BEGIN,
        f"<summary>{len(TABLE)} mistakes: when each is noticed, what is raised, and what the text says</summary>",
    ]
    for topic, rows in TOPICS.items():
        lines += ["", f"**{topic}**", "", "| what is wrong | noticed | what happens |", "|---|---|---|"]
        lines += [f"| {row.wrong} | {row.when} | {_outcome(row)} |" for row in rows]
    return "\n".join([*lines, ""])


def _outcome(row: BadInput) -> str:
    says = " … ".join(row.says)
    for mark in "\\|<*_`[":
        says = says.replace(mark, f"\\{mark}")
    return f"{'a warning' if row.error is None else f'`{row.error.__name__}`'}: “{says}”"


def in_readme() -> tuple[str, str, str]:
    """README before the table, the table, and README after it."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, BEGIN + table, END + after
