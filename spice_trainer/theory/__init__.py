"""The theory behind the selection, checked on a pool's Gram matrix alone: no model, no trainer.

    >>> from spice_trainer.theory import analyse_pool, summarise
    >>> summarise(analyse_pool(gram, 12) for gram in grams)["curvature"]

`examples/theory.py` takes the Gram matrices of a run and prints and draws what this says of them.
"""

from spice_trainer.theory.bounds import BoundCheck, check_bounds
from spice_trainer.theory.correlations import ConflictCorrelations, ConflictGroup, conflict_groups, correlate
from spice_trainer.theory.decay import GroupDecay, aumg, group_decays, half_life
from spice_trainer.theory.decomposition import Decomposition, decompose
from spice_trainer.theory.guarantees import (
    Guarantees,
    best_subset,
    curvature_ratio,
    leave_one_out_gains,
    measure_guarantees,
    total_curvature,
)
from spice_trainer.theory.pool_theory import Estimate, PoolTheory, analyse_pool, summarise

__all__ = [
    "BoundCheck",
    "ConflictCorrelations",
    "ConflictGroup",
    "Decomposition",
    "Estimate",
    "GroupDecay",
    "Guarantees",
    "PoolTheory",
    "analyse_pool",
    "aumg",
    "best_subset",
    "check_bounds",
    "conflict_groups",
    "correlate",
    "curvature_ratio",
    "decompose",
    "group_decays",
    "half_life",
    "leave_one_out_gains",
    "measure_guarantees",
    "summarise",
    "total_curvature",
]
