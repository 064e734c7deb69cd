"""The rows of a comparison, and their splits: by hash, without duplicates across them.

    share of row x = sha256(normalised instruction of x) / 2²⁵⁶      test, validation or train by where it falls

The same instruction is in one split only, whatever else the file holds and in whichever order. Of rows that share an
instruction the first is kept. Then what nearly duplicates a test row is dropped from validation, and what nearly
duplicates a test or validation row is dropped from training, so that held-out rows stay a sample of the data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.near_duplicates import near_duplicates


@dataclass(frozen=True)
class Row:
    """An instruction and its answer.

    Args:
        id (`str`): A name; without a column `id`, a hash of the texts.
        domain (`str`): What losses are grouped by; without a column `domain`, `"all"`.
        source (`str`): Where it comes from; without a column `source`, the domain.
        instruction (`str`): What is given.
        response (`str`): What is learned.
        choices (`tuple[str, ...]`, *optional*): Answers to choose between, the response among them.
    """

    id: str
    domain: str
    source: str
    instruction: str
    response: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Splits:
    """Rows by what they are for, each in an order that follows from their hashes, and how many were dropped why."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    dropped: dict[str, int]


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of rows.

    Args:
        path (`str` or `Path`): JSON lines, or the same compressed (`.gz`), with the columns `instruction` and
            `response`; `id`, `domain`, `source` and `choices` where there are any. Others are ignored.

    Returns:
        `list[Row]`

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no such row; it is named by its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no rows at {path} (looked for from {Path.cwd()}). Set `data: {{path: ...}}` in the YAML file, "
            "or pass --data, to JSON lines with the columns instruction and response."
        )
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_read_row(line, f"{path}, line {number}"))
    return rows


def _read_row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
        instruction, response = values["instruction"], values["response"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: no row with `instruction` and `response` ({error!r}): {line[:80]!r}") from error
    if not (isinstance(instruction, str) and isinstance(response, str) and instruction.strip() and response.strip()):
        raise ValueError(f"{where}: instruction and response must be texts that are not empty: {line[:80]!r}")
    choices = values.get("choices")
    if choices is not None and (response not in choices or len(set(choices)) < 2):
        raise ValueError(f"{where}: choices must hold the response and another answer, got {choices!r}.")
    name = values.get("id") or hashlib.sha256(f"{instruction}\0{response}".encode()).hexdigest()[:16]
    domain = str(values.get("domain") or "all")
    source = str(values.get("source") or domain)
    return Row(str(name), domain, source, instruction, response, tuple(choices) if choices is not None else None)


def normalise(text: str) -> str:
    """The text without differences of case, spacing and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_share(text: str) -> float:
    """A number from 0 to 1 that follows from the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_rows(rows: Sequence[Row], *, validation_share: float, test_share: float) -> Splits:
    """Split rows by the hash of their instruction, and drop duplicates across splits.

    Args:
        rows (`Sequence[Row]`): All rows.
        validation_share (`float`): Share of the instructions held out for validation.
        test_share (`float`): Share held out for testing.

    Returns:
        [`Splits`]: With the numbers dropped as `same_instruction`, `train_near_held_out` and `validation_near_test`.

    Raises:
        ValueError: If a share is not between 0 and 1, or a split is empty.
    """
    if not (validation_share > 0 and test_share > 0 and validation_share + test_share < 1):
        raise ValueError(
            f"validation_share={validation_share} and test_share={test_share} must be above 0, and below 1 together."
        )
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(normalise(row.instruction), row)
    test, validation, train = [], [], []
    # In an order that has nothing to do with the file's, nor with the split.
    for text in sorted(first, key=lambda text: hash_share(f"order {text}")):
        share = hash_share(text)
        split = test if share < test_share else validation if share < test_share + validation_share else train
        split.append(first[text])
    near_test = near_duplicates([row.instruction for row in test], [row.instruction for row in validation])
    validation = [row for position, row in enumerate(validation) if position not in near_test]
    near = near_duplicates([row.instruction for row in (*test, *validation)], [row.instruction for row in train])
    train = [row for position, row in enumerate(train) if position not in near]
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        if not split:
            raise ValueError(
                f"No row of {len(rows)} is left for {name}: raise its share, or look for rows that repeat each other."
            )
    dropped = {
        "same_instruction": len(rows) - len(first),
        "validation_near_test": len(near_test),
        "train_near_held_out": len(near),
    }
    return Splits(train, validation, test, dropped)
