"""The cost ledger: what a run's selection and training took, and what training on all the data would have taken.

    run = scoring + selecting + learning + checking + training                    seconds, measured
    all the data ≈ rows · epochs · tokens a row · (training / tokens trained)     seconds, estimated

The estimate trains every row once in each epoch of the run, in batches of the same size, at the measured seconds a
trained token. It says nothing of what either run is worth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spice_trainer.recording.metrics import RunTotals
from spice_trainer.selection.results import StepTimes

_BESIDE = (
    " Another {} of scoring ran beside the training; what it slowed that by is in the seconds a trained token, so "
    "that the estimate is too high."
)


@dataclass(frozen=True)
class CostLedger:
    """What a run cost, and what it is compared with.

    `num_epochs` counts replayed epochs too. `mean_row_tokens` is in the target's tokens, `None` where unknown, and
    `is_mean_of_candidates` says that it is the mean of the candidates scored. `times.ahead`, scoring that ran beside
    the training and slowed it, is no part of the sums.
    """

    num_rows: int
    num_epochs: float
    mean_row_tokens: float | None
    num_rows_scored: int
    tokens_scored: int
    num_rows_trained: int
    tokens_trained: int
    times: StepTimes
    is_mean_of_candidates: bool = True

    @classmethod
    def from_totals(
        cls, totals: RunTotals, *, num_rows: int, steps_per_epoch: int, mean_row_tokens: float | None = None
    ) -> CostLedger:
        """Reads a run's totals, summed from its first step also where it was resumed.

        `mean_row_tokens` is by default the mean of the candidates scored, which after an epoch is that of all rows;
        give it where a proxy's tokenizer counted those.
        """
        is_mean_of_candidates = mean_row_tokens is None
        if mean_row_tokens is None and totals.num_candidates:
            mean_row_tokens = totals.tokens_scored / totals.num_candidates
        return cls(
            num_rows=num_rows,
            num_epochs=totals.num_steps / steps_per_epoch,
            mean_row_tokens=mean_row_tokens,
            num_rows_scored=totals.num_candidates,
            tokens_scored=totals.tokens_scored,
            num_rows_trained=totals.num_trained,
            tokens_trained=totals.tokens_trained,
            times=totals.times,
            is_mean_of_candidates=is_mean_of_candidates,
        )

    @property
    def seconds(self) -> float:
        """What the run took, measured: its steps' selection and training."""
        return self.times.total

    @property
    def seconds_per_trained_token(self) -> float | None:
        """Measured; `None` where no token was trained or no time was taken."""
        if self.tokens_trained <= 0 or self.times.training <= 0:
            return None
        return self.times.training / self.tokens_trained

    @property
    def seconds_on_all_data(self) -> float | None:
        """Estimate of training on every row once in each of the run's epochs; `None` where nothing was measured."""
        num_tokens = self.num_rows * self.num_epochs * (self.mean_row_tokens or 0.0)
        if self.seconds_per_trained_token is None or num_tokens <= 0:
            return None
        return num_tokens * self.seconds_per_trained_token

    @property
    def cost_ratio(self) -> float | None:
        """The run's seconds over the estimate for all the data: below 1 the run costs less."""
        return self.seconds / self.seconds_on_all_data if self.seconds_on_all_data else None

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON values, with what follows from it."""
        derived = ("seconds", "seconds_per_trained_token", "seconds_on_all_data", "cost_ratio")
        names = {"seconds_on_all_data": "estimated_seconds_on_all_data"}
        known = asdict(self) | self.times.to_dict()
        del known["times"]
        return known | {names.get(name, name): getattr(self, name) for name in derived}

    def describe(self) -> str:
        """The break-even sentence of the summary; without the estimate where no token was trained."""
        took = f"Scoring took {format_duration(self.times.scoring)}; this run took {format_duration(self.seconds)}"
        per_token, on_all, ratio = self.seconds_per_trained_token, self.seconds_on_all_data, self.cost_ratio
        if per_token is None or on_all is None or ratio is None:
            return f"{took}; what training on all the data would have taken cannot be estimated from it."
        verdict = "less than" if ratio < 0.995 else "more than" if ratio >= 1.005 else "as much as"
        mean = ", the mean of the candidates scored" if self.is_mean_of_candidates else " on average"
        return (
            f"{took}; training on all the data would have taken about {format_duration(on_all)} (estimated from the "
            f"measured {_microseconds(per_token)} a trained token and {self.mean_row_tokens:,.1f} tokens a row{mean})."
            f" So far this run has cost {verdict} that: {ratio:.2f} times as much."
            f"{_BESIDE.format(format_duration(self.times.ahead)) if self.times.ahead > 0 else ''}"
        )


def cost_rows(totals: RunTotals, ledger: CostLedger | None = None) -> list[tuple[str, str]]:
    """Rows, name and value, of the end-of-run table that say what the run cost.

    With a ledger the estimate for all the data is among them. Learning and checking of a proxy that took no time at
    all have no row.
    """
    parts = [
        ("Scoring", totals.times.scoring, " of the steps' time"),
        ("Selecting", totals.times.selecting, ""),
        ("Learning (proxy)", totals.times.learning, ""),
        ("Checking (proxy)", totals.times.checking, ""),
        ("Training", totals.times.training, ""),
    ]
    whole = sum(seconds for _, seconds, _ in parts)
    rows = [
        (name, f"{format_duration(seconds)} ({f'{seconds / whole:.1%}' if whole else '-'}{unit})")
        for name, seconds, unit in parts
        if seconds > 0 or not name.endswith("(proxy)")
    ]
    if totals.times.ahead > 0:
        rows.insert(1, ("Scoring beside the training", format_duration(totals.times.ahead)))
    if ledger is not None and ledger.seconds_on_all_data is not None:
        epochs = f"{ledger.num_epochs:.3g} epoch{'' if ledger.num_epochs == 1 else 's'}"
        estimate = f"{format_duration(ledger.seconds_on_all_data)} for {epochs} of {ledger.num_rows:,} rows"
        rows.append(("Training on all the data, estimated", estimate))
    return rows


def format_duration(seconds: float) -> str:
    """Writes a duration in the unit a reader would choose: "0.02 s", "12.3 s", "5.1 min", "1,234.5 h"."""
    # The next unit begins where rounding would write 60.0 of this one.
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 59.95 else f"{minutes / 60:,.1f} h"


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f} µs" if value >= 9.5 else f"{value:.2g} µs"
