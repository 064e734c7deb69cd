"""The cost ledger: its arithmetic worked by hand, its words, and the totals it is read from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from spice_trainer.recording.ledger import CostLedger, cost_rows, format_duration
from spice_trainer.recording.metrics import RunTotals, clock_metrics
from spice_trainer.selection.results import StepSelection, StepTimes

# 12 steps of 6 an epoch: two epochs of 500 rows of 40 tokens are 40,000 tokens. 4,000 were trained in 2 s, so 500 µs a
# token, and all of them would have taken 20 s. Scoring 20,000 tokens (one epoch; the second replayed) took 5 s.
TOTALS = RunTotals(
    num_steps=12, num_replayed_steps=6, num_candidates=500, num_trained=100,
    tokens_scored=20_000, tokens_trained=4_000,
    times=StepTimes(scoring=5.0, selecting=0.25, learning=0.5, checking=0.25, training=2.0),
)  # fmt: skip


def _ledger(**changes: float) -> CostLedger:
    totals = RunTotals()
    totals.load_state_dict(TOTALS.state_dict() | changes)
    return CostLedger.from_totals(totals, num_rows=500, steps_per_epoch=6)


def test_the_arithmetic_by_hand() -> None:
    ledger = _ledger()
    assert ledger.num_epochs == 2.0
    assert ledger.mean_row_tokens == 40.0
    assert ledger.times.overhead == 6.0
    assert ledger.seconds == 8.0
    assert ledger.seconds_per_trained_token == pytest.approx(500e-6)
    assert ledger.seconds_on_all_data == pytest.approx(20.0)
    assert ledger.cost_ratio == pytest.approx(0.4)
    assert (ledger.num_rows_scored, ledger.tokens_scored) == (500, 20_000)
    assert (ledger.num_rows_trained, ledger.tokens_trained) == (100, 4_000)


def test_half_an_epoch_is_compared_with_half_an_epoch() -> None:
    assert _ledger(num_steps=3).seconds_on_all_data == pytest.approx(5.0)


def test_tokens_of_a_row_that_are_given_replace_the_candidates() -> None:
    ledger = CostLedger.from_totals(TOTALS, num_rows=500, steps_per_epoch=6, mean_row_tokens=60.0)
    assert ledger.seconds_on_all_data == pytest.approx(30.0)
    assert "and 60.0 tokens a row on average). So far" in ledger.describe()
    # Nothing scored: only what is given is known.
    unscored = RunTotals(num_steps=6, tokens_trained=100, times=StepTimes(training=1.0))
    assert CostLedger.from_totals(unscored, num_rows=10, steps_per_epoch=6).seconds_on_all_data is None
    given = CostLedger.from_totals(unscored, num_rows=10, steps_per_epoch=6, mean_row_tokens=20.0)
    assert given.seconds_on_all_data == pytest.approx(2.0)


def test_the_sentence() -> None:
    assert _ledger().describe() == (
        "Scoring took 5.0 s; this run took 8.0 s; training on all the data would have taken about 20.0 s (estimated "
        "from the measured 500 µs a trained token and 40.0 tokens a row, the mean of the candidates scored). So far "
        "this run has cost less than that: 0.40 times as much."
    )


@pytest.mark.parametrize(
    ("seconds_scoring", "words"),
    [
        (16.8, "less than that: 0.99 times as much."),
        (16.98, "as much as that: 1.00 times as much."),
        (17.0, "as much as that: 1.00 times as much."),
        (17.2, "more than that: 1.01 times as much."),
        (57.0, "more than that: 3.00 times as much."),
    ],
)
def test_more_or_less_than_all_the_data(seconds_scoring: float, words: str) -> None:
    assert _ledger(seconds_scoring=seconds_scoring).describe().endswith(f"So far this run has cost {words}")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.002, "0.5 µs"), (0.0365, "9.1 µs"), (0.2, "50 µs"), (8.0, "2,000 µs")],
)
def test_microseconds_a_token(seconds: float, words: str) -> None:
    assert f"measured {words} a trained token" in _ledger(seconds_training=seconds).describe()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_trained": 0},
        {"seconds_training": 0.0},
        {"tokens_trained": 0, "seconds_training": 0.0},
        {"num_candidates": 0, "tokens_scored": 0},
        {"num_steps": 0},
        {"tokens_scored": 0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_nothing_is_divided_by_zero(changes: dict[str, float]) -> None:
    ledger = _ledger(**changes)
    assert ledger.cost_ratio is None
    assert ledger.describe().endswith(
        "; what training on all the data would have taken cannot be estimated from it."
    ), ledger.describe()
    assert ledger.seconds_on_all_data is None
    assert "Training on all the data, estimated" not in dict(cost_rows(TOTALS, ledger))


def test_a_run_of_nothing() -> None:
    ledger = CostLedger.from_totals(RunTotals(), num_rows=10, steps_per_epoch=5)
    assert ledger.describe().startswith("Scoring took 0.00 s; this run took 0.00 s; ")
    assert cost_rows(RunTotals(), ledger) == [
        ("Scoring", "0.00 s (- of the steps' time)"),
        ("Selecting", "0.00 s (-)"),
        ("Training", "0.00 s (-)"),
    ]


def test_the_rows_of_the_table() -> None:
    ledger = CostLedger.from_totals(TOTALS, num_rows=500, steps_per_epoch=6)
    rows = cost_rows(TOTALS, ledger)
    assert rows == [
        ("Scoring", "5.0 s (62.5% of the steps' time)"),
        ("Selecting", "0.25 s (3.1%)"),
        ("Learning (proxy)", "0.50 s (6.2%)"),
        ("Checking (proxy)", "0.25 s (3.1%)"),
        ("Training", "2.0 s (25.0%)"),
        ("Training on all the data, estimated", "20.0 s for 2 epochs of 500 rows"),
    ]
    assert cost_rows(TOTALS) == rows[:-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.004, "0.00 s"),
        (0.994, "0.99 s"),
        (0.995, "1.0 s"),
        (1.04, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1.0 min"),
        (60.0, "1.0 min"),
        (90.0, "1.5 min"),
        (3594.0, "59.9 min"),
        (3598.0, "1.0 h"),
        (3600.0, "1.0 h"),
        (5400.0, "1.5 h"),
        (4_444_200.0, "1,234.5 h"),
    ],
)
def test_durations_change_unit_where_rounding_would_reach_60(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# The totals and the log's clock readings


def test_totals_add_a_proxys_learning_and_go_through_a_checkpoint() -> None:
    totals = RunTotals()
    for step in range(3):
        totals.add_selection(
            StepSelection(step=step, epoch=0, indices=(1, 2), times=StepTimes(learning=0.5, checking=0.25))
        )
    assert (totals.times.learning, totals.times.checking) == (1.5, 0.75)
    resumed = RunTotals()
    resumed.load_state_dict(json.loads(json.dumps(totals.state_dict())))
    assert resumed == totals


def test_totals_of_a_version_that_knew_no_proxy_are_read() -> None:
    state = TOTALS.state_dict()
    del state["seconds_learning"], state["seconds_checking"]
    # A run that goes on in the same process must not keep what it had.
    resumed = RunTotals(times=StepTimes(learning=9.0))
    resumed.load_state_dict(state)
    assert (resumed.times.learning, resumed.times.checking) == (0.0, 0.0)
    assert resumed.state_dict() == TOTALS.state_dict() | {"seconds_learning": 0.0, "seconds_checking": 0.0}


def test_learning_is_overhead_in_the_log() -> None:
    step = {"step": 0, "epoch": 0, "indices": (1,)}
    times = StepTimes(scoring=2.0, selecting=1.0)
    plain = clock_metrics(StepSelection(**step, times=times), 1.0)
    assert plain == {"spice/seconds_scoring": 2.0, "spice/seconds_selecting": 1.0, "spice/overhead": 0.75}
    learned = clock_metrics(StepSelection(**step, times=times + StepTimes(learning=3.0, checking=1.0)), 1.0)
    assert learned == plain | {"spice/overhead": 0.875, "spice/seconds_learning": 3.0}
    assert clock_metrics(StepSelection(step=0, epoch=0, indices=()), 0.0)["spice/overhead"] == 0.0


def test_the_sentence_owns_up_to_scoring_beside_the_training() -> None:
    beside = replace(TOTALS, times=TOTALS.times + StepTimes(ahead=90.0))
    ledger = CostLedger.from_totals(beside, num_rows=1000, steps_per_epoch=6)
    assert ledger.describe().endswith(
        " Another 1.5 min of scoring ran beside the training; what it slowed that by is in the seconds a trained "
        "token, so that the estimate is too high."
    )
    assert "beside" not in CostLedger.from_totals(TOTALS, num_rows=1000, steps_per_epoch=6).describe()
