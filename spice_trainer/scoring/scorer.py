"""Candidates to scores: collate, forward, backward, features, Gram matrix.

For every candidate x of the step's pools the sample gradient g_x at the current weights (module `gradients`), stored
exactly or as a sketch, then per pool the normalised Gram matrix K_xy = c_x c_y ⟨g_x, g_y⟩ that everything later needs
(module `gram`). Sketched features of all T pools fit in memory, so their rows are sorted by length together; exact
ones are scored in as many pools at a time as fit.

With several processes each scores a share of the candidates (module `sharing`), and the features go to the one that
measures the pool (module `features`). Only the passes run the model (module `passes`), and they talk to no other
process but for sharded weights: a proxy's can run beside the target's training.

Axes: N candidates of a pool, T pools, S tokens, D gradient dimension, m features kept per candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import check_token_ids, vocabulary_sizes
from spice_trainer.data.rows import CandidateRow, RowShape, collate_row, fetch_rows, keep_first_labels
from spice_trainer.distributed import Processes
from spice_trainer.gradients.backends import rows_influence_each_other
from spice_trainer.gradients.lora import choose_modules
from spice_trainer.gradients.optimizer_state import AdamMoments, OptimizerMomentum
from spice_trainer.scoring.features import FeatureBuffer, OwnedFeatures, send_to_owners
from spice_trainer.scoring.measure import PoolScores, measure_pool
from spice_trainer.scoring.out_of_memory import TokenBudget
from spice_trainer.scoring.passes import ScoringPasses
from spice_trainer.scoring.prefilter import WholePool, filter_by_loss
from spice_trainer.scoring.sharing import SharedCandidates, share_candidates
from spice_trainer.utils.random import preserved_random_state

# A process holds features of several pools together up to this size; one pool is always held.
FEATURE_BUFFER_BYTES = 2**30
_SCORING = "scoring candidates"


class GradientScorer:
    """Scores pools of candidates with a model's own LoRA gradients.

    Args:
        get_model (`Callable[[], torch.nn.Module]`):
            Gives the model to score with at the moment of scoring, unwrapped from DDP or DeepSpeed.
        modules (`Mapping[str, torch.nn.Module]`): Its trainable LoRA layers, among which the settings may choose.
        dataset (`Any`): Training rows by index.
        collate (`Callable`): The trainer's collator.
        config ([`SpiceConfig`]): Normalisation, sketch and micro-batch size.
        seed (`int`): Seed of the sketch.
        autocast (`Callable`, *optional*): Makes the context of the training precision.
        processes ([`Processes`], *optional*): Those that share the work; by default this one.
        get_optimizer (`Callable`, *optional*): Gives the layers' optimizer, for settings that look into it.
    """

    def __init__(
        self,
        get_model: Callable[[], nn.Module],
        modules: Mapping[str, nn.Module],
        *,
        dataset: Any,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        config: SpiceConfig,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]] | None = None,
        processes: Processes | None = None,
        get_optimizer: Callable[[], Any] = lambda: None,
    ) -> None:
        self.get_model = get_model
        self.modules = choose_modules(
            modules, layers=config.scoring_layers, target_modules=config.scoring_target_modules
        )
        self.dataset = dataset
        self.collate = collate
        self.gradient_normalization = config.gradient_normalization
        self.gradient_centering = config.gradient_centering
        self.tokens_per_batch = config.scoring_tokens_per_batch
        self.max_label_tokens = config.scoring_max_tokens
        self.prefilter = config.scoring_prefilter
        # Measures other than the exact one need the gradients' coordinates, not only their inner products.
        self.keep_gradients = config.information != "exact"
        self.processes = processes if processes is not None else Processes()
        self.seed = seed
        self.vocabulary = vocabulary_sizes(get_model())
        self.passes = ScoringPasses(
            get_model,
            self.modules,
            sketch_dim=config.resolve_sketch_dim(),
            tokens_per_batch=self.tokens_per_batch,
            seed=seed,
            autocast=autocast,
            processes=self.processes,
            moments=AdamMoments(get_optimizer, self.modules) if config.gradient_preconditioning == "adam" else None,
            momentum=OptimizerMomentum(get_optimizer, self.modules) if config.takes_momentum else None,
        )
        self.dimension = self.passes.dimension
        self.sketch_dim = self.passes.sketch_dim
        self.num_features = self.passes.num_features

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs, and where the features live."""
        return self.passes.device

    @property
    def budget(self) -> TokenBudget:
        """Tokens of a pass that fit into this process's memory."""
        return self.passes.budget

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
        for whole, shared, buffer in self.compute_groups(pools, progress=progress):
            for scores in self.measure(shared, buffer):
                yield replace(scores, whole=whole.get(scores.pool))
                # It may hold the features, and must be gone before those of the next pools come.
                del scores
            # Not held beside the next group's.
            del shared, buffer

    def compute_groups(
        self, pools: Sequence[Sequence[int]], *, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[dict[int, WholePool], SharedCandidates, FeatureBuffer]]:
        """Computes the features of as many pools at a time as fit. A collective.

        Args:
            pools (`Sequence[Sequence[int]]`): As for [`GradientScorer.score`].
            progress (`Callable[[int, int], None]`, *optional*): As there.

        Yields:
            `tuple`: The pools of which candidates were dropped before, and what [`GradientScorer.measure`] takes.
        """
        total, done = sum(map(len, pools)), 0
        for group in self.group_pools(pools):
            num_rows = sum(map(len, group.values()))

            def report(share: float, done: int = done, num_rows: int = num_rows) -> None:
                if progress is not None:
                    progress(done + int(share * num_rows), total)

            with preserved_random_state(self.device):
                whole, shared = self._filter(self.share(group))
                with self.failing_together():
                    buffer = self.compute(shared, report)
            yield whole, shared, buffer
            del whole, shared, buffer
            done += num_rows

    def share(self, pools: dict[int, tuple[int, ...]]) -> SharedCandidates:
        """Collates the candidates of some pools and deals them to the processes. A collective."""
        return share_candidates(
            pools, self.collate_rows, tokens_per_batch=self.plan_tokens(), processes=self.processes
        )

    def plan_tokens(self) -> int:
        """Tokens of a micro-batch as it is planned: where rows influence each other each is alone."""
        return 1 if rows_influence_each_other(self.get_model()) else self.tokens_per_batch

    def compute(self, shared: SharedCandidates, report: Callable[[float], None] | None = None) -> FeatureBuffer:
        """Features of what falls to this process; see [`ScoringPasses.compute_features`]."""
        return self.passes.compute_features(shared, report)

    def failing_together(self) -> AbstractContextManager[object]:
        """Context of this process's passes, whose errors reach all others. No collective may stand in it.

        With sharded weights the others are inside a forward's collective: only the launcher can end them.
        """
        return nullcontext() if self.processes.lockstep else self.processes.failing_together(_SCORING)

    def compute_losses(
        self, shared: SharedCandidates, report: Callable[[float], None] | None = None
    ) -> dict[int, float | None]:
        """Losses of all candidates that have label tokens, by position. A collective."""
        with self.failing_together():
            losses = self.passes.compute_losses(shared, report)
        return self.gather(losses)

    def gather(self, losses: dict[int, float | None]) -> dict[int, float | None]:
        """Everyone's losses by position. A collective."""
        return {position: loss for part in self.processes.gather(losses) for position, loss in part.items()}

    def _filter(self, shared: SharedCandidates) -> tuple[dict[int, WholePool], SharedCandidates]:
        """Drops candidates by their loss, if that is asked for, and shares the others anew. A collective then."""
        if self.prefilter is None:
            return {}, shared
        whole = filter_by_loss(
            shared,
            self.compute_losses(shared),
            share=self.prefilter,
            gradient_normalization=self.gradient_normalization,
        )
        kept = {
            pool: tuple(candidates[place] for place in whole[pool].kept) if pool in whole else candidates
            for pool, candidates in shared.pools.items()
        }
        return whole, self.share(kept)

    def measure(self, shared: SharedCandidates, buffer: FeatureBuffer) -> Iterator[PoolScores]:
        """Brings features to the pools' owners, and measures the pools owned here. A collective.

        Args:
            shared ([`SharedCandidates`]): The candidates.
            buffer ([`FeatureBuffer`]): What this process computed of them.

        Yields:
            [`PoolScores`]
        """
        for pool, shapes, found in self.send(shared, buffer):
            yield measure_pool(
                found.features,
                found.norms,
                pool=pool,
                candidates=shared.pools[pool],
                shapes=shapes,
                losses=found.losses,
                gradient_normalization=self.gradient_normalization,
                gradient_centering=self.gradient_centering,
                keep_gradients=self.keep_gradients,
                out_of_memory=found.out_of_memory,
                lengths=found.lengths,
                momentum=found.momentum,
            )

    def send(
        self, shared: SharedCandidates, buffer: FeatureBuffer
    ) -> Iterator[tuple[int, list[RowShape], OwnedFeatures]]:
        """Brings features to the pools' owners. A collective.

        Yields:
            `tuple`: A pool that is owned here, its rows' lengths and their features.
        """
        owned = send_to_owners(buffer, shared.holders, shared.owners, self.processes)
        start = 0
        for pool, candidates in shared.pools.items():
            positions = range(start, start + len(candidates))
            start = positions.stop
            if self.processes.owner(pool) == self.processes.rank:
                yield pool, list(shared.shapes[positions.start : positions.stop]), owned.take(positions)

    def collate_alone(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Rows as the model that scores reads them, each collated alone, without a trace in the random states."""
        with preserved_random_state(self.device):
            return self.collate_rows(indices)

    def collate_rows(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Fetches and collates rows, each alone, and keeps what of them is scored."""
        rows = fetch_rows(self.dataset, indices)
        collated = [collate_row(index, row, self.collate) for index, row in zip(indices, rows, strict=True)]
        check_token_ids(collated, self.vocabulary)
        return [self.shorten(row) for row in collated]

    def shorten(self, row: CandidateRow) -> CandidateRow:
        """What of a row is scored."""
        return row if self.max_label_tokens is None else keep_first_labels(row, self.max_label_tokens)

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
