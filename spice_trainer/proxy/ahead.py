"""Scoring the next step's pools with a proxy while the target trains on this one's.

A proxy's picks of step t+1 depend on its own weights after learning from step t's picks, not on what the target makes
of them, so its gradients can be computed beside the target's training: on a CUDA stream of their own, on another
device, or on idle cores.

    main thread   select(t) ─ proxy learns ─ share t+1's candidates ─ target trains step t ─ wait ─ select(t+1)
    thread                                                          └ forward, backward, features of t+1 ┘

Only the forward and backward run in the thread. They draw nothing at random and speak to no other process: rows are
fetched before it starts, and features go to their owners after it has ended, in the main thread, as ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch

from spice_trainer.scoring.features import FeatureBuffer
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.sharing import SharedCandidates
from spice_trainer.utils.random import preserved_random_state


class ScoringAhead:
    """Computes the gradient features of one step's pools, held together, in a thread.

    The weights of the proxy that `scorer` runs must not change until [`ScoringAhead.take`] has returned.
    """

    def __init__(self, scorer: GradientScorer, pools: Sequence[Sequence[int]]) -> None:
        self.pools = tuple(tuple(pool) for pool in pools)
        self._scorer = scorer
        with preserved_random_state(scorer.device):
            self._shared = scorer.share(dict(enumerate(self.pools)))
        self._stream: torch.cuda.Stream | None = None
        if scorer.device.type == "cuda":
            self._stream = torch.cuda.Stream(scorer.device)
            # What this step's learning has queued comes first.
            self._stream.wait_stream(torch.cuda.current_stream(scorer.device))
        self._buffer: FeatureBuffer | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._compute, name="spice-scoring-ahead", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        started = time.perf_counter()
        try:
            # A null context for `None`.
            with torch.cuda.stream(self._stream):
                self._buffer = self._scorer.compute(self._shared)
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException as error:  # it belongs to the main thread, which raises it
            self._error = error
        self.seconds = time.perf_counter() - started

    def take(self) -> tuple[SharedCandidates, FeatureBuffer]:
        """Waits for what [`GradientScorer.measure`] takes; raises what scoring raised in the thread."""
        self.join()
        if self._error is not None:
            raise self._error
        assert self._buffer is not None
        return self._shared, self._buffer

    def join(self) -> None:
        """Waits until the thread has ended, whatever came of it."""
        self._thread.join()
