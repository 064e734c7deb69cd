"""Metrics of a run: per step, averaged over a logging window, and summed over the run.

Every value but the seconds is a function of the picks alone, so a resumed run logs what the uninterrupted one does:
the window and the totals travel in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from spice_trainer.selection.results import StepSelection, StepTimes
from spice_trainer.selection.target import SHIFT_LEVEL
from spice_trainer.utils.saved import saved_number, saved_numbers


def step_metrics(selection: StepSelection) -> dict[str, float]:
    """The log's values for one step by keys `spice/...`, without clock readings.

    A replayed step has `spice/trained_samples` only; values that need a pick are left out of a step without any, and
    those that the strategy does not compute of every step.
    """
    metrics: dict[str, float] = {"spice/trained_samples": float(len(selection.indices))}
    if not selection.pools:
        return metrics
    pools = selection.pools
    metrics["spice/num_selected"] = float(sum(len(pool.indices) for pool in pools))
    metrics["spice/num_candidates"] = float(sum(len(pool.candidates) for pool in pools))
    picked = [pool for pool in pools if pool.indices]
    if not picked:
        return metrics
    conflicts = [conflict for pool in picked for conflict in pool.selection.conflicts]
    values: dict[str, list[float | None]] = {
        "information": [pool.information for pool in picked],
        "gain_first": [pool.selection.gains[0] for pool in picked],
        "gain_last": [pool.selection.gains[-1] for pool in picked],
        "conflict": [*conflicts],
        "conflict_rate": [conflict if math.isnan(conflict) else float(conflict > 0) for conflict in conflicts],
        "overlap_top_norm": [pool.overlap_top_norm for pool in picked],
        "changed_by_conflict": [pool.changed_by_conflict for pool in picked],
        "tokens_ratio": [(pool.tokens_selected or 0.0) / max(pool.tokens_pool, 1e-9) for pool in picked],
    }
    for name in dict.fromkeys(name for pool in picked for name in pool.selection.facts):
        values[name] = [pool.selection.facts.get(name) for pool in picked]
    known = {
        f"spice/{name}": [float(value) for value in found if value is not None and not math.isnan(value)]
        for name, found in values.items()
    }
    return metrics | {name: _mean(found) for name, found in known.items() if found}


def transfer_metrics(selection: StepSelection) -> dict[str, float]:
    """How a proxy's scores compare with the target's, over the step's pools that both scored."""
    found: dict[str, float] = {}
    for name in ("rank_correlation", "overlap", "retained", "retained_by_length"):
        values = [value for transfer in selection.transfers if (value := getattr(transfer, name)) is not None]
        if values:
            found[f"spice/proxy_{name}"] = _mean(values)
    return found


def clock_metrics(selection: StepSelection, seconds_training: float) -> dict[str, float]:
    """The log's clock readings for one step, `seconds_training` being what the step itself took.

    `spice/overhead` is the share of the step's time that went into anything but training; seconds of learning are
    there where a proxy learned.
    """
    times = replace(selection.times, training=seconds_training)
    metrics = {
        "spice/seconds_scoring": times.scoring,
        "spice/seconds_selecting": times.selecting,
        "spice/overhead": times.overhead / times.total if times.total > 0 else 0.0,
    }
    return metrics | {"spice/seconds_learning": times.learning} if times.learning > 0 else metrics


class MetricWindow:
    """Averages each key over the steps since the last training log."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds one step."""
        for key, value in metrics.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
            self._counts[key] = self._counts.get(key, 0) + 1

    def take(self) -> dict[str, float]:
        """Means since the last call, and an empty window."""
        means = {key: value / self._counts[key] for key, value in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """The window as JSON values."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores [`MetricWindow.state_dict`]."""
        self._sums, self._counts = saved_numbers(state["sums"]), saved_numbers(state["counts"])
        if self._sums.keys() != self._counts.keys() or not all(self._counts.values()):
            raise KeyError("a sum without its count")


@dataclass
class RunTotals:
    """Sums over a run, for the warning after five pools and the summary at the end."""

    num_steps: int = 0
    num_replayed_steps: int = 0
    num_pools: int = 0
    num_candidates: int = 0
    num_selected: int = 0
    num_trained: int = 0
    num_in_top_norm: float = 0.0
    num_changed_by_conflict: int = 0
    num_without_norms: int = 0
    num_without_conflict: int = 0
    num_pools_without_information: int = 0
    num_with_conflict: int = 0
    num_nonfinite: int = 0
    num_zero: int = 0
    num_out_of_memory: int = 0
    num_fillers: int = 0
    num_stopped_early: int = 0
    label_tokens_selected: float = 0.0
    label_tokens_pool: float = 0.0
    information: float = 0.0
    information_top_norm: float = 0.0
    num_pools_aimed: int = 0
    num_pools_shifted: int = 0
    shift_distance: float = 0.0
    shift_shrinkage: float = 0.0
    tokens_scored: int = 0
    tokens_trained: int = 0
    times: StepTimes = field(default_factory=StepTimes)

    def add_selection(self, selection: StepSelection) -> None:
        """Adds one step's picks."""
        self.num_steps += 1
        self.num_replayed_steps += not selection.pools
        self.num_trained += len(selection.indices)
        self.num_fillers += selection.num_fillers
        self.times += selection.times
        for pool in selection.pools:
            picked = len(pool.indices)
            self.num_pools += 1
            self.num_candidates += len(pool.candidates)
            self.num_selected += picked
            self.num_in_top_norm += (pool.overlap_top_norm or 0.0) * picked
            self.num_without_norms += picked if pool.top_norm is None else 0
            self.num_without_conflict += picked if pool.changed_by_conflict is None else 0
            self.num_pools_without_information += pool.information is None
            self.num_changed_by_conflict += pool.changed_by_conflict or 0
            self.num_with_conflict += sum(conflict > 0 for conflict in pool.selection.conflicts)
            self.num_nonfinite += len(pool.nonfinite)
            self.num_zero += len(pool.zero)
            self.num_out_of_memory += len(pool.out_of_memory)
            self.num_stopped_early += pool.selection.stopped_early
            self.label_tokens_selected += sum(pick.label_tokens for pick in pool.picks)
            self.label_tokens_pool += pool.tokens_pool * len(pool.candidates)
            self.information += pool.information or 0.0
            self.information_top_norm += pool.information_top_norm or 0.0
            self.tokens_scored += pool.num_tokens_pool
            self._add_shift(pool.selection.facts)

    def _add_shift(self, facts: Mapping[str, float]) -> None:
        p_value, shrinkage = facts.get("shift_p_value"), facts.get("shift_shrinkage")
        if p_value is None:
            return
        self.num_pools_aimed += 1
        # Of lengths alone there is no target to shrink.
        if (shrinkage is None and p_value <= SHIFT_LEVEL) or shrinkage:
            self.num_pools_shifted += 1
            self.shift_shrinkage += shrinkage or 0.0
            self.shift_distance += facts.get("shift_distance", 0.0)

    def add_training(self, seconds: float, num_tokens: int) -> None:
        """Adds one step's training."""
        self.times += StepTimes(training=seconds)
        self.tokens_trained += num_tokens

    @property
    def overlap_top_norm(self) -> float:
        """Share of the picks that are among as many largest gradient norms of their pool, of those with norms."""
        return self.num_in_top_norm / max(self.num_selected - self.num_without_norms, 1)

    @property
    def mean_label_tokens_selected(self) -> float:
        """Mean label tokens of a pick."""
        return self.label_tokens_selected / max(self.num_selected, 1)

    @property
    def mean_label_tokens_pool(self) -> float:
        """Mean label tokens of a candidate."""
        return self.label_tokens_pool / max(self.num_candidates, 1)

    def state_dict(self) -> dict[str, Any]:
        """The sums as JSON values."""
        sums = asdict(self)
        del sums["times"]
        return sums | self.times.to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores [`RunTotals.state_dict`]; sums that an older version did not keep begin at their default."""
        for one in fields(self):
            if one.name != "times":
                setattr(self, one.name, saved_number(state.get(one.name, one.default)))
        seconds = {name: saved_number(state.get(f"seconds_{name}", 0.0)) for name in asdict(StepTimes())}
        self.times = StepTimes(**seconds)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
