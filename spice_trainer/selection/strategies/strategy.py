"""A rule that picks from a pool, as an object: its name, what it needs, what a candidate costs, and how it picks.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Bool, Float64
from torch import Tensor

from spice_trainer.selection.conflict import conflicts_with_earlier
from spice_trainer.selection.greedy import PickOptions, information_of
from spice_trainer.selection.information import ExactInformation
from spice_trainer.selection.quotas import LengthQuotas, QuotaRoom
from spice_trainer.selection.results import Selection
from spice_trainer.selection.scores import NEEDS_IN_WORDS, PoolScores


class Picks(NamedTuple):
    """Positions in the order of picking, each one's gain in the rule's own units, and what else it found, by name."""

    indices: list[int]
    gains: list[float]
    facts: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Strategy:
    """A rule that picks from a pool. [`register_strategy`] makes it a legal `SpiceConfig(strategy=...)`.

    A pick must be a function of the scores and options alone, so that it is the same on any number of processes and
    after a resume, and its first k of K picks those of a budget of k, but where it keeps to `options.quotas`.

    Args:
        name (`str`): Its name.
        needs (`tuple[str, ...]`): Fields of [`PoolScores`] that it reads beside `sound`, of those in `NEEDS_IN_WORDS`.
            What no rule needs is not computed, and what a candidate costs follows: `gram`, `gradient_norms` and
            `alignment` take a forward and a backward, `losses` a forward, `losses_without_instruction` one more.
        pick (`Callable[[PoolScores, int, PickOptions], Picks | Selection]`): Picks at most so many candidates of those
            that [`PoolScores.eligible`] tells. Of [`Picks`] the conflicts and the information are added, which mean
            the same for every rule.
        maximizes_information (`bool`, *optional*, defaults to `False`): Whether its picks are the [`Selection`] of a
            greedy pass by Fisher information on the Gram matrix, so that `information`, `stop_ratio`, `min_gain` and
            centred gradients mean something to it.
        has_conflict_penalty (`bool`, *optional*, defaults to `False`): Whether that pass heeds λ.
        has_gains (`bool`, *optional*, defaults to `True`): Whether its gains say anything; else records have none.
        reads_whole_gram (`bool`, *optional*, defaults to `True`): Whether it reads `gram` as a matrix; else that of a
            large pool is a `GramRows`, which computes what `build_information` and `greedy` read.
        reads_target (`bool`, *optional*, defaults to `False`): Whether it reads the validation rows where there are
            any, and does without where not; a rule that needs them has `"target"` in `needs`.
        has_own_quotas (`bool`, *optional*, defaults to `False`): Whether it keeps to answer lengths by itself, unless
            `length_quotas` says how.
        target_is_raw (`bool`, *optional*, defaults to `False`): Whether `gradient_cosines` compare with the validation
            rows' own gradients, also where candidates' are preconditioned.
        on_hidden_states ([`Strategy`], *optional*): The same rule on hidden states, for
            `matching_features="hidden_states"`.

    Raises:
        TypeError: If the name is no text, `needs` no tuple of names, or `pick` cannot be called.
        ValueError: If it needs something that is not known of a pool, or a property without what that needs.

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
    reads_whole_gram: bool = True
    reads_target: bool = False
    has_own_quotas: bool = False
    target_is_raw: bool = False
    on_hidden_states: Strategy | None = None

    def __post_init__(self) -> None:
        """Checks what it is made of."""
        if not (isinstance(self.name, str) and self.name):
            raise TypeError(f"A Strategy's name is a text, got {self.name!r}. Fix: Strategy('name', needs, pick).")
        if not isinstance(self.needs, tuple | list) or not callable(self.pick):
            raise TypeError(
                f"Strategy {self.name!r}: needs is a tuple of names and pick a function, got {self.needs!r} and "
                f"{self.pick!r}. Fix: Strategy({self.name!r}, ('label_tokens',), pick), a comma after a lone name."
            )
        object.__setattr__(self, "needs", tuple(self.needs))
        unknown = [name for name in self.needs if name not in NEEDS_IN_WORDS]
        if unknown:
            raise ValueError(
                f"Strategy {self.name!r} needs {', '.join(map(repr, unknown))}, which is not known of a pool. Fix: "
                f"name fields among {', '.join(map(repr, NEEDS_IN_WORDS))}."
            )
        if self.maximizes_information and "gram" not in self.needs:
            raise ValueError(f"Strategy {self.name!r}: maximizes_information=True needs 'gram'. Fix: add it to needs.")
        if self.has_conflict_penalty and not self.maximizes_information:
            raise ValueError(
                f"Strategy {self.name!r}: has_conflict_penalty=True is of a rule with maximizes_information=True. "
                "Fix: set both, or neither."
            )

    @property
    def num_backwards(self) -> int:
        """Backwards through the model that a candidate costs."""
        of_gradients = {
            "gram",
            "gradient_norms",
            "gradient_cosines",
            "gradient_lengths",
            "alignment",
            "reference_norm",
        }
        return int(bool(of_gradients & set(self.needs)))

    @property
    def num_forwards(self) -> int:
        """Forwards through the model that a candidate costs."""
        alone = "losses_without_instruction" in self.needs
        hidden = bool({"hidden_cosines", "last_hidden_cosines"} & set(self.needs))
        logits = bool({"logit_norms", "logit_features"} & set(self.needs))
        return hidden + alone + logits + max(self.num_backwards, int("losses" in self.needs or alone))

    @property
    def compares_gradients(self) -> bool:
        """Whether it compares gradients with something, and not only their norms."""
        return bool({"gram", "gradient_cosines", "alignment"} & set(self.needs))

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
        if not isinstance(picks, Selection if self.maximizes_information else Picks | Selection):
            expected = "the Selection of a greedy pass" if self.maximizes_information else "Picks or a Selection"
            raise TypeError(f'strategy="{self.name}" picked a {type(picks).__name__}, where {expected} was expected.')
        checked = self._check_picks(picks.indices, picks.gains, scores, num_selected)
        if isinstance(picks, Selection):
            return picks
        return replace(describe_picks(scores, checked, options.fisher_alpha), facts=dict(picks.facts))

    def _check_picks(
        self, indices: Sequence[int], gains: Sequence[float], scores: PoolScores, num_selected: int
    ) -> Picks:
        """Picks as plain numbers; a `ValueError` for those that must not train."""
        picked, values = [operator.index(index) for index in indices], [float(gain) for gain in gains]
        eligible = scores.eligible().tolist()
        problem = None
        if len(picked) > num_selected:
            problem = f"{len(picked)} candidates, where at most {num_selected} were asked for"
        elif len(values) != len(picked) or any(math.isinf(gain) for gain in values):
            problem = f"gains {values} for {len(picked)} candidates; each has one, finite or nan"
        elif len(set(picked)) != len(picked) or not all(0 <= index < len(eligible) for index in picked):
            problem = f"the positions {picked}, which are not distinct ones of {len(eligible)} candidates"
        elif not all(eligible[index] for index in picked):
            unsound = next(index for index in picked if not eligible[index])
            problem = f"position {unsound}, whose gradient or loss is zero or not finite, or which has no label"
        if problem is not None:
            raise ValueError(
                f'strategy="{self.name}" picked {problem}. Fix: pick among `scores.eligible(...)`, which also '
                "takes the numbers that must be finite."
            )
        return Picks(picked, values)


def describe_picks(scores: PoolScores, picks: Picks, fisher_alpha: float) -> Selection:
    """Returns the picks with their conflicts, against the mean of the picks before, and their information."""
    gains = tuple(picks.gains)
    conflicts, information = (math.nan,) * len(gains), math.nan
    if scores.gram is not None:
        gram = scores.gram_of(picks.indices)
        conflicts = conflicts_with_earlier(gram)
        information = (
            information_of(ExactInformation(gram, fisher_alpha=fisher_alpha), range(len(gains))) if gains else 0.0
        )
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
    quotas: LengthQuotas | None = None,
) -> Picks:
    """Picks the largest values, largest first; those within `tie_tolerance` times the largest left go by position."""
    remaining, room = eligible.clone(), QuotaRoom(quotas)
    picks = Picks([], [])
    for _ in range(min(num_selected, int(eligible.sum()))):
        among = room.among(remaining)
        scale = max(float(values[among].max().abs()), smallest_scale)
        index = lowest_tied(values, among, tie_tolerance * scale)
        remaining[index] = False
        room.take(index)
        picks.indices.append(index)
        picks.gains.append(float(values[index]))
    return picks
