"""Multiple-choice rows: a row's own choices, the answers of a source that has only a few, or other rows' answers.

| kind | wrong answers |
|---|---|
| `given` | the row's column `choices` |
| `options` | the other answers of its source, where all training rows of it share at most 6 (A to D, Yes and No) |
| `contrast` | answers of other test rows of its domain, of like length |
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from comparison.rows import Row

CHOICE_KINDS = ("given", "options", "contrast")
MOST_OPTIONS = 6
# An option that only one row has would be the mistake of that row.
LEAST_ROWS_OF_AN_OPTION = 3
# Answers whose lengths are nearest; some of them are drawn.
NEAREST_PER_ANSWER = 5


@dataclass(frozen=True)
class ChoiceRow:
    """A row with answers to choose between, the right one first."""

    row: Row
    kind: str
    answers: tuple[str, ...]


def build_choice_rows(
    test: Sequence[Row], train: Sequence[Row], *, num_choices: int, most: int, seed: int = 0
) -> list[ChoiceRow]:
    """Make multiple-choice rows of test rows.

    Args:
        test (`Sequence[Row]`): Rows to make them of, in order of preference.
        train (`Sequence[Row]`): Rows that tell which sources have few answers.
        num_choices (`int`): Answers of a `contrast` row, the right one included.
        most (`int`): Most rows of each kind.
        seed (`int`, *optional*, defaults to 0): Seed of the draw of wrong answers.

    Returns:
        `list[ChoiceRow]`
    """
    options = _options_of_sources(train)
    by_domain: dict[str, list[str]] = defaultdict(list)
    for row in test:
        if row.choices is None and row.response not in options.get(row.source, ()):
            by_domain[row.domain].append(row.response)
    found: dict[str, list[ChoiceRow]] = {kind: [] for kind in CHOICE_KINDS}
    for row in test:
        if row.choices is not None:
            kind, others = "given", [answer for answer in dict.fromkeys(row.choices) if answer != row.response]
        elif row.response in options.get(row.source, ()):
            kind, others = "options", [answer for answer in options[row.source] if answer != row.response]
        else:
            kind, others = "contrast", _of_like_length(row, by_domain[row.domain], num_choices - 1, seed)
        if others and len(found[kind]) < most:
            found[kind].append(ChoiceRow(row, kind, (row.response, *others)))
    return [one for kind in CHOICE_KINDS for one in found[kind]]


def _options_of_sources(train: Sequence[Row]) -> dict[str, list[str]]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        counts[row.source][row.response] += 1
    return {
        source: sorted(answers)
        for source, answers in counts.items()
        if 2 <= len(answers) <= MOST_OPTIONS and min(answers.values()) >= LEAST_ROWS_OF_AN_OPTION
    }


def _of_like_length(row: Row, answers: Sequence[str], number: int, seed: int) -> list[str]:
    others = sorted(
        {answer for answer in answers if answer.strip() != row.response.strip()},
        key=lambda answer: (abs(len(answer) - len(row.response)), answer),
    )
    if len(others) < number:
        return []
    return random.Random(f"{seed} {row.id}").sample(others[: NEAREST_PER_ANSWER * number], number)
