"""Scores every row once, after some steps on random rows, and serves all later steps from these scores.

    step 0 … w−1   random picks, no model      step w   every row scored at θ_w      step w …   picks from the scores

The scores lie on the disk of process 0, which alone reads them and decides; the processes share the scoring. A run
that is resumed before step w scores again, or goes on where it was interrupted if the weights are the same; one that
is resumed later needs them.

Axes: N candidates of a pool.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spice_trainer.data.rows import RowReference
from spice_trainer.scoring.out_of_memory import MemoryNotice
from spice_trainer.scoring.step_scorer import StepScorer
from spice_trainer.scoring.store import ScoreStore
from spice_trainer.selection.results import PoolSelection, StepSelection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.utils.logging import logger

STORE_FOLDER = "scores"

# Rows that are scored and written at a time, at most, and bytes of their features.
_ROWS_PER_WRITE, _BYTES_PER_WRITE = 512, 2**28


class OnceScorer(StepScorer):
    """Scores with what `inner` scores with, once, at step `config.score_once_after`."""

    def __init__(self, inner: StepScorer) -> None:
        super().__init__(inner.gradient_scorer)
        self.inner = inner
        self.memory_report = inner.memory_report
        self._after = inner.gradient_scorer.config.score_once_after or 0
        self._folder: Path | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._store: ScoreStore | None = None
        self._identity: dict[str, Any] | None = None
        self._reference: Tensor | None = None
        self._num_tokens = 0

    def keep_in(self, folder: Path) -> None:
        """Where the scores go; without it a temporary folder."""
        self._folder = folder / STORE_FOLDER

    def start(self) -> None:
        """Begins a run."""
        self.inner.start()
        self._store, self._identity, self._reference = None, None, None

    def is_warming_up(self, step: int) -> bool:
        """Whether a step's rows are drawn at random."""
        return step < self._after

    def score(
        self,
        pools: Sequence[Sequence[int]],
        *,
        step: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[PoolScores]:
        """Reads a step's pools from the scores; in the first such step, scores all rows. A collective."""
        scorer = self.gradient_scorer
        numbered = dict(enumerate(map(tuple, pools)))
        if self.is_warming_up(step):
            yield from scorer.read_lengths(numbered)
            return
        if self._store is None:
            self._prepare(progress)
        yield from scorer.read_lengths(numbered, measure=self._measure)

    def _measure(self, known: PoolScores) -> PoolScores:
        """What is known of a pool's rows, with their scores. On process 0."""
        assert self._store is not None
        rows, hashes = self._store.read(known.candidates)
        if hashes != [_number(reference) for reference in known.references]:
            raise RuntimeError(
                "Rows of the training dataset are others than when all rows were scored (score_once_after="
                f"{self._after}), so their scores would be of other rows. Fix: leave the dataset as it was, or begin "
                "a new run."
            )
        return self.gradient_scorer.put_together(known, rows, self._reference)

    def _prepare(self, progress: Callable[[int, int], None] | None) -> None:
        """Opens the scores of a resumed run, or scores all rows. A collective."""
        scorer, processes = self.gradient_scorer, self.processes
        resumed = self._identity
        identity = resumed or self._describe()
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="spice_scores_")
            self._folder = Path(self._temporary.name)
        store = ScoreStore(self._folder, len(scorer.rows.dataset), identity)
        with processes.failing_together("opening the rows' scores"):
            is_there = processes.is_main and store.open()
            if processes.is_main and resumed is not None and not (is_there and store.is_complete):
                raise FileNotFoundError(
                    f"The run scored every row once, and these scores are not in {str(self._folder)!r} any more, or "
                    "not whole. The weights they were taken at are gone. Fix: bring the folder back, or resume from "
                    f"a checkpoint of at most {self._after} steps."
                )
        num_done = processes.broadcast(store.num_done)
        self._look_at_target()
        total = store.num_rows
        if num_done < total:
            logger.info(
                "SPICE: every one of %s rows is scored once now%s; all later steps pick from these scores.",
                f"{total:,}", f", from row {num_done:,} on" if num_done else "",
            )  # fmt: skip
        started = time.perf_counter()
        num_rows = max(1, min(_ROWS_PER_WRITE, _BYTES_PER_WRITE // (4 * scorer.num_features)))
        for start in range(num_done, total, num_rows):
            indices = tuple(range(start, min(start + num_rows, total)))
            rows, shapes = scorer.score_rows(indices)
            self._num_tokens += sum(shape.num_tokens for shape in shapes)
            with processes.failing_together("writing the rows' scores"):
                if processes.is_main:
                    assert rows is not None
                    store.append(rows, [_number(shape.reference) for shape in shapes])
            if progress is not None:
                progress(indices[-1] + 1, total)
        logger.debug("SPICE: scoring all rows took %.1f s.", time.perf_counter() - started)
        self._store, self._identity = store, identity

    def _look_at_target(self) -> None:
        """Computes what is read of the validation rows, unless a checkpoint brought it. A collective."""
        scorer = self.gradient_scorer
        if scorer.config.takes_alignment and self._reference is None:
            self._reference = scorer.reference_gradient()
        scorer.look_at_target(is_frozen=True)

    def _describe(self) -> dict[str, Any]:
        """What scores depend on: the weights that train, on all processes, the settings and the number of rows."""
        scorer = self.gradient_scorer
        digest = hashlib.sha256()
        for module in scorer.trained.modules.values():
            for weight in module.parameters(recurse=False):
                local = weight.to_local() if hasattr(weight, "to_local") else weight
                digest.update(local.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        weights = hashlib.sha256("".join(self.processes.gather(digest.hexdigest())).encode()).hexdigest()
        return {"weights": weights, "settings": scorer.config.to_dict(), "num_rows": len(scorer.rows.dataset)}

    def account(self, pool: PoolSelection) -> PoolSelection:
        """The tokens that were read, which are those of all rows in one step, and none in any other."""
        num_tokens, self._num_tokens = self._num_tokens, 0
        return replace(pool, num_tokens_pool=num_tokens)

    def after_step(
        self,
        selection: StepSelection,
        pools: Sequence[Sequence[int]],
        budgets: Sequence[int],
        next_pools: Sequence[Sequence[int]] | None,
    ) -> StepSelection:
        """A proxy learns until everything is scored."""
        if not self.is_warming_up(selection.step):
            return selection
        return self.inner.after_step(selection, pools, budgets, next_pools)

    def take_notices(self) -> dict[str, MemoryNotice | None]:
        """As the scorer within."""
        return self.inner.take_notices()

    def close(self) -> None:
        """Ends a run."""
        self.inner.close()

    def state_dict(self) -> dict[str, Any]:
        """What the scores are of, once there are any."""
        return self.inner.state_dict() | {"scored_once": self._identity}

    def tensors(self) -> dict[str, Tensor]:
        """The validation set's mean gradient beside what the scorer within keeps."""
        own = {} if self._reference is None else {_REFERENCE: self._reference}
        return self.inner.tensors() | own

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both."""
        identity = state.get("scored_once")
        self._store, self._identity = None, dict(identity) if isinstance(identity, Mapping) else None
        self._reference = tensors.get(_REFERENCE)
        rest = {name: value for name, value in tensors.items() if name != _REFERENCE}
        self.inner.load_state_dict(state, rest)


_REFERENCE = "once.reference"


def _number(reference: RowReference) -> int:
    return 0 if reference.token_hash is None else int(reference.token_hash, 16) - 2**63
