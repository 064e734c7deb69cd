"""Moments of a run: the adapter as it is after some optimizer steps on random rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tests.benchmarks.real_model import Row
from tests.benchmarks.workload import Workload, collate


class Finetuning:
    """AdamW at lr 2e-4 on batches of rows, token-mean loss; may be stopped, measured and continued."""

    def __init__(self, workload: Workload, model: nn.Module, rows: Sequence[Row]) -> None:
        self.workload, self.model, self.rows = workload, model, rows
        self.num_steps = 0
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.01)

    def advance(self, to_step: int) -> list[float]:
        """Trains until so many steps are done, each on the next `batch_size` rows; returns the losses."""
        losses, size = [], self.workload.batch_size
        torch.manual_seed(self.num_steps)
        self.model.train()
        for step in range(self.num_steps, to_step):
            inputs = collate(self.rows[step * size : (step + 1) * size])
            labels = inputs.pop("labels")
            inputs, labels = self.workload.to_device((inputs, labels))
            with self.workload.autocast():
                loss = self.model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        self.num_steps = max(self.num_steps, to_step)
        self.model.eval()
        return losses
