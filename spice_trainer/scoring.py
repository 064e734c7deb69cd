"""Candidates to scores: collate, forward, backward, features, Gram matrix.

For every candidate x of the step's pools the sample gradient g_x at the current weights (module `gradients`), stored
exactly or as a sketch, then per pool the normalised Gram matrix K_xy = c_x c_y ⟨g_x, g_y⟩ that everything later needs
(module `gram`). Sketched features of all T pools fit in memory, so their rows are sorted by length together; exact
ones are scored in as many pools at a time as fit.

With several processes each collates a share of the rows, all learn every row's length and make the same plan (module
`micro_batches`), each scores its share, and the features go to the pool's owner (module `features`).

Axes: N candidates of a pool, T pools, S tokens, D gradient dimension, m features kept per candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.features import DiscardedGradients, FeatureBuffer, OwnedFeatures, order_for_owners, send_to_owners
from spice_trainer.gradients import SampleGradients, trainable_size
from spice_trainer.kernels import rows_influence_each_other
from spice_trainer.micro_batches import share_micro_batches
from spice_trainer.pool_scores import PoolScores, measure_pool
from spice_trainer.processes import Processes
from spice_trainer.random_states import preserved_random_state
from spice_trainer.rows import CandidateRow, RowShape, collate_row, fetch_rows, pad_rows
from spice_trainer.sketch import GradientSketch

# A process holds features of several pools together up to this size; one pool is always held.
FEATURE_BUFFER_BYTES = 2**30


class GradientScorer:
    """Scores pools of candidates with a model's own LoRA gradients.

    Args:
        get_model (`Callable[[], torch.nn.Module]`):
            Gives the model to score with at the moment of scoring, unwrapped from DDP or DeepSpeed.
        modules (`Mapping[str, torch.nn.Linear]`):
            Its trainable LoRA layers.
        dataset (`Any`):
            Training rows by index.
        collate (`Callable`):
            The trainer's collator.
        config ([`SpiceConfig`]):
            Normalisation, sketch and micro-batch size.
        seed (`int`):
            Seed of the sketch.
        autocast (`Callable`, *optional*):
            Makes the context of the training precision.
        processes ([`~spice_trainer.processes.Processes`], *optional*):
            Those that share the work. Defaults to this one alone.
    """

    def __init__(
        self,
        get_model: Callable[[], nn.Module],
        modules: Mapping[str, nn.Linear],
        *,
        dataset: Any,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        config: SpiceConfig,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.get_model = get_model
        self.modules = dict(modules)
        self.dataset = dataset
        self.collate = collate
        self.gradient_normalization = config.gradient_normalization
        self.tokens_per_batch = config.scoring_tokens_per_batch
        # Measures other than the exact one need the gradients' coordinates, not only their inner products.
        self.keep_gradients = config.information != "exact"
        self.processes = processes if processes is not None else Processes()
        self._autocast = autocast
        self._sizes = [trainable_size(module) for module in self.modules.values()]
        self.dimension = sum(self._sizes)
        sketch_dim = config.resolve_sketch_dim()
        self.sketch_dim = sketch_dim if 0 < sketch_dim < self.dimension else 0
        self._seed = seed
        self._sketch: GradientSketch | None = None

    @property
    def num_features(self) -> int:
        """Numbers kept per candidate: `sketch_dim`, or D when exact."""
        return self.sketch_dim or self.dimension

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs, and where the features live."""
        if self.processes.lockstep:
            # Sharded weights may rest on the CPU (offload); the wrapper computes here.
            return self.processes.device
        return input_device(self.get_model())

    def feature_bytes(self, num_pools: int, num_rows: int) -> int:
        """Most bytes of features that a process holds for some pools of `num_rows` candidates together."""
        world_size = self.processes.world_size
        scored = -(-num_rows // world_size)
        # What it scored, and beside it the pools it measures.
        owned = 0 if world_size == 1 else -(-num_rows // num_pools) * -(-num_pools // world_size)
        return (scored + owned) * self.num_features * 4

    def pools_at_once(self, num_pools: int, pool_size: int) -> int:
        """How many pools of a step are scored together."""
        fitting = 1
        while (
            fitting < num_pools and self.feature_bytes(fitting + 1, (fitting + 1) * pool_size) <= FEATURE_BUFFER_BYTES
        ):
            fitting += 1
        return fitting

    def score(
        self, pools: Sequence[Sequence[int]], *, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[PoolScores]:
        """Scores pools at the current weights, in order. With several processes all must call it and exhaust it.

        Leaves no trace: random states, modes, hooks and gradients are as before whenever a pool is handed out.

        Args:
            pools (`Sequence[Sequence[int]]`): Dataset rows of each pool.
            progress (`Callable[[int, int], None]`, *optional*): Told how many candidates are done, of how many.

        Yields:
            [`PoolScores`], one per pool that this process owns: with a single process every pool.
        """
        total, done = sum(map(len, pools)), 0
        for group in self._group_pools(pools):
            indices = [index for pool in group for index in pools[pool]]
            owners = [self.processes.owner(pool) for pool in group for _ in pools[pool]]

            def report(share: float, done: int = done, num_rows: int = len(indices)) -> None:
                if progress is not None:
                    progress(done + int(share * num_rows), total)

            with preserved_random_state(self.device):
                shapes, owned = self._score_rows(indices, owners, report)
            start = 0
            for pool in group:
                positions = range(start, start + len(pools[pool]))
                start = positions.stop
                if self.processes.owner(pool) == self.processes.rank:
                    features, norms, losses = owned.take(positions)
                    yield measure_pool(
                        features,
                        norms,
                        pool=pool,
                        candidates=pools[pool],
                        shapes=[shapes[position] for position in positions],
                        losses=losses,
                        gradient_normalization=self.gradient_normalization,
                        keep_gradients=self.keep_gradients,
                    )
            done += len(indices)

    def _group_pools(self, pools: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        group: list[int] = []
        num_rows = 0
        for pool, rows in enumerate(pools):
            num_rows += len(rows)
            if group and self.feature_bytes(len(group) + 1, num_rows) > FEATURE_BUFFER_BYTES:
                yield group
                group, num_rows = [], len(rows)
            group.append(pool)
        if group:
            yield group

    def _collate(self, indices: Sequence[int]) -> list[CandidateRow]:
        rows = fetch_rows(self.dataset, indices)
        return [collate_row(index, row, self.collate) for index, row in zip(indices, rows, strict=True)]

    def _score_rows(
        self, indices: Sequence[int], owners: Sequence[int], report: Callable[[float], None]
    ) -> tuple[list[RowShape], OwnedFeatures]:
        """Scores candidates together with the other processes, and brings home those of the pools owned here."""
        processes = self.processes
        positions = range(processes.rank, len(indices), processes.world_size)
        with processes.failing_together("reading candidates"):
            rows = dict(zip(positions, self._collate([indices[position] for position in positions]), strict=True))
        shapes = _interleave(processes.gather([rows[position].shape for position in positions]))
        # A row without label tokens has a zero gradient: nothing to compute, its owner just holds the zeros.
        scored = [position for position, shape in enumerate(shapes) if shape.num_label_tokens > 0]
        tokens_per_batch = 1 if rows_influence_each_other(self.get_model()) else self.tokens_per_batch
        shares = [
            [[scored[place] for place in batch] for batch in share]
            for share in share_micro_batches(
                [shapes[position] for position in scored], tokens_per_batch, num_shares=processes.world_size
            )
        ]
        holders = list(owners)
        for rank, share in enumerate(shares):
            for batch in share:
                for position in batch:
                    holders[position] = rank
        batches = shares[processes.rank]
        num_rounds = max(map(len, shares)) if processes.lockstep else len(batches)
        if len(batches) < num_rounds:
            # Every forward gathers sharded weights from all processes. One with nothing left to score repeats the
            # shortest row, and drops what comes of it.
            spare = min(scored, key=lambda position: (shapes[position].num_tokens, position))
            batches = batches + [[spare]] * (num_rounds - len(batches))
        needed = {position for batch in batches for position in batch}
        with processes.failing_together("reading candidates"):
            missing = sorted(needed - rows.keys())
            rows.update(zip(missing, self._collate([indices[position] for position in missing]), strict=True))
        # With sharded weights the others are inside a forward's collective: only the launcher can end them.
        together = nullcontext() if processes.lockstep else processes.failing_together("scoring candidates")
        with together:
            held = order_for_owners([p for p, holder in enumerate(holders) if holder == processes.rank], owners)
            buffer = self._fill_buffer(held, rows, batches, len(shares[processes.rank]), report)
        return shapes, send_to_owners(buffer, holders, owners, processes)

    def _fill_buffer(
        self,
        held: Sequence[int],
        rows: Mapping[int, CandidateRow],
        batches: Sequence[Sequence[int]],
        num_kept: int,
        report: Callable[[float], None],
    ) -> FeatureBuffer:
        """Runs this process's micro-batches; those from `num_kept` on only keep step with the others."""
        device = self.device
        if self.sketch_dim and self._sketch is None:
            self._sketch = GradientSketch(self._sizes, self.sketch_dim, seed=self._seed, device=device)
        buffer = FeatureBuffer(len(held), self._sizes, self._sketch, device)
        places = {position: place for place, position in enumerate(held)}
        num_rows, done = sum(map(len, batches)), 0
        with SampleGradients(self.get_model(), self.modules) as sample_gradients:
            for number, batch in enumerate(batches):
                inputs, labels = pad_rows([rows[position] for position in batch])
                inputs = {
                    key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()
                }
                is_kept = number < num_kept
                if is_kept:
                    buffer.begin([places[position] for position in batch])
                with self._autocast() if self._autocast is not None else nullcontext():
                    losses = sample_gradients.compute(
                        inputs, labels.to(device), buffer if is_kept else DiscardedGradients()
                    )
                if is_kept:
                    buffer.finish(losses)
                done += len(batch)
                report(done / num_rows)
        if not batches:
            report(1.0)
        return buffer


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its input embedding."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return next((parameter.device for parameter in embedding.parameters()), torch.device("cpu"))


def _interleave(shares: Sequence[Sequence[RowShape]]) -> list[RowShape]:
    """Puts together again what was dealt in turns: the first of every share, the second of every share, ..."""
    return [share[turn] for turn in range(len(shares[0])) for share in shares if turn < len(share)]
