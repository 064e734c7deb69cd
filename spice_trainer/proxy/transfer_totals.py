"""How a proxy's picks transfer to the target over several pools, and what the log says of it.

one pool: correlation of gains, shared picks, retained (module `transfer`) ─ means over pools ─ one sentence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from spice_trainer.selection.results import PoolTransfer
from spice_trainer.utils.saved import saved_number


@dataclass
class TransferTotals:
    """What the compared pools of a run say together.

    Args:
        transfers (`list[PoolTransfer]`, *optional*): The pools compared so far.
    """

    transfers: list[PoolTransfer] = field(default_factory=list)

    def add(self, transfer: PoolTransfer) -> None:
        """Adds one pool."""
        self.transfers.append(transfer)

    @property
    def num_pools(self) -> int:
        """Pools compared."""
        return len(self.transfers)

    @property
    def rank_correlation(self) -> float | None:
        """Mean rank correlation of the pools that have one."""
        return _mean(self._values("rank_correlation"))

    @property
    def overlap(self) -> float | None:
        """Mean share of the target's picks that the proxy makes too."""
        return _mean(self._values("overlap"))

    @property
    def retained(self) -> float | None:
        """Mean `retained` of the pools that have one."""
        return _mean(self._values("retained"))

    @property
    def retained_by_length(self) -> float | None:
        """Mean `retained_by_length` of the pools that have one."""
        return _mean(self._values("retained_by_length"))

    @property
    def minimum_retained(self) -> float | None:
        """`retained` of the worst pool."""
        return min(self._values("retained"), default=None)

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

    def _values(self, name: str) -> list[float]:
        return [value for transfer in self.transfers if (value := getattr(transfer, name)) is not None]


def describe_transfer(totals: TransferTotals) -> str:
    """What the log says of a proxy, with a verdict only where its picks are closer to chance than to the target's.

    Args:
        totals ([`TransferTotals`]): The pools compared.

    Returns:
        `str`
    """
    num_pools = totals.num_pools
    if not num_pools:
        return "SPICE: no pool was scored by both the proxy and the target, so they cannot be compared."
    ours, theirs, shared = (
        sum(getattr(transfer, name) for transfer in totals.transfers) / num_pools
        for name in ("num_selected", "num_selected_proxy", "num_shared")
    )
    ranks = (
        "the gains of the proxy or of the target are all equal and cannot be ranked"
        if totals.rank_correlation is None
        else f"the proxy's gains rank as the target's with a correlation of {totals.rank_correlation:.2f}"
    )
    same = (
        f"{_count(shared)} of {_count(ours)} picks are the same"
        if ours == theirs
        else f"{_count(shared)} of the target's {_count(ours)} picks are among the proxy's {_count(theirs)}"
    )
    retained, minimum = totals.retained, totals.minimum_retained
    beginning = f"SPICE: on {num_pools:,} pool{'s' if num_pools > 1 else ''} {ranks}, {same}, and "
    if retained is None or minimum is None:
        return (
            f"{beginning}what its picks retain cannot be measured: there are none, or the target's own add nothing "
            "over random ones."
        )
    worst = f"; {minimum:.2f} on the worst pool" if num_pools > 1 else ""
    text = (
        f"{beginning}its picks retain {retained:.2f} of the information that the target's own picks add over random "
        f"ones (1 is as good, 0 as good as chance{worst})."
    )
    by_length = totals.retained_by_length
    if by_length is not None:
        text += f" Picking by the length of answers alone, with no model, retains {by_length:.2f}."
        if retained <= by_length:
            text += " So nothing here shows that the proxy knows more than that."
    if retained >= 0.5:
        return text
    verdict = "no better than random ones" if retained <= 0 else "closer to random ones than to the target's own"
    return f"{text} On this data this proxy's picks are {verdict}: take a larger proxy, or one of the target's family."


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _count(mean: float) -> str:
    return f"{mean:.1f}".removesuffix(".0")
