"""The tokens that all arms share: training rows, held-out rows, multiple-choice rows.

Rows longer than `max_length` are dropped, not cut, so that every loss is of a whole answer.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comparison.choices import build_choice_rows
from comparison.rows import Row, Splits, read_rows, split_rows
from comparison.settings import Settings
from spice_trainer.sampling.schedule import plan_step


@dataclass(frozen=True)
class TokenRow:
    """A tokenised row: its first `num_prompt` tokens are given, the others are learned."""

    input_ids: list[int]
    num_prompt: int
    domain: str

    @property
    def num_labels(self) -> int:
        """Tokens of the answer."""
        return len(self.input_ids) - self.num_prompt

    def features(self) -> dict[str, list[int]]:
        """The row as a Trainer takes it, the prompt's labels −100."""
        labels = [-100] * self.num_prompt + self.input_ids[self.num_prompt :]
        return {"input_ids": self.input_ids, "attention_mask": [1] * len(self.input_ids), "labels": labels}


@dataclass(frozen=True)
class ChoiceTokens:
    """A multiple-choice row: its answers as rows, the right one first."""

    kind: str
    answers: list[TokenRow]


@dataclass(frozen=True)
class PreparedData:
    """What all arms train and are measured on, and how it was made (JSON values)."""

    train: list[TokenRow]
    validation: list[TokenRow]
    test: list[TokenRow]
    choices: list[ChoiceTokens]
    report: dict[str, Any]


def tokenize(tokenizer: Any, instruction: str, response: str, domain: str) -> TokenRow:
    """Tokenise a row with the chat template; prompt and answer apart, so that no token spans their border."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": instruction}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = [{"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(messages + answer, tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "This tokenizer's chat template renders a prompt differently once its answer follows, so the answer's "
                f"tokens cannot be told from the prompt's: {whole!r} does not start with {prompt!r}."
            )
    else:
        prompt = f"{instruction}\n\n"
        whole = f"{prompt}{response}{tokenizer.eos_token}"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
    return TokenRow([*prompt_ids, *response_ids], len(prompt_ids), domain)


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


def prepare_data(settings: Settings, tokenizer: Any) -> PreparedData:
    """Read, split and tokenise the comparison's rows.

    Args:
        settings ([`Settings`]): The comparison.
        tokenizer (`PreTrainedTokenizerBase`): The model's.

    Returns:
        [`PreparedData`]

    Raises:
        ValueError: If there are fewer training rows than `num_steps` steps draw.
    """
    data = settings.data
    splits = split_rows(read_rows(data.path), validation_share=data.validation_share, test_share=data.test_share)
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
    wanted = data.train_rows if settings.num_steps is None else settings.num_steps * drawn
    train_rows, train = fitting("train", wanted)
    # Whole steps alone: every step of every arm has its full batch.
    num_steps = len(train) // drawn
    if num_steps < (settings.num_steps or 1):
        raise ValueError(
            f"{settings.num_steps or 1} steps draw {drawn:,} candidates each, and there are {len(train):,} "
            f"training rows of at most {data.max_length} tokens. Lower num_steps to {num_steps}, or pool_size, or use "
            "more rows."
        )
    train_rows, train = train_rows[: num_steps * drawn], train[: num_steps * drawn]
    _, validation = fitting("validation", data.validation_rows)
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
    report = {
        "num_steps": num_steps,
        "rows": {"train": len(train), "validation": len(validation), "test": len(test)},
        "rows_by_domain": {
            name: dict(sorted(Counter(row.domain for row in tokens).items()))
            for name, tokens in (("train", train), ("validation", validation), ("test", test))
        },
        "choice_rows": dict(Counter(one.kind for one in choices)),
        "dropped": splits.dropped | {f"{name}_too_long": count for name, count in sorted(too_long.items())},
        "before_limits": _sizes(splits),
        "fingerprint": _fingerprint([train_rows, validation, test_rows, choices]),
        "mean_label_tokens": sum(row.num_labels for row in train) / len(train),
    }
    return PreparedData(train, validation, test, choices, report)


def _sizes(splits: Splits) -> dict[str, int]:
    return {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}


def _fingerprint(parts: Sequence[Sequence[Any]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for one in part:
            digest.update(repr(asdict(one)).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
