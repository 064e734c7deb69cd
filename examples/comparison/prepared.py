"""The tokens that all arms share: training rows, held-out rows, multiple-choice rows.

Rows longer than `max_length` are dropped, not cut, so that every loss is of a whole answer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from comparison.choices import build_choice_rows
from comparison.json_lines import write_json
from comparison.regimes import Candidates, RegimeRows, draw_regime
from comparison.rows import Row, Splits, read_rows, split_rows
from comparison.settings import DataSettings, Settings
from comparison.tokens import ChoiceTokens, TokenRow, tokenize
from spice_trainer.sampling.schedule import plan_step

DRAWN_BY = ("regimes", "corruption", "rows", "near_duplicates", "tokens")


@dataclass(frozen=True)
class PreparedData:
    """What all arms train and are measured on, and how it was made (JSON values)."""

    train: list[TokenRow]
    target: list[TokenRow]
    validation: list[TokenRow]
    test: list[TokenRow]
    choices: list[ChoiceTokens]
    report: dict[str, Any]

    def input_ids(self) -> list[list[int]]:
        """The token ids of every row."""
        answers = [answer for one in self.choices for answer in one.answers]
        return [row.input_ids for row in (*self.train, *self.target, *self.validation, *self.test, *answers)]


class RowFile:
    """The file of rows, read and split once for all regimes, and only if one needs it."""

    def __init__(self, data: DataSettings, tokenizer: Any) -> None:
        self.data = data
        self.tokenizer = tokenizer

    @cached_property
    def rows(self) -> list[Row]:
        """All rows."""
        return read_rows(self.data.path)

    @cached_property
    def splits(self) -> Splits:
        """Their splits."""
        return split_rows(self.rows, validation_share=self.data.validation_share, test_share=self.data.test_share)

    @cached_property
    def candidates(self) -> Candidates:
        """Those that fit, tokenised."""
        return Candidates.of(self.rows, self.splits, self.tokenize, self.data.max_length)

    def tokenize(self, row: Row) -> TokenRow:
        """The model's tokens of a row."""
        return tokenize(self.tokenizer, row.instruction, row.response, row.domain)

    def fingerprint(self) -> list[Any]:
        """Tells files, tokenizers and ways to draw apart, without reading the file."""
        state = Path(self.data.path).stat()
        tokenizer = self.tokenizer
        # How rows are drawn is part of what they are.
        sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in DRAWN_BY]
        drawn_by = hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]
        names = [tokenizer.chat_template, len(tokenizer), tokenizer.eos_token_id]
        return [state.st_size, state.st_mtime_ns, *names, drawn_by]


def rows_per_step(settings: Settings) -> int:
    """Candidates of an optimizer step."""
    num_slots = settings.batch_size // settings.micro_batch_size
    shape = plan_step(
        pool_size=settings.pool_size,
        num_selected=settings.num_selected,
        pools_per_step=None,
        samples_per_step=settings.batch_size,
        num_slots=num_slots,
    )
    return shape.pools_per_step * settings.pool_size


def prepare_data(settings: Settings, tokenizer: Any, file: RowFile | None = None) -> PreparedData:
    """Read, split and tokenise the comparison's rows.

    Args:
        settings ([`Settings`]): The comparison.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        file ([`RowFile`], *optional*): One that several regimes share.

    Returns:
        [`PreparedData`]

    Raises:
        ValueError: If there are fewer training rows than `num_steps` steps draw.
    """
    file = RowFile(settings.data, tokenizer) if file is None else file
    if settings.regime is not None:
        return _prepare_regime(settings, file)
    data, splits = settings.data, file.splits
    too_long: Counter[str] = Counter()

    def fitting(split: str, most: int | None) -> tuple[list[Row], list[TokenRow]]:
        kept, tokens = [], []
        for row in getattr(splits, split):
            if most is not None and len(kept) == most:
                break
            tokenized = tokenize(tokenizer, row.instruction, row.response, row.domain)
            if len(tokenized.input_ids) <= data.max_length:
                kept.append(row)
                tokens.append(tokenized)
            else:
                too_long[split] += 1
        return kept, tokens

    drawn = rows_per_step(settings)
    wanted_steps = None if settings.num_steps is None else settings.num_steps // settings.num_epochs
    wanted = data.train_rows if wanted_steps is None else wanted_steps * drawn
    train_rows, train = fitting("train", wanted)
    # Whole steps alone: every step of every arm has its full batch.
    num_steps = len(train) // drawn
    if num_steps < (wanted_steps or 1):
        raise ValueError(
            f"{wanted_steps or 1} steps draw {drawn:,} candidates each, and there are {len(train):,} "
            f"training rows of at most {data.max_length} tokens. Lower num_steps to {num_steps}, or pool_size, or use "
            "more rows."
        )
    train_rows, train = train_rows[: num_steps * drawn], train[: num_steps * drawn]
    num_held_out = None if data.validation_rows is None else data.validation_rows + data.target_rows
    _, held_out = fitting("validation", num_held_out)
    target, validation = held_out[: data.target_rows], held_out[data.target_rows :]
    test_rows, test = fitting("test", data.test_rows)
    # Of all test rows, as many are needed of each kind.
    made = build_choice_rows(
        splits.test, splits.train, num_choices=settings.evaluation.num_choices, most=settings.evaluation.choice_rows
    )
    choices = [
        ChoiceTokens(
            one.kind, [tokenize(tokenizer, one.row.instruction, text, one.row.domain) for text in one.answers]
        )
        for one in made
    ]
    choices = [one for one in choices if all(len(row.input_ids) <= data.max_length for row in one.answers)]
    groups = {"train": train, "target": target, "validation": validation, "test": test}
    report = {
        "num_steps": num_steps * settings.num_epochs,
        **_describe(groups),
        "choice_rows": dict(Counter(one.kind for one in choices)),
        "dropped": splits.dropped | {f"{name}_too_long": count for name, count in sorted(too_long.items())},
        "before_limits": _sizes(splits),
        "fingerprint": _fingerprint([train_rows, held_out, test_rows, choices]),
    }
    return PreparedData(train, target, validation, test, choices, report)


def _prepare_regime(settings: Settings, file: RowFile) -> PreparedData:
    """The rows of a regime, from `<output_dir>/rows.json` where they were drawn before."""
    path = Path(settings.output_dir) / "rows.json"
    made_of = json.loads(json.dumps([settings.shared(), file.fingerprint()]))
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["made_of"] == made_of:
        groups = {name: [TokenRow(**row) for row in rows] for name, rows in kept["rows"].items()}
        return PreparedData(**groups, choices=[], report=kept["report"])
    assert settings.regime is not None and settings.num_steps is not None
    num_train = settings.num_steps // settings.num_epochs * rows_per_step(settings)
    found: RegimeRows = draw_regime(settings.regime, file.candidates, settings.data, num_train, file.tokenize)
    groups = {name: getattr(found, name) for name in ("train", "target", "validation", "test")}
    report = {
        "num_steps": settings.num_steps,
        **_describe(groups),
        "wanted_share": sum(row.wanted for row in found.train) / num_train,
        "damage": dict(sorted(found.damage.items())),
        "choice_rows": {},
        "dropped": file.splits.dropped,
        "before_limits": _sizes(file.splits),
        "fingerprint": _fingerprint(list(groups.values())),
    }
    rows = {name: [asdict(row) for row in group] for name, group in groups.items()}
    write_json(path, {"made_of": made_of, "report": report, "rows": rows})
    return PreparedData(**groups, choices=[], report=report)


def _describe(groups: dict[str, list[TokenRow]]) -> dict[str, Any]:
    """Numbers of rows, domains and answer tokens; of the test rows each one's, for the report's errors."""
    train = groups["train"]
    return {
        "rows": {name: len(rows) for name, rows in groups.items()},
        "rows_by_domain": {
            name: dict(sorted(Counter(row.domain for row in rows).items())) for name, rows in groups.items()
        },
        "mean_label_tokens": sum(row.num_labels for row in train) / len(train),
        "label_tokens": {
            name: quartiles([row.num_labels for row in train if row.domain == name])
            for name in sorted({row.domain for row in train})
        },
        "test_label_tokens": [row.num_labels for row in groups["test"]],
    }


def quartiles(values: Sequence[int]) -> list[int]:
    """The values a quarter, half and three quarters up."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)]


def _sizes(splits: Splits) -> dict[str, int]:
    return {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}


def _fingerprint(parts: Sequence[Sequence[Any]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for one in part:
            digest.update(repr(asdict(one)).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
