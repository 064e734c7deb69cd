"""Hidden states of a step's candidates, kept for later epochs where training does not change them.

    rows ─ forward up to layer l ─ one vector a row ─ to every process ─┬─ cosines of the pools owned here
                                                                        └─ kept by row, while layer l lies below
                                                                           everything that trains

Axes: N candidates, H numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.gradients.hidden_states import HiddenStates, decoder_layers, last_layer, lowest_trained_layer
from spice_trainer.scoring.passes import ScoringPasses
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.sharing import SharedCandidates

# Kept states of a process, in bytes, which every checkpoint holds too; beyond them rows are computed anew.
MAX_KEPT_BYTES = 2**28


class HiddenScorer:
    """Computes hidden states at the layer that the settings name, or that what trains suggests."""

    def __init__(self, runtime: Runtime, config: SpiceConfig) -> None:
        self._runtime = runtime
        model = runtime.get_model()
        num_layers, lowest = len(decoder_layers(model)), lowest_trained_layer(model)
        default = lowest if 2 * lowest >= num_layers else num_layers * 7 // 8
        if config.takes_last_hidden_states:
            default = last_layer(model)
        self.layer = default if config.hidden_layer is None else config.hidden_layer
        # Refuses a layer that the model does not have.
        HiddenStates(model, self.layer)
        self.keeps = True
        """Whether rows will be asked for again, in a later epoch."""
        self._kept: dict[int, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        """What is kept: computed anew, in other micro-batches, it would differ in rounding, and picks with it."""
        if not self._kept:
            return {}
        return {"rows": torch.tensor(list(self._kept)), "states": torch.stack(list(self._kept.values()))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores it."""
        self._kept = {}
        if "rows" in tensors and self.keeps:
            self._kept = dict(zip(tensors["rows"].tolist(), tensors["states"], strict=True))

    @property
    def is_constant(self) -> bool:
        """Whether nothing that trains now changes these states."""
        return self.layer <= lowest_trained_layer(self._runtime.get_model())

    def compute(
        self,
        passes: ScoringPasses,
        shared: SharedCandidates,
        indices: Sequence[int] | None = None,
        report: Callable[[float], None] | None = None,
    ) -> Float[Tensor, "N H"]:
        """Hidden states of all candidates on every process, on the CPU, −inf for rows without; a collective.

        With their dataset `indices` they are kept, and taken from what was kept, as long as training leaves them.
        """
        processes = self._runtime.processes
        if indices is None or not self.is_constant:
            self._kept = {} if indices is not None else self._kept
            kept: set[int] = set()
        else:
            kept = {position for position, index in enumerate(indices) if index in self._kept}
        if processes.lockstep and len(kept) < len(shared.shapes):
            # All processes run the same number of micro-batches.
            kept = set()
        batches = [tuple(position for position in batch if position not in kept) for batch in shared.batches]
        own = [number for number, batch in enumerate(batches) if batch]
        num_kept = sum(number < shared.num_kept for number in own)
        part = replace(shared, batches=tuple(batches[number] for number in own), num_kept=num_kept)
        with nullcontext() if processes.lockstep else processes.failing_together("computing hidden states"):
            found = passes.compute_hidden_states(part, self.layer, report)
        gathered = processes.gather((list(found), torch.stack(list(found.values())) if found else None))
        width = next((states.shape[1] for _, states in gathered if states is not None), None)
        if width is None:
            width = len(next(iter(self._kept.values()))) if self._kept else 1
        states = torch.full((len(shared.shapes), width), -torch.inf)
        for positions, rows in gathered:
            if rows is not None:
                states[positions] = rows
        if indices is None:
            return states
        for position in kept:
            states[position] = self._kept[indices[position]]
        if self.keeps and self.is_constant and (len(self._kept) + len(states)) * width * 4 <= MAX_KEPT_BYTES:
            for position, index in enumerate(indices):
                if position not in kept and bool(states[position].isfinite().all()):
                    self._kept[index] = states[position].clone()
        return states
