"""What selecting gives: the picks of a greedy pass, of a pool and of a step, how a proxy's compare, and what it took.

Frozen dataclasses and what follows from their own fields; nothing is computed from a model here.

Axes: T pools of a step, N candidates of a pool, K picked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace


@dataclass(frozen=True)
class Selection:
    """What a greedy pass picked, in the order it was picked.

    Args:
        indices (`tuple[int, ...]`): Positions of the picks in the pool.
        gains (`tuple[float, ...]`): Δ of each pick when it was picked.
        conflicts (`tuple[float, ...]`): Conflict c of each pick when it was picked, in [0, 1].
        scores (`tuple[float, ...]`): Δ − λ c of each pick.
        information (`float`): F of all picks.
        stopped_early (`bool`): Whether `stop_ratio` or `min_gain` ended the pass.
        facts (`Mapping[str, float]`): What else the rule found out about the pool, by name.
    """

    indices: tuple[int, ...]
    gains: tuple[float, ...]
    conflicts: tuple[float, ...]
    scores: tuple[float, ...]
    information: float
    stopped_early: bool
    facts: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class Pick:
    """What is recorded of one picked row; what the strategy does not compute is `None`.

    Args:
        pool (`int`): Pool within the step, from 0.
        order (`int`): Place within the pool's picks, from 0.
        index (`int`): Row of the dataset.
        gain (`float`, *optional*): Information that the pick added, or what another strategy maximises.
        conflict (`float`, *optional*): Its conflict with the picks before it.
        score (`float`, *optional*): Gain less the weighted conflict.
        gradient_norm (`float`, *optional*): Norm of its raw gradient.
        label_tokens (`int`): Tokens that its loss counts.
        id (`str`, *optional*): Its id, where the dataset has a column of them.
        token_hash (`str`, *optional*): Hash of its token ids as the model that scores reads them.
        text (`str`, *optional*): The beginning of the text that it trains, if records are to hold some.
    """

    pool: int
    order: int
    index: int
    gain: float | None
    conflict: float | None
    score: float | None
    gradient_norm: float | None
    label_tokens: int
    id: str | None = None
    token_hash: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class PoolSelection:
    """One pool's picks and what they look like; positions count in the whole pool, `None` is what was not computed."""

    candidates: tuple[int, ...]  # Dataset rows, as all rows below.
    selection: Selection
    picks: tuple[Pick, ...]  # What is recorded of each pick.
    num_tokens: tuple[int, ...]  # Of each pick.
    alpha: float | None
    information_gains: tuple[float, ...] | None  # What each pick adds to F.
    top_norm: tuple[int, ...] | None  # Positions of as many candidates of largest raw gradient norm, largest first.
    top_norm_gains: tuple[float, ...] | None  # What they add to F in that order.
    without_conflict: tuple[int, ...] | None  # Positions that λ = 0 would have picked, for rules of information.
    tokens_pool: float  # Mean label tokens of the pool.
    num_tokens_pool: int  # Tokens of all candidates, which scoring had to read; 0 where the model read nothing.
    nonfinite: tuple[int, ...]  # Rows whose gradient, or loss, is not finite.
    zero: tuple[int, ...]  # Rows whose gradient is zero; where none was computed, rows without labels.
    out_of_memory: tuple[int, ...] = ()  # Rows that did not fit alone, of which nothing is known.
    filtered: tuple[int, ...] = ()  # Rows dropped by their loss, whose gradient is unknown.

    @property
    def indices(self) -> tuple[int, ...]:
        """Dataset rows of the picks, in the order of picking."""
        return tuple(pick.index for pick in self.picks)

    @property
    def information(self) -> float | None:
        """F of the picks, or `None` without a Gram matrix."""
        return None if math.isnan(self.selection.information) else self.selection.information

    @property
    def information_top_norm(self) -> float | None:
        """F of as many candidates of largest gradient norm, or `None` without a Gram matrix."""
        return None if self.top_norm_gains is None else sum(self.top_norm_gains)

    @property
    def overlap_top_norm(self) -> float | None:
        """Share of the picks among the candidates of largest gradient norm; `None` without picks or norms."""
        picked = self.selection.indices
        return len(set(picked) & set(self.top_norm)) / len(picked) if picked and self.top_norm is not None else None

    @property
    def changed_by_conflict(self) -> int | None:
        """Picks that λ = 0 would not have made, or `None` for strategies that have no λ."""
        if self.without_conflict is None:
            return None
        return len(set(self.selection.indices) - set(self.without_conflict))

    @property
    def tokens_selected(self) -> float | None:
        """Mean label tokens of the picks, or `None` without picks."""
        return sum(pick.label_tokens for pick in self.picks) / len(self.picks) if self.picks else None


@dataclass(frozen=True)
class PoolTransfer:
    """How a proxy's picks S′ from one pool compare with the target's picks S."""

    pool: int  # Which of the step's pools.
    num_selected: int  # |S|.
    num_selected_proxy: int  # |S′|, not |S| only where a pool stops early or rows cannot be picked.
    num_shared: int
    rank_correlation: float | None  # Spearman, of the two models' first gains.
    retained: float | None  # See `compare_pools`.
    retained_by_length: float | None = None  # The same of picks that only know how long the answers are.

    @property
    def overlap(self) -> float | None:
        """Share of the target's picks that the proxy makes too, or `None` without picks."""
        return self.num_shared / self.num_selected if self.num_selected else None


@dataclass(frozen=True)
class StepTimes:
    """Seconds of an optimizer step, or of many together, by what they went into.

    `scoring` is collating, forward, backward, features and Gram (where the forward and backward ran beside the step
    before, only what was waited for); `selecting` α, greedy, conflict, stopping and diagnosis; `learning` a proxy's
    own update; `checking` scoring with the target too, to compare; `ahead` scoring beside the step before; and
    `training` the step itself.
    """

    scoring: float = 0.0
    selecting: float = 0.0
    learning: float = 0.0
    checking: float = 0.0
    ahead: float = 0.0
    training: float = 0.0

    def __add__(self, other: StepTimes) -> StepTimes:
        """Sums, name by name."""
        return StepTimes(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def overhead(self) -> float:
        """What a step took beside training."""
        return self.scoring + self.selecting + self.learning + self.checking

    @property
    def total(self) -> float:
        """What a step took."""
        return self.overhead + self.training

    def to_dict(self) -> dict[str, float]:
        """By the names that logs, records and checkpoints have: `seconds_scoring` and so on."""
        return {f"seconds_{name}": seconds for name, seconds in asdict(self).items()}


@dataclass(frozen=True)
class StepSelection:
    """What one optimizer step trains on."""

    step: int  # Optimizer updates done before it.
    epoch: int  # From 0.
    indices: tuple[int, ...]  # Dataset rows, in order.
    pools: tuple[PoolSelection, ...] = ()  # Where they came from; empty in a replayed epoch.
    num_fillers: int = 0  # Micro-batches over all ranks that hold a neutral filler.
    filler: int | None = None  # The row that stands there, where one is known to be sound.
    num_tokens: tuple[int, ...] = ()  # Of each pick, where they are to be packed.
    times: StepTimes = StepTimes()
    transfers: tuple[PoolTransfer, ...] = ()  # A proxy's scores of the first pools beside the target's.

    def took(self, more: StepTimes) -> StepSelection:
        """The same selection, which took longer."""
        return replace(self, times=self.times + more)
