"""A rule that picks from a pool, as an object: its name, what it needs, what a candidate costs, and how it picks.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Bool, Float64
from torch import Tensor

from spice_trainer.selection.conflict import conflicts_with_mean
from spice_trainer.selection.greedy import PickOptions, information_of
from spice_trainer.selection.information import ExactInformation
from spice_trainer.selection.results import Selection
from spice_trainer.selection.scores import NEEDS_IN_WORDS, PoolScores


class Picks(NamedTuple):
    """Positions in the order of picking, and each one's gain in the rule's own units."""

    indices: list[int]
    gains: list[float]


@dataclass(frozen=True)
class Strategy:
    """A rule that picks from a pool. [`register_strategy`] makes it a legal `SpiceConfig(strategy=...)`.

    A pick must be a function of the scores and options alone, so that it is the same on any number of processes and
    after a resume, and its first k of K picks those of a budget of k.

    Args:
        name (`str`): Its name.
        needs (`tuple[str, ...]`): Fields of [`PoolScores`] that it reads beside `sound`, of those in `NEEDS_IN_WORDS`.
            What no rule needs is not computed, and what a candidate costs follows: `gram`, `gradient_norms` and
            `alignment` take a forward and a backward, `losses` a forward, `losses_without_instruction` one more.
        pick (`Callable[[PoolScores, int, PickOptions], Picks | Selection]`): Picks at most so many sound candidates.
            Of [`Picks`] the conflicts and the information are added, which mean the same for every rule.
        maximizes_information (`bool`, *optional*, defaults to `False`): Whether its gains are of Fisher information,
            so that `information`, `stop_ratio`, `min_gain` and centred gradients mean something to it.
        has_conflict_penalty (`bool`, *optional*, defaults to `False`): Whether λ means something to it.
        has_gains (`bool`, *optional*, defaults to `True`): Whether its gains say anything; else records have none.

    Raises:
        ValueError: If it needs something that is not known of a pool.

    Example:
    ```python
    >>> def pick_longest(scores, num_selected, options):
    ...     lengths = scores.values("label_tokens")
    ...     return pick_largest(lengths, scores.eligible(lengths), num_selected, options.tie_tolerance)
    >>> register_strategy(Strategy("longest", ("label_tokens",), pick_longest))
    >>> attach_spice(trainer, SpiceConfig(strategy="longest"))
    ```
    """

    name: str
    needs: tuple[str, ...]
    pick: Callable[[PoolScores, int, PickOptions], Picks | Selection]
    maximizes_information: bool = False
    has_conflict_penalty: bool = False
    has_gains: bool = True

    def __post_init__(self) -> None:
        """Checks what it needs."""
        unknown = [name for name in self.needs if name not in NEEDS_IN_WORDS]
        if unknown:
            raise ValueError(
                f"Strategy {self.name!r} needs {', '.join(map(repr, unknown))}, which is not known of a pool. Fix: "
                f"name fields among {', '.join(map(repr, NEEDS_IN_WORDS))}."
            )

    @property
    def num_backwards(self) -> int:
        """Backwards through the model that a candidate costs."""
        return int(bool({"gram", "gradient_norms", "alignment"} & set(self.needs)))

    @property
    def num_forwards(self) -> int:
        """Forwards through the model that a candidate costs."""
        alone = "losses_without_instruction" in self.needs
        return alone + max(self.num_backwards, int("losses" in self.needs or alone))

    @property
    def compares_gradients(self) -> bool:
        """Whether it compares gradients with something, and not only their norms."""
        return bool({"gram", "alignment"} & set(self.needs))

    def select(self, scores: PoolScores, num_selected: int, options: PickOptions) -> Selection:
        """Picks at most K sound candidates; one for which a number that the rule needs is not finite is not sound.

        Gains are in the rule's own units; scores the same, less λ times the conflict where the rule has a penalty.
        Information is log det(I + α Σ_S g gᵀ) (or the measure's) and conflicts are against the picks so far, whatever
        the rule; both nan where there is no Gram matrix. What is missing, or a setting that means nothing to the rule,
        is a `ValueError`.
        """
        for name in self.needs:
            if getattr(scores, name) is None:
                raise ValueError(
                    f'strategy="{self.name}" needs {NEEDS_IN_WORDS[name]}, but {name} is None. Pass '
                    f"PoolScores({name}=...)."
                )
        if not self.maximizes_information:
            given = {"stop_ratio": options.stop_ratio, "min_gain": options.min_gain, "measure": options.new_measure}
            for option, value in given.items():
                if value is not None:
                    raise ValueError(
                        f'{option} is about gains of Fisher information, which strategy="{self.name}" does not '
                        f'maximise. Set {option}=None, or use strategy="spice" or "fisher".'
                    )
        picks = self.pick(scores, num_selected, options)
        return picks if isinstance(picks, Selection) else describe_picks(scores, picks, options.fisher_alpha)


def describe_picks(scores: PoolScores, picks: Picks, fisher_alpha: float) -> Selection:
    """Returns the picks with their conflicts, against the mean of the picks before, and their information."""
    gains = tuple(picks.gains)
    conflicts, information = (math.nan,) * len(gains), math.nan
    if scores.gram is not None:
        gram = scores.sound_gram()
        picked = enumerate(picks.indices)
        conflicts = tuple(conflicts_with_mean(gram, picks.indices[:order])[index] for order, index in picked)
        information = information_of(ExactInformation(gram, fisher_alpha=fisher_alpha), picks.indices)
    return Selection(tuple(picks.indices), gains, conflicts, gains, information, stopped_early=False)


def lowest_tied(scores: Float64[Tensor, " N"], remaining: Bool[Tensor, " N"], tolerance: float) -> int:
    """Returns the lowest position among the remaining ones whose score is at most `tolerance` below the best."""
    best = scores[remaining].max()
    return int(((scores >= best - tolerance) & remaining).nonzero()[0])


def pick_largest(
    values: Float64[Tensor, " N"],
    eligible: Bool[Tensor, " N"],
    num_selected: int,
    tie_tolerance: float,
    smallest_scale: float = 0.0,
) -> Picks:
    """Picks the largest values, largest first; those within `tie_tolerance` times the largest left go by position."""
    remaining = eligible.clone()
    picks = Picks([], [])
    for _ in range(min(num_selected, int(eligible.sum()))):
        scale = max(float(values[remaining].max().abs()), smallest_scale)
        index = lowest_tied(values, remaining, tie_tolerance * scale)
        remaining[index] = False
        picks.indices.append(index)
        picks.gains.append(float(values[index]))
    return picks
