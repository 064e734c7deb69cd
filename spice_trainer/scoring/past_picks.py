"""What the logits of a step's candidates tell, and a memory of what was picked before.

    candidates ─ forward ─ norm and sketch of each row ─ to every process ─ pools, beside the memory
    picks of the step ─ their sketches ─ the memory, first in, first out

The memory is the same on every process, changes when a step's picks are known, and goes into checkpoints.

Axes: N candidates, P rows of the memory, F numbers of a sketch, W = F + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from spice_trainer.scoring.passes import ScoringPasses
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.sharing import SharedCandidates

# Rows that are remembered.
MEMORY_ROWS = 1024


class PastPicks:
    """Scores candidates by their logits, and remembers those of them that were picked."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of_step: dict[int, Tensor] = {}
        # Sketches of the last picks, oldest first.
        self.memory: Float[Tensor, "P F"] | None = None

    def compute(
        self,
        passes: ScoringPasses,
        shared: SharedCandidates,
        indices: Sequence[int],
        report: Callable[[float], None] | None = None,
    ) -> Float64[Tensor, "N W"]:
        """Norm and sketch of all candidates on every process; −inf for those that did not fit. A collective."""
        processes = self._runtime.processes
        with nullcontext() if processes.lockstep else processes.failing_together("computing logits"):
            found = passes.compute_logits(shared, report)
        gathered = processes.gather((list(found), torch.stack(list(found.values())) if found else None))
        width = next((rows.shape[1] for _, rows in gathered if rows is not None), 2)
        scored = torch.full((len(shared.shapes), width), -torch.inf, dtype=torch.float64)
        for positions, rows in gathered:
            if rows is not None:
                scored[positions] = rows
        self._of_step = {index: scored[place, 1:].float() for place, index in enumerate(indices)}
        return scored

    def remember(self, picked: Sequence[int]) -> None:
        """Takes a step's picks into the memory."""
        known = [self._of_step[index] for index in picked if index in self._of_step]
        self._of_step = {}
        if known:
            rows = torch.stack(known)
            self.memory = (rows if self.memory is None else torch.cat([self.memory, rows]))[-MEMORY_ROWS:].clone()

    def tensors(self) -> dict[str, Tensor]:
        """The memory, for a checkpoint."""
        return {} if self.memory is None else {"memory": self.memory}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores it."""
        self._of_step = {}
        self.memory = tensors.get("memory")
