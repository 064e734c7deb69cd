"""Candidates to scores: collate, forward, backward, features, and of them what the rule needs and no more.

    Gram matrix (spice, fisher, dpp, matching, …), norms, products with a validation set   a forward and a backward
    losses                                                                                 a forward
    losses of answers alone (ifd)                                                          one more
    hidden states (targeted_matching, rds)                                                 a forward up to a layer
    logits (uds)                                                                           a forward
    lengths alone (random)                                                                 nothing: rows are collated

For every candidate x of the step's pools g_x is its sample gradient at the current weights, stored exactly or as a
sketch. Sketched features of all T pools fit in memory, so their rows are sorted by length together; exact ones are
scored in as many pools at a time as fit.

With several processes each scores a share of the candidates, and the features go to the one that measures the pool.
Only the passes run the model, and they talk to no other process but for sharded weights: a proxy's can run beside the
target's training.

Axes: N candidates of a pool, T pools, m features kept per candidate.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.answers import bos_tokens, split_answer
from spice_trainer.data.checks import check_token_ids, token_id_limits
from spice_trainer.data.references import RowReferences
from spice_trainer.data.rows import CandidateRow, RowShape, TargetRows, fetch_rows, keep_first_labels
from spice_trainer.data.stream import StreamRows
from spice_trainer.gradients.backends import rows_influence_each_other
from spice_trainer.gradients.lora import choose_modules
from spice_trainer.gradients.optimizer_state import learning_rate_of
from spice_trainer.gradients.trained import TrainedLayers
from spice_trainer.scoring.features import FeatureBuffer, OwnedFeatures, send_to_owners
from spice_trainer.scoring.hidden import HiddenScorer
from spice_trainer.scoring.measure import from_features, from_hidden_states, from_logits, from_losses
from spice_trainer.scoring.out_of_memory import TokenBudget
from spice_trainer.scoring.passes import ScoringPasses
from spice_trainer.scoring.past_picks import PastPicks
from spice_trainer.scoring.prefilter import FilteredPool, filter_by_loss
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.sharing import SharedCandidates, read_shapes, share_candidates, split_by_pool
from spice_trainer.scoring.store import ScoredRows
from spice_trainer.scoring.target_reader import TargetReader, describe_aim
from spice_trainer.scoring.validation import ValidationRows, mean_gradient
from spice_trainer.selection.repeats import RepeatLimit
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.target import Target
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state

# A process holds features of several pools together up to this size; one pool is always held.
FEATURE_BUFFER_BYTES = 2**30

# Fewer are found to differ from a pool in fewer than four of five cases where they do.
FEW_VALIDATION_ROWS = 8

_Progress = Callable[[int, int], None]

# Dataset rows of each pool, by its number within the step.
_Pools = dict[int, tuple[int, ...]]


class GradientScorer:
    """Scores pools of candidates with a model's own gradients, or by less where the rule asks for less.

    Of the trainable `modules` the settings may choose some. Rules that need an `alignment` compare
    candidates with the `validation` rows.
    """

    def __init__(
        self,
        runtime: Runtime,
        modules: Mapping[str, nn.Module],
        rows: TargetRows,
        config: SpiceConfig,
        validation: ValidationRows | None = None,
    ) -> None:
        self.runtime = runtime
        self.get_model = runtime.get_model
        self.processes = runtime.processes
        self.rows = rows
        # A stream's rows are held by number, and of a run that goes on from its beginning fewer were read than before.
        self._num_rows = 0 if isinstance(rows.dataset, StreamRows) else len(rows.dataset)
        # What is read of a stream, by a proxy with tokens of its own too, comes as the run goes on.
        sources = (rows.dataset, getattr(rows.dataset, "dataset", None), rows.raw_dataset)
        is_stream = any(isinstance(source, StreamRows) for source in sources)
        self._known_length = sys.maxsize if is_stream else self._num_rows
        self.references = RowReferences(rows, config.record_id_column, config.record_text_length)
        self.config = config
        self.validation = validation
        self.vocabulary = token_id_limits(self.get_model())
        self.trained = TrainedLayers(self.get_model(), modules, runtime.get_optimizer, config.scoring_parameters)
        self.passes = ScoringPasses(runtime, self._chosen(modules), config)
        self.past = PastPicks(runtime) if config.takes_logits else None
        self.limit = None if config.max_repeats is None else RepeatLimit(config.max_repeats)
        self.hidden = HiddenScorer(runtime, config) if config.takes_hidden_states else None
        self.target: TargetReader | None = None
        if validation is not None and (not config.takes_alignment or config.length_quotas == "validation"):
            self.target = TargetReader(validation, config, runtime.processes)

    def with_config(self, config: SpiceConfig) -> GradientScorer:
        """Scores the same rows with the same model under other settings, for a look beside a run."""
        return GradientScorer(self.runtime, self.modules, self.rows, config, self.validation)

    def _chosen(self, modules: Mapping[str, nn.Module], names: Collection[str] = ()) -> dict[str, nn.Module]:
        layers, targets = self.config.scoring_layers, self.config.scoring_target_modules
        return choose_modules(modules, layers=layers, target_modules=targets, names=names)

    def follow(self, *, is_told: bool = True) -> None:
        """Scores by the layers that train now; the log says it, where it is to be told. A collective."""
        before = self.trained.modules
        if not self.trained.follow(self.processes, self.get_model()):
            return
        now = self.trained.modules
        # What was learned of the memory stays.
        self.passes = ScoringPasses(self.runtime, self._chosen(now, self.trained.names), self.config, self.budget)
        if is_told and before.keys() != now.keys():
            logger.info(
                "SPICE: %d layers were frozen and %d unfrozen: candidates are scored by %d from here on, whose "
                "gradients have %s numbers.",
                len(before.keys() - now.keys()), len(now.keys() - before.keys()), len(self.modules),
                f"{self.dimension:,}",
            )  # fmt: skip

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that candidates are scored by."""
        return self.passes.modules

    @property
    def dimension(self) -> int:
        """Numbers of a sample gradient, D."""
        return self.passes.dimension

    @property
    def sketch_dim(self) -> int:
        """Numbers of its sketch; 0 when exact."""
        return self.passes.sketch_dim

    @property
    def num_features(self) -> int:
        """Numbers kept per candidate: `sketch_dim`, or D when exact."""
        return self.passes.num_features

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
        for number in range(2, num_pools + 1):
            if self.feature_bytes(number, number * pool_size) > FEATURE_BUFFER_BYTES:
                return number - 1
        return max(num_pools, 1)

    def score(self, pools: Sequence[Sequence[int]], *, progress: _Progress | None = None) -> Iterator[PoolScores]:
        """Scores pools at the current weights, in order; a process gets those that it owns, a single one all of them.

        Leaves no trace: random states, modes, hooks and gradients are as before whenever a pool is handed out.
        `progress` is told how many candidates are done, of how many. A collective that all must exhaust.
        """
        numbered = dict(enumerate(map(tuple, pools)))
        if self.config.takes_gradients:
            self.follow()
        self.look_at_target()
        if self.past is not None:
            return self._score_logits(numbered, progress)
        return self._score(numbered, progress)

    def _score(self, numbered: _Pools, progress: _Progress | None) -> Iterator[PoolScores]:
        if self.config.takes_gradients:
            return self._score_gradients(numbered, progress)
        if self._takes_losses:
            return self._score_losses(numbered, progress)
        return self._score_hidden(numbered, progress) if self.hidden is not None else self.read_lengths(numbered)

    def look_at_target(self, *, is_frozen: bool = False) -> None:
        """Brings what is known of the validation rows up to date, or keeps it as it is. A collective."""
        if self.target is not None:
            with preserved_random_state(self.device):
                self.target.look(self._share_validation, self.passes, self.hidden, is_frozen=is_frozen)

    def share(self, pools: _Pools) -> SharedCandidates:
        """Collates the candidates of some pools and deals them to the processes. A collective."""
        return share_candidates(
            pools, self.collate_rows, tokens_per_batch=self._plan_tokens(), processes=self.processes
        )

    def compute(self, shared: SharedCandidates, report: Callable[[float], None] | None = None) -> FeatureBuffer:
        """Features of what falls to this process; see [`ScoringPasses.compute_features`]."""
        return self.passes.compute_features(shared, report)

    def measure(
        self,
        shared: SharedCandidates,
        buffer: FeatureBuffer,
        filtered: Mapping[int, FilteredPool] | None = None,
        reference: Float64[Tensor, " m"] | None = None,
        hidden: Float[Tensor, "N H"] | None = None,
    ) -> Iterator[PoolScores]:
        """Brings features to the pools' owners, and measures the pools owned here. A collective."""
        owned = send_to_owners(buffer, shared.holders, shared.owners, self.processes)
        for pool, known, positions in self._limited(shared.by_pool()):
            if self._owns(pool):
                found = owned.take(positions)
                states = None if hidden is None else hidden[positions.start : positions.stop]
                scores = self._measured(known, found, reference, states)
                del found
                if filtered is not None and pool in filtered:
                    scores = replace(scores, whole=filtered[pool].whole, kept=filtered[pool].kept)
                yield scores
                # It may hold the features, and must be gone before those of the next pools come.
                del scores

    def _measured(
        self,
        known: PoolScores,
        found: OwnedFeatures,
        reference: Float64[Tensor, " m"] | None,
        hidden: Float[Tensor, "N H"] | None,
    ) -> PoolScores:
        """What features tell, and hidden states where they are read too."""
        gradients = None if self.target is None else self.target.gradients
        features = None if gradients is None else gradients.features
        scores = from_features(known, found, self.config, reference, self._target_of(known), features)
        if self.config.takes_learning_rate:
            scores = replace(scores, learning_rate=learning_rate_of(self.runtime.get_optimizer()))
        return scores if hidden is None else self._with_hidden(scores, hidden)

    def score_rows(self, indices: tuple[int, ...]) -> tuple[ScoredRows | None, tuple[RowShape, ...]]:
        """What is computed of some rows at the current weights, on process 0, and all rows' shapes. A collective."""
        found: dict[str, Tensor] = {}
        with preserved_random_state(self.device):
            shared = self.share({0: indices})
            hidden = None if self.hidden is None else self.hidden.compute(self.passes, shared)
            if self.config.takes_gradients:
                with self.failing_together():
                    buffer = self.compute(shared)
                owned = send_to_owners(buffer, shared.holders, shared.owners, self.processes)
                if self._owns(0):
                    owned = owned.take(range(len(indices)))
                    names = ("features", "norms", "lengths", "losses", "out_of_memory")
                    found = {name: getattr(owned, name).cpu() for name in names}
                    found["losses"] = found["losses"].double()
            elif self._takes_losses:
                losses, alone = self._all_losses(shared, lambda share: None)
                found = {"losses": _by_position(losses, len(indices))}
                # Not by nan, which a model may give as a loss.
                missing = [None in (losses.get(p, 0.0), (alone or {}).get(p, 0.0)) for p in range(len(indices))]
                found["out_of_memory"] = torch.tensor(missing)
                if alone is not None:
                    found["losses_alone"] = _by_position(alone, len(indices))
        rows = ScoredRows(hidden=hidden, **found) if self._owns(0) else None
        return rows, shared.shapes

    def put_together(self, known: PoolScores, rows: ScoredRows, reference: Float64[Tensor, " m"] | None) -> PoolScores:
        """What was computed of a pool's rows earlier, by [`GradientScorer.score_rows`], as scoring it would give."""
        if rows.features is not None:
            assert rows.norms is not None and rows.lengths is not None
            assert rows.losses is not None and rows.out_of_memory is not None
            found = OwnedFeatures({}, rows.features, rows.norms, rows.lengths, rows.losses.float(), rows.out_of_memory)
            return self._measured(known, found, reference, rows.hidden)
        scores = replace(known, target=self._target_of(known))
        if self._takes_losses:
            assert rows.losses is not None and rows.out_of_memory is not None
            losses = _known_losses(rows.losses, rows.out_of_memory)
            alone = None
            if self.config.takes_answers_alone:
                assert rows.losses_alone is not None
                alone = rows.losses_alone.tolist()
            scores = replace(from_losses(known, losses, alone), target=scores.target)
        return scores if rows.hidden is None else self._with_hidden(scores, rows.hidden)

    @property
    def _takes_losses(self) -> bool:
        return "losses" in self.config.rule.needs or self.config.takes_answers_alone

    def failing_together(self) -> AbstractContextManager[object]:
        """Context of this process's passes, whose errors reach all others. No collective may stand in it.

        With sharded weights the others are inside a forward's collective: only the launcher can end them.
        """
        return nullcontext() if self.processes.lockstep else self.processes.failing_together("scoring candidates")

    def collate_alone(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Rows as the model that scores reads them, each collated alone, without a trace in the random states."""
        with preserved_random_state(self.device):
            return self.collate_rows(indices)

    def collate_rows(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Fetches and collates rows, each alone, and keeps what of them is scored."""
        length = len(self.rows.dataset)
        if length < self._num_rows:
            raise ValueError(
                f"The training dataset ({type(self.rows.dataset).__name__}) has {length:,} rows now, and had "
                f"{self._num_rows:,} when the run began: row numbers may mean other rows. Fix: leave it as it is "
                "until the run has ended, or give the trainer a copy."
            )
        if length > self._known_length:
            self._known_length = length
            logger.warning(
                "SPICE: the training dataset (%s) has %s rows now, and had %s when the run began: those that came "
                "since are no candidates. Fix: give the trainer all rows before training begins.",
                type(self.rows.dataset).__name__,
                f"{length:,}",
                f"{self._num_rows:,}",
            )
        rows = fetch_rows(self.rows.dataset, indices)
        collated = self.rows.collate_each(indices, rows)
        references = self.references.refer(indices, rows, collated)
        return self._scored_part(
            [replace(row, reference=reference) for row, reference in zip(collated, references, strict=True)]
        )

    def describe_validation(self) -> dict[str, Any] | None:
        """How many rows of each validation set are read, and their fingerprint."""
        return None if self.validation is None else self.validation.description

    def describe_aim(self) -> str:
        """What picks aim at, in a sentence; "" if at nothing."""
        return describe_aim(self.config, self.validation, self.hidden)

    def check_validation(self) -> list[CandidateRow]:
        """The validation rows as they are scored; a ValueError for ids that the model does not know."""
        if self.validation is None:
            return []
        with preserved_random_state(self.device):
            rows = self._scored_part(self.validation.collate(self.validation.indices))
        if self.config.rule.reads_target and len(rows) < FEW_VALIDATION_ROWS:
            logger.warning(
                "SPICE: %d validation row%s can hardly show that pools differ from %s, and where no difference shows "
                "nothing is aimed at. Give at least %d.",
                len(rows), "" if len(rows) == 1 else "s", "it" if len(rows) == 1 else "them", FEW_VALIDATION_ROWS,
            )  # fmt: skip
        return rows

    def shorten(self, row: CandidateRow) -> CandidateRow:
        """What of a row is scored."""
        limit = self.config.scoring_max_tokens
        return row if limit is None else keep_first_labels(row, limit)

    def _scored_part(self, rows: Sequence[CandidateRow]) -> list[CandidateRow]:
        check_token_ids(rows, self.vocabulary)
        return [self.shorten(row) for row in rows]

    def _limited(self, pools: Iterator[tuple[int, PoolScores, range]]) -> Iterator[tuple[int, PoolScores, range]]:
        """The same pools, each with which candidates have not been picked too often; all of a step, in order."""
        for pool, known, positions in pools:
            if self.limit is not None:
                hashes = [reference.token_hash for reference in known.references]
                known = replace(known, allowed=self.limit.allow(known.candidates, hashes))
            yield pool, known, positions

    def _target_of(self, known: PoolScores) -> Target | None:
        """What is known of the validation rows; copies of a pool's own rows do not count in it."""
        return None if self.target is None else self.target.without_copies(known.references)

    def _owns(self, pool: int) -> bool:
        return self.processes.owner(pool) == self.processes.rank

    def _plan_tokens(self) -> int:
        """Tokens of a micro-batch as it is planned: where rows influence each other each is alone."""
        return 1 if rows_influence_each_other(self.get_model()) else self.config.scoring_tokens_per_batch

    # By gradients

    def _score_gradients(self, pools: _Pools, progress: _Progress | None) -> Iterator[PoolScores]:
        reference = self.reference_gradient() if self.config.takes_alignment else None
        total, done = sum(map(len, pools.values())), 0
        for group in self._group_pools(pools):
            num_rows = sum(map(len, group.values()))

            def report(share: float, done: int = done, num_rows: int = num_rows) -> None:
                if progress is not None:
                    progress(done + int(share * num_rows), total)

            with preserved_random_state(self.device):
                filtered, shared = self._filter(self.share(group))
                with self.failing_together():
                    buffer = self.compute(shared, report)
                hidden = None if self.hidden is None else self._hidden_states(shared)
            yield from self.measure(shared, buffer, filtered, reference, hidden)
            # Not held beside the next group's.
            del shared, buffer
            done += num_rows

    def _group_pools(self, pools: _Pools) -> Iterator[_Pools]:
        """Groups a step's pools into as many as are scored together."""
        group: _Pools = {}
        for pool, rows in pools.items():
            num_rows = sum(map(len, group.values())) + len(rows)
            if group and self.feature_bytes(len(group) + 1, num_rows) > FEATURE_BUFFER_BYTES:
                yield group
                group = {}
            group[pool] = rows
        if group:
            yield group

    def _filter(self, shared: SharedCandidates) -> tuple[dict[int, FilteredPool], SharedCandidates]:
        """Drops candidates by their loss, if that is asked for, and shares the others anew. A collective then."""
        if self.config.scoring_prefilter is None:
            return {}, shared
        filtered = filter_by_loss(
            shared,
            self._gather(self._compute_losses(shared)),
            share=self.config.scoring_prefilter,
            gradient_normalization=self.config.gradient_normalization,
        )
        kept = {
            pool: tuple(candidates[place] for place in filtered[pool].kept) if pool in filtered else candidates
            for pool, candidates in shared.pools.items()
        }
        return filtered, self.share(kept)

    def reference_gradient(self) -> Float64[Tensor, " m"]:
        """The validation set's mean gradient at the current weights. A collective."""
        assert self.validation is not None
        with preserved_random_state(self.device):
            shared = self._share_validation()
            with self.failing_together():
                buffer = self.passes.compute_features(shared, preconditioned=False)
        return mean_gradient(buffer, shared, self.processes, self.validation)

    def _share_validation(self) -> SharedCandidates:
        """Reads the validation rows and deals them to the processes. A collective."""
        validation = self.validation
        assert validation is not None
        return share_candidates(
            {0: validation.indices},
            lambda some: self._scored_part(validation.collate(some)),
            tokens_per_batch=self._plan_tokens(),
            processes=self.processes,
        )

    # By hidden states

    def _score_hidden(self, pools: _Pools, progress: _Progress | None) -> Iterator[PoolScores]:
        report = _counted(progress, pools)
        with preserved_random_state(self.device):
            shared = self.share(pools)
            states = self._hidden_states(shared, report)
        for pool, known, positions in self._limited(shared.by_pool()):
            if self._owns(pool):
                yield self._with_hidden(known, states[positions.start : positions.stop])

    def _hidden_states(
        self, shared: SharedCandidates, report: Callable[[float], None] | None = None
    ) -> Float[Tensor, "N H"]:
        assert self.hidden is not None
        indices = [index for rows in shared.pools.values() for index in rows]
        return self.hidden.compute(self.passes, shared, indices, report)

    def _with_hidden(self, known: PoolScores, states: Float[Tensor, "N H"]) -> PoolScores:
        target_states = None if self.target is None else self.target.hidden
        is_last = self.config.takes_last_hidden_states
        return from_hidden_states(known, states, self._target_of(known), target_states, is_last=is_last)

    # By logits

    def _score_logits(self, pools: _Pools, progress: _Progress | None) -> Iterator[PoolScores]:
        """What logits tell, beside what else the rule reads."""
        assert self.past is not None
        report = _counted(progress, pools)
        with preserved_random_state(self.device):
            shared = self.share(pools)
            told = self.past.compute(self.passes, shared, [row for rows in pools.values() for row in rows], report)
        of_pool = {pool: positions for pool, _, positions in shared.by_pool()}
        del shared
        for scores in self._score(pools, None):
            found = told[of_pool[scores.pool or 0]]
            yield from_logits(scores, found if scores.whole is None else found[list(scores.kept)], self.past.memory)

    # By losses

    def _score_losses(self, pools: _Pools, progress: _Progress | None) -> Iterator[PoolScores]:
        report = _counted(progress, pools)
        with preserved_random_state(self.device):
            shared = self.share(pools)
            losses, alone = self._all_losses(shared, report)
            states = None if self.hidden is None else self._hidden_states(shared)
        for pool, known, positions in self._limited(shared.by_pool()):
            if self._owns(pool):
                found = [losses.get(position, 0.0) for position in positions]
                others = None if alone is None else [alone.get(position, 0.0) for position in positions]
                scores = replace(from_losses(known, found, others), target=self._target_of(known))
                yield scores if states is None else self._with_hidden(scores, states[positions.start : positions.stop])

    def _all_losses(
        self, shared: SharedCandidates, report: Callable[[float], None]
    ) -> tuple[dict[int, float | None], dict[int, float | None] | None]:
        """Everyone's losses by position, and those of answers alone where the rule reads them. A collective."""
        if self.config.takes_answers_alone:
            return self._losses_of_answers(shared, report)
        return self._gather(self._compute_losses(shared, report)), None

    def _compute_losses(
        self, shared: SharedCandidates, report: Callable[[float], None] | None = None
    ) -> dict[int, float | None]:
        with self.failing_together():
            return self.passes.compute_losses(shared, report)

    def _gather(self, losses: dict[int, float | None]) -> dict[int, float | None]:
        """Everyone's losses by position. A collective."""
        return {position: loss for part in self.processes.gather(losses) for position, loss in part.items()}

    def _losses_of_answers(
        self, shared: SharedCandidates, report: Callable[[float], None]
    ) -> tuple[dict[int, float | None], dict[int, float | None]]:
        """Losses of the candidates' answers with and without what precedes them; nan where nothing is left of one."""
        bos = bos_tokens(self.get_model())
        whole: dict[int, CandidateRow] = {}
        alone: dict[int, CandidateRow] = {}
        with self.failing_together():
            halves = {position: split_answer(row, bos) for position, row in shared.rows.items()}
            for position, row in shared.rows.items():
                # One of which nothing is left runs as it is: with sharded weights all processes run the same batches.
                whole[position], alone[position] = halves[position] or (row, row)
            losses = self.passes.compute_losses(replace(shared, rows=whole), lambda share: report(share / 2))
            without = self.passes.compute_losses(replace(shared, rows=alone), lambda share: report((1 + share) / 2))
            for position in without:
                if halves[position] is None:
                    without[position] = float("nan")
        return self._gather(losses), self._gather(without)

    # By lengths

    def read_lengths(
        self, pools: _Pools, *, measure: Callable[[PoolScores], PoolScores] | None = None
    ) -> Iterator[PoolScores]:
        """What the rows' lengths alone tell; with `measure` process 0 gets all pools, and what that makes of them."""
        indices = [index for pool in pools.values() for index in pool]
        with preserved_random_state(self.device):
            _, shapes = read_shapes(indices, self.collate_rows, self.processes)
        for pool, known, _ in self._limited(split_by_pool(pools, shapes)):
            if measure is not None and self.processes.is_main:
                yield measure(known)
            elif measure is None and self._owns(pool):
                yield replace(known, target=self._target_of(known))


def _counted(progress: _Progress | None, pools: _Pools) -> Callable[[float], None]:
    """What takes the share of the pools' rows that is done, and tells how many of how many that is."""
    total = sum(map(len, pools.values()))

    def report(share: float) -> None:
        if progress is not None:
            progress(int(share * total), total)

    return report


def _by_position(values: Mapping[int, float | None], number: int) -> Float64[Tensor, " N"]:
    """Losses by position; 0 for rows without a label, nan where memory did not suffice."""
    found = [values.get(position, 0.0) for position in range(number)]
    return torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float64)


def _known_losses(losses: Float64[Tensor, " N"], out_of_memory: Bool[Tensor, " N"]) -> list[float | None]:
    pairs = zip(losses.tolist(), out_of_memory.tolist(), strict=True)
    return [None if missing else loss for loss, missing in pairs]
