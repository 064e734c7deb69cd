"""What a few hundred scored rows tell of a selection before anything is trained: arithmetic alone.

Axes: N rows of the training set, m rows of the validation set, F features, K picked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from spice_trainer.selection.quotas import quotas_by_reference
from spice_trainer.selection.target import Target

_NUM_DRAWS = 200


def explained_by_length(
    cosines: Float64[Tensor, "M M"],
    sound: Bool[Tensor, " M"],
    lengths: Sequence[int],
    target: Target,
    *,
    num_bins: int = 4,
) -> float:
    """The share of the difference between training and validation rows that goes once their lengths are alike.

        1 − D(p_ℓ)/D(p),   D(q) = max(0, |v̄ − q|² − what it is by chance)

    p is the mean of the training rows and p_ℓ that of the same rows weighted so that each range of answer lengths
    counts as in the validation rows. In [0, 1]; 0 where there is no difference to explain.
    """
    number = len(lengths)
    of_pool, of_target = sound[:number], sound[number:]
    weights = target.weights(of_target)
    bins = quotas_by_reference(lengths, target.label_tokens, weights, 1, num_bins=num_bins).bins
    target_bins = quotas_by_reference(target.label_tokens, target.label_tokens, weights, 1, num_bins=num_bins).bins
    plain = of_pool.to(torch.float64) / of_pool.sum()
    matched = torch.zeros(number, dtype=torch.float64)
    for one in range(num_bins):
        share, members = float(weights[target_bins == one].sum()), of_pool & (bins == one)
        if share > 0 and bool(members.any()):
            matched[members] = share / int(members.sum())
    if not bool((matched > 0).any()):
        return 0.0
    matched /= matched.sum()
    before, after = (_excess(cosines, candidate, weights) for candidate in (plain, matched))
    return min(max(1.0 - after / before, 0.0), 1.0) if before > 0 else 0.0


def _excess(
    cosines: Float64[Tensor, "M M"], of_pool: Float64[Tensor, " N"], of_target: Float64[Tensor, " m"]
) -> float:
    """Squared distance of two weighted means of unit rows, less what two samples of one source have by chance."""
    difference = torch.cat([-of_pool, of_target])
    squared = float(difference @ cosines @ difference)
    by_chance = 0.0
    for weights, block in (
        (of_pool, cosines[: len(of_pool), : len(of_pool)]),
        (of_target, cosines[len(of_pool) :, len(of_pool) :]),
    ):
        effective = float(weights.square().sum())
        if effective < 1:
            by_chance += (1.0 - float(weights @ block @ weights)) * effective / (1.0 - effective)
    return max(squared - by_chance, 0.0)


@dataclass(frozen=True)
class Pointing:
    """How far the steps of a rule's picks point down the loss of rows that it did not read, beside random picks'.

    Args:
        cosine (`float`): Of the sum of the picks' steps over all pools with the mean gradient of those rows.
        over_random (`float`): That less the mean of random picks of the same pools.
        standard_error (`float`): Of `over_random`, over the rows that were not read.
        random_spread (`float`): Standard deviation of random picks' cosines.
    """

    cosine: float
    over_random: float
    standard_error: float
    random_spread: float

    @property
    def is_better(self) -> bool:
        """Whether it is better than random picks by two standard errors, and than nineteen in twenty of them."""
        return self.over_random > max(2 * self.standard_error, 1.645 * self.random_spread)


def measure_pointing(
    steps: Float64[Tensor, "N F"],
    held: Float64[Tensor, "m F"],
    pools: Sequence[Sequence[int]],
    picks: Sequence[Sequence[int]],
    *,
    seed: int = 0,
) -> Pointing:
    """Measures it of the picks from each pool, rows of `steps`, which are what each row would do to the weights.

    Per step a rule may look good by going one way again and again, so the sum over all pools counts.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [index for pool in picks for index in pool]
    sums = [steps[chosen].sum(dim=0)]
    for _ in range(_NUM_DRAWS):
        drawn: list[int] = []
        for pool, of_pool in zip(pools, picks, strict=True):
            order = torch.randperm(len(pool), generator=generator)[: len(of_pool)].tolist()
            drawn += [pool[place] for place in order]
        sums.append(steps[drawn].sum(dim=0))
    directions = torch.stack(sums)
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-30)
    resampled = torch.randint(len(held), (_NUM_DRAWS, len(held)), generator=generator)
    # The mean gradient of the rows as they are, and of draws of them with repetition.
    targets = torch.cat([held.mean(dim=0)[None], held[resampled].mean(dim=1)])
    targets = targets / targets.norm(dim=1, keepdim=True).clamp_min(1e-30)
    cosines = directions @ targets.T
    over_random = cosines[0] - cosines[1:].mean(dim=0)
    return Pointing(
        cosine=float(cosines[0, 0]),
        over_random=float(over_random[0]),
        standard_error=float(over_random[1:].std()),
        random_spread=float(cosines[1:, 0].std()),
    )
