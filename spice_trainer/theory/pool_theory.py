"""Everything the theory says of one pool, and its means over pools.

    K, picks ─ decomposition ┬ bounds, correlations, conflict groups
                             ├ guarantees (curvature, certificate)
                             └ decay (half-life, AUMG, by conflict group)

Axes: N candidates, K picked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor

from spice_trainer.selection.checks import check_gram, sound_rows
from spice_trainer.selection.greedy import GramReference, select
from spice_trainer.selection.results import Selection
from spice_trainer.theory.bounds import BoundCheck, check_bounds
from spice_trainer.theory.correlations import ConflictCorrelations, ConflictGroup, conflict_groups, correlate
from spice_trainer.theory.decay import GroupDecay, aumg, group_decays, half_life
from spice_trainer.theory.decomposition import Decomposition, decompose
from spice_trainer.theory.guarantees import GREEDY_RATIO, Guarantees, measure_guarantees


@dataclass(frozen=True)
class PoolTheory:
    """What the theory says of one pool and its picks.

    `half_life` and `aumg` are of the picks' gains, `groups` are all pairs in thirds by conflict, `group_decays` greedy
    picks from thirds of the pool by conflict.
    """

    num_candidates: int
    num_sound: int
    decomposition: Decomposition
    bounds: tuple[BoundCheck, ...]
    guarantees: Guarantees
    half_life: int | None
    aumg: float | None
    correlations: ConflictCorrelations
    groups: tuple[ConflictGroup, ...]
    group_decays: tuple[GroupDecay, ...]

    def as_numbers(self) -> dict[str, float | None]:
        """Every number by a name, as JSON holds them: `bound/conflict/violation_rate`, `group/low/size`."""
        found = self.decomposition
        pairs = found.pair_epsilons.numel()
        numbers: dict[str, float | None] = {
            "num_candidates": self.num_candidates,
            "num_sound": self.num_sound,
            "num_selected": len(found.indices),
            "num_pairs": pairs,
            "fisher_alpha": found.fisher_alpha,
            "information": found.information,
            "base_gain": sum(found.base_gains),
            "epsilon": sum(found.epsilons),
            "identity_residual": found.identity_residual,
            "largest_norm": found.largest_norm,
            "mean_overlap": float(found.pair_overlaps.mean()) if pairs else None,
            "mean_epsilon": float(found.pair_epsilons.mean()) if pairs else None,
            "mean_decay": float((found.pair_epsilons / found.pair_base_gains).mean()) if pairs else None,
            "mean_conflict": float(found.pair_conflicts.mean()) if pairs else None,
            "conflict_rate": float((found.pair_cosines < 0).double().mean()) if pairs else None,
            "half_life": self.half_life,
            "aumg": self.aumg,
            "greedy_ratio": GREEDY_RATIO,
        }
        numbers |= asdict(self.guarantees)
        numbers |= {f"spearman/{name}": value for name, value in asdict(self.correlations).items()}
        for bound in self.bounds:
            for name in ("violation_rate", "tightness", "constant"):
                numbers[f"bound/{bound.name}/{name}"] = getattr(bound, name)
        for group in self.groups:
            values = asdict(group)
            del values["group"]
            numbers |= {f"group/{group.group}/{name}": value for name, value in values.items()}
        for decay in self.group_decays:
            for name in ("size", "mean_cosine", "half_life", "aumg", "information"):
                numbers[f"decay/{decay.group}/{name}"] = getattr(decay, name)
        return numbers


@dataclass(frozen=True)
class Estimate:
    """A number's mean over the pools that have it, its standard error and range.

    The error takes the pools as independent and is `None` for a single one. Where a half-life was not reached in some,
    the mean is of the others.
    """

    mean: float
    standard_error: float | None
    minimum: float
    maximum: float
    num_pools: int


def analyse_pool(
    gram: Float[Tensor, "N N"],
    selection_or_num_selected: Selection | Sequence[int] | int,
    *,
    fisher_alpha: float = 1.0,
    conflict_penalty: float = 0.1,
    conflict_reference: GramReference = "selected",
    tie_tolerance: float = 1e-6,
    max_subsets: int = 20_000,
) -> PoolTheory:
    """Holds the theory against one pool's Gram matrix.

    Args:
        gram (`Tensor`): Inner products of the N candidates' gradients, shape (N, N), any floating dtype; computed in
            float64 on the CPU. Rows with a non-finite or zero diagonal take no part.
        selection_or_num_selected ([`Selection`], `Sequence[int]` or `int`): The picks, as [`select`] returned them or
            as positions in order; or how many to pick here, by [`select`].
        fisher_alpha (`float`, *optional*, defaults to 1.0): α, as it was used on this pool.
        conflict_penalty (`float`, *optional*, defaults to 0.1): λ, where the picks are made here.
        conflict_reference (`str`, *optional*, defaults to "selected"): Whose mean gradient a conflict is against.
        tie_tolerance (`float`, *optional*, defaults to 1e-6): See [`select`], where the picks are made here.
        max_subsets (`int`, *optional*, defaults to 20,000): The best picks are looked for by trying all subsets where
            there are no more than these; 0 never tries.

    Returns:
        [`PoolTheory`]

    Raises:
        ValueError: If an argument is out of range, `gram` is not a Gram matrix, or the picks are not distinct sound
            rows of it.

    Example:
    ```python
    >>> gradients = torch.randn(120, 1000)
    >>> theory = analyse_pool(gradients @ gradients.T, 12)
    >>> theory.guarantees.certified_ratio, theory.half_life
    ```
    """
    if isinstance(selection_or_num_selected, int):
        selection_or_num_selected = select(
            gram,
            selection_or_num_selected,
            fisher_alpha=fisher_alpha,
            conflict_penalty=conflict_penalty,
            conflict_reference=conflict_reference,
            tie_tolerance=tie_tolerance,
        )
    if isinstance(selection_or_num_selected, Selection):
        selection_or_num_selected = selection_or_num_selected.indices
    indices = selection_or_num_selected
    decomposition = decompose(gram, indices, fisher_alpha=fisher_alpha, conflict_reference=conflict_reference)
    return PoolTheory(
        num_candidates=gram.shape[0],
        num_sound=int(sound_rows(check_gram(gram)).sum()),
        decomposition=decomposition,
        bounds=check_bounds(decomposition),
        guarantees=measure_guarantees(gram, indices, fisher_alpha=fisher_alpha, max_subsets=max_subsets),
        half_life=half_life(decomposition.gains),
        aumg=aumg(decomposition.gains),
        correlations=correlate(decomposition),
        groups=conflict_groups(decomposition),
        group_decays=group_decays(gram, len(indices), fisher_alpha=fisher_alpha) if indices else (),
    )


def summarise(pools: Iterable[PoolTheory]) -> dict[str, Estimate]:
    """Means over pools, with standard errors, by the names of [`PoolTheory.as_numbers`] that some pool has.

    Pools of one run are scored at weights that follow from each other, so their standard error is of these pools alone
    and says little of another run.

    Args:
        pools (`Iterable[PoolTheory]`): At least one.

    Returns:
        `dict[str, Estimate]`
    """
    numbers = [pool.as_numbers() for pool in pools]
    if not numbers:
        raise ValueError("summarise needs at least one analysed pool, got none.")
    estimates = {}
    for name in dict.fromkeys(name for one in numbers for name in one):
        values = [float(value) for one in numbers if (value := one.get(name)) is not None]
        if not values:
            continue
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        estimates[name] = Estimate(statistics.fmean(values), error, min(values), max(values), len(values))
    return estimates
