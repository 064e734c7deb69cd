"""This process's micro-batches: forwards and backwards that give gradient features, or forwards that give losses.

    micro-batch ─ padded ─ forward ─┬─ backward ─ features, losses        (gradients)
                                    └─ losses                             (no graph, about half of the work)

Where memory runs out a micro-batch is halved, and so are later ones; a row that does not fit alone is marked. Nothing
here speaks to another process but the forwards of sharded weights, and nothing is drawn at random: a proxy's can run
beside the target's training.

Axes: n rows of a micro-batch, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import naming_rows
from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.forward import input_embedding, move_inputs
from spice_trainer.gradients.hidden_states import HiddenStates
from spice_trainer.gradients.label_logits import LabelLogits
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.optimizer_state import AdamMoments, OptimizerMomentum
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.gradients.sketch import GradientSketch
from spice_trainer.scoring.features import DiscardedGradients, FeatureBuffer
from spice_trainer.scoring.out_of_memory import TokenBudget, explained, features_error, lockstep_error
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.sharing import SharedCandidates

# Runs some rows, whose places in what is filled are given; of rows that only keep step there are none.
_RunRows = Callable[[Any, list[CandidateRow], Sequence[int] | None], None]


class ScoringPasses:
    """Runs the micro-batches that fell to this process, for the gradients of some layers or for losses alone."""

    def __init__(
        self,
        runtime: Runtime,
        modules: Mapping[str, nn.Module],
        config: SpiceConfig,
        budget: TokenBudget | None = None,
    ) -> None:
        self.get_model = runtime.get_model
        self.modules = dict(modules)
        self.processes = runtime.processes
        # What fits may be less; that is this process's own affair, the shared plan stays as it is.
        self.budget = TokenBudget(config.scoring_tokens_per_batch) if budget is None else budget
        self._autocast = runtime.autocast
        self._label_loss = runtime.label_loss
        self._moments: AdamMoments | None = None
        if config.gradient_preconditioning == "adam":
            self._moments = AdamMoments(runtime.get_optimizer, self.modules)
        self._momentum = OptimizerMomentum(runtime.get_optimizer, self.modules) if config.takes_momentum else None
        self._sizes = [layer.num_coordinates for layer in scored_layers(self.modules)]
        self.dimension = sum(self._sizes)
        sketch_dim = config.resolve_sketch_dim()
        self.sketch_dim = sketch_dim if 0 < sketch_dim < self.dimension else 0
        self._seed = runtime.seed
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

    def open(self) -> SampleGradients:
        """The context in which passes run."""
        return SampleGradients(
            self.get_model(),
            self.modules,
            can_repeat=not self.processes.lockstep,
            label_loss=self._label_loss,
        )

    def new_buffer(self, num_rows: int, *, preconditioned: bool = True) -> FeatureBuffer:
        """Room for the features of some candidates, of raw gradients if preconditioning is not wanted or asked for."""
        device = self.device
        moments = self._moments.read() if self._moments is not None and preconditioned else None
        momentum = None if self._momentum is None else self._momentum.read(moments)
        with explained(features_error(num_rows, self.num_features)):
            if self.sketch_dim and self._sketch is None:
                self._sketch = GradientSketch(self._sizes, self.sketch_dim, seed=self._seed, device=device)
            return FeatureBuffer(num_rows, self._sizes, self._sketch, device, moments, momentum)

    def compute_features(
        self,
        shared: SharedCandidates,
        report: Callable[[float], None] | None = None,
        *,
        preconditioned: bool = True,
    ) -> FeatureBuffer:
        """Runs forwards and backwards; features of what this process scored, raw gradients' if not preconditioned."""
        buffer = self.new_buffer(len(shared.held), preconditioned=preconditioned)

        def run(sample_gradients: SampleGradients, rows: list[CandidateRow], places: Sequence[int] | None) -> None:
            inputs, labels = self._move(*pad_rows(rows))
            if places is not None:
                buffer.begin(places)
            with self._autocast():
                sink = DiscardedGradients() if places is None else buffer
                losses = sample_gradients.compute(inputs, labels, sink)
            if places is not None:
                buffer.finish(losses)

        self._run(shared, run, buffer.leave_out, report)
        return buffer

    def compute_losses(
        self, shared: SharedCandidates, report: Callable[[float], None] | None = None
    ) -> dict[int, float | None]:
        """Runs forwards alone: losses of the candidates that this process scores, by position.

        The mean negative log-likelihood of the label tokens; `None` for a candidate that does not fit into memory.
        """
        losses: list[float | None] = [None] * len(shared.held)

        def run(sample_gradients: SampleGradients, rows: list[CandidateRow], places: Sequence[int] | None) -> None:
            inputs, labels = self._move(*pad_rows(rows))
            with self._autocast():
                found = sample_gradients.losses(inputs, labels).tolist()
            for place, loss in zip(places or [], found, strict=places is not None):
                losses[place] = loss

        def leave_out(place: int) -> None:
            losses[place] = None

        self._run(shared, run, leave_out, report)
        scored = {position for batch in shared.batches[: shared.num_kept] for position in batch}
        return {position: loss for position, loss in zip(shared.held, losses, strict=True) if position in scored}

    def compute_hidden_states(
        self, shared: SharedCandidates, layer: int, report: Callable[[float], None] | None = None
    ) -> dict[int, Tensor]:
        """Runs forwards up to a layer: one vector for each candidate that this process scores, by position.

        On the CPU, in float32; none for a candidate that does not fit into memory.
        """
        states: dict[int, Tensor] = {}

        def run(hidden_states: HiddenStates, rows: list[CandidateRow], places: Sequence[int] | None) -> None:
            inputs, labels = self._move(*pad_rows(rows))
            with self._autocast():
                found = hidden_states.compute(inputs, labels).cpu()
            states.update(zip(places or [], found, strict=places is not None))

        self._run(shared, run, lambda place: None, report, HiddenStates(self.get_model(), layer))
        scored = {position for batch in shared.batches[: shared.num_kept] for position in batch}
        places = {place: position for place, position in enumerate(shared.held)}
        return {places[place]: row for place, row in states.items() if places[place] in scored}

    def compute_logits(
        self, shared: SharedCandidates, report: Callable[[float], None] | None = None
    ) -> dict[int, Tensor]:
        """Runs forwards: norm and sketch of the logits of each candidate that this process scores, by position.

        On the CPU; none for a candidate that does not fit into memory.
        """
        found: dict[int, Tensor] = {}

        def run(logits: LabelLogits, rows: list[CandidateRow], places: Sequence[int] | None) -> None:
            inputs, labels = self._move(*pad_rows(rows))
            with self._autocast():
                told = logits.compute(inputs, labels)
            if places is not None:
                found.update(zip(places, told, strict=True))

        self._run(shared, run, lambda place: None, report, LabelLogits(self.get_model(), self._seed))
        scored = {position for batch in shared.batches[: shared.num_kept] for position in batch}
        places = {place: position for place, position in enumerate(shared.held)}
        return {places[place]: row for place, row in found.items() if places[place] in scored}

    def _move(self, inputs: Mapping[str, Any], labels: Tensor) -> tuple[dict[str, Any], Tensor]:
        device = self.device
        return move_inputs(inputs, device), labels.to(device)

    def _run(
        self,
        shared: SharedCandidates,
        run: _RunRows,
        leave_out: Callable[[int], None],
        report: Callable[[float], None] | None,
        runner: AbstractContextManager[Any] | None = None,
    ) -> None:
        places = {position: place for place, position in enumerate(shared.held)}
        num_rows, done, report = sum(map(len, shared.batches)), 0, report or (lambda share: None)
        if not shared.batches:
            report(1.0)
        with runner or self.open() as sample_gradients:
            for number, batch in enumerate(shared.batches):
                rows = [shared.rows[position] for position in batch]
                if number < shared.num_kept:
                    where = [places[position] for position in batch]
                    for position in self._run_in_parts(sample_gradients, run, rows, where):
                        leave_out(where[position])
                        self.budget.leave_out(rows[position])
                else:
                    run(sample_gradients, rows, None)
                done += len(batch)
                report(done / num_rows)

    def _run_in_parts(
        self, sample_gradients: Any, run: _RunRows, rows: list[CandidateRow], places: list[int]
    ) -> list[int]:
        """Runs a micro-batch; positions of the rows that do not fit alone."""

        def attempt(part: range) -> None:
            where = slice(part.start, part.stop)
            with naming_rows(rows[where], self.get_model()):
                run(sample_gradients, rows[where], places[where])

        lengths = [row.num_tokens for row in rows]
        if self.processes.lockstep and self.processes.world_size > 1:
            with explained(lockstep_error(len(rows), max(lengths))):
                attempt(range(len(rows)))
            return []
        return self.budget.run(lengths, attempt)


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its token ids: the device of its input embedding."""
    return next((parameter.device for parameter in input_embedding(model).parameters()), torch.device("cpu"))
