"""Rows that say almost the same: the share of word n-grams that two texts have in common.

    overlap(a, b) = |A ∩ B| / min(|A|, |B|)        A, B: the n-grams of a and b that are not common to many texts

An n-gram in more than 1 in 500 texts (and more than 20) is a phrase that a source begins all its questions with, and
tells nothing of two of them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

NGRAM = 8
OVERLAP = 0.5
COMMON_SHARE = 1 / 500
COMMON_LEAST = 20


def near_duplicates(held_out: Sequence[str], others: Sequence[str]) -> set[int]:
    """Find what comes near a held-out text.

    Args:
        held_out (`Sequence[str]`): Texts that must not be known.
        others (`Sequence[str]`): Texts to look through.

    Returns:
        `set[int]`: Positions in `others` of texts whose overlap with some held-out text is at least one half.
    """
    grams = [_ngrams(text) for text in (*held_out, *others)]
    counts = Counter(gram for found in grams for gram in found)
    most = max(COMMON_LEAST, COMMON_SHARE * len(grams))
    grams = [{gram for gram in found if counts[gram] <= most} for found in grams]
    places: dict[int, list[int]] = defaultdict(list)
    for position in range(len(held_out)):
        for gram in grams[position]:
            places[gram].append(position)
    near = set()
    for position in range(len(others)):
        found = grams[len(held_out) + position]
        shared = Counter(place for gram in found for place in places.get(gram, ()))
        if any(count >= OVERLAP * min(len(found), len(grams[place])) for place, count in shared.items()):
            near.add(position)
    return near


def _ngrams(text: str) -> set[int]:
    """Hashes of the n-grams: whole ones of 50,000 texts would take half a gigabyte."""
    # Signs count in long texts, where they tell formulas and code apart, and not in short ones: "Hello!", "hello".
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    if len(words) < NGRAM:
        words = re.findall(r"\w+", text.casefold()) or words
        return {hash(tuple(words))}
    return {hash(tuple(words[start : start + NGRAM])) for start in range(len(words) - NGRAM + 1)}
