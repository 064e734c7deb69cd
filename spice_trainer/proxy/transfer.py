"""Does a proxy pick what the target would? Two models' scores of the same pools, compared, and what the log says.

    retained = (F(S′) − mean F(R′)) / (F(S) − mean F(R)),    F on the target's gradients

S are the target's picks, S′ the proxy's, R and R′ random candidates, as many as S and as S′. 1 is as good as the
target's own picks, 0 as good as chance. The plain ratio F(S′) / F(S) would say nothing: random picks reach 0.999 of
the information when gradients have unit norm.

Axes: N candidates of a pool, M compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.selection.checks import sound_rows
from spice_trainer.selection.gram import normalization_weights
from spice_trainer.selection.information import InformationMeasure, build_information
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.results import PoolTransfer
from spice_trainer.selection.scores import PoolScores
from spice_trainer.utils.saved import saved_number
from spice_trainer.utils.statistics import spearman

NUM_RANDOM_SUBSETS = 200

# Gains this close, relative to the largest, are equal but for rounding: those of unit gradients are, by construction.
_EQUAL_GAINS = 1e-6

# What the target's picks must add over random ones, relative to F, to be told from rounding.
_LEAST_SPAN = 1e-9


def compare_pools(
    target: PoolScores,
    proxy: PoolScores,
    budget: int,
    config: SpiceConfig,
    *,
    num_random_subsets: int = NUM_RANDOM_SUBSETS,
) -> PoolTransfer:
    """Compares what a proxy picks from a pool with what the target picks, of scores of the same candidates in order.

    **Rank correlation**: Spearman's, of Δ(x|∅) over the candidates that both models can pick, ties by their mean rank.
    It is `None` with fewer than 3 of them, and where all gains of a model are equal but for rounding. The latter holds
    for exact and AdaFisher information under unit norm, where the first pick is free and only the angles between
    candidates decide: nothing ranks candidates there before something is picked, so overlap and `retained` alone tell.

    **Retained**: each set of picks is measured beside random sets of its own size, so that with adaptive stopping a
    proxy that picks everything has added nothing over chance, one that stops early only what its few picks add, and
    one that picks more well can have more than 1.
    Random sets are drawn from the candidates that the target can pick; a pick of the proxy that the target cannot make
    adds nothing. They depend on the rows of the pool alone, neither on their order nor on any global random state.
    `None` where a model picks nothing, where the target picks all it can, and where the target's picks add nothing
    over random ones. AdaFisher's information depends on the order: picks are added as they were picked, random
    candidates as they were drawn. With diagonal information each random set costs as much as a greedy pass that
    evaluates nothing but its picks.

    **Retained by length**: what [`scores_by_length`] would pick, for exact information. A proxy that retains no more
    has shown only that answers are as long for it as for the target.
    """
    if target.candidates != proxy.candidates:
        raise ValueError(
            f"compare_pools: the target scored rows {_shown(target.candidates)} and the proxy rows "
            f"{_shown(proxy.candidates)}. Their picks can be compared only on the same candidates in the same order. "
            "Fix: score one pool of the schedule with both models, from datasets whose rows correspond."
        )
    if num_random_subsets < 1:
        raise ValueError(
            f"compare_pools: num_random_subsets={num_random_subsets}, but chance needs at least 1 random set."
        )
    selection, proxy_selection = select_pool(target, budget, config), select_pool(proxy, budget, config)
    ours, theirs = selection.selection.indices, proxy_selection.selection.indices
    # Pools that have a Gram matrix have an α.
    information = _PoolInformation(target, selection.alpha or config.fisher_alpha, config)
    proxy_information = _PoolInformation(proxy, proxy_selection.alpha or config.fisher_alpha, config)
    both = information.sound & proxy_information.sound
    by_length: tuple[int, ...] = ()
    if config.information == "exact":
        by_length = select_pool(scores_by_length(target, config), budget, config).selection.indices
    retained, retained_by_length = _retained(
        information, target.candidates, ours, (theirs, by_length), num_random_subsets
    )
    return PoolTransfer(
        pool=target.pool or 0,
        num_selected=len(ours),
        num_selected_proxy=len(theirs),
        num_shared=len(set(ours) & set(theirs)),
        rank_correlation=spearman(
            information.first_gains()[both], proxy_information.first_gains()[both], equal_share=_EQUAL_GAINS
        ),
        retained=retained,
        retained_by_length=retained_by_length,
    )


def scores_by_length(scores: PoolScores, config: SpiceConfig) -> PoolScores:
    """What scoring would say of gradients at right angles to each other, of squared norm 1 / label tokens.

    The gradient of a mean over n tokens that have nothing in common has such a norm. No model is asked, and nothing is
    in conflict with a momentum. For exact information only: there are no coordinates.
    """
    label_tokens = torch.tensor(scores.label_tokens, dtype=torch.float64)
    norms = torch.where(scores.sound, label_tokens.clamp(min=1).rsqrt(), 0.0)
    weights = normalization_weights(norms, label_tokens, config.gradient_normalization)
    gram = torch.diag((weights * norms).square())
    cosines = None if scores.momentum_cosines is None else torch.zeros_like(norms)
    known = replace(scores, gram=gram, gradient_norms=norms, momentum_cosines=cosines)
    return replace(known, gradients=None, row_weights=None)


class _PoolInformation:
    """Gains and F of subsets of one pool, on one model's scores, for any of the three measures."""

    def __init__(self, scores: PoolScores, alpha: float, config: SpiceConfig) -> None:
        self._scores, self._alpha, self._kind = scores, alpha, config.information
        self._gram = scores.sound_gram()
        # The rows that `select_pool` considers.
        self.sound = sound_rows(self._gram)

    def first_gains(self) -> Float64[Tensor, " N"]:
        """Δ(x|∅) of every candidate; 0 for those that cannot be picked."""
        gains = torch.zeros(len(self._scores.candidates), dtype=torch.float64)
        rows: list[int] = self.sound.nonzero().flatten().tolist()
        if rows:
            gains[rows] = self._measure(rows).gains()
        return gains

    def gains_in_order(self, positions: Sequence[int]) -> list[float]:
        """The gain of each candidate beside those before it; their sum is F. Those that cannot be picked gain 0."""
        gains = [0.0] * len(positions)
        places = [place for place, position in enumerate(positions) if self.sound[position]]
        if places:
            # A measure of these rows alone: one of the whole pool would cost N / K times as much.
            measure = self._measure([positions[place] for place in places])
            for order, place in enumerate(places):
                gains[place] = measure.add(order)
        return gains

    def _measure(self, rows: list[int]) -> InformationMeasure:
        gradients, weights = self._scores.gradients, self._scores.row_weights
        return build_information(
            self._kind,
            gram=self._gram[rows][:, rows],
            gradients=None if gradients is None else gradients[rows],
            fisher_alpha=self._alpha,
            row_weights=None if weights is None else weights[rows],
        )


def _retained(
    information: _PoolInformation,
    candidates: Sequence[int],
    ours: Sequence[int],
    others: Sequence[Sequence[int]],
    num_random_subsets: int,
) -> list[float | None]:
    """What each of the other sets of picks retains."""
    pickable: list[int] = information.sound.nonzero().flatten().tolist()
    if not ours or len(ours) == len(pickable):
        return [None for _ in others]
    longer = max(map(len, [ours, *others]))
    # One random order serves all sizes, so that chance has no noise of its own between them.
    shuffles = _shuffles(candidates, pickable, num_random_subsets)
    random_gains = [information.gains_in_order(order[:longer]) for order in shuffles]

    def beyond_chance(picks: Sequence[int]) -> tuple[float, float]:
        total = sum(information.gains_in_order(picks))
        return total, total - sum(sum(gains[: len(picks)]) for gains in random_gains) / num_random_subsets

    total, span = beyond_chance(ours)
    return [beyond_chance(picks)[1] / span if picks and span > _LEAST_SPAN * total else None for picks in others]


def _shuffles(candidates: Sequence[int], positions: Sequence[int], num_shuffles: int) -> list[list[int]]:
    """Seeded permutations of the pool positions, the same rows whatever order the pool has."""
    by_row = sorted(positions, key=lambda position: candidates[position])
    rows = [candidates[position] for position in by_row]
    digest = hashlib.sha256(f"spice_trainer/transfer/{rows}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    orders = (torch.randperm(len(by_row), generator=generator).tolist() for _ in range(num_shuffles))
    return [[by_row[place] for place in order] for order in orders]


def _shown(rows: Sequence[int]) -> str:
    return f"{list(rows[:5])}{'…' if len(rows) > 5 else ''} ({len(rows)} of them)"


@dataclass
class TransferTotals:
    """What the compared pools of a run say together."""

    transfers: list[PoolTransfer] = field(default_factory=list)

    def add(self, transfer: PoolTransfer) -> None:
        """Adds one pool."""
        self.transfers.append(transfer)

    def mean(self, name: str) -> float | None:
        """Mean of a number of [`PoolTransfer`] over the pools that have it."""
        values = self.values(name)
        return sum(values) / len(values) if values else None

    def values(self, name: str) -> list[float]:
        """A number of [`PoolTransfer`], of the pools that have it."""
        return [value for transfer in self.transfers if (value := getattr(transfer, name)) is not None]

    def state_dict(self) -> dict[str, Any]:
        """The pools as JSON values."""
        return {"transfers": [asdict(transfer) for transfer in self.transfers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores [`TransferTotals.state_dict`]."""
        values = [
            {name: None if value is None else saved_number(value) for name, value in transfer.items()}
            for transfer in state["transfers"]
        ]
        self.transfers = [PoolTransfer(**transfer) for transfer in values]  # type: ignore[arg-type]


def describe_transfer(totals: TransferTotals) -> str:
    """What the log says of a proxy, with a verdict only where its picks are closer to chance than to the target's."""
    num_pools = len(totals.transfers)
    if not num_pools:
        return "SPICE: no pool was scored by both the proxy and the target, so they cannot be compared."
    ours, theirs, shared = (totals.mean(name) or 0.0 for name in ("num_selected", "num_selected_proxy", "num_shared"))
    correlation = totals.mean("rank_correlation")
    ranks = (
        "the gains of the proxy or of the target are all equal and cannot be ranked"
        if correlation is None
        else f"the proxy's gains rank as the target's with a correlation of {correlation:.2f}"
    )
    same = (
        f"{_count(shared)} of {_count(ours)} picks are the same"
        if ours == theirs
        else f"{_count(shared)} of the target's {_count(ours)} picks are among the proxy's {_count(theirs)}"
    )
    retained, by_length = totals.mean("retained"), totals.mean("retained_by_length")
    beginning = f"SPICE: on {num_pools:,} pool{'s' if num_pools > 1 else ''} {ranks}, {same}, and "
    if retained is None:
        return (
            f"{beginning}what its picks retain cannot be measured: there are none, or the target's own add nothing "
            "over random ones."
        )
    worst = f"; {min(totals.values('retained')):.2f} on the worst pool" if num_pools > 1 else ""
    text = (
        f"{beginning}its picks retain {retained:.2f} of the information that the target's own picks add over random "
        f"ones (1 is as good, 0 as good as chance{worst})."
    )
    if by_length is not None:
        text += f" Picking by the length of answers alone, with no model, retains {by_length:.2f}."
        if retained <= by_length:
            text += " So nothing here shows that the proxy knows more than that."
    if retained >= 0.5:
        return text
    verdict = "no better than random ones" if retained <= 0 else "closer to random ones than to the target's own"
    return f"{text} On this data this proxy's picks are {verdict}: take a larger proxy, or one of the target's family."


def _count(mean: float) -> str:
    return f"{mean:.1f}".removesuffix(".0")
