"""Regimes: what training rows are like, and that no held-out row is known from elsewhere."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.examples.comparisons import tiny_comparison

from comparison.corruption import CORRUPTIONS, REFUSALS, corrupt, near_copy  # isort: skip
from comparison.model import load_tokenizer  # isort: skip
from comparison.prepared import PreparedData, RowFile, prepare_data  # isort: skip
from comparison.regimes import largest_remainders  # isort: skip
from comparison.rows import Row, normalise  # isort: skip
from comparison.settings import Settings, load_settings  # isort: skip

# 5 steps of 2 pools of 8: 80 training rows.
STEPS = 5
DATA = {"validation_share": 0.2, "test_share": 0.3, "validation_rows": 9, "target_rows": 8, "test_rows": 10}
REGIMES: dict[str, dict[str, Any]] = {
    "clean": {},
    "dirty": {"corrupt": 0.3, "copies": 0.1},
    "targeted": {"shares": {"math": 0.25, "code": 0.75}, "target": ["math"]},
    "imbalanced": {"easy": 0.5},
    "length_neutral": {"shares": {"math": 0.2, "code": 0.8}, "target": ["math"], "lengths_of": "math"},
}


def write_rows(folder: Path, number: int = 1500) -> None:
    """Mathematics answers in 6 to 9 words, code in 1 to 14, and general rows in one of two words."""
    generator = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{generator.randint(3, 60)}" for _ in range(generator.randint(least, most)))

    rows = []
    for place in range(number):
        domain = ("math", "code", "general")[place % 3]
        answers = {"math": words(6, 9), "code": words(1, 14), "general": generator.choice(["w5", "w6"])}
        rows.append({"id": f"r{place}", "domain": domain, "instruction": words(9, 12), "response": answers[domain]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(folder: Path, name: str, **data: Any) -> tuple[Settings, PreparedData]:
    if not (folder / "rows.jsonl").exists():
        write_rows(folder)
    regimes = [{"name": regime, **values} for regime, values in REGIMES.items()]
    config = tiny_comparison(folder, regimes=regimes, num_steps=STEPS, data=DATA | data)
    (settings,) = load_settings(config).by_regime([name])
    return settings, prepare_data(settings, load_tokenizer(settings.model))


def answer(row: Any) -> tuple[int, ...]:
    return tuple(row.input_ids[row.num_prompt :])


def question(row: Any) -> tuple[int, ...]:
    return tuple(row.input_ids[: row.num_prompt])


@pytest.mark.parametrize("name", REGIMES)
def test_held_out_rows_share_nothing_with_others(name: str, tmp_path: Path) -> None:
    splits = [prepared(tmp_path, name, test_split=number)[1] for number in range(3)]
    for number, data in enumerate(splits):
        assert (len(data.target), len(data.validation), len(data.test)) == (8, 9, 10) and not data.choices
        others = [data.train, data.target, data.validation, *(one.test for one in splits[:number])]
        groups = [*others, data.test]
        for part in (question, answer):
            known = Counter(text for group in groups for text in {part(row) for row in group})
            held_out = [part(row) for row in (*data.test, *data.validation, *data.target)]
            assert len(set(held_out)) == 27 and all(known[text] == 1 for text in held_out)
        # The rows that rules see are the same, whichever test rows are read.
        assert (data.train, data.target, data.validation) == (splits[0].train, splits[0].target, splits[0].validation)


def test_shares_and_wanted_rows(tmp_path: Path) -> None:
    _, data = prepared(tmp_path, "targeted")
    assert Counter(row.domain for row in data.train) == {"math": 20, "code": 60}
    assert all(row.wanted == (row.domain == "math") for row in data.train)
    assert {row.domain for row in (*data.target, *data.validation, *data.test)} == {"math"}
    assert data.report["wanted_share"] == 0.25 and data.report["rows_by_domain"]["target"] == {"math": 8}
    assert data.report["test_label_tokens"] == [row.num_labels for row in data.test]
    _, clean = prepared(tmp_path, "clean")
    assert all(row.wanted and not row.corrupt for row in clean.train)
    assert {row.domain for row in clean.test} == {"code", "math"}
    # The order is of chance: no domain comes first.
    places = [place for place, row in enumerate(data.train) if row.wanted]
    assert 25 < fmean(places) < 55


def test_easy_rows(tmp_path: Path) -> None:
    _, data = prepared(tmp_path, "imbalanced")
    easy = [row for row in data.train if row.domain == "easy"]
    assert len(easy) == 40 and all(not row.wanted and row.num_labels <= 6 for row in easy)
    others = [row for row in (*data.train, *data.target, *data.validation, *data.test) if row.domain != "easy"]
    assert all(row.wanted and row.num_labels > 6 for row in others)


def test_equal_answer_lengths(tmp_path: Path) -> None:
    _, plain = prepared(tmp_path, "targeted")
    _, data = prepared(tmp_path, "length_neutral")

    def lengths(rows: Any, domain: str) -> list[int]:
        return sorted(row.num_labels for row in rows if row.domain == domain)

    assert max(lengths(plain.train, "code")) > 1.3 * max(lengths(plain.train, "math"))
    math, code = (lengths(data.train, domain) for domain in ("math", "code"))
    assert (len(math), len(code)) == (16, 64)
    assert min(math) - 2 <= min(code) and max(code) <= max(math) + 2
    assert abs(fmean(code) - fmean(math)) < 1
    assert data.report["label_tokens"]["code"] == [code[16], code[32], code[47]]


def test_damage(tmp_path: Path) -> None:
    _, data = prepared(tmp_path, "dirty")
    spoilt = [row for row in data.train if row.corrupt]
    assert len(spoilt) == 24 and not any(row.wanted for row in spoilt)
    damage = data.report["damage"]
    assert sum(damage[kind] for kind in CORRUPTIONS) == 24 and min(damage[kind] for kind in CORRUPTIONS) >= 4
    assert damage["exact copy"] == 4 and damage["near copy"] == 4
    # 48 rows as they were, each once; of copies none is wanted.
    assert sum(row.wanted for row in data.train) == 48
    twice = [count for count in Counter(tuple(row.input_ids) for row in data.train).values() if count > 1]
    assert sum(count - 1 for count in twice) >= 4
    assert all(len(row.input_ids) <= 64 for row in data.train)


def test_each_kind_of_damage() -> None:
    row = Row("r", "d", "s", "Who wrote 'Faust'?", "Goethe wrote it in two parts - the second one late.")
    other = Row("o", "d", "s", "What?", "Another answer.")
    made = {kind: corrupt(row, other, kind, random.Random(1)) for kind in CORRUPTIONS}
    assert all(one.instruction == row.instruction and one.response != row.response for one in made.values())
    assert made["swapped"].response == other.response
    assert row.response.startswith(made["cut"].response) and len(made["cut"].response) <= len(row.response) / 2
    assert made["refusal"].response in REFUSALS
    letters = [Counter(one.response) for one in (made["garbled"], row)]
    assert letters[0] == letters[1]
    written = made["encoding"].response.encode("latin-1").decode()
    assert len(written) == len(row.response) and written.encode().decode("latin-1") == made["encoding"].response
    plain = Row("r", "d", "s", "Who?", "zzz")
    assert corrupt(plain, other, "encoding", random.Random(0)).response.startswith("zzz ")
    for seed in range(20):
        near = near_copy(row, random.Random(seed))
        assert (near.instruction, near.response) != (row.instruction, row.response)
        shared = set(normalise(row.instruction).split()) & set(normalise(near.instruction).split())
        assert len(shared) >= 2 and normalise(near.response) == normalise(row.response)


def test_rows_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, data = prepared(tmp_path, "dirty")
    again = prepared(tmp_path, "dirty")[1]
    assert again == data
    _, other = prepared(tmp_path, "dirty", seed=1)
    assert other.train != data.train and other.report["damage"].keys() == data.report["damage"].keys()
    prepared(tmp_path, "dirty")
    monkeypatch.setattr(RowFile, "rows", property(lambda file: pytest.fail("the file was read again")))
    assert prepared(tmp_path, "dirty")[1] == data
    # Drawn by other code, or from other rows.
    monkeypatch.setattr("comparison.prepared.DRAWN_BY", ("regimes",))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        prepared(tmp_path, "dirty")
    monkeypatch.undo()
    write_rows(tmp_path, 1470)
    assert prepare_data(settings, load_tokenizer(settings.model)).train != data.train


def test_largest_remainders() -> None:
    assert largest_remainders({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}
    assert largest_remainders({"a": 0.12, "b": 0.44, "c": 0.44}, 120) == {"a": 14, "b": 53, "c": 53}
    generator = random.Random(0)
    for _ in range(50):
        shares = {str(name): generator.random() + 0.01 for name in range(generator.randint(1, 6))}
        counts = largest_remainders(shares, 97)
        total = sum(shares.values())
        assert sum(counts.values()) == 97
        assert all(abs(counts[name] - 97 * share / total) < 1 for name, share in shares.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"easy": 1.0}, "easy is a share"),
        ({"corrupt": 0.6, "copies": 0.4}, "leave no row as it is"),
        ({"shares": {"math": 0}}, "shares must be above 0"),
        ({"lengths_of": "math"}, "lengths_of='math' is not among its shares"),
        ({"colour": 1}, "Regime has no field 'colour'"),
    ],
)
def test_wrong_regimes(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(tiny_comparison(tmp_path, regimes=[{"name": "one", **values}]))


def test_unknown_regimes_and_too_few_rows(tmp_path: Path) -> None:
    write_rows(tmp_path)
    settings = load_settings(tiny_comparison(tmp_path, regimes=[{"name": "one"}, {"name": "two"}]))
    with pytest.raises(ValueError, match="No regime is named 'three'. There are one, two"):
        settings.by_regime(["one", "three"])
    assert [one.output_dir.rsplit("/", 1)[1] for one in settings.by_regime()] == ["one", "two"]
    with pytest.raises(ValueError, match="No regime is named 'one'. There are none"):
        load_settings(tiny_comparison(tmp_path)).by_regime(["one"])
    with pytest.raises(ValueError, match="Two regimes have one name"):
        load_settings(tiny_comparison(tmp_path, regimes=[{"name": "one"}, {"name": "one"}]))
    with pytest.raises(
        ValueError, match=r"rows of 'math', regime 'targeted'.*: 80 are needed, and the file has \d\d that fit"
    ):
        REGIMES["targeted"]["shares"], before = {"math": 3, "code": 0.01}, REGIMES["targeted"]["shares"]
        try:
            prepared(tmp_path, "targeted", test_share=0.7)
        finally:
            REGIMES["targeted"]["shares"] = before
    # Mathematics has no answers as short or as long as code has.
    with pytest.raises(ValueError, match=r"rows of 'math'.*of the 16 that are needed \d+ are as long as wanted"):
        REGIMES["length_neutral"]["lengths_of"] = "code"
        try:
            prepared(tmp_path, "length_neutral")
        finally:
            REGIMES["length_neutral"]["lengths_of"] = "math"
    with pytest.raises(ValueError, match="no training row is of the domains"):
        REGIMES["targeted"]["target"] = ["law"]
        try:
            prepared(tmp_path, "targeted")
        finally:
            REGIMES["targeted"]["target"] = ["math"]
