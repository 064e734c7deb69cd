"""Candidates to scores: collate, forward, backward, features, Gram matrix.

For every candidate x of the step's pools the sample gradient g_x at the current weights (module `gradients`), stored
exactly or as a sketch, then per pool the normalised Gram matrix K_xy = c_x c_y ⟨g_x, g_y⟩ that everything later needs
(module `gram`). Sketched features of all T pools fit in memory, so their rows are sorted by length together; exact
ones are scored in as many pools at a time as fit.

With several processes each scores a share of the candidates (module `sharing`), and the features go to the one that
measures the pool (module `features`). Only [`GradientScorer.compute`] runs the model, and it talks to no other process
but for sharded weights: a proxy's can run beside the target's training.

Axes: N candidates of a pool, T pools, S tokens, D gradient dimension, m features kept per candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.features import DiscardedGradients, FeatureBuffer, send_to_owners
from spice_trainer.gradients import SampleGradients, trainable_size
from spice_trainer.kernels import rows_influence_each_other
from spice_trainer.out_of_memory import TokenBudget, explained, features_error, lockstep_error
from spice_trainer.pool_scores import PoolScores, measure_pool
from spice_trainer.processes import Processes
from spice_trainer.random_states import preserved_random_state
from spice_trainer.row_checks import check_token_ids, naming_rows, vocabulary_sizes
from spice_trainer.rows import CandidateRow, collate_row, fetch_rows, pad_rows
from spice_trainer.sharing import SharedCandidates, share_candidates
from spice_trainer.sketch import GradientSketch

# A process holds features of several pools together up to this size; one pool is always held.
FEATURE_BUFFER_BYTES = 2**30
_SCORING = "scoring candidates"


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
        # What fits may be less; that is this process's own affair, the shared plan stays as it is.
        self.budget = TokenBudget(config.scoring_tokens_per_batch)
        # Measures other than the exact one need the gradients' coordinates, not only their inner products.
        self.keep_gradients = config.information != "exact"
        self.processes = processes if processes is not None else Processes()
        self._autocast = autocast
        self.vocabulary = vocabulary_sizes(get_model())
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
        for group in self.group_pools(pools):
            num_rows = sum(map(len, group.values()))

            def report(share: float, done: int = done, num_rows: int = num_rows) -> None:
                if progress is not None:
                    progress(done + int(share * num_rows), total)

            with preserved_random_state(self.device):
                shared = self.share(group)
                # With sharded weights the others are inside a forward's collective: only the launcher can end them.
                together = nullcontext() if self.processes.lockstep else self.processes.failing_together(_SCORING)
                with together:
                    buffer = self.compute(shared, report)
            yield from self.measure(shared, buffer)
            # Not held beside the next group's.
            del shared, buffer
            done += num_rows

    def share(self, pools: dict[int, tuple[int, ...]]) -> SharedCandidates:
        """Collates the candidates of some pools and deals them to the processes. A collective."""
        return share_candidates(
            pools,
            self._collate,
            tokens_per_batch=1 if rows_influence_each_other(self.get_model()) else self.tokens_per_batch,
            processes=self.processes,
        )

    def compute(self, shared: SharedCandidates, report: Callable[[float], None] | None = None) -> FeatureBuffer:
        """Runs this process's micro-batches. No collective but those of sharded weights; draws nothing.

        Where memory runs out a micro-batch is halved, and so are later ones; a row that does not fit alone is marked.

        Args:
            shared ([`~spice_trainer.sharing.SharedCandidates`]): The candidates.
            report (`Callable[[float], None]`, *optional*): Told the share that is done.

        Returns:
            [`~spice_trainer.features.FeatureBuffer`]: Features of what this process scored.

        Raises:
            RuntimeError: If there is no memory for the features, or for a pass with sharded weights.
        """
        buffer = self.new_buffer(len(shared.held))
        places = {position: place for place, position in enumerate(shared.held)}
        num_rows, done, report = sum(map(len, shared.batches)), 0, report or (lambda share: None)
        if not shared.batches:
            report(1.0)
        with SampleGradients(
            self.get_model(), self.modules, can_repeat=not self.processes.lockstep
        ) as sample_gradients:
            for number, batch in enumerate(shared.batches):
                rows = [shared.rows[position] for position in batch]
                if number < shared.num_kept:
                    self._score_batch(sample_gradients, rows, buffer, [places[position] for position in batch])
                else:
                    self.run_pass(sample_gradients, *pad_rows(rows), None, [])
                done += len(batch)
                report(done / num_rows)
        return buffer

    def new_buffer(self, num_rows: int) -> FeatureBuffer:
        """Room for the features of some candidates."""
        device = self.device
        with explained(features_error(num_rows, self.num_features)):
            if self.sketch_dim and self._sketch is None:
                self._sketch = GradientSketch(self._sizes, self.sketch_dim, seed=self._seed, device=device)
            return FeatureBuffer(num_rows, self._sizes, self._sketch, device)

    def _score_batch(
        self, sample_gradients: SampleGradients, rows: list[CandidateRow], buffer: FeatureBuffer, places: list[int]
    ) -> None:
        def attempt(part: range) -> None:
            where = slice(part.start, part.stop)
            with naming_rows(rows[where], self.get_model()):
                self.run_pass(sample_gradients, *pad_rows(rows[where]), buffer, places[where])

        lengths = [row.num_tokens for row in rows]
        if self.processes.lockstep and self.processes.world_size > 1:
            with explained(lockstep_error(len(rows), max(lengths))):
                return attempt(range(len(rows)))
        for position in self.budget.run(lengths, attempt):
            buffer.leave_out(places[position])
            self.budget.leave_out(rows[position].index, rows[position].num_tokens)

    def run_pass(
        self,
        sample_gradients: SampleGradients,
        inputs: Mapping[str, Any],
        labels: Tensor,
        buffer: FeatureBuffer | None,
        places: Sequence[int],
    ) -> None:
        """One forward and backward of padded rows. Their features go to `places` of the buffer, if there is one."""
        device = self.device
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        if buffer is not None:
            buffer.begin(places)
        with self._autocast() if self._autocast is not None else nullcontext():
            losses = sample_gradients.compute(inputs, labels.to(device), buffer or DiscardedGradients())
        if buffer is not None:
            buffer.finish(losses)

    def measure(self, shared: SharedCandidates, buffer: FeatureBuffer) -> Iterator[PoolScores]:
        """Brings features to the pools' owners, and measures the pools owned here. A collective.

        Args:
            shared ([`~spice_trainer.sharing.SharedCandidates`]): The candidates.
            buffer ([`~spice_trainer.features.FeatureBuffer`]): What this process computed of them.

        Yields:
            [`~spice_trainer.pool_scores.PoolScores`]
        """
        owned = send_to_owners(buffer, shared.holders, shared.owners, self.processes)
        start = 0
        for pool, candidates in shared.pools.items():
            positions = range(start, start + len(candidates))
            start = positions.stop
            if self.processes.owner(pool) != self.processes.rank:
                continue
            found = owned.take(positions)
            yield measure_pool(
                found.features,
                found.norms,
                pool=pool,
                candidates=candidates,
                shapes=[shared.shapes[position] for position in positions],
                losses=found.losses,
                gradient_normalization=self.gradient_normalization,
                keep_gradients=self.keep_gradients,
                out_of_memory=found.out_of_memory,
            )

    def collate_alone(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Rows as the model that scores reads them, each collated alone, without a trace in the random states."""
        with preserved_random_state(self.device):
            return self._collate(indices)

    def _collate(self, indices: Sequence[int]) -> list[CandidateRow]:
        rows = fetch_rows(self.dataset, indices)
        collated = [collate_row(index, row, self.collate) for index, row in zip(indices, rows, strict=True)]
        check_token_ids(collated, self.vocabulary)
        return collated

    def group_pools(self, pools: Sequence[Sequence[int]]) -> Iterator[dict[int, tuple[int, ...]]]:
        """Groups a step's pools into as many as are scored together."""
        group: dict[int, tuple[int, ...]] = {}
        for pool, rows in enumerate(pools):
            num_rows = sum(map(len, group.values())) + len(rows)
            if group and self.feature_bytes(len(group) + 1, num_rows) > FEATURE_BUFFER_BYTES:
                yield group
                group = {}
            group[pool] = tuple(rows)
        if group:
            yield group


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its input embedding."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return next((parameter.device for parameter in embedding.parameters()), torch.device("cpu"))
