"""What a run says: its first line, the warnings of its first pools, and its summary."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import spread_positions
from spice_trainer.data.sample import SAMPLE_ROWS
from spice_trainer.recording.ledger import CostLedger, format_duration
from spice_trainer.recording.metrics import RunTotals
from spice_trainer.recording.summary import print_summary, summarize_run, warn_of_first_pools
from spice_trainer.selection.results import StepTimes
from spice_trainer.utils import logging as logs
from tests.support.trainers import make_trainer, read_records, tiny_rows, trained_indices
from tests.trainer.test_checks import OwnLoss

WANTED = [
    {"input_ids": [3, *[4] * length], "attention_mask": [1] * (length + 1), "labels": [-100, *[4] * length]}
    for length in range(9, 19)
]

pytestmark = pytest.mark.oldest


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def _messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    records = [record for record in caplog.records if record.name == "spice_trainer"]
    return [record.getMessage() for record in records if record.levelno == level]


TOP_NORM = (
    "100% of the picks of the first 6 pools are simply the largest gradient norms of their pool, so neither "
    'information nor conflict decides. Set gradient_normalization="sqrt_tokens" (now "none") if directions '
    "should."
)
SHORT = (
    "label tokens against 5.7 in the pool. The gradient of a mean over few tokens is large. Set "
    'gradient_normalization="sqrt_tokens" (now "none") if short answers are not what you want.'
)


def test_the_warning_after_five_pools_comes_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counts.append(len(_messages(caplog, logging.WARNING)))

    counts: list[int] = []
    settings = {"pools_per_step": 2, "num_selected": 2, "information": "adafisher", "conflict_penalty": 0.0}
    settings |= {"gradient_normalization": "none"}
    make_trainer(tmp_path, spice=settings, callbacks=[Count()], num_train_epochs=3).train()
    # The third step's pools, the fifth and sixth, count once it has trained.
    assert counts == [0, 0, 0] + [2] * 6
    top_norm, short = _messages(caplog, logging.WARNING)
    assert top_norm == f"SPICE: {TOP_NORM}"
    assert short.startswith("SPICE: the picks of the first 6 pools are short: 2.") and short.endswith(SHORT)


def test_no_warning_where_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, spice={"gradient_normalization": "unit"}).train()
    assert not _messages(caplog, logging.WARNING)


@pytest.mark.parametrize(
    ("normalization", "in_top_norm", "tokens", "suggestions"),
    [
        ("none", 9, 50, ["sqrt_tokens"]),
        ("none", 8, 49, ["sqrt_tokens"]),
        ("none", 8, 50, []),
        ("sqrt_tokens", 10, 10, ["matching", "matching"]),
        ("unit", 10, 10, ["sqrt_tokens"]),
        ("tokens", 0, 200, []),
        ("tokens", 0, 201, ["sqrt_tokens"]),
        ("sqrt_tokens", 0, 201, ["matching"]),
        ("unit", 0, 201, ["sqrt_tokens"]),
    ],
)
def test_when_the_first_pools_are_warned_about(
    normalization: Any, in_top_norm: int, tokens: int, suggestions: list[str]
) -> None:
    totals = RunTotals(
        num_pools=5, num_selected=10, num_candidates=50, num_in_top_norm=in_top_norm,
        label_tokens_selected=tokens, label_tokens_pool=500,
    )  # fmt: skip
    warnings = warn_of_first_pools(totals, SpiceConfig(gradient_normalization=normalization))
    assert len(warnings) == len(suggestions)
    for warning, suggestion in zip(warnings, suggestions, strict=True):
        # Of SPICE's own normalisations no other trained a better model than sqrt_tokens by every measure.
        expected = f'Set gradient_normalization="{suggestion}" (now "{normalization}")'
        assert ('Compare with strategy="matching"' if suggestion == "matching" else expected) in warning
    if tokens > 200:
        assert " are long: 20.1 label tokens against 10.0 in the pool, so that short answers are hardly" in warnings[0]


def test_the_first_line_says_what_will_happen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path / "a", spice={}, num_train_epochs=2).train()
    rows = tiny_rows()
    mean = _mean(len(rows[position]["input_ids"]) for position in spread_positions(55, SAMPLE_ROWS))
    assert _messages(caplog, logging.INFO)[0] == (
        "SPICE: 55 samples, 12 optimizer steps (2 epochs of 6). Each step scores 1 pool of 10 and trains on 4 picks: "
        '40.0% of the candidates (asked for: 40.0%). Rows are picked by strategy="spice". The model itself '
        "scores, with all 3,712 gradient numbers a sample (exact); scoring holds 148 KB of gradient features. "
        f"Per step about {10 * mean:,.0f} tokens are scored and {4 * mean:,.0f} trained."
    )


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"sketch_dim": 64}, {}, "with 64 numbers a sample, a sketch of 3,712; scoring holds 2.56 KB of gradient"),
        ({"num_selected": 2}, {}, "scores 2 pools of 10 and trains on 4 picks: 20.0% of the candidates"),
        ({"stop_ratio": 0.5, "pools_per_step": 1}, {}, "trains on at most 4 picks"),
        (
            {
                "scoring_layers": 1,
                "scoring_target_modules": ["q_proj", "v_proj"],
                "scoring_max_tokens": 4,
                "scoring_prefilter": 0.5,
            },
            {},
            "Rows are scored by the last layer, by q_proj, v_proj, on the first 4 label tokens of a row, among the "
            "0.5 of a pool with the largest loss alone.",
        ),
        ({"selection_epochs": 1}, {}, "After 1 epoch(s) the picks are replayed without scoring."),
        (
            {},
            {"trainer_class": OwnLoss, "gradient_accumulation_steps": 2},
            "rounded down to a multiple of the 2 micro-batches of a step.",
        ),
    ],
    ids=["sketch", "pools", "adaptive", "part", "replay", "mean_loss"],
)
def test_the_first_line_of_other_runs(
    settings: dict[str, Any], arguments: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, spice=settings, max_steps=1, **arguments).train()
    assert words in _messages(caplog, logging.INFO)[0]


def test_messages_are_shown_where_nobody_configured_logging(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(logs.logger, "propagate", False)
    monkeypatch.setattr(logs.logger, "handlers", [])
    monkeypatch.setattr(logs.logger, "level", logging.NOTSET)
    logs.logger.manager._clear_cache()
    logs.show_messages()
    logs.show_messages()
    logs.logger.info("said once")
    assert capsys.readouterr().err == "said once\n"
    # A user's own level is respected.
    logs.logger.setLevel(logging.ERROR)
    logs.show_messages()
    assert logs.logger.level == logging.ERROR


# The summary


@pytest.mark.parametrize("rich", [True, False])
def test_the_summary_of_an_adaptive_run(
    rich: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    rows = tiny_rows()
    rows[3] = rows[3] | {"labels": [-100] * len(rows[3]["labels"])}
    trainer = make_trainer(
        tmp_path,
        spice={"stop_ratio": 0.85, "pools_per_step": 2, "selection_epochs": 1, "conflict_penalty": 20.0},
        train_dataset=Dataset.from_list(rows),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    trainer.train()
    printed = capsys.readouterr().out
    pools, selections = read_records(tmp_path, "pools"), read_records(tmp_path, "selections")
    picks, stopped = len(selections), sum(line["stopped_early"] for line in pools)
    trained = sum(map(len, trained_indices(tmp_path)))
    not_top = picks - sum(line["overlap_top_norm"] * line["num_selected"] for line in pools)
    changed = sum(line["changed_by_conflict"] for line in pools)
    label_tokens = _mean(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    costs = read_records(tmp_path, "costs")
    tokens = sum(line["tokens_trained"] for line in costs)
    fillers = sum(max(0, 2 - len(indices)) for indices in trained_indices(tmp_path))
    assert 0 < stopped < 6 and trained == 2 * picks
    expected = {
        "Optimizer steps": "6",
        "Steps that replayed earlier picks": "3",
        "Candidates scored": f"55 in 6 pools, {sum(len(row['input_ids']) for row in rows)} tokens",
        "Samples picked": f"{picks} ({picks / 55:.1%} of the candidates)",
        "Samples trained": f"{trained}, {tokens} tokens",
        "Picks that are not of the largest norms": f"{not_top / picks:.1%}",
        "Picks changed by the conflict penalty": f"{changed} ({changed / picks:.1%})",
        "Label tokens of a pick / of a candidate":
            f"{_mean(line['label_tokens'] for line in selections):.1f} / {label_tokens:.1f}",
        "Information, picks / largest norms":
            f"{_mean(line['information'] for line in pools):.4g} / "
            f"{_mean(line['information_top_norm'] for line in pools):.4g} a pool",
        "Pools stopped early": f"{stopped} of 6",
        "Candidates left out": "0 not finite, 1 with zero gradient",
    }  # fmt: skip
    if fillers:
        expected["Micro-batches with a neutral filler"] = str(fillers)
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.splitlines()]
    assert "SPICE summary" in lines and ("┌" in printed) == rich
    for name, value in expected.items():
        assert f"{name} {value}" in lines, (name, value, printed)
    assert f"Records: {tmp_path / 'spice'}" in lines
    for name, key in (("Scoring", "scoring"), ("Training", "training")):
        seconds = sum(line[f"seconds_{key}"] for line in costs)
        assert any(line.startswith(f"{name} {format_duration(seconds)} (") for line in lines)


def test_a_plain_run_has_no_row_about_what_did_not_happen() -> None:
    rows = dict(summarize_run(RunTotals(num_steps=2, num_pools=2, num_candidates=20, num_selected=8, num_trained=8)))
    assert rows["Samples picked"] == "8 (40.0% of the candidates)" and rows["Picks changed by the conflict penalty"]
    assert not set(rows) & {
        "Steps that replayed earlier picks", "Pools stopped early", "Candidates left out",
        "Micro-batches with a neutral filler",
    }  # fmt: skip
    assert dict(summarize_run(RunTotals()))["Samples picked"] == "0 (- of the candidates)"


@pytest.mark.parametrize("rich", [True, False])
def test_the_summary_of_a_run_with_its_ledger(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    totals = RunTotals(
        num_steps=4, num_candidates=100, tokens_scored=2000, tokens_trained=200,
        times=StepTimes(scoring=6.0, selecting=0.5, learning=1.5, training=2.0),
    )  # fmt: skip
    ledger = CostLedger.from_totals(totals, num_rows=100, steps_per_epoch=4)
    print_summary(totals, "records", ledger)
    lines = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    costs = [
        "Scoring 6.0 s (60.0% of the steps' time)",
        "Selecting 0.50 s (5.0%)",
        "Learning (proxy) 1.5 s (15.0%)",
        "Training 2.0 s (20.0%)",
        "Training on all the data, estimated 20.0 s for 1 epoch of 100 rows",
    ]
    begin = lines.index(costs[0])
    assert lines[begin : begin + 5] == costs
    assert lines[-2:] == [ledger.describe(), "Records: records"]
    # Without a ledger nothing is said of all the data, and without a proxy nothing of its learning.
    print_summary(RunTotals(times=StepTimes(training=1.0)), "records")
    plain = capsys.readouterr().out
    assert "all the data" not in plain and "proxy" not in plain and "Training" in plain


def test_a_long_value_breaks_no_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    totals = RunTotals(num_steps=4, num_candidates=100, num_pools=1)
    print_summary(totals, "records", peak="less than 1.05 GB (an earlier peak), which was measured before")
    shown = capsys.readouterr().out
    assert all(name in shown for name, _ in summarize_run(totals, peak="some"))


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp936", "cp949", "koi8-r", "iso8859-2", "utf-8"])
def test_a_summary_is_printed_in_any_encoding(encoding: str, rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    totals = RunTotals(num_steps=4, tokens_scored=2000, tokens_trained=10**6, times=StepTimes(training=2.0))
    ledger = CostLedger.from_totals(totals, num_rows=100, steps_per_epoch=4, mean_row_tokens=20.0)
    assert "2 µs a trained token" in ledger.describe()
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    print_summary(totals, "runs/naïve 名", ledger)
    text = written.getvalue().decode(encoding)
    assert "Optimizer steps" in text and ("2 µs a trained" if encoding == "utf-8" else "2 us a trained") in text
    assert "Records: runs/na" in text and ("naïve 名" in text) == (encoding == "utf-8")


def test_a_report_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("spice_trainer.recording.records.RecordWriter.write_ledger", fail)
    monkeypatch.setattr("spice_trainer.trainer.callback.print_summary", fail)
    trainer = make_trainer(tmp_path, spice={})
    with caplog.at_level(logging.WARNING, "spice_trainer"):
        trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == len(trained_indices(tmp_path))
    texts = [text for text in _messages(caplog, logging.WARNING) if "No space left" in text]
    assert texts == [
        f"SPICE: {action} failed (OSError: No space left on device). The result is not affected."
        for action in ("writing what the run cost", "printing the summary")
    ]


def test_the_summary_of_a_selection_alone_says_nothing_of_training() -> None:
    totals = RunTotals(num_steps=3, num_candidates=30, num_selected=6, num_trained=6, times=StepTimes(scoring=2.0))
    names = [name for name, _ in summarize_run(totals, trains=False)]
    assert names[0] == "Steps" and "Samples picked" in names and "Scoring" in names
    assert not {"Optimizer steps", "Samples trained", "Training"} & set(names)


def test_the_summary_tells_scoring_beside_the_training() -> None:
    totals = RunTotals(num_steps=3, times=StepTimes(scoring=0.5, ahead=12.3))
    assert dict(summarize_run(totals))["Scoring beside the training"] == "12.3 s"
    assert "Scoring beside the training" not in dict(summarize_run(RunTotals(num_steps=3)))


AIMS = [
    (
        {"strategy": "targeted_matching", "hidden_layer": 0},
        "Picks aim at 10 validation rows (10 of 'validation') by the hidden states that layer 0 takes, which stay as "
        "they are while training.",
    ),
    (
        {"strategy": "targeted_matching", "hidden_layer": 1, "validation_every": 2},
        "by the hidden states that layer 1 takes, computed anew every 2 steps.",
    ),
    (
        {"strategy": "targeted_matching", "matching_features": "gradients"},
        "by their gradients, computed anew every step.",
    ),
    ({"strategy": "length_matched"}, "by their answer lengths alone."),
    ({"strategy": "fisher", "length_quotas": "validation"}, "by their answer lengths."),
]


@pytest.mark.parametrize(("spice", "words"), AIMS)
def test_the_first_line_says_what_picks_aim_at(
    spice: dict[str, Any], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    with caplog.at_level(logging.INFO, logger="spice_trainer"):
        trainer = make_trainer(tmp_path, spice={"pool_size": 24} | spice, validation_dataset=WANTED)
        trainer.train()
    (line,) = (message for message in _messages(caplog, logging.INFO) if "Rows are picked by" in message)
    assert words in line
    rows = dict(summarize_run(trainer._spice.callback.totals))
    pools = [pool for pool in read_records(tmp_path, "pools") if "shift_p_value" in pool]
    found = sum(pool.get("shift_shrinkage", float(pool["shift_p_value"] <= 0.01)) > 0 for pool in pools)
    assert ("Pools that differ from the validation rows" in rows) == ("strategy" in spice and bool(pools))
    if not pools:
        return
    value = rows["Pools that differ from the validation rows"]
    assert value.startswith(f"{found} of {len(pools)} pools")
    if "shift_shrinkage" in pools[0]:
        shifted = [pool for pool in pools if pool["shift_shrinkage"] > 0]
        assert shifted, "nothing was told apart"
        distance, shrinkage = (_mean(pool[f"shift_{name}"] for pool in shifted) for name in ("distance", "shrinkage"))
        assert f"by {distance:.2g} of a row's length, of which picks aim at {shrinkage:.0%}" in value


def test_without_validation_rows_or_a_difference_nothing_is_aimed_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spice = {"strategy": "targeted_matching", "pool_size": 24}
    with caplog.at_level(logging.INFO, logger="spice_trainer"):
        trainer = make_trainer(tmp_path / "none", spice=spice)
        trainer.train()
    assert "Without validation rows picks are like the candidates of their pool, by the hidden states" in caplog.text
    assert "Pools that differ from the validation rows" not in dict(summarize_run(trainer._spice.callback.totals))
    alike = make_trainer(tmp_path / "alike", spice=spice, validation_dataset=tiny_rows(10, seed=4))
    alike.train()
    assert dict(summarize_run(alike._spice.callback.totals))["Pools that differ from the validation rows"] == (
        "0 of 3 pools: nothing was aimed at, so picks are like random rows of their pool's answer lengths"
    )


@pytest.mark.parametrize("tokens", [2.0, 50.0])
def test_quotas_by_length_are_no_reason_to_warn_of_lengths(tokens: float) -> None:
    totals = RunTotals(
        num_pools=6, num_candidates=60, num_selected=24, label_tokens_pool=600.0, label_tokens_selected=24 * tokens
    )
    assert len(warn_of_first_pools(totals, SpiceConfig())) == 1
    for quotas in ("pool", "validation"):
        assert warn_of_first_pools(totals, SpiceConfig(length_quotas=quotas)) == []
