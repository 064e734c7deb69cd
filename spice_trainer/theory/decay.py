"""How fast gains shrink as picks are made, and whether they shrink faster where candidates conflict.

    half-life = the fewest picks after which the next gain is at most half of the first
    AUMG      = Σ_k Δ_k / (K Δ_1)      the area under the gains over that of a rectangle as high as the first

The paper's text was not at hand; these are the definitions taken here. AUMG is 1 where nothing is lost, and may pass 1
where a penalty made the first pick one of low gain.

Axes: N candidates, K picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from spice_trainer.selection.checks import check_alpha, check_gram, sound_rows
from spice_trainer.selection.conflict import mean_cosines
from spice_trainer.selection.greedy import select

GroupName = Literal["low", "medium", "high"]
GROUP_NAMES: tuple[GroupName, ...] = ("low", "medium", "high")


@dataclass(frozen=True)
class GroupDecay:
    """Greedy picks from one third of a pool, by conflict with the pool's mean gradient.

    `size` counts its candidates and `mean_cosine` is theirs with that mean; `gains` are of the picks in order,
    `half_life` is `None` where it was not reached, `information` is F of the picks.
    """

    group: GroupName
    size: int
    mean_cosine: float
    gains: tuple[float, ...]
    half_life: int | None
    aumg: float
    information: float


def half_life(gains: Sequence[float]) -> int | None:
    """After how many picks, at least 1, the next gain is at most half of the first; `None` where no gain is as low."""
    return next((picks for picks, gain in enumerate(gains) if picks and gain <= gains[0] / 2), None)


def aumg(gains: Sequence[float]) -> float | None:
    """The mean gain as a share of the first; `None` without a positive first gain."""
    return sum(gains) / (len(gains) * gains[0]) if gains and gains[0] > 0 else None


def group_decays(
    gram: Float[Tensor, "N N"], num_selected: int, *, fisher_alpha: float = 1.0
) -> tuple[GroupDecay, ...]:
    """Picks greedily, by gain alone, within the third of a pool that conflicts least, the middle and the most.

    Candidates are ranked by their cosine with the mean gradient of the pool's sound rows, the largest cosine first, so
    that there are thirds also where few conflict. Each third gives as many picks, at most its size. Nothing where
    fewer than 6 rows are sound.
    """
    check_alpha(fisher_alpha)
    gram = check_gram(gram)
    sound = sound_rows(gram)
    rows: Tensor = sound.nonzero().flatten()
    if rows.numel() < 6:
        return ()
    gram = torch.where(sound[:, None] & sound, gram, 0.0)
    cosines = mean_cosines(gram, rows.tolist())
    order = rows[torch.argsort(cosines[rows], descending=True, stable=True)]
    thirds = order.tensor_split(3)
    num_picks = min(num_selected, *(len(third) for third in thirds))
    decays = []
    for name, third in zip(GROUP_NAMES, thirds, strict=True):
        picks = select(gram[third][:, third], num_picks, fisher_alpha=fisher_alpha, conflict_penalty=0.0)
        share = aumg(picks.gains)
        decays.append(
            GroupDecay(
                group=name,
                size=len(third),
                mean_cosine=float(cosines[third].mean()),
                gains=picks.gains,
                half_life=half_life(picks.gains),
                aumg=0.0 if share is None else share,
                information=picks.information,
            )
        )
    return tuple(decays)
