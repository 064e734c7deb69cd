"""How much of what trains is left out of the score, where candidates are scored by the weights of LoRA alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.forward import move_inputs
from spice_trainer.gradients.label_head import PLAIN, LabelLoss
from spice_trainer.gradients.per_sample import ALL, SampleGradients
from spice_trainer.utils.random import preserved_random_state


class _SquaredNorms:
    """Squared gradient norms of one row by layer."""

    def __init__(self) -> None:
        self.by_layer: dict[int, float] = {}

    def add(self, module_index: int, gradients: Tensor, rows: slice = ALL, start: int = 0) -> None:
        square = float(torch.linalg.vector_norm(gradients, dtype=torch.float64)) ** 2
        self.by_layer[module_index] = self.by_layer.get(module_index, 0.0) + square

    def add_sparse(self, module_index: int, row: int, coordinates: Tensor, values: Tensor) -> None:
        self.add(module_index, values)

    def restart(self, rows: Sequence[int]) -> None:
        self.by_layer.clear()


def unscored_share(
    model: nn.Module,
    trained: Mapping[str, nn.Module],
    scored: Mapping[str, nn.Module],
    rows: Sequence[CandidateRow],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    label_loss: LabelLoss = PLAIN,
) -> float:
    """Mean share of a row's squared gradient norm that lies in trained modules which don't score.

    NaN if no row has a finite gradient that is not 0.
    """
    shares = []
    with preserved_random_state(device), SampleGradients(model, trained, label_loss=label_loss) as sample_gradients:
        names = sample_gradients.layer_names
        for row in rows:
            sink = _SquaredNorms()
            inputs, labels = pad_rows([row])
            with autocast():
                sample_gradients.compute(move_inputs(inputs, device), labels.to(device), sink)
            outside = sum(square for index, square in sink.by_layer.items() if names[index] not in scored)
            shares.append(torch.tensor(outside / total if (total := sum(sink.by_layer.values())) else torch.nan))
    known = [share for share in shares if share.isfinite()]
    return float(torch.stack(known).mean()) if known else torch.nan
