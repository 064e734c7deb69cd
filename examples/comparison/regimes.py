"""Regimes: training rows that differ from the wanted ones in a known way, drawn from one file.

    file ─ splits ─ rows of at most max_length tokens ┬ train, by shares of domains, lengths, damage
                                                      └ target, validation, test, of the wanted domains

Held-out rows have answers that no other row of the file has; so have training rows but easy ones. So no test row
shares its instruction or its answer with a row that anything else reads, the test rows of other `test_split`s
included.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from comparison.corruption import CORRUPTIONS, corrupt, near_copy
from comparison.rows import Row, Splits, hash_share, normalise
from comparison.settings import DataSettings, Regime
from comparison.tokens import TokenRow


@dataclass(frozen=True)
class Candidate:
    """A row of the file and its tokens."""

    row: Row
    tokens: TokenRow

    @property
    def is_easy(self) -> bool:
        """Whether its answer is a letter, a number or a word or two."""
        return self.tokens.num_labels <= MOST_EASY_TOKENS


MOST_EASY_TOKENS = 6
# How far answers drawn to lengths may be from them, in the mean, as a share.
MOST_LENGTH_GAP = 0.05

Tokenizer = Callable[[Row], TokenRow]


@dataclass(frozen=True)
class RegimeRows:
    """The rows of a regime, and of each training row what was done to it (`""`: nothing)."""

    train: list[TokenRow]
    target: list[TokenRow]
    validation: list[TokenRow]
    test: list[TokenRow]
    damage: Counter[str]


@dataclass(frozen=True)
class Candidates:
    """Rows that fit, by split; of each whether no other row of the file has its answer."""

    splits: dict[str, list[Candidate]]
    repeated: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[Row], splits: Splits, tokenize: Tokenizer, max_length: int) -> Candidates:
        """Tokenise the rows of all splits.

        Args:
            rows (`Sequence[Row]`): The whole file.
            splits ([`Splits`]): Its splits.
            tokenize (`Callable[[Row], TokenRow]`): The model's tokens of a row.
            max_length (`int`): Longer rows are left out.
        """
        counts = Counter(normalise(row.response) for row in rows)
        fitting = {
            name: [one for one in (Candidate(row, tokenize(row)) for row in getattr(splits, name))]
            for name in ("train", "validation", "test")
        }
        return cls(
            {
                name: [one for one in group if len(one.tokens.input_ids) <= max_length]
                for name, group in fitting.items()
            },
            frozenset(text for text, count in counts.items() if count > 1),
        )

    def of_split(self, split: str, seed: int, *, unique: bool = True) -> list[Candidate]:
        """A split's rows in an order of the seed; by default those whose answer no other row has."""
        found = self.splits[split]
        if unique:
            found = [one for one in found if normalise(one.row.response) not in self.repeated]
        return sorted(found, key=lambda one: hash_share(f"{seed} {one.row.id} {one.row.instruction}"))


def draw_regime(
    regime: Regime, candidates: Candidates, data: DataSettings, num_train: int, tokenize: Tokenizer
) -> RegimeRows:
    """Draw the rows of a regime.

    Args:
        regime ([`Regime`]): What they are like.
        candidates ([`Candidates`]): The file's rows.
        data ([`DataSettings`]): Numbers of rows, `test_split`, and the seed of the draws.
        num_train (`int`): Training rows.
        tokenize (`Callable[[Row], TokenRow]`): The model's tokens of a row that was changed.

    Returns:
        [`RegimeRows`]

    Raises:
        ValueError: If the file has too few rows of some kind.
    """
    generator = random.Random(f"{regime.name} {data.seed}")
    train = candidates.of_split("train", data.seed)
    if regime.easy:
        train = [one for one in train if not one.is_easy]
    num_easy, num_copies, num_corrupt = (
        round(share * num_train) for share in (regime.easy, regime.copies, regime.corrupt)
    )
    num_plain = num_train - num_easy - num_copies
    plain = _by_shares(train, regime.shares, num_plain, regime.lengths_of, generator, f"regime {regime.name!r}")
    wanted = [regime.target is None or one.row.domain in regime.target for one in plain]
    rows = [replace(one.tokens, wanted=is_wanted) for one, is_wanted in zip(plain, wanted, strict=True)]
    damage: Counter[str] = Counter()
    for place in generator.sample(range(num_plain), num_corrupt):
        kind, rows[place] = _corrupted(plain, place, num=damage.total(), tokenize=tokenize, data=data, draw=generator)
        damage[kind] += 1
    sound = [place for place, row in enumerate(rows) if not row.corrupt]
    for number in range(num_copies):
        place = generator.choice(sound)
        near = tokenize(near_copy(plain[place].row, generator)) if number % 2 else plain[place].tokens
        if len(near.input_ids) > data.max_length:
            near = plain[place].tokens
        damage["near copy" if near is not plain[place].tokens else "exact copy"] += 1
        rows.append(replace(near, wanted=False))
    if num_easy:
        easy = [one for one in candidates.of_split("train", data.seed, unique=False) if one.is_easy]
        rows += [replace(one.tokens, wanted=False, domain="easy") for one in _take(easy, num_easy, "easy rows")]
    if damage:
        # Only what is left as it was is wanted.
        rows = [replace(row, wanted=row.wanted and not row.corrupt) for row in rows]
    generator.shuffle(rows)
    held_out = {}
    for split in ("validation", "test"):
        found = candidates.of_split(split, data.seed)
        held_out[split] = [one for one in found if not (regime.easy and one.is_easy)]
    num_target, num_validation, num_test = data.target_rows, data.validation_rows, data.test_rows
    if num_validation is None or num_test is None:
        raise ValueError("Regimes need data.validation_rows and data.test_rows, how many rows they are.")
    shares = _shares_of_target(regime, plain)
    lengths = regime.lengths_of
    where = f"regime {regime.name!r}, held-out rows"
    first = _by_shares(held_out["validation"], shares, num_target + num_validation, lengths, generator, where)
    # Split after split, so that the draws of one are the same whatever comes behind it.
    left, test = held_out["test"], []
    for _ in range(data.test_split + 1):
        test = _by_shares(left, shares, num_test, lengths, random.Random(f"{regime.name} {data.seed} test"), where)
        taken = {id(one) for one in test}
        left = [one for one in left if id(one) not in taken]
    generator.shuffle(first)
    tokens = [one.tokens for one in first]
    return RegimeRows(rows, tokens[:num_target], tokens[num_target:], [one.tokens for one in test], damage)


def _corrupted(
    plain: Sequence[Candidate], place: int, *, num: int, tokenize: Tokenizer, data: DataSettings, draw: random.Random
) -> tuple[str, TokenRow]:
    """A row spoilt in the next of the ways in which it still fits."""
    kinds = list(CORRUPTIONS)
    for attempt in range(20 * len(kinds)):
        kind = kinds[(num + attempt // 20) % len(kinds)]
        other = plain[draw.randrange(len(plain))].row
        if other.response == plain[place].row.response:
            continue
        made = tokenize(corrupt(plain[place].row, other, kind, draw))
        if len(made.input_ids) <= data.max_length:
            return kind, replace(made, wanted=False, corrupt=True)
    raise ValueError(f"No corruption of this row fits in {data.max_length} tokens: {plain[place].row.instruction!r}")


def _shares_of_target(regime: Regime, plain: Sequence[Candidate]) -> dict[str, float]:
    """Shares of held-out rows by domain: of the wanted ones as in training."""
    counts = Counter(one.row.domain for one in plain)
    wanted = {name: count for name, count in counts.items() if regime.target is None or name in regime.target}
    if not wanted:
        raise ValueError(f"Regime {regime.name!r}: no training row is of the domains {regime.target}.")
    return {name: count / sum(wanted.values()) for name, count in sorted(wanted.items())}


def _by_shares(
    candidates: Sequence[Candidate],
    shares: dict[str, float] | None,
    number: int,
    lengths_of: str | None,
    generator: random.Random,
    where: str,
) -> list[Candidate]:
    """Rows by shares of domains (`None`: as they come); with `lengths_of`, of that domain's answer lengths."""
    if shares is None:
        return _take(candidates, number, f"rows, {where}")
    by_domain: dict[str, list[Candidate]] = defaultdict(list)
    for one in candidates:
        by_domain[one.row.domain].append(one)
    found: list[Candidate] = []
    for name, share in sorted(largest_remainders(shares, number).items()):
        group = by_domain[name]
        if lengths_of is not None and name != lengths_of:
            lengths = [one.tokens.num_labels for one in by_domain[lengths_of]]
            found += _of_lengths(group, generator.choices(lengths, k=share), f"rows of {name!r}, {where}")
        else:
            found += _take(group, share, f"rows of {name!r}, {where}")
    return found


def _take(candidates: Sequence[Candidate], number: int, what: str) -> list[Candidate]:
    if len(candidates) < number:
        raise ValueError(
            f"{what}: {number:,} are needed, and the file has {len(candidates):,} that fit. Lower num_steps or raise "
            "num_epochs, change the shares, or give more rows."
        )
    return list(candidates[:number])


def _of_lengths(candidates: Sequence[Candidate], lengths: Sequence[int], what: str) -> list[Candidate]:
    """For each answer length the row of the nearest one that is left.

    Raises:
        ValueError: If they are not near.
    """
    _take(candidates, len(lengths), what)
    left = sorted(candidates, key=lambda one: one.tokens.num_labels)
    keys = [one.tokens.num_labels for one in left]
    found = []
    for length in lengths:
        place = bisect_left(keys, length)
        if place == len(keys) or (place and length - keys[place - 1] < keys[place] - length):
            place -= 1
        found.append(left.pop(place))
        keys.pop(place)
    gaps = [abs(one.tokens.num_labels - length) for one, length in zip(found, lengths, strict=True)]
    if sum(gaps) > MOST_LENGTH_GAP * sum(lengths):
        near = sum(gap <= MOST_LENGTH_GAP * length for gap, length in zip(gaps, lengths, strict=True))
        raise ValueError(
            f"{what}: of the {len(lengths):,} that are needed {near:,} are as long as wanted, and the others are "
            f"far from it ({sum(gaps) / len(gaps):.1f} tokens in the mean). Lower the share of this domain, or give "
            "more rows."
        )
    return found


def largest_remainders(shares: dict[str, float], number: int) -> dict[str, int]:
    """Whole numbers in the ratio of some shares that sum to `number`."""
    total = sum(shares.values())
    exact = {name: share / total * number for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (counts[name] - exact[name], name))[: number - sum(counts.values())]:
        counts[name] += 1
    return counts
