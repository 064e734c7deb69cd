"""Tables on the terminal: with rich where it is installed, else plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """Columns, rows of text, and lines below them."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(cells)} cells in a table of {len(self.columns)} columns.")
        self.rows.append([str(cell) for cell in cells])


def print_table(table: Table) -> None:
    """Prints one table, numbers to the right."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        print(plain_table(table), flush=True)
        return
    # As wide as it is: a table cut to 80 columns in a log file is of no use.
    width = max(map(len, plain_table(table).splitlines())) + 3 * len(table.columns) + 2
    console = Console(width=max(80, width), highlight=False)
    shown = RichTable(title=table.title, title_justify="left")
    for index, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown, markup=False)
    for note in table.notes:
        console.print(note, markup=False)
    console.print()


def plain_table(table: Table) -> str:
    """The table as text."""
    lines = [list(table.columns), *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(["", table.title, *text, *table.notes])


def bytes_shown(number: float) -> str:
    """`1.24 GiB`, `310 MiB` or `12 KiB`."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.2f} {unit}" if unit == "GiB" else f"{number / size:.0f} {unit}"
    return f"{number / 2**10:.0f} KiB"


def passed(value: float, target: float, *, at_most: bool = True) -> str:
    """Whether a target is reached, in words."""
    reached = value <= target if at_most else value >= target
    return f"target {'at most' if at_most else 'at least'} {target:g}: {'reached' if reached else 'MISSED'}"
