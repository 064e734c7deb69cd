"""Pools too large for their Gram matrix: its entries, and gains from them, only where the next pick may be.

    N = 10,000 candidates of m = 32,768 numbers:    K takes N² m = 3.3 · 10¹² operations and 8 N² = 0.8 GB

A gain never rises as picks are added, so an old one bounds the new one. A candidate whose bound is below the best is
left as it is; one that may be the best catches up with all picks since, in products of matrices:

    C = (A_xS − C_x,old C_S,oldᵀ) L⁻ᵀ,    e_x ← e_x − Σ C²        (the recurrence of `cholesky`, by blocks)

Axes: N candidates, K picked, m numbers a candidate, R of the candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from spice_trainer.selection.cholesky import FLOAT64_LIMIT
from spice_trainer.selection.conflict import opposition, sums_cancel
from spice_trainer.selection.gram import RowLengths, default_product_dtype, find_copies

# From so many candidates on the Gram matrix costs more than what a greedy pass reads of it.
LARGE_POOL = 2048

# Share of the matrix that may be computed in parts: if more is read, all of it at once takes less time.
_SHARE_IN_PARTS = 1 / 32

# Rows that are multiplied, and candidates that catch up, at a time.
_BLOCK = 256


class GramRows:
    """K_xy = l_x l_y cos(u_x, u_y) of a large pool, computed where it is asked for, and kept by column.

    `rows` are those that [`scale_rows`] leaves, u, and `geometry` what it found; `lengths` are l, and 0 for candidates
    that are not sound. Rows that are equal up to sign have cosines of exactly 1 or −1.
    """

    def __init__(
        self,
        rows: Float[Tensor, "N m"],
        geometry: RowLengths,
        lengths: Float64[Tensor, " N"],
        *,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        self.lengths = torch.where(geometry.sound, lengths, 0.0)
        self._rows = rows
        self._row_norms = torch.where(geometry.sound, geometry.norms / geometry.scales, 1.0)
        self._copy_of = torch.arange(len(rows))
        for other, (first, _) in find_copies([rows], self.lengths.nonzero()[:, 0].tolist()).items():
            self._copy_of[other] = first
        self._product_dtype = product_dtype or default_product_dtype(rows)
        self._forget()

    def __len__(self) -> int:
        """N."""
        return len(self.lengths)

    def diagonal(self) -> Float64[Tensor, " N"]:
        """K_xx."""
        return self.lengths.square()

    def masked(self, sound: Bool[Tensor, " N"]) -> GramRows:
        """The same with zeros in the rows and columns that are not sound."""
        if not bool((~sound & (self.lengths > 0)).any()):
            return self
        other = copy(self)
        other.lengths = torch.where(sound, self.lengths, 0.0)
        other._forget()
        return other

    def _forget(self) -> None:
        self._num_computed = 0
        self._places: dict[int, int] = {}
        self._known = torch.empty(len(self), 0, dtype=torch.float64)

    def block(self, rows: Int64[Tensor, " R"], columns: Int64[Tensor, " K"]) -> Float64[Tensor, "R K"]:
        """K between some candidates and some others, whose columns are kept."""
        if self._num_computed > len(self) ** 2 * _SHARE_IN_PARTS:
            return self.whole[rows[:, None], columns]
        places = torch.tensor(
            [self._places.setdefault(c, len(self._places)) for c in columns.tolist()], dtype=torch.int64
        )
        room = self._known.shape[1]
        if len(self._places) > room:
            more = max(room, _BLOCK, len(self._places) - room)
            self._known = torch.nn.functional.pad(self._known, (0, more), value=torch.nan)
        found = self._known[rows[:, None], places]
        missing = found.isnan()
        if bool(missing.any()):
            of_rows, of_columns = missing.any(dim=1).nonzero()[:, 0], missing.any(dim=0).nonzero()[:, 0]
            self._num_computed += len(of_rows) * len(of_columns)
            found[of_rows[:, None], of_columns] = self._compute(rows[of_rows], columns[of_columns])
            self._known[rows[:, None], places] = found
        return found

    def mean_products(self, members: Bool[Tensor, " N"]) -> tuple[Float64[Tensor, " N"], float]:
        """K_x·Σ over `members` of each candidate, and ‖Σ‖², without the matrix."""
        weights = torch.where(members, self.lengths / self._row_norms, 0.0)
        scale = float(weights.max()) or 1.0
        total = torch.zeros(self._rows.shape[1], dtype=torch.float64)
        for start in range(0, len(self), _BLOCK):
            block = self._rows[start : start + _BLOCK].to(torch.float64)
            total += (weights[start : start + _BLOCK] / scale) @ block
        products = torch.cat([block.to(torch.float64) @ total for block in self._rows.split(_BLOCK)])
        return self.lengths / self._row_norms * products * scale, float(total.square().sum()) * scale**2

    @cached_property
    def whole(self) -> Float64[Tensor, "N N"]:
        """The matrix, for rules that read all of it."""
        self._forget()
        gram = torch.empty(len(self), len(self), dtype=torch.float64)
        blocks = [slice(start, min(start + 4 * _BLOCK, len(self))) for start in range(0, len(self), 4 * _BLOCK)]
        for number, first in enumerate(blocks):
            for second in blocks[: number + 1]:
                gram[first, second] = self._products(self._rows[first], self._rows[second], first, second)
                gram[second, first] = gram[first, second].T.clone()
            within = gram[first, first]
            within.copy_(0.5 * (within + within.T))
        self._num_computed = len(self) ** 2
        return gram

    def _compute(self, rows: Int64[Tensor, " R"], columns: Int64[Tensor, " K"]) -> Float64[Tensor, "R K"]:
        others = self._rows[columns]
        return torch.cat([self._products(self._rows[some], others, some, columns) for some in rows.split(_BLOCK)])

    def _products(
        self, first: Float[Tensor, "R m"], second: Float[Tensor, "K m"], rows: Tensor | slice, columns: Tensor | slice
    ) -> Float64[Tensor, "R K"]:
        dtype = self._product_dtype
        with torch.autocast(device_type="cpu", enabled=False):
            cosines = (first.to(dtype) @ second.to(dtype).T).to(torch.float64)
        cosines = cosines.div_(self._row_norms[rows][:, None]).div_(self._row_norms[columns]).clamp_(-1.0, 1.0)
        equal = self._copy_of[rows][:, None] == self._copy_of[columns]
        cosines = torch.where(equal, torch.where(cosines < 0, -1.0, 1.0).to(torch.float64), cosines)
        return cosines.mul_(self.lengths[rows][:, None]).mul_(self.lengths[columns])


class LargePoolInformation:
    """F(S) = log det(I + α Σ_S g gᵀ) from [`GramRows`]: gains that were asked for, and bounds of the others.

    Right where `ExactInformation` is in float64; see [`is_read_in_parts`].
    """

    block_size = 64

    def __init__(self, gram: GramRows, *, fisher_alpha: float) -> None:
        self.gram = gram
        self.fisher_alpha = fisher_alpha
        self.num_candidates = len(gram)
        self.information = 0.0
        self.picks = torch.empty(0, dtype=torch.int64)
        self._residuals = fisher_alpha * gram.diagonal()
        self._num_seen = torch.zeros(len(gram), dtype=torch.int64)
        self._factor = torch.empty(len(gram), _BLOCK, dtype=torch.float64)
        self._pick_residuals = torch.empty(0, dtype=torch.float64)
        self.sums = torch.zeros(len(gram), dtype=torch.float64)

    def gain_bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns upper bounds on the current gains, and which of them are the gains themselves."""
        return torch.log1p(self._residuals), self._num_seen == len(self.picks)

    def gains(self, indices: Sequence[int] | None = None) -> Float64[Tensor, " R"]:
        """Returns the current gains of `indices`, or of all candidates; these have then seen all picks."""
        rows = torch.arange(self.num_candidates) if indices is None else torch.tensor(list(indices), dtype=torch.int64)
        self._catch_up(rows)
        return torch.log1p(self._residuals[rows])

    def add(self, index: int) -> float:
        """Adds candidate `index` to S and returns the gain it had."""
        gain = float(self.gains([index]))
        if len(self.picks) == self._factor.shape[1]:
            self._factor = torch.cat([self._factor, torch.empty_like(self._factor)], dim=1)
        self._pick_residuals = torch.cat([self._pick_residuals, self._residuals[[index]]])
        self.picks = torch.cat([self.picks, torch.tensor([index])])
        self.information += gain
        return gain

    def _catch_up(self, rows: Int64[Tensor, " R"]) -> None:
        """Brings residuals and `sums`, Σ_S K_xs, of some candidates up to date."""
        num_picks = len(self.picks)
        behind = rows[self._num_seen[rows] < num_picks]
        # In few products, of those that have about as much to catch up with. Where that is much, the next ones that
        # will have to come along: most of the time goes into reading the picks' rows.
        lags = (num_picks - self._num_seen).to(torch.float64).log2().div(2.0).floor()
        groups = []
        for lag in lags[behind].unique():
            some = behind[lags[behind] == lag]
            if lag >= 2 and len(some) < _BLOCK:
                alike = (lags == lag).index_fill(0, torch.cat([some, self.picks]), False).nonzero()[:, 0]
                nearest = self._residuals[alike].topk(min(_BLOCK - len(some), len(alike))).indices
                some = torch.cat([some, alike[nearest]])
            self.gram.block(some, self.picks[int(self._num_seen[some].min()) :])
            groups.append(some)
        behind = torch.cat([behind[:0], *groups])
        for num_seen in self._num_seen[behind].unique().tolist():
            some = behind[self._num_seen[behind] == num_seen]
            new = self.picks[num_seen:]
            products = self.gram.block(some, new)
            self.sums[some] += products.sum(dim=1)
            old = self._factor[some, :num_seen] @ self._factor[new, :num_seen].T
            columns = self._solve(some, self.fisher_alpha * products - old, num_seen)
            self._factor[some, num_seen:num_picks] = columns
            self._residuals[some] = (self._residuals[some] - columns.square().sum(dim=1)).clamp_min(0.0)
            self._num_seen[some] = num_picks

    def _solve(
        self, rows: Int64[Tensor, " R"], products: Float64[Tensor, "R K"], num_seen: int
    ) -> Float64[Tensor, "R K"]:
        """Columns of the factor for the picks from `num_seen` on, as the recurrence gives them one by one."""
        new, of_picks = self.picks[num_seen:], self._pick_residuals[num_seen:]
        lower = self._factor[new, num_seen : len(self.picks)].tril(-1) + (1.0 + of_picks).sqrt().diag()
        columns = torch.linalg.solve_triangular(lower, products.T, upper=False).T
        squares = columns.square()
        left = self._residuals[rows, None] - squares.cumsum(dim=1) + squares
        too_large = (squares * (1.0 + of_picks) > left.clamp_min(0.0) * of_picks).any(dim=1)
        # Rounding would take more from these than there is; see `Float64Cholesky`.
        for row in too_large.nonzero()[:, 0].tolist():
            residual = self._residuals[rows[row]]
            for place, of_pick in enumerate(of_picks):
                bound = (residual * of_pick).sqrt()
                entry = products[row, place] - columns[row, :place] @ lower[place, :place]
                columns[row, place] = entry.clamp(-bound, bound) / (1.0 + of_pick).sqrt()
                residual = (residual - columns[row, place].square()).clamp_min(0.0)
        solved: Tensor = columns
        return solved


class LargePoolConflicts:
    """Conflicts with a mean of candidates, as [`MeanConflicts`] has them, of those whose gains are known.

    The others' may be as little as 0.
    """

    def __init__(self, measure: LargePoolInformation, reference: str, sound: Bool[Tensor, " N"]) -> None:
        self._measure = measure
        self._reference = reference
        self._members = sound & (reference != "selected")
        self._restart()

    def _restart(self) -> None:
        """Sums the reference anew; of Σ = Σ_reference g there are the products K_x·Σ and ‖Σ‖²."""
        measure, lengths = self._measure, self._measure.gram.lengths
        self._totals, self._square = torch.zeros_like(lengths), 0.0
        self._length = float(lengths[self._members].sum())
        if self._reference != "selected":
            measure.gains(self._members.nonzero()[:, 0].tolist())
            self._totals, self._square = measure.gram.mean_products(self._members)
        self._sums_before = measure.sums.clone()

    def bounds(self) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
        """Returns lower bounds on the current conflicts, and which of them are the conflicts themselves."""
        if self._reference == "candidates" and sums_cancel(self._length, self._measure.gram.lengths, self._members):
            self._restart()
        known = self._measure.gain_bounds()[1]
        conflicts = torch.zeros_like(self._totals)
        conflicts[known] = self.of(known.nonzero()[:, 0])
        return conflicts, known

    def of(self, indices: Int64[Tensor, " R"]) -> Float64[Tensor, " R"]:
        """Returns the conflicts of candidates whose gains were asked for since the last pick."""
        number = int(self._members.sum())
        if not number:
            return torch.zeros(len(indices), dtype=torch.float64)
        mean_norm = math.sqrt(max(self._square, 0.0)) / number
        return opposition(self._products(indices) / number, self._measure.gram.lengths[indices], mean_norm)

    def add(self, index: int) -> None:
        """Takes a pick, before the measure does."""
        if self._reference == "pool":
            return
        sign = 1.0 if self._reference == "selected" else -1.0
        length = float(self._measure.gram.lengths[index])
        self._square += sign * 2.0 * float(self._products(torch.tensor([index]))) + length**2
        self._members[index] = self._reference == "selected"

    def _products(self, indices: Int64[Tensor, " R"]) -> Float64[Tensor, " R"]:
        since = self._measure.sums[indices] - self._sums_before[indices]
        return self._totals[indices] + {"selected": since, "candidates": -since, "pool": 0.0 * since}[self._reference]


def is_read_in_parts(gram: GramRows, fisher_alpha: float) -> bool:
    """Whether bounds may spare most of the matrix, and float64 is enough for gains of these gradients."""
    lengths = gram.lengths[gram.lengths > 0]
    # Where all gradients are as long (`"unit"`) all first gains are the same: bounds say nothing at first.
    differ = len(lengths) > 0 and bool(lengths.min() < lengths.max())
    return differ and fisher_alpha * float(gram.diagonal().max()) <= FLOAT64_LIMIT
