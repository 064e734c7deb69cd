"""Candidates to scores: collate, forward, backward, features, Gram matrix.

For every candidate x of the step's pools the sample gradient g_x at the current weights (module `gradients`), stored
exactly or as a sketch, then per pool the normalised Gram matrix K_xy = c_x c_y ⟨g_x, g_y⟩ that everything later needs
(module `gram`). Sketched features of all T pools fit in memory, so their rows are sorted by length together; exact
ones are scored in as many pools at a time as fit.

Axes: N candidates of a pool, T pools, S tokens, D gradient dimension, m features kept per candidate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.gradients import SampleGradients, trainable_size
from spice_trainer.gram import measure_rows, normalization_weights, normalized_gram
from spice_trainer.rows import CandidateRow, collate_row, fetch_rows, pad_rows, plan_micro_batches
from spice_trainer.sketch import GradientSketch

# Features of several pools are held together up to this size; one pool is always held.
FEATURE_BUFFER_BYTES = 2**30


@dataclass(frozen=True)
class PoolScores:
    """What scoring found out about one pool.

    Args:
        candidates (`tuple[int, ...]`): Dataset rows in pool order.
        gram (`torch.Tensor` of shape `(N, N)`): Normalised inner products of sample gradients, float64, on the CPU.
        gradient_norms (`torch.Tensor` of shape `(N,)`): Norms of the raw gradients, float64.
        finite (`torch.Tensor` of shape `(N,)`): Whether the gradient is finite.
        nonzero (`torch.Tensor` of shape `(N,)`): Whether it is finite and not zero.
        losses (`torch.Tensor` of shape `(N,)`): Mean negative log-likelihood of each row's label tokens.
        label_tokens (`tuple[int, ...]`): Label tokens per row.
        num_tokens (`tuple[int, ...]`): Tokens per row.
        gradients (`torch.Tensor` of shape `(N, D)`, *optional*): Rows divided by their largest magnitude, for measures
            that need coordinates.
        row_weights (`torch.Tensor` of shape `(N,)`, *optional*): Multipliers that turn `gradients` into normalised
            gradients.
    """

    candidates: tuple[int, ...]
    gram: Float64[Tensor, "N N"]
    gradient_norms: Float64[Tensor, "N"]
    finite: Bool[Tensor, "N"]
    nonzero: Bool[Tensor, "N"]
    losses: Float[Tensor, "N"]
    label_tokens: tuple[int, ...]
    num_tokens: tuple[int, ...]
    gradients: Float[Tensor, "N D"] | None = None
    row_weights: Float64[Tensor, "N"] | None = None


class FeatureBuffer:
    """Holds the features of some candidates, and takes them module by module as a gradient sink.

    Args:
        num_rows (`int`): Candidates held.
        sizes (`Sequence[int]`): Gradient coordinates per module, D = Σ sizes.
        sketch ([`~spice_trainer.sketch.GradientSketch`], *optional*): Folds gradients; `None` keeps them exactly.
        device (`torch.device`): Where the features live.
    """

    def __init__(
        self, num_rows: int, sizes: Sequence[int], sketch: GradientSketch | None, device: torch.device
    ) -> None:
        self._sketch = sketch
        self._ends = torch.tensor(sizes).cumsum(0).tolist()
        self._sizes = tuple(sizes)
        width = sketch.sketch_dim if sketch is not None else self._ends[-1]
        self.features = torch.zeros(num_rows, width, device=device)
        # Exact also when sketched: the sketch only has to carry directions.
        self._squared_norms = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self._rows = torch.empty(0, dtype=torch.long, device=device)
        self._folded = torch.empty(0, device=device)

    def begin(self, rows: Sequence[int]) -> None:
        """Announces which rows of the buffer the next micro-batch fills, in its order."""
        self._rows = torch.tensor(rows, device=self.features.device)
        if self._sketch is not None:
            self._folded = torch.zeros(len(rows), self._sketch.sketch_dim, device=self.features.device)

    def add(self, module_index: int, gradients: Float[Tensor, "n D_l"]) -> None:
        """Takes one module's sample gradients of the announced rows."""
        gradients = gradients.to(self.features.device)
        # float64 sums of squares: gradients of 1e-30 would vanish, and of 1e+30 overflow, when squared in float32.
        norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
        self._squared_norms.index_add_(0, self._rows, norms.square())
        if self._sketch is not None:
            self._sketch.fold_(self._folded, module_index, gradients)
        else:
            end = self._ends[module_index]
            self.features[self._rows, end - self._sizes[module_index] : end] = gradients

    def finish(self) -> None:
        """Ends the announced micro-batch."""
        if self._sketch is not None:
            self.features[self._rows] = self._folded

    @property
    def norms(self) -> Float64[Tensor, "N"]:
        """Exact norms of the raw gradients."""
        return self._squared_norms.sqrt()


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
    ) -> None:
        self.get_model = get_model
        self.modules = dict(modules)
        self.dataset = dataset
        self.collate = collate
        self.gradient_normalization = config.gradient_normalization
        self.tokens_per_batch = config.scoring_tokens_per_batch
        # Measures other than the exact one need the gradients' coordinates, not only their inner products.
        self.keep_gradients = config.information != "exact"
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

    def score(
        self, pools: Sequence[Sequence[int]], *, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[PoolScores]:
        """Scores pools at the current weights, in order.

        Leaves no trace: random states, modes, hooks and gradients are as before whenever a pool is handed out.

        Args:
            pools (`Sequence[Sequence[int]]`): Dataset rows of each pool.
            progress (`Callable[[int, int], None]`, *optional*): Told how many candidates are done, of how many.

        Yields:
            [`PoolScores`], one per pool.
        """
        total, done = sum(map(len, pools)), 0
        for group in self._group_pools(pools):
            with preserved_random_state(self.device):
                rows = [row for pool in group for row in self._load_rows(pool)]
                report = None if progress is None else partial(_report, progress, done, total)
                buffer, losses = self._fill_buffer(rows, report)
            done += len(rows)
            start = 0
            for pool in group:
                stop = start + len(pool)
                yield self._measure_pool(rows[start:stop], buffer, losses, start, stop)
                start = stop

    def _group_pools(self, pools: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        group: list[Sequence[int]] = []
        num_rows = 0
        for pool in pools:
            num_rows += len(pool)
            if group and num_rows * self.num_features * 4 > FEATURE_BUFFER_BYTES:
                yield group
                group, num_rows = [], len(pool)
            group.append(pool)
        if group:
            yield group

    def _load_rows(self, indices: Sequence[int]) -> list[CandidateRow]:
        rows = fetch_rows(self.dataset, indices)
        return [collate_row(index, row, self.collate) for index, row in zip(indices, rows, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs, and where the features live."""
        embedding: nn.Module = self.get_model().get_input_embeddings()  # type: ignore[operator]
        return next((parameter.device for parameter in embedding.parameters()), torch.device("cpu"))

    def _fill_buffer(
        self, rows: Sequence[CandidateRow], report: Callable[[int], None] | None
    ) -> tuple[FeatureBuffer, Float[Tensor, "N"]]:
        device = self.device
        if self.sketch_dim and self._sketch is None:
            self._sketch = GradientSketch(self._sizes, self.sketch_dim, seed=self._seed, device=device)
        buffer = FeatureBuffer(len(rows), self._sizes, self._sketch, device)
        losses = torch.zeros(len(rows))
        # A row without label tokens has a zero gradient: nothing to compute.
        scored = [position for position, row in enumerate(rows) if row.num_label_tokens > 0]
        done = len(rows) - len(scored)
        if report is not None and not scored:
            report(done)
        with SampleGradients(self.get_model(), self.modules) as sample_gradients:
            for batch in plan_micro_batches([rows[position] for position in scored], self.tokens_per_batch):
                positions = [scored[position] for position in batch]
                inputs, labels = pad_rows([rows[position] for position in positions])
                inputs = {
                    key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()
                }
                buffer.begin(positions)
                with self._autocast() if self._autocast is not None else nullcontext():
                    batch_losses = sample_gradients.compute(inputs, labels.to(device), buffer)
                buffer.finish()
                losses[positions] = batch_losses.float().cpu()
                done += len(positions)
                if report is not None:
                    report(done)
        return buffer, losses

    def _measure_pool(
        self, rows: Sequence[CandidateRow], buffer: FeatureBuffer, losses: Tensor, start: int, stop: int
    ) -> PoolScores:
        geometry = measure_rows(buffer.features[start:stop])
        norms = buffer.norms[start:stop].cpu()
        finite = geometry.finite.cpu() & norms.isfinite()
        nonzero = finite & geometry.nonzero.cpu() & (norms > 0)
        label_tokens = tuple(row.num_label_tokens for row in rows)
        weights = normalization_weights(
            norms, torch.tensor(label_tokens, dtype=torch.float64), self.gradient_normalization
        )
        gram = normalized_gram(geometry.cosines.cpu(), norms, weights, unit=self.gradient_normalization == "unit")
        return PoolScores(
            candidates=tuple(row.index for row in rows),
            gram=gram,
            gradient_norms=norms,
            finite=finite,
            nonzero=nonzero,
            losses=losses[start:stop],
            label_tokens=label_tokens,
            num_tokens=tuple(row.num_tokens for row in rows),
            gradients=buffer.features[start:stop] if self.keep_gradients else None,
            row_weights=weights * geometry.scales.cpu() if self.keep_gradients else None,
        )


def _report(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Gives back the random states of Python, NumPy, torch and `device` as they were.

    The model draws nothing in evaluation mode, but a user's dataset transform or collator may, and the training run
    must not see that it was called for candidates.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
