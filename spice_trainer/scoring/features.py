"""Features of candidates: where gradients go while scoring, exactly or as a sketch, and how they reach their owner.

Each process fills a buffer with the features of the rows it scored, then sends every row to the process that measures
its pool: m numbers a candidate, sent at most once, whatever the number of processes. The optimizer's momentum, which
every process has, may be seen through the same features.

Axes: N candidates, D gradient dimension, m features kept per candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from spice_trainer.distributed import Processes
from spice_trainer.gradients.optimizer_state import SecondMoment, precondition_
from spice_trainer.gradients.per_sample import ALL
from spice_trainer.gradients.sketch import GradientSketch

# Numbers of a row of which the norm is taken, as only layers that train in full have them.
_LONG_ROW = 2**16


class FeatureBuffer:
    """Holds the features of some candidates, and takes them layer by layer as a gradient sink.

    `sizes` are the gradient coordinates of each layer, D = Σ sizes; without a `sketch` they are kept exactly. With
    Adam's second `moments` of the layers gradients are preconditioned before they are kept or folded. The optimizer's
    `momentum` of each layer, `None` where it has none yet, is seen through the same features.
    """

    def __init__(
        self,
        num_rows: int,
        sizes: Sequence[int],
        sketch: GradientSketch | None,
        device: torch.device,
        moments: Sequence[SecondMoment] | None = None,
        momentum: Sequence[Tensor | None] | None = None,
    ) -> None:
        self._sketch = sketch
        self._moments = moments
        self._columns = [slice(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]
        width = sketch.sketch_dim if sketch is not None else self._columns[-1].stop
        # Whatever the default precision of tensors is.
        self.features = torch.zeros(num_rows, width, dtype=torch.float32, device=device)
        self.losses = torch.zeros(num_rows, dtype=torch.float32, device=device)
        # Exact also when sketched: the sketch only has to carry directions.
        self._squared_norms = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self._squared_lengths = self._squared_norms if moments is None else self._squared_norms.clone()
        self.out_of_memory = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._batch = self._rows = torch.empty(0, dtype=torch.long, device=device)
        self._folded = torch.empty(0, dtype=torch.float32, device=device)
        self._norms_by_piece: list[Tensor] = []
        self._lengths_by_piece: list[Tensor] = []
        self.momentum = None if momentum is None else self._features_of(momentum)

    def _features_of(self, vectors: Sequence[Tensor | None]) -> Float[Tensor, " m"]:
        """Features of one vector that is given by module, and left as it is."""
        # This process may have no row of the step.
        found = self.features.new_zeros(1, self.features.shape[1])
        for number, (vector, columns) in enumerate(zip(vectors, self._columns, strict=True)):
            if vector is None:
                continue
            values = vector.to(found, copy=True)[None]
            if self._sketch is not None:
                # It overwrites them.
                self._sketch.fold_(found, number, values)
            else:
                found[:, columns] = values
        return found[0]

    def begin(self, rows: Sequence[int]) -> None:
        """Announces which rows of the buffer the next micro-batch fills, in its order.

        What an earlier attempt at them left behind when memory ran out is forgotten.
        """
        self._batch = torch.tensor(rows, device=self.features.device)
        self._start(self._batch)

    def restart(self, rows: Sequence[int]) -> None:
        """Takes gradients of some rows of the micro-batch anew; what comes from here on is theirs alone."""
        self._store()
        self._start(self._batch[list(rows)])

    def _start(self, rows: Tensor) -> None:
        self._rows = rows
        self._norms_by_piece, self._lengths_by_piece = [], []
        if self._sketch is not None:
            self._folded = self.features.new_zeros(len(rows), self._sketch.sketch_dim)
        else:
            self.features[rows] = 0.0

    def add(self, module_index: int, gradients: Float[Tensor, "n w"], rows: slice = ALL, start: int = 0) -> None:
        """Takes a piece of one module's sample gradients of announced rows."""
        gradients, where = gradients.to(self.features.device), slice(start, start + gradients.shape[1])
        self._norms_by_piece.append(self._norms_of(gradients, rows))
        if self._moments is not None:
            precondition_(gradients, self._moments[module_index].at(where))
            self._lengths_by_piece.append(self._norms_of(gradients, rows))
        if self._sketch is not None:
            self._sketch.fold_(self._folded[rows], module_index, gradients, start)
        else:
            first = self._columns[module_index].start
            self.features[self._rows[rows], first + where.start : first + where.stop] = gradients

    def add_sparse(
        self, module_index: int, row: int, coordinates: Int[Tensor, " w"], values: Float[Tensor, " w"]
    ) -> None:
        """Takes what is not 0 of one module's gradient of an announced row."""
        coordinates, values = coordinates.to(self.features.device), values.to(self.features.device)[None]
        only = slice(row, row + 1)
        self._norms_by_piece.append(self._norms_of(values, only))
        if self._moments is not None:
            precondition_(values, self._moments[module_index].at(coordinates))
            self._lengths_by_piece.append(self._norms_of(values, only))
        if self._sketch is not None:
            self._sketch.fold_sparse_(self._folded[row], module_index, coordinates, values[0])
        else:
            self.features[self._rows[row], self._columns[module_index].start + coordinates] = values[0]

    def _norms_of(self, gradients: Tensor, rows: slice) -> Float64[Tensor, " n"]:
        """Norms of a piece, 0 for the announced rows that it is not of."""
        # Put together at the end: on a GPU, launching small kernels for every module is what scoring could wait for.
        norms = _norms(gradients)
        if len(norms) == len(self._rows):
            return norms
        of_all = norms.new_zeros(len(self._rows))
        of_all[rows] = norms
        return of_all

    def finish(self, losses: Float[Tensor, "n"]) -> None:
        """Ends the announced micro-batch with its rows' losses."""
        self.losses[self._batch] = losses.to(self.losses)
        self._store()

    def _store(self) -> None:
        if self._norms_by_piece:
            self._squared_norms[self._rows] = torch.stack(self._norms_by_piece).square_().sum(0)
        if self._lengths_by_piece:
            self._squared_lengths[self._rows] = torch.stack(self._lengths_by_piece).square_().sum(0)
        if self._sketch is not None:
            self.features[self._rows] = self._folded

    def leave_out(self, row: int) -> None:
        """Marks a row that does not fit into memory alone; nothing is known of its gradient."""
        self.features[row] = 0.0
        self._squared_norms[row] = self._squared_lengths[row] = 0.0
        self.out_of_memory[row] = True

    @property
    def is_preconditioned(self) -> bool:
        """Whether the features are of preconditioned gradients."""
        return self._moments is not None

    @property
    def norms(self) -> Float64[Tensor, "N"]:
        """Exact norms of the raw gradients."""
        return self._squared_norms.sqrt()

    @property
    def lengths(self) -> Float64[Tensor, "N"]:
        """Exact norms of what the features are of: of the raw gradients, or the preconditioned ones."""
        return self._squared_lengths.sqrt()


def _norms(gradients: Float[Tensor, "n w"]) -> Float64[Tensor, " n"]:
    """Norms of rows, with sums of squares in float64: 1e-30 would vanish, and 1e+30 overflow, squared in float32."""
    if gradients.device.type == "cpu" and gradients.shape[1] > _LONG_ROW:
        # Of long rows float32 gives the same to 2e-6, in a hundredth of the time.
        norms: Tensor = torch.linalg.vector_norm(gradients, dim=1).double()
        if bool(((norms > 1e-10) & (norms < 1e15)).all()):
            return norms
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    return norms


class DiscardedGradients:
    """A gradient sink that keeps nothing, for a forward that only keeps step with the other processes."""

    def add(self, module_index: int, gradients: Tensor, rows: slice = ALL, start: int = 0) -> None:
        """Drops the gradients."""

    def add_sparse(self, module_index: int, row: int, coordinates: Tensor, values: Tensor) -> None:
        """Drops these, too."""

    def restart(self, rows: Sequence[int]) -> None:
        """Drops those that come again, too."""


@dataclass(frozen=True)
class OwnedFeatures:
    """Features of the candidates of the pools that this process measures; all but the features are on the CPU.

    `rows` tells where each candidate is, by its position among all that were scored.
    """

    rows: dict[int, int]
    features: Float[Tensor, "n m"]
    norms: Float64[Tensor, "n"]  # Exact, of the raw gradients.
    lengths: Float64[Tensor, "n"]  # Exact, of what the features are of, which may be preconditioned.
    losses: Float[Tensor, "n"]
    out_of_memory: Bool[Tensor, "n"]  # Whether the row did not fit, so that nothing is known of it.
    momentum: Float[Tensor, " m"] | None = None  # Features of the optimizer's momentum.

    def take(self, positions: Sequence[int]) -> OwnedFeatures:
        """Those of some candidates, in their order; views where they lie together."""
        rows = [self.rows[position] for position in positions]
        where: slice | list[int] = rows
        if rows == list(range(rows[0], rows[0] + len(rows))):
            where = slice(rows[0], rows[0] + len(rows))
        return OwnedFeatures(
            rows={position: place for place, position in enumerate(positions)},
            features=self.features[where],
            norms=self.norms[where],
            lengths=self.lengths[where],
            losses=self.losses[where],
            out_of_memory=self.out_of_memory[where],
            momentum=self.momentum,
        )


def order_for_owners(held: Sequence[int], owners: Sequence[int]) -> list[int]:
    """The order in which a process holds candidates: by owner, then position, so that each owner's lie together."""
    return sorted(held, key=lambda position: (owners[position], position))


def send_to_owners(
    buffer: FeatureBuffer, holders: Sequence[int], owners: Sequence[int], processes: Processes
) -> OwnedFeatures:
    """Brings each candidate's features from its holder, which scored it, to its owner, which measures its pool.

    The buffer is in the order of [`order_for_owners`]. A collective.
    """
    world_size, rank = processes.world_size, processes.rank
    send_counts, receive_counts = [0] * world_size, [0] * world_size
    arriving: list[list[int]] = [[] for _ in range(world_size)]
    for position, (holder, owner) in enumerate(zip(holders, owners, strict=True)):
        if holder == rank:
            send_counts[owner] += 1
        if owner == rank:
            receive_counts[holder] += 1
            arriving[holder].append(position)
    features = processes.exchange(buffer.features, send_counts, receive_counts)
    measured = [buffer.losses.double(), buffer.out_of_memory.double(), buffer.norms]
    if buffer.is_preconditioned:
        measured.append(buffer.lengths)
    arrived = processes.exchange(torch.stack(measured, dim=1), send_counts, receive_counts).cpu().unbind(1)
    losses, out_of_memory, norms, lengths = *arrived[:3], arrived[-1]
    order = [position for positions in arriving for position in positions]
    return OwnedFeatures(
        rows={position: row for row, position in enumerate(order)},
        features=features,
        norms=norms,
        lengths=lengths,
        losses=losses.float(),
        out_of_memory=out_of_memory.bool(),
        momentum=buffer.momentum,
    )
