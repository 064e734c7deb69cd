"""What a pilot found, in numbers, and what follows from them, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from spice_trainer.pilot.evidence import Pointing
from spice_trainer.selection.target import SHIFT_LEVEL

# Three tests are made, and one alarm among them would do.
PILOT_LEVEL = SHIFT_LEVEL / 3

# From so much on the difference is one of answer lengths.
_MOSTLY = 0.8


@dataclass(frozen=True)
class ShiftFound:
    """Whether training and validation rows differ, by one kind of features.

    Args:
        p_value (`float`): Of the permutation test.
        shrinkage (`float`): How far picks would aim from the training rows' mean to the validation rows', 0 to 1.
        by_length (`float`): Share of the difference that their answer lengths explain.
    """

    p_value: float
    shrinkage: float
    by_length: float


@dataclass(frozen=True)
class PilotCosts:
    """What scoring and training take here, in seconds.

    Args:
        scoring_row (`float`): To take one row's gradient.
        hidden_row (`float`): To take one row's hidden states.
        training_row (`float`): To train on one row.
        pilot (`float`): The pilot as a whole.
    """

    scoring_row: float
    hidden_row: float
    training_row: float
    pilot: float


@dataclass(frozen=True)
class PilotReport:
    """What [`run_pilot`] found. Printed, it is a table and a recommendation.

    Args:
        num_rows (`int`): Training rows that were scored.
        num_validation (`int`): Validation rows.
        shifts (`Mapping[str, ShiftFound]`): By the kind of features, `"hidden_states"` and `"gradients"`.
        length_p_value (`float`): Of a test whether answer lengths differ.
        pointing (`Mapping[str, Pointing]`): By rule, where its picks point.
        costs ([`PilotCosts`]): Seconds.
        pool_size (`int`): Candidates of a pool.
        num_selected (`int`): Picks of a pool.
    """

    num_rows: int
    num_validation: int
    shifts: Mapping[str, ShiftFound]
    length_p_value: float
    pointing: Mapping[str, Pointing]
    costs: PilotCosts
    pool_size: int
    num_selected: int

    @property
    def strategy(self) -> str | None:
        """The rule to try: `"length_matched"`, `"targeted_matching"`, or `None` for no selection."""
        found = [shift for shift in self.shifts.values() if shift.p_value <= PILOT_LEVEL and shift.shrinkage > 0]
        if self.length_p_value <= PILOT_LEVEL and all(shift.by_length >= _MOSTLY for shift in found):
            return "length_matched"
        return "targeted_matching" if found else None

    @property
    def recommendation(self) -> str:
        """One sentence."""
        rows = f"{self.num_validation} validation rows"
        if self.strategy is None:
            return (
                f"Don't select: the training rows do not differ from the {rows} as far as these can tell, and then no "
                "rule beat random rows where we compared them. Train on random rows, or on all."
            )
        if self.strategy == "length_matched":
            return (
                f"Select by answer length, which costs nothing: the training rows differ from the {rows} in their "
                'lengths, and in little else that was seen. strategy="length_matched".'
            )
        features = "hidden_states" if self._is_seen_in("hidden_states") else "gradients"
        aimed = self.pointing.get(f"targeted_matching, {features}")
        shown = (
            "its picks point where rows that it did not read point, more than random ones do"
            if aimed is not None and aimed.is_better
            else "whether that pays here is open: on so few rows its picks do not point elsewhere than random ones"
        )
        return (
            f"Select rows like the validation rows: the training rows differ from the {rows}, and {shown}. "
            f'strategy="targeted_matching", matching_features="{features}".'
        )

    def _is_seen_in(self, features: str) -> bool:
        return features in self.shifts and self.shifts[features].p_value <= PILOT_LEVEL

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, with the recommendation."""
        return asdict(self) | {"strategy": self.strategy, "recommendation": self.recommendation}

    def tables(self) -> list[list[tuple[str, ...]]]:
        """The numbers as tables of texts, a heading first."""
        shift: list[tuple[str, ...]] = [
            ("Do training and validation rows differ?", "p", "aim (ρ)", "explained by length")
        ]
        for name, found in self.shifts.items():
            values = (found.p_value, found.shrinkage, found.by_length)
            shift.append((name.replace("_", " "), *(f"{value:.3g}" for value in values)))
        shift.append(("answer lengths alone", f"{self.length_p_value:.3g}", "", ""))
        where: list[tuple[str, ...]] = [
            ("Where picks point (cosine with rows not read)", "cosine", "− random", "standard error")
        ]
        for name, pointing in self.pointing.items():
            over = f"{pointing.over_random:+.3f}{' *' if pointing.is_better else ''}"
            where.append((name, f"{pointing.cosine:.3f}", over, f"{pointing.standard_error:.3f}"))
        return [shift, where]

    def __str__(self) -> str:
        """Tables, costs and the recommendation."""
        parts = [f"{self.num_rows} training rows, {self.num_validation} validation rows"]
        parts += [_table(rows) for rows in self.tables()]
        parts += [fill(self.describe_costs(), _WIDTH), fill(self.recommendation, _WIDTH)]
        return "\n\n".join(parts)

    def describe_costs(self) -> str:
        """What scoring a pool takes here beside training on its picks, and what plain training would buy."""
        train, score, hidden = self.costs.training_row, self.costs.scoring_row, self.costs.hidden_row
        picks = self.num_selected * train
        gradients, states = (self.pool_size * seconds / max(train, 1e-12) for seconds in (score, hidden))
        return (
            f"A pool of {self.pool_size} takes {self.pool_size * score:.2f} s to score by gradients and "
            f"{self.pool_size * hidden:.2f} s by hidden states; training on its {self.num_selected} picks takes "
            f"{picks:.2f} s. In the time of scoring, plain training goes through {gradients:.0f} more random rows "
            f"(hidden states: {states:.0f}). The pilot took {self.costs.pilot:.0f} s."
        )


_WIDTH = 100


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])
