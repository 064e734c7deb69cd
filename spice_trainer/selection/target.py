"""What the user wants to do well on, as rows, and how far a pool differs from them.

Of N candidates with unit features u and m target rows v, weighted by w:

    p = mean u,   v̄ = Σ_j w_j v_j,   d = v̄ − p
    s² = Σ_sets ω² (1 − |v̄_set|²)/(m_set − 1) + (1 − |p|²)/(N − 1)          what |d|² is without any difference
    gate: p-value of |d|² among shuffles of all N + m rows;  ρ = max(0, 1 − s²/|d|²) where it is at most 0.01, else 0
    target c = p + ρ d

ρ is James and Stein's shrinkage: the target is as far from the pool as the rows warrant. All of it comes from the
matrix of the N + m rows' inner products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

SHIFT_LEVEL = 0.01
"""Largest p-value that counts as a difference between the pool and the target rows."""

_NUM_SHUFFLES = 499


@dataclass(frozen=True, eq=False)
class Target:
    """The rows of one or several sets that the user wants to do well on.

    Args:
        label_tokens (`tuple[int, ...]`): Label tokens of each row.
        sets (`tuple[int, ...]`, *optional*): Which set each is of, from 0; by default all are of one.
        set_weights (`tuple[float, ...]`, *optional*): Weight of each set; by default all weigh the same.
        gradient_norms (`torch.Tensor` of shape `(m,)`, *optional*): Norms of the raw gradients.
        token_hashes (`tuple[str | None, ...]`, *optional*): Hash of each row's token ids.

    Raises:
        ValueError: If lengths differ, or a weight is not above 0.
    """

    label_tokens: tuple[int, ...]
    sets: tuple[int, ...] = ()
    set_weights: tuple[float, ...] = ()
    gradient_norms: Float64[Tensor, " m"] | None = None
    token_hashes: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        """Fills in what was left out."""
        # A frozen instance is written to only while it is made.
        object.__setattr__(self, "sets", self.sets or (0,) * len(self.label_tokens))
        num_sets = max(self.sets, default=-1) + 1
        object.__setattr__(self, "set_weights", self.set_weights or (1.0,) * num_sets)
        if len(self.sets) != len(self.label_tokens) or len(self.set_weights) < num_sets:
            raise ValueError(
                f"A Target of {len(self.label_tokens)} rows needs the set of each, got {len(self.sets)}, and a weight "
                f"of each of {num_sets} sets, got {len(self.set_weights)}."
            )
        if not all(weight > 0 for weight in self.set_weights):
            raise ValueError(f"Weights of validation sets must be above 0, got {self.set_weights}.")

    @property
    def num_rows(self) -> int:
        """How many rows there are, m."""
        return len(self.label_tokens)

    def weights(self, sound: Bool[Tensor, " m"]) -> Float64[Tensor, " m"]:
        """Weight of each row: its set's, shared by the sound rows of the set; 0 for others, 1 in all, if any is."""
        sets = torch.tensor(self.sets, dtype=torch.int64)
        counts = torch.bincount(sets[sound], minlength=len(self.set_weights)).to(torch.float64)
        of_set = torch.tensor(self.set_weights, dtype=torch.float64) / counts.clamp_min(1.0)
        weights = torch.where(sound, of_set[sets], 0.0)
        return weights / weights.sum() if bool(sound.any()) else weights

    @cached_property
    def set_numbers(self) -> tuple[int, ...]:
        """The sets that have a row."""
        return tuple(sorted(set(self.sets)))


@dataclass(frozen=True, eq=False)
class Shift:
    """How far a pool is from the target: the gate's p-value, ρ, and c by its weights on the N + m rows."""

    p_value: float
    shrinkage: float
    distance: float  # |d|.
    target_weights: Float64[Tensor, " M"]


def measure_shift(
    cosines: Float64[Tensor, "M M"],
    sound: Bool[Tensor, " M"],
    target: Target,
    *,
    seed: int = 0,
    num_shuffles: int = _NUM_SHUFFLES,
    level: float = SHIFT_LEVEL,
) -> Shift:
    """Measures it on the inner products of N candidates and, behind them, m target rows, all of unit length.

    Rows that are not `sound` take no part. The order of the rows does not matter: shuffles go by the rows in the order
    of their products with d.
    """
    num_candidates = len(cosines) - target.num_rows
    of_pool = sound.clone()
    of_pool[num_candidates:] = False
    in_pool = of_pool.to(torch.float64) / max(int(of_pool.sum()), 1)
    in_target = torch.zeros_like(in_pool)
    in_target[num_candidates:] = target.weights(sound[num_candidates:])
    if not bool(of_pool.any()) or not bool((in_target > 0).any()):
        return Shift(1.0, 0.0, 0.0, in_pool)
    difference = in_target - in_pool
    products = cosines @ difference
    squared = float(difference @ products)
    expected = _expected(cosines, sound, in_pool, in_target, target)
    order = torch.argsort(products[sound], stable=True)
    members = sound.nonzero().flatten()[order]
    p_value = _p_value(cosines[members][:, members], difference[members], seed, num_shuffles)
    is_shifted = p_value <= level and squared > expected
    shrinkage = 1.0 - expected / squared if is_shifted else 0.0
    return Shift(p_value, shrinkage, max(squared, 0.0) ** 0.5, in_pool + shrinkage * difference)


def _expected(
    cosines: Float64[Tensor, "M M"],
    sound: Bool[Tensor, " M"],
    in_pool: Float64[Tensor, " M"],
    in_target: Float64[Tensor, " M"],
    target: Target,
) -> float:
    """s², the squared distance that the means of rows from one source have by chance."""
    num_candidates = len(cosines) - target.num_rows
    num_sound = int((in_pool > 0).sum())
    pool_square = float(in_pool @ cosines @ in_pool)
    # A pool of one row, and a set of one, tell nothing of how rows spread: then as far as unit rows can.
    pool_spread = (1.0 - pool_square) * num_sound / max(num_sound - 1, 1)
    expected = pool_spread / num_sound
    sets = torch.tensor(target.sets, dtype=torch.int64)
    for number in target.set_numbers:
        rows = (sets == number) & sound[num_candidates:]
        count = int(rows.sum())
        if count == 0:
            continue
        members = torch.nn.functional.pad(rows.to(torch.float64) / count, (num_candidates, 0))
        weight = float(in_target[num_candidates:][rows].sum())
        spread = pool_spread if count == 1 else (1.0 - float(members @ cosines @ members)) * count / (count - 1)
        expected += weight**2 * spread / count
    return expected


def _p_value(
    cosines: Float64[Tensor, "M M"], difference: Float64[Tensor, " M"], seed: int, num_shuffles: int
) -> float:
    """Share of shuffles, the rows as they are among them, under which |d|² is at least as large."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn = torch.rand(num_shuffles, len(difference), generator=generator, dtype=torch.float64)
    # NumPy sorts several times as fast as torch, and no two of these numbers are equal.
    shuffled = difference[torch.from_numpy(np.argsort(drawn.numpy(), axis=1))]
    squares = ((shuffled @ cosines) * shuffled).sum(dim=1)
    observed = float(difference @ cosines @ difference)
    # Rows of equal features give the same sum up to rounding.
    return (1 + int((squares >= observed * (1 - 1e-9) - 1e-12).sum())) / (num_shuffles + 1)


def lengths_differ(
    lengths: Sequence[int],
    target_lengths: Sequence[int],
    *,
    seed: int = 0,
    num_shuffles: int = _NUM_SHUFFLES,
) -> float:
    """The p-value of a difference between two samples of answer lengths, 1 where there is nothing to compare.

    A permutation test of the energy distance of their ranks: lengths tie often, and tests by tables are wrong then.
    """
    if not lengths or not target_lengths:
        return 1.0
    values = torch.tensor([*lengths, *target_lengths], dtype=torch.float64)
    # Equal lengths share their mean rank. In the order of lengths that of the rows does not matter.
    order = values.argsort(stable=True)
    below = (values[:, None] > values).sum(dim=1) + (values[:, None] >= values).sum(dim=1)
    ranks = (below.to(torch.float64) / 2)[order]
    difference = torch.full_like(values, -1 / len(lengths))
    difference[len(lengths) :] = 1 / len(target_lengths)
    # Of equal lengths those of the pool come first.
    return _p_value(-(ranks[:, None] - ranks).abs(), difference[order], seed, num_shuffles)
