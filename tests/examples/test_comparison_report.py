"""The comparison's plan and report, on results written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from spice_trainer import SpiceConfig
from tests.examples.comparisons import EXAMPLES, tiny_comparison

from comparison.driver import run_comparison  # isort: skip
from comparison.json_lines import append_line, keep_lines, read_lines  # isort: skip
from comparison.plan import Run, chosen_rate, missing_runs  # isort: skip
from comparison.report import build_tables, write_report  # isort: skip
from comparison.settings import KINDS, load_settings  # isort: skip
from comparison.summary import difference, estimate, format_difference, format_estimate  # isort: skip

STEPS = 4


def means(loss: float) -> dict[str, Any]:
    return {"loss_per_token": loss, "loss_per_row": 2 * loss, "rows": 10, "tokens": 90}


def make_line(
    arm: str, seed: int, loss: float, *, rate: float = 0.01, steps: int = STEPS, **values: Any
) -> dict[str, Any]:
    """A run whose validation loss is 1 above its test loss, and that answers half of the options right at loss 1."""
    losses = {"all": means(loss), "domains": {"code": means(loss + 0.25), "math": means(loss - 0.5)}}
    held_out = {"all": means(loss + 1), "domains": {}}
    return {
        "arm": arm,
        "seed": seed,
        "learning_rate": rate,
        "num_steps": steps,
        "fields": {},
        "rows_trained": 16,
        "label_tokens_trained": 40,
        "seconds": {"scoring": 6.0, "selecting": 1.0, "training": 2.0, "evaluation": 1.0},
        "curve": [
            {"step": step, "rows": 4 * step, "seconds": 2.0 * step, "losses": {"all": means(loss + 3 - step / 2)}}
            for step in (2, 4)
        ],
        "validation": held_out,
        "test": losses,
        "choices": {"options": {"accuracy": loss / 2, "chance": 0.5, "rows": 8}},
    }


def test_estimates_by_hand() -> None:
    # Mean 2; squares 1, 0, 1; s = 1; 1 / √3.
    assert estimate([1.0, 2.0, 3.0]).mean == 2.0
    assert estimate([1.0, 2.0, 3.0]).error == pytest.approx(0.57735, abs=1e-5)
    assert estimate([4.0]).error is None
    # Differences −1 and −3 over the seeds in both: mean −2, s = √2, error 1.
    found = difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 2.0, 1: 5.0, 5: 0.0})
    assert found is not None and found.num_won == 2
    assert (found.estimate.mean, found.estimate.error, found.estimate.num_seeds) == (-2.0, pytest.approx(1.0), 2)
    better = difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 2.0}, higher_is_better=True)
    assert better is not None and better.num_won == 1
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert format_estimate(estimate([1.0, 3.0])) == "2.0000 ± 1.0000"
    assert format_estimate(estimate([1.0])) == "1.0000" and format_estimate(None) == "-"
    assert format_difference(found) == "−2.0000 ± 1.0000 (2/2)"
    assert format_difference(better) == "+0.2500 ± 0.2500 (1/2)"
    assert format_difference(difference({0: 1.0}, {0: 1.0})) == "0.0000 (0/1)"


def write_results(folder: Path, **overrides: Any) -> Any:
    """Three arms, two seeds; test losses full 1.0, 1.2; random 2.0, 2.4; spice 1.9, 2.7."""
    settings = load_settings(tiny_comparison(folder, **overrides))
    output_dir = Path(settings.output_dir)
    for arm, losses in (("full", (1.0, 1.2)), ("random", (2.0, 2.4)), ("spice", (1.9, 2.7))):
        for seed, loss in enumerate(losses):
            append_line(output_dir / "results.jsonl", make_line(arm, seed, loss))
    shared = settings.shared() | {
        "prepared": {
            "num_steps": STEPS,
            "rows": {"train": 64, "validation": 12, "test": 15},
            "dropped": {"train_near_held_out": 7},
            "choice_rows": {"options": 5},
        }
    }
    (output_dir / "settings.json").write_text(json.dumps(shared))
    return settings


def test_tables_by_hand(tmp_path: Path) -> None:
    settings = write_results(tmp_path)
    before = make_line("", 0, 3.0)
    base = {"validation": before["validation"], "test": before["test"], "choices": {}}
    losses, validation, by_token, by_row, accuracy, seconds, rates = build_tables(
        settings, read_lines(Path(settings.output_dir) / "results.jsonl"), STEPS, base
    )
    assert losses.columns[2:4] == ("loss per token", "loss per token − random")
    assert losses.rows[0] == (
        "full",
        "2",
        "1.1000 ± 0.1000",
        "−1.1000 ± 0.1000 (2/2)",
        "2.2000 ± 0.2000",
        "−2.2000 ± 0.2000 (2/2)",
    )
    assert losses.rows[1] == ("random", "2", "2.2000 ± 0.2000", "", "4.4000 ± 0.4000", "")
    # −0.1 and +0.3: mean 0.1, error 0.2.
    assert losses.rows[2] == (
        "spice",
        "2",
        "2.3000 ± 0.4000",
        "+0.1000 ± 0.2000 (1/2)",
        "4.6000 ± 0.8000",
        "+0.2000 ± 0.4000 (1/2)",
    )
    assert losses.rows[3] == ("before training", "", "3.0000", "", "6.0000", "")
    # Those of all rows shifted alike, and so the same differences.
    shift = before["validation"]["all"]["loss_per_token"] - before["test"]["all"]["loss_per_token"]
    assert validation.rows[3][2] == f"{3 + shift:.4f}" and validation.rows[2][2] == f"{2.3 + shift:.4f} ± 0.4000"
    assert validation.rows[2][3] == losses.rows[2][3]
    assert by_token.columns[2::2] == ("code", "math") and by_token.rows[2][2] == "2.5500 ± 0.4000"
    assert by_row.rows[0][4] == "1.2000 ± 0.2000"
    # Accuracies 0.95 and 1.35 against 1.0 and 1.2: higher is better here.
    assert accuracy.rows[2][2:] == ("1.1500 ± 0.2000", "+0.0500 ± 0.1000 (1/2)")
    assert accuracy.rows[0][3] == "−0.5500 ± 0.0500 (0/2)"
    assert accuracy.rows[3][2] == "-"
    assert seconds.rows[0] == ("full", "16", "2.5", "6.0", "1.0", "2.0", "1.0", "10%")
    assert rates.rows[2] == ("spice", "0.01", "own", "one value, no grid")


def test_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    settings = write_results(tmp_path, seeds=[0, 1, 2])
    write_report(settings)
    text = (Path(settings.output_dir) / "report.md").read_text()
    assert "| spice | 2 | 2.3000 ± 0.4000 | +0.1000 ± 0.2000 (1/2) |" in text
    assert "6 of 9 runs are finished." in text and "train near held out 7" in text
    assert "Evaluation took 10% of all seconds" in text
    for name in ("steps", "rows", "seconds"):
        assert f"(loss_{name}.png)" in text
        assert (Path(settings.output_dir) / f"loss_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Held-out loss (test)" in capsys.readouterr().out


def test_curves_are_means_over_seeds() -> None:
    pytest.importorskip("matplotlib")
    from comparison.plots import mean_curve

    lines = [make_line("spice", 0, 1.0), make_line("spice", 1, 2.0)]
    lines[1]["curve"][1]["seconds"] = 20.0
    assert mean_curve(lines, "seconds") == ([4.0, 14.0], [3.5, 2.5])
    base = {"validation": {"all": means(9.0)}}
    assert mean_curve(lines, "rows", "loss_per_row", base) == ([0.0, 8.0, 16.0], [18.0, 7.0, 5.0])


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no results in .* yet"):
        write_report(load_settings(tiny_comparison(tmp_path)))


def test_the_learning_rate_is_the_one_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    path = tiny_comparison(tmp_path, learning_rates=[0.1, "1e-2", 1], learning_rate_steps=2, learning_rate_seeds="all")
    settings = load_settings(path)
    assert settings.learning_rates == (0.1, 0.01, 1.0)
    spice = settings.arm("spice")
    lines: list[dict[str, Any]] = []
    first = next(missing_runs(settings, lines, STEPS))
    assert first == Run("full", 0, 0.1, 2)
    order = []
    # The mean over both seeds decides: of 0.01 it is 1.5, of 0.1 it is 1.6 though seed 0 prefers it, and 1 diverges.
    losses = {0.1: (1.0, 2.2), 0.01: (1.4, 1.6), 1.0: (math.nan, 0.1)}
    while (run := next(missing_runs(settings, lines, STEPS), None)) is not None:
        order.append(run)
        # Whole runs at the rate chosen turn out worse; they choose nothing.
        loss = losses[run.learning_rate][run.seed] if run.num_steps == 2 else 9.0
        lines.append(make_line(run.arm, run.seed, loss, rate=run.learning_rate, steps=run.num_steps))
        assert (chosen_rate(settings, spice, lines, STEPS) is None) == (len(order) < 18)
    assert len(order) == len(set(order)) == 3 * 3 * 2 + 3 * 2
    assert [run.num_steps for run in order] == [2] * 18 + [STEPS] * 6
    assert [run.seed for run in order[18:]] == [0, 0, 0, 1, 1, 1]
    rate = chosen_rate(settings, spice, lines, STEPS)
    assert rate is not None and rate.value == 0.01 and rate.source == "spice"
    assert (
        rate.grid[0.1] == pytest.approx(2.6) and rate.grid[0.01] == pytest.approx(2.5) and math.isnan(rate.grid[1.0])
    )
    rates = build_tables(settings, lines, STEPS, None)[-1]
    assert rates.rows[2] == ("spice", "0.01", "own", "0.1: 2.6000, 0.01: 2.5000, 1: nan")


def test_a_grid_of_whole_runs_is_not_repeated(tmp_path: Path) -> None:
    settings = load_settings(tiny_comparison(tmp_path, learning_rates=[0.1, 0.01]))
    lines: list[dict[str, Any]] = []
    while (run := next(missing_runs(settings, lines, STEPS), None)) is not None:
        lines.append(make_line(run.arm, run.seed, run.learning_rate, rate=run.learning_rate))
    # Both rates with the first seed, the better one with the second.
    assert len(lines) == 3 * 3


def test_two_processes_share_the_seeds(tmp_path: Path) -> None:
    settings = load_settings(tiny_comparison(tmp_path))
    runs = [set(missing_runs(settings, [], STEPS, seeds=seeds)) for seeds in ([0], [1], None)]
    assert runs[0] and runs[1] and not runs[0] & runs[1] and runs[0] | runs[1] == runs[2]
    with pytest.raises(ValueError, match=r"7 is not among the seeds \[0, 1\]"):
        run_comparison(settings, seeds=[1, 7])


def test_a_learning_rate_can_be_shared(tmp_path: Path) -> None:
    arms = [
        {"name": "random", "kind": "random"},
        {"name": "spice"},
        {"name": "own", "learning_rates_from": "none"},
        {"name": "other", "learning_rates": [1.0, 2.0]},
    ]
    settings = load_settings(
        tiny_comparison(tmp_path, arms=arms, learning_rates=[0.1, 0.01], learning_rates_from="random")
    )
    lines: list[dict[str, Any]] = []
    while (run := next(missing_runs(settings, lines, STEPS, ["spice"]), None)) is not None:
        lines.append(make_line(run.arm, run.seed, run.learning_rate, rate=run.learning_rate))
    # Of the arm that is asked for, and the grid that it needs.
    assert {(line["arm"], line["learning_rate"]) for line in lines} == {
        ("random", 0.1),
        ("random", 0.01),
        ("spice", 0.01),
    }
    sources = {arm.name: settings.grid_of(arm) for arm in settings.arms}
    assert sources["spice"] == ("random", (0.1, 0.01)) and sources["own"] == ("own", (0.1, 0.01))
    assert sources["other"] == ("other", (1.0, 2.0))
    assert build_tables(settings, lines, STEPS, None)[-1].rows[1][:3] == ("spice", "0.01", "random")


def test_lines_survive_an_interrupted_writer(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 2, "b": "cut')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"a": 3})
    assert read_lines(path) == [{"a": 1}, {"a": 3}]
    keep_lines(path, lambda line: line["a"] > 1)
    assert path.read_text() == '{"a": 3}\n'
    path.write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2 is damaged .*Remove the line"):
        read_lines(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pool_sizes": 3}, "Settings has no field 'pool_sizes'. Did you mean pool_size"),
        ({"data": {"pth": 3}}, "data: DataSettings has no field 'pth'. Did you mean path"),
        ({"arms": []}, "arms must be a list"),
        ({"arms": [{"kind": "random"}]}, r"arms\[0\] lacks name"),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "Two arms are named 'a'"),
        ({"arms": [{"name": "a", "kind": "spices"}]}, "The arm 'a' has kind='spices'"),
        ({"arms": [{"name": "a", "kind": "full", "fields": {"pool_size": 3}}]}, "fields .'pool_size'. do nothing"),
        ({"arms": [{"name": "a", "fields": {"conflict": 3}}]}, "fields of the arm 'a': SpiceConfig has no field"),
        ({"arms": [{"name": "a", "fields": {"fisher_alpha": 0}}]}, "The arm 'a' is not possible. .*fisher_alpha=0"),
        ({"learning_rates": [0.0]}, "Learning rates must be above 0"),
        ({"learning_rates": ["high"]}, "learning_rates must be a number, got 'high'"),
        ({"learning_rates": []}, "must each hold at least one value"),
        ({"learning_rates_from": "none such"}, "learning_rates_from='none such' names no arm"),
        (
            {
                "arms": [
                    {"name": "a", "learning_rates_from": "b"},
                    {"name": "b", "learning_rates_from": "c"},
                    {"name": "c"},
                ]
            },
            "takes the learning rate of 'b', which takes another",
        ),
        ({"micro_batch_size": 3}, "batch_size=4 is no multiple of micro_batch_size=3"),
        ({"learning_rate_seeds": "some"}, "must be 'first' or 'all'"),
        ({"evaluation": {"metric": "loss"}}, "metric must be one of"),
    ],
)
def test_settings_that_are_wrong(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(tiny_comparison(tmp_path, **overrides))


@pytest.mark.skipif(
    "strategy" not in SpiceConfig.__dataclass_fields__, reason="the arms need strategies, which SpiceConfig lacks yet"
)
def test_shipped_settings(tmp_path: Path) -> None:
    for name in ("compare_small.yaml", "compare.yaml"):
        settings = load_settings(
            EXAMPLES / name, {"data": "there.jsonl", "model": "here", "output_dir": str(tmp_path)}
        )
        assert (settings.data.path, settings.model, settings.output_dir) == ("there.jsonl", "here", str(tmp_path))
        assert settings.reference is not None and settings.reference.name == "random"
        assert settings.num_selected * 10 == settings.pool_size
        kinds = {settings.spice_config(arm).gradient_normalization for arm in settings.arms if arm.kind == "spice"}
        assert kinds >= {"none", "sqrt_tokens", "tokens", "unit"}


def test_shipped_laboratory(tmp_path: Path) -> None:
    settings = load_settings(EXAMPLES / "compare_lab.yaml", {"output_dir": str(tmp_path)})
    regimes = {one.regime.name: one.regime for one in settings.by_regime() if one.regime is not None}
    assert list(regimes) == ["clean", "dirty", "targeted", "imbalanced", "length_neutral"]
    assert regimes["targeted"].target == regimes["length_neutral"].target == ["math"]
    assert {arm.kind for arm in settings.arms} >= set(KINDS)
    assert settings.data.target_rows == 24 and settings.data.test_rows is not None and settings.data.test_rows >= 160
    assert {one.states_dir for one in settings.by_regime()} == {str(tmp_path / "states")}
