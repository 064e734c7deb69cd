"""The comparison's rows: nothing that is held out is known from training, and every loss is of a whole answer."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples.comparisons import tiny_comparison, tiny_file

# First: it makes the examples' folder importable.
from comparison.choices import build_choice_rows  # isort: skip
from comparison.model import load_tokenizer  # isort: skip
from comparison.near_duplicates import NGRAM, near_duplicates  # isort: skip
from comparison.prepared import prepare_data  # isort: skip
from comparison.rows import Row, normalise, read_rows, split_rows  # isort: skip
from comparison.settings import load_settings  # isort: skip
from comparison.tokens import tokenize  # isort: skip

WORDS = [f"word{number}" for number in range(40)]


def make_row(instruction: str, response: str = "answer", **values: Any) -> Row:
    fields = {"id": instruction, "domain": "all", "source": "all"} | values
    return Row(instruction=instruction, response=response, **fields)


def slow_overlap(first: str, second: str) -> float:
    """Overlap of n-grams, without the rule about common ones."""
    grams = []
    for text in (first, second):
        words = text.lower().split()
        width = min(NGRAM, len(words))
        grams.append({" ".join(words[start : start + width]) for start in range(len(words) - width + 1)})
    return len(grams[0] & grams[1]) / min(len(grams[0]), len(grams[1]))


def split(rows: list[Row]) -> Any:
    return split_rows(rows, validation_share=0.2, test_share=0.2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_no_held_out_row_is_known(seed: int) -> None:
    generator = random.Random(seed)
    rows = []
    for _ in range(60):
        text = " ".join(generator.choices(WORDS, k=generator.randint(3, 25)))
        rows.append(make_row(text))
        if generator.random() < 0.5:
            # The same in other clothes, or with a word changed, or continued.
            words = text.split()
            words[generator.randrange(len(words))] = "other"
            copies = [f"  {text.upper()}\n", " ".join(words), f"{text} and then something else"]
            rows.append(make_row(generator.choice(copies), "another answer"))
    generator.shuffle(rows)
    splits = split(rows)
    held_out = [*splits.test, *splits.validation]
    assert splits.train and splits.validation and splits.test
    for one in held_out:
        for other in splits.train:
            assert normalise(one.instruction) != normalise(other.instruction)
            assert slow_overlap(one.instruction, other.instruction) < 0.5
    for one in splits.test:
        assert all(slow_overlap(one.instruction, other.instruction) < 0.5 for other in splits.validation)
    # Every row is somewhere, or counted as dropped; test rows are dropped for nobody's sake.
    assert len(held_out) + len(splits.train) + sum(splits.dropped.values()) == len(rows)


def test_near_duplicates_against_all_pairs() -> None:
    generator = random.Random(3)
    texts = [" ".join(generator.choices(WORDS[:12], k=generator.randint(8, 14))) for _ in range(40)]
    texts += [text.replace(WORDS[0], WORDS[30]) for text in texts]
    held_out, others = texts[:40], texts[40:]
    expected = {
        position for position, text in enumerate(others) if any(slow_overlap(text, other) >= 0.5 for other in held_out)
    }
    assert near_duplicates(held_out, others) == expected
    assert 0 < len(expected) < len(others)


def test_a_phrase_that_a_source_begins_with_makes_no_duplicates() -> None:
    phrase = "choose the right one of the following answers and write its letter"
    own = [" ".join(random.Random(number).choices(WORDS, k=8)) for number in range(120)]
    texts = [f"{phrase} {text}" for text in own]
    assert slow_overlap(texts[0], texts[1]) < 0.5
    longer = [f"{phrase} {phrase} {text}" for text in own]
    assert slow_overlap(longer[0], longer[1]) > 0.5
    assert near_duplicates(longer[:60], longer[60:]) == set()
    # But the same question behind it is one.
    assert near_duplicates(longer[:60], [*longer[60:], f"{longer[3]} indeed"]) == {60}


def test_splits_follow_from_the_texts_alone(tmp_path: Path) -> None:
    tiny_file(tmp_path / "rows.jsonl")
    rows = read_rows(tmp_path / "rows.jsonl")
    splits = split(rows)
    shuffled = list(rows)
    random.Random(1).shuffle(shuffled)
    assert split(shuffled) == splits
    # More rows move none from one split to another.
    more = split([*rows, make_row("something that was not there before")])
    assert {row.id for row in splits.test} <= {row.id for row in more.test}
    assert not {row.id for row in more.train} & {row.id for row in (*splits.test, *splits.validation)}
    shares = [len(part) / len(rows) for part in (splits.train, splits.validation, splits.test)]
    assert all(abs(share - wanted) < 0.08 for share, wanted in zip(shares, (0.6, 0.2, 0.2), strict=True))


def test_of_rows_with_the_same_instruction_the_first_is_kept() -> None:
    rows = [make_row(" ".join(WORDS[number : number + 9]) + f" {number * 'x'}", str(number)) for number in range(20)]
    again = make_row(rows[4].instruction.upper(), "later")
    splits = split([*rows, again])
    assert splits.dropped["same_instruction"] == 1
    assert again not in [*splits.train, *splits.validation, *splits.test]


def test_files(tmp_path: Path) -> None:
    lines = [
        {"instruction": "a", "response": "b"},
        {"instruction": "a", "response": "c", "domain": "d", "choices": ["c", "e"]},
    ]
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_rows(path)
    assert first.domain == first.source == "all" and len(first.id) == 16 and first.id != second.id
    assert second.source == "d" and second.choices == ("c", "e")
    with pytest.raises(FileNotFoundError, match=r"no rows at .*none.jsonl .*pass --data"):
        read_rows(tmp_path / "none.jsonl")
    for line, message in (
        ('{"instruction": "a"', "line 2: no row"),
        ('{"instruction": "a"}', "line 2: no row with `instruction` and `response`"),
        ("[1]", "line 2: no row"),
        ('{"instruction": "a", "response": " "}', "line 2: instruction and response must be texts"),
        ('{"instruction": "a", "response": "b", "choices": ["c"]}', "line 2: choices must hold the response"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(lines[0]) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "bad.jsonl")


def test_choice_rows() -> None:
    letters = [make_row(f"letter {number}", "AB"[number % 2], source="letters") for number in range(8)]
    # One row's slip is no option, and makes the source none of a few answers.
    slips = [make_row(f"slip {number}", "Yes" if number else "yes?", source="slips") for number in range(9)]
    essays = [
        make_row(f"essay {number}", "x" * (10 + number % 7 + 90 * (number % 2)), source="essays", domain="d")
        for number in range(14)
    ]
    given_row = make_row("given", "b", choices=("a", "b", "c", "b"))
    test = [given_row, letters[0], *essays]
    rows = build_choice_rows(test, [*letters, *slips], num_choices=3, most=5)
    by_kind = {kind: [row for row in rows if row.kind == kind] for kind in ("given", "options", "contrast")}
    assert by_kind["given"][0].answers == ("b", "a", "c")
    assert by_kind["options"][0].answers == ("A", "B")
    assert len(by_kind["contrast"]) == 5
    for one in by_kind["contrast"]:
        assert one.answers[0] == one.row.response and len(set(one.answers)) == 3
        assert set(one.answers) <= {row.response for row in essays}
    assert build_choice_rows(test, [*letters, *slips], num_choices=3, most=5) == rows
    assert not [row for row in build_choice_rows(slips[:1], slips, num_choices=3, most=5) if row.kind == "options"]
    # With few answers to draw from there is no such row, rather than an easier one.
    assert not build_choice_rows(essays[:2], letters, num_choices=3, most=5)


def test_wrong_answers_are_of_like_length() -> None:
    rows = [make_row(str(number), "x" * (number + 1), domain="d") for number in range(200)]
    (one,) = build_choice_rows([rows[100], *rows[:100], *rows[101:]], [], num_choices=4, most=1)
    assert all(abs(len(answer) - 101) <= 8 for answer in one.answers)


def test_prepared_rows_hold_whole_answers(tmp_path: Path) -> None:
    config = load_settings(tiny_comparison(tmp_path, data={"max_length": 26}))
    tokenizer = load_tokenizer(config.model)
    data = prepare_data(config, tokenizer)
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    texts = {tuple(tokenize(tokenizer, row["instruction"], row["response"], "").input_ids) for row in rows.values()}
    tokens = [*data.train, *data.validation, *data.test]
    assert all(tuple(row.input_ids) in texts and len(row.input_ids) <= 26 for row in tokens)
    assert data.report["dropped"]["train_too_long"] > 0
    # 4 steps of 2 pools of 8.
    assert len(data.train) == 64 and data.report["num_steps"] == 4
    assert len({tuple(row.input_ids) for row in tokens}) == len(tokens)
    row = data.test[0]
    shown = tokenizer.decode([label for label in row.features()["labels"] if label != -100])
    assert shown.endswith("</s>") and len(shown.split()) == row.num_labels
    assert {one.kind for one in data.choices} == {"options", "contrast"}
    for one in data.choices:
        assert len({tuple(answer.input_ids[: answer.num_prompt]) for answer in one.answers}) == 1
    again = prepare_data(config, tokenizer)
    assert again.report == data.report
    fewer = load_settings(tiny_comparison(tmp_path, data={"max_length": 26, "test_rows": 14}))
    assert prepare_data(fewer, tokenizer).report["fingerprint"] != data.report["fingerprint"]


def test_too_few_rows(tmp_path: Path) -> None:
    config = load_settings(tiny_comparison(tmp_path, num_steps=100))
    with pytest.raises(ValueError, match=r"100 steps draw 16 .*there are 2\d\d .*Lower num_steps to 1"):
        prepare_data(config, load_tokenizer(config.model))
    config = load_settings(tiny_comparison(tmp_path, num_steps=None, data={"train_rows": 50}))
    assert prepare_data(config, load_tokenizer(config.model)).report["num_steps"] == 3
