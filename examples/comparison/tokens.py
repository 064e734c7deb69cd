"""A row as tokens, the prompt apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenRow:
    """A tokenised row: its first `num_prompt` tokens are given, the others are learned.

    `wanted` and `corrupt` are what a regime knows of a training row: whether it is one of those that the model shall
    do well on, and whether its answer was spoilt. No rule is told.
    """

    input_ids: list[int]
    num_prompt: int
    domain: str
    wanted: bool = True
    corrupt: bool = False

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
