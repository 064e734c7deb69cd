"""The arms beside the rules, and a laboratory of regimes and stored states as a whole."""

from __future__ import annotations

import json
import math
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.examples.comparisons import results, start, tiny_comparison, without_clocks
from tests.examples.test_comparison_regimes import write_rows
from tests.examples.test_comparison_report import make_line
from tests.examples.test_comparison_runs import KILL_AT_LINE

from comparison.json_lines import append_line  # isort: skip
from comparison.model import load_tokenizer  # isort: skip
from comparison.plan import Run, missing_runs  # isort: skip
from comparison.prepared import PreparedData, prepare_data  # isort: skip
from comparison.report import build_tables, write_report  # isort: skip
from comparison.run import describe_picks, num_updates  # isort: skip
from comparison.settings import Settings, load_settings  # isort: skip
from comparison.summary import error_over_rows  # isort: skip
from comparison.trainers import arm_config, check_arms, ordered_rows, pools_of  # isort: skip

STEPS = 4
ARMS: list[dict[str, Any]] = [
    {"name": "random", "kind": "random"},
    {"name": "label", "kind": "domain_random"},
    {"name": "pool", "kind": "pool"},
    {"name": "less", "fields": {"strategy": "less"}},
    {"name": "wide", "batch_size": 8, "fields": {"num_selected": 4}},
    {"name": "as long", "kind": "same_seconds", "seconds_of": "less"},
    {"name": "long", "kind": "random", "num_steps": 8, "learning_rates": [1e-3]},
    {"name": "full", "kind": "full"},
]
LAB: dict[str, Any] = {
    "arms": ARMS,
    "num_steps": STEPS,
    "num_epochs": 2,
    "frozen_states": True,
    "adapter": {"dropout": 0.0},
    "data": {
        "validation_share": 0.2,
        "test_share": 0.3,
        "validation_rows": 9,
        "target_rows": 8,
        "test_rows": 10,
    },
    "regimes": [
        {"name": "targeted", "shares": {"math": 0.25, "code": 0.75}, "target": ["math"]},
        {"name": "dirty", "corrupt": 0.25, "copies": 0.1},
    ],
    "evaluation": {"choice_rows": 0},
}


def lab(folder: Path, **overrides: Any) -> Path:
    if not (folder / "rows.jsonl").exists():
        write_rows(folder, 600)
    return tiny_comparison(folder, **(LAB | overrides))


def prepared(folder: Path, **overrides: Any) -> tuple[Settings, PreparedData]:
    settings = load_settings(lab(folder, **overrides)).by_regime()[0]
    return settings, prepare_data(settings, load_tokenizer(settings.model))


def test_arms_whose_rows_are_known_beforehand(tmp_path: Path) -> None:
    settings, data = prepared(tmp_path)
    # 2 epochs of 2 steps of 2 pools of 8.
    assert len(data.train) == 32 and data.report["num_steps"] == STEPS
    check_arms(settings, 32, STEPS)
    schedule = pools_of(settings, settings.arm("label"), 32, 7)
    pools = [pool for step in range(STEPS) for pool in schedule.pools(step // 2, step % 2).pools]
    every = ordered_rows(settings, settings.arm("pool"), data, 7, STEPS)
    assert every == [row for pool in pools for row in pool]
    assert Counter(every) == dict.fromkeys(range(32), 2)
    picked = ordered_rows(settings, settings.arm("label"), data, 7, STEPS)
    assert picked is not None and len(picked) == 16
    for number, pool in enumerate(pools):
        picks = picked[2 * number : 2 * number + 2]
        wanted = [row for row in pool if data.train[row].wanted]
        assert len(set(picks)) == 2 and set(picks) <= set(pool)
        # Among wanted rows as long as there are any.
        assert sum(data.train[row].wanted for row in picks) == min(2, len(wanted))
    assert ordered_rows(settings, settings.arm("label"), data, 7, STEPS) == picked
    assert ordered_rows(settings, settings.arm("label"), data, 8, STEPS) != picked
    full = ordered_rows(settings, settings.arm("full"), data, 7, 16)
    assert full is not None and sorted(full[:32]) == sorted(full[32:]) == list(range(32)) and full[:32] != full[32:]
    assert ordered_rows(settings, settings.arm("less"), data, 7, STEPS) is None


def test_chances_of_a_random_draw_by_label(tmp_path: Path) -> None:
    """Every wanted row of a pool is as likely as another."""
    settings, data = prepared(tmp_path)
    data = replace(data, train=[replace(row, wanted=place % 4 > 0) for place, row in enumerate(data.train)])
    counts: Counter[int] = Counter()
    for seed in range(400):
        counts.update(ordered_rows(settings, settings.arm("label"), data, seed, STEPS) or [])
    assert all(data.train[row].wanted for row in counts) and len(counts) == 24
    # 6,400 draws of 24 rows: 267 each, and a standard deviation of about 16.
    assert all(190 < count < 345 for count in counts.values())


def test_what_was_picked(tmp_path: Path) -> None:
    _, data = prepared(tmp_path)
    wanted = [place for place, row in enumerate(data.train) if row.wanted]
    others = [place for place, row in enumerate(data.train) if not row.wanted]
    rows = [replace(row, corrupt=place in others[:2]) for place, row in enumerate(data.train)]
    found = describe_picks(replace(data, train=rows), [[wanted[0], wanted[1]], [others[0], wanted[0]]])
    lengths = sorted(rows[place].num_labels for place in (wanted[0], wanted[1], others[0], wanted[0]))
    assert found == {
        "wanted": 0.75,
        "corrupt": 0.25,
        "unique": 0.75,
        "label_tokens": [lengths[1], lengths[2], lengths[2]],
    }


def test_an_arm_for_the_seconds_of_another(tmp_path: Path) -> None:
    settings, data = prepared(tmp_path)
    arm, run = settings.arm("as long"), Run("as long", 0, 1e-2, STEPS)
    lines: list[dict[str, Any]] = []

    def names() -> list[str]:
        return [one.arm for one in missing_runs(settings, lines, STEPS) if one.seed == 0]

    others = ["random", "label", "pool", "less", "wide", "long", "full"]
    assert names() == others
    lines.append(make_line("random", 0, 1.0) | {"num_updates": 4, "test_row_losses": None})
    # Of another seed, and so nothing to go by.
    lines.append(make_line("less", 1, 1.0) | {"num_updates": 4})
    assert "as long" not in names()
    lines.append(make_line("less", 0, 1.0) | {"num_updates": 4})
    # Behind the others, of which random and less are done.
    assert names() == [name for name in others if name not in ("random", "less")] + ["as long"]
    # Less: 30 seconds. Random: 9 in 4 steps.
    lines[2]["seconds"] = {"scoring": 20.0, "selecting": 1.0, "training": 9.0, "evaluation": 50.0}
    assert num_updates(settings, arm, data, run, lines) == round(30 / (9 / 4)) == 13
    assert num_updates(settings, settings.arm("full"), data, run, lines) == 16
    assert num_updates(settings, settings.arm("long"), data, replace(run, num_steps=8), lines) == 8
    assert arm_config(settings, arm).strategy == "random"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"arms": [*ARMS, {"name": "x", "kind": "same_seconds"}]}, "kind same_seconds and seconds_of go together"),
        ({"arms": [*ARMS, {"name": "x", "kind": "same_seconds", "seconds_of": "y"}]}, "has seconds_of='y'"),
        ({"arms": [{"name": "x", "kind": "pool", "fields": {"strategy": "less"}}]}, "trains on all rows, so fields"),
        ({"arms": [{"name": "x", "kind": "full", "num_steps": 3}]}, "it has no steps of its own"),
        ({"arms": [{"name": "x", "batch_size": 3}]}, "batch_size=3 is no multiple of micro_batch_size=2"),
        ({"num_epochs": 3}, "num_steps=4 is no multiple of num_epochs=3"),
        ({"data": {"test_split": -1}}, "data.test_split and data.target_rows must be 0 or more"),
        ({"data": {"test_rows": None}}, "Regimes need num_steps, data.validation_rows and data.test_rows"),
    ],
)
def test_arms_that_are_not_possible(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(lab(tmp_path, **overrides))


def test_an_arm_with_another_number_of_rows_a_step(tmp_path: Path) -> None:
    settings, data = prepared(tmp_path)
    assert pools_of(settings, settings.arm("wide"), 32, 0).shape.budgets == (4, 4)
    assert settings.arm("wide").identity == {"kind": "spice", "num_selected": 4, "batch_size": 8}
    narrow, _ = prepared(tmp_path, arms=[{"name": "x", "batch_size": 8}])
    with pytest.raises(ValueError, match="An epoch of the arm 'x' has 1 steps, fewer than the comparison's 2"):
        check_arms(narrow, len(data.train), STEPS)


def test_errors_over_rows_by_hand() -> None:
    tokens = [1, 2, 4, 3]
    lines = [
        {"seed": 0, "test_row_losses": [1.0, 5.0, 2.0, 3.0]},
        {"seed": 1, "test_row_losses": [2.0, 3.0, 2.0, 1.0]},
    ]
    others = [{"seed": 1, "test_row_losses": [1.0, 1.0, 1.0, 1.0]}, {"seed": 2, "test_row_losses": [9.0] * 4}]
    # Seed 1 alone: gaps 1, 2, 1, 0.
    by_row = [1.0, 1.0, 0.25, 0.0]
    found = error_over_rows(lines, others, tokens, "loss_per_row")
    assert found == pytest.approx(stdev(by_row) / 2)
    # 4 / 10 a token: gaps less that 0.6, 1.2, −0.6, −1.2.
    found = error_over_rows(lines, others, tokens, "loss_per_token")
    assert found == pytest.approx(math.sqrt(4 / 3 * (0.36 + 1.44 + 0.36 + 1.44)) / 10)
    assert error_over_rows(lines, others[1:], tokens, "loss_per_row") is None
    assert error_over_rows([{"seed": 1}], others, tokens, "loss_per_row") is None
    # Against drawing the rows anew.
    generator = random.Random(0)
    sizes = [generator.randint(1, 30) for _ in range(60)]
    gaps = [generator.gauss(0.1, 1.0) * size for size in sizes]
    one, other = [{"seed": 0, "test_row_losses": gaps}], [{"seed": 0, "test_row_losses": [0.0] * 60}]
    for metric in ("loss_per_token", "loss_per_row"):
        means = []
        for _ in range(3000):
            rows = generator.choices(range(60), k=60)
            total = sum(gaps[row] for row in rows) / sum(sizes[row] for row in rows)
            means.append(total if metric == "loss_per_token" else fmean(gaps[row] / sizes[row] for row in rows))
        assert error_over_rows(one, other, sizes, metric) == pytest.approx(stdev(means), rel=0.1)


def test_report_of_regimes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    settings = load_settings(lab(tmp_path, arms=ARMS[:4]))
    with pytest.raises(FileNotFoundError, match="There are no results"):
        write_report(settings)
    for number, one in enumerate(settings.by_regime()):
        data = prepare_data(one, load_tokenizer(one.model))
        output_dir = Path(one.output_dir)
        (output_dir / "settings.json").write_text(json.dumps(one.shared() | {"prepared": data.report}))
        picks = {"wanted": 0.25, "corrupt": 0.0, "unique": 1.0, "label_tokens": [3, 4, 5]}
        for arm, loss in (("random", 1.0), ("less", 1.25 + number)):
            for seed in (0, 1):
                line = make_line(arm, seed, loss + seed) | {"picks": picks, "num_updates": 4}
                line |= {"rows_trained_by_domain": {"code": 12, "math": 4}}
                line |= {"test_row_losses": [loss * row.num_labels for row in data.test]}
                append_line(output_dir / "results.jsonl", line)
        titles = [table.title for table in build_tables(one, results(output_dir), STEPS, None, [3] * 10)]
        assert "Difference to random (test)" in titles and "Rows trained on (shares; mean over seeds)" in titles
    write_report(settings)
    text = (tmp_path / "output" / "report.md").read_text()
    assert "| arm | targeted | dirty |" in text
    assert "| less | +0.2500 ± 0.0000 (0/2) | +1.2500 ± 0.0000 (0/2) |" in text
    one = (tmp_path / "output" / "targeted" / "report.md").read_text()
    assert "| less | 2 | +0.2500 (0/2) | 0.0000 | 0.0000 |" in one
    assert "| less | 0.25 | 0.00 | 1.00 | 3, 4, 5 | code 0.75, math 0.25 |" in one
    assert "1 rules were compared with random rows" in one and "share of wanted rows 0.25" in one


@pytest.mark.slow
def test_a_laboratory_and_one_that_was_killed(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    arms = [arm for arm in ARMS if arm["name"] != "as long"]
    statuses, output = start("run", lab(whole, arms=ARMS, seeds=[0]))
    assert statuses == [0], output[-3000:]
    lines = {regime: results(whole / "output" / regime) for regime in ("targeted", "dirty")}
    for regime, found in lines.items():
        by_arm = {line["arm"]: line for line in found}
        assert list(by_arm)[-1] == "as long" and len(found) == len(ARMS)
        rows = {name: (line["num_updates"], line["rows_trained"]) for name, line in by_arm.items()}
        assert rows.pop("as long")[0] >= 1
        assert rows == {
            "random": (4, 16),
            "label": (4, 16),
            "pool": (4, 64),
            "less": (4, 16),
            "wide": (4, 32),
            "long": (8, 32),
            "full": (16, 64),
        }
        report = json.loads((whole / "output" / regime / "settings.json").read_text())["prepared"]
        for line in found:
            assert len(line["test_row_losses"]) == 10 and line["curve"]
            total = sum(line["test_row_losses"]) / sum(report["test_label_tokens"])
            assert line["test"]["all"]["loss_per_token"] == pytest.approx(total, rel=1e-4)
        assert by_arm["label"]["picks"]["wanted"] > by_arm["random"]["picks"]["wanted"]
        assert by_arm["full"]["picks"]["wanted"] == pytest.approx(report["wanted_share"])
    assert {line["picks"]["corrupt"] > 0 for line in lines["dirty"] if line["arm"] == "pool"} == {True}
    assert len({line["test"]["all"]["loss_per_token"] for line in lines["targeted"]}) == len(ARMS)
    # One store of states for both regimes.
    assert (whole / "output" / "states").is_dir() and not (whole / "output" / "dirty" / "states").exists()
    kills = [KILL_AT_LINE.format(number=number, torn=torn) for number, torn in ((4, False), (9, True), (30, True))]
    statuses, output = start("run", lab(killed, arms=arms, seeds=[0]), attempts=[*kills, ""])
    assert statuses == [-signal.SIGKILL] * 3 + [0], output[-3000:]
    for regime, found in lines.items():
        expected = [line for line in found if line["arm"] != "as long"]
        assert without_clocks(results(killed / "output" / regime)) == without_clocks(expected)
