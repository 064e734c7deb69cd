"""What selecting gives: the picks of a greedy pass, of a pool and of a step, how a proxy's compare, and what it took.

Frozen dataclasses and what follows from their own fields; nothing is computed from a model here.

Axes: T pools of a step, N candidates of a pool, K picked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace


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
    """

    indices: tuple[int, ...]
    gains: tuple[float, ...]
    conflicts: tuple[float, ...]
    scores: tuple[float, ...]
    information: float
    stopped_early: bool


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
    """

    pool: int
    order: int
    index: int
    gain: float | None
    conflict: float | None
    score: float | None
    gradient_norm: float | None
    label_tokens: int


@dataclass(frozen=True)
class PoolSelection:
    """One pool's picks.

    Args:
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        selection ([`Selection`]): Picks as positions in the pool, in the order of picking.
        picks (`tuple[Pick, ...]`): What is recorded of each, in the same order.
        num_tokens (`tuple[int, ...]`): Tokens of each pick.
        alpha (`float`, *optional*): The α that was used, where there is a Gram matrix.
        information_gains (`tuple[float, ...]`, *optional*): What each pick adds to F, where there is a Gram matrix.
        top_norm (`tuple[int, ...]`, *optional*): Positions of as many candidates of largest raw gradient norm,
            largest first, where gradients were computed.
        top_norm_gains (`tuple[float, ...]`, *optional*): Their gains, added in that order, where there is a Gram
            matrix.
        without_conflict (`tuple[int, ...]`, *optional*): Positions that λ = 0 would have picked, in order, for
            strategies that pick by information.
        tokens_pool (`float`): Mean label tokens of the pool.
        num_tokens_pool (`int`): Tokens of all candidates, what scoring had to read; 0 where the model read nothing.
        nonfinite (`tuple[int, ...]`): Dataset rows whose gradient, or loss, is not finite.
        zero (`tuple[int, ...]`): Dataset rows whose gradient is zero; where none was computed, rows without labels.
        out_of_memory (`tuple[int, ...]`): Dataset rows that did not fit into memory alone, of which nothing is known.
        filtered (`tuple[int, ...]`): Dataset rows that were dropped by their loss, whose gradient is unknown.
    """

    candidates: tuple[int, ...]
    selection: Selection
    picks: tuple[Pick, ...]
    num_tokens: tuple[int, ...]
    alpha: float | None
    information_gains: tuple[float, ...] | None
    top_norm: tuple[int, ...] | None
    top_norm_gains: tuple[float, ...] | None
    without_conflict: tuple[int, ...] | None
    tokens_pool: float
    num_tokens_pool: int
    nonfinite: tuple[int, ...]
    zero: tuple[int, ...]
    out_of_memory: tuple[int, ...] = ()
    filtered: tuple[int, ...] = ()

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
    """How a proxy's picks from one pool compare with the target's.

    Args:
        pool (`int`): Which of the step's pools.
        num_selected (`int`): Picks of the target, |S|.
        num_selected_proxy (`int`): Picks of the proxy, |S′|. Differs from |S| only where a pool stops early, or where
            rows cannot be picked.
        num_shared (`int`): Picks that both make.
        rank_correlation (`float`, *optional*): Spearman correlation of the two models' first gains.
        retained (`float`, *optional*): See [`compare_pools`].
        retained_by_length (`float`, *optional*): The same of picks that only know how long the answers are.
    """

    pool: int
    num_selected: int
    num_selected_proxy: int
    num_shared: int
    rank_correlation: float | None
    retained: float | None
    retained_by_length: float | None = None

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
        return StepTimes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

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
    """What one optimizer step trains on.

    Args:
        step (`int`): Optimizer updates done before it.
        epoch (`int`): Epoch, from 0.
        indices (`tuple[int, ...]`): Dataset rows the step trains on, in order.
        pools (`tuple[PoolSelection, ...]`): The pools they came from; empty in a replayed epoch.
        num_fillers (`int`): Micro-batches over all ranks that hold a neutral filler.
        filler (`int`, *optional*): The row that stands there, where one is known to be sound.
        times ([`StepTimes`]): What selecting took.
        transfers (`tuple[PoolTransfer, ...]`): How the proxy's scores of the first pools compare with the target's.
    """

    step: int
    epoch: int
    indices: tuple[int, ...]
    pools: tuple[PoolSelection, ...] = ()
    num_fillers: int = 0
    filler: int | None = None
    times: StepTimes = StepTimes()
    transfers: tuple[PoolTransfer, ...] = ()

    def took(self, more: StepTimes) -> StepSelection:
        """The same selection, which took longer."""
        return replace(self, times=self.times + more)
