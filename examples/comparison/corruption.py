"""Rows spoilt on purpose, as careless data is: what the regime `dirty` mixes in.

| kind | the answer |
|---|---|
| `swapped` | another row's |
| `cut` | its first 10 to 50 % |
| `refusal` | a template that answers nothing |
| `garbled` | the letters of most words shuffled |
| `encoding` | accents and dashes written in one encoding and read in another |
"""

from __future__ import annotations

import random
from collections.abc import Callable

from comparison.rows import Row

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I am unable to answer this question.",
    "I cannot fulfil this request. Please consult a professional.",
    "Sorry, I don't have enough information to answer that.",
)
_ACCENTED = str.maketrans("aeioucnAEIOU-'\"", "áéíóúçñÁÉÍÓÚ–’”")


def _swapped(row: Row, other: Row, generator: random.Random) -> str:
    return other.response


def _cut(row: Row, other: Row, generator: random.Random) -> str:
    return row.response[: max(1, int(len(row.response) * generator.uniform(0.1, 0.5)))].strip() or row.response[:1]


def _refusal(row: Row, other: Row, generator: random.Random) -> str:
    return generator.choice(REFUSALS)


def _garbled(row: Row, other: Row, generator: random.Random) -> str:
    def shuffle(word: str) -> str:
        return "".join(generator.sample(word, len(word))) if generator.random() < 0.8 else word

    return " ".join(shuffle(word) for word in row.response.split(" "))


def _encoding(row: Row, other: Row, generator: random.Random) -> str:
    # Some letters: each takes two or three tokens, and answers would grow out of their rows.
    written = "".join(one.translate(_ACCENTED) if generator.random() < 0.3 else one for one in row.response)
    return (written if written != row.response else f"{row.response} …").encode().decode("latin-1")


CORRUPTIONS: dict[str, Callable[[Row, Row, random.Random], str]] = {
    "swapped": _swapped,
    "cut": _cut,
    "refusal": _refusal,
    "garbled": _garbled,
    "encoding": _encoding,
}


def corrupt(row: Row, other: Row, kind: str, generator: random.Random) -> Row:
    """A row with its answer spoilt.

    Args:
        row (`Row`): The row.
        other (`Row`): Whose answer a swapped one gets.
        kind (`str`): One of `CORRUPTIONS`.
        generator (`random.Random`): Draws.
    """
    return Row(row.id, row.domain, row.source, row.instruction, CORRUPTIONS[kind](row, other, generator))


def near_copy(row: Row, generator: random.Random) -> Row:
    """The same row with small differences: a word doubled in the instruction, a polite end, spaces, or other case."""
    words = row.instruction.split(" ")
    place = generator.randrange(len(words))
    instruction, response = generator.choice(
        [
            (" ".join([*words[: place + 1], *words[place:]]), row.response),
            (f"{row.instruction} Please.", row.response),
            (row.instruction[:1].swapcase() + row.instruction[1:], f"{row.response} "),
            (f" {row.instruction}", f"{row.response}\n"),
        ]
    )
    return Row(row.id, row.domain, row.source, instruction, response)
