"""The whole table, as docs/errors.md shows it."""

from __future__ import annotations

from pathlib import Path

from spice_trainer.data.sample import SAMPLE_ROWS
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
    validation,
)
from tests.bad_input.scene import BadInput

ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"

TOPICS: dict[str, tuple[BadInput, ...]] = {
    "Settings": settings.ROWS,
    "The trainer's arguments": arguments.ROWS,
    "Datasets": datasets.ROWS,
    "Validation rows": validation.ROWS,
    "Collators": collators.ROWS,
    "Models and adapters": models.ROWS,
    "Proxies": proxies.ROWS,
    "Resuming": resuming.ROWS,
    "The output directory": files.ROWS,
    "`select_subset`": subsets.ROWS,
    "Manifests, exports and `spice-trainer select`": exports.ROWS,
}
TABLE = tuple(row for rows in TOPICS.values() for row in rows)

_PREAMBLE = """\
<!-- Written by `python -m tests.bad_input`; a test compares. -->
# Errors

Mistakes are noticed as early as they can be, most of them when SPICE is attached. The error says what is wrong, in
which row, layer or setting, the likely cause and the fix, and an attempt that fails alters nothing of the trainer, the
model, the dataset and the files. What only some row can show ({sample_rows} rows of a dataset are looked at before
training) ends the run at that row, by name.

Nothing that is read is executed: checkpoints are JSON and safetensors, never pickle, and no path in one is followed.
Chat templates are rendered by the tokenizer, in its sandbox. `trust_remote_code` is what you say, and off otherwise.

Below are {num_rows} mistakes: when each is noticed, what is raised, and what the text says. A test makes every one.
"""


def as_markdown() -> str:
    """All of docs/errors.md."""
    lines = [_PREAMBLE.format(num_rows=len(TABLE), sample_rows=SAMPLE_ROWS)]
    for topic, rows in TOPICS.items():
        lines += [f"## {topic}", "", "| what is wrong | noticed | what happens |", "|---|---|---|"]
        lines += [*(f"| {row.wrong} | {row.when} | {_outcome(row)} |" for row in rows), ""]
    return "\n".join(lines)


def _outcome(row: BadInput) -> str:
    says = " … ".join(row.says)
    for mark in "\\|<*_`[":
        says = says.replace(mark, f"\\{mark}")
    return f"{'a warning' if row.error is None else f'`{row.error.__name__}`'}: “{says}”"
