r"""A proxy learns from what it picked: one AdamW step on the subset, at a constant learning rate.

    L(θ) = Σ_x Σ_{s ∈ L_x} −log p_θ(y_xs | y_x,<s) / Σ_x |L_x|,      θ ← AdamW(θ, clip(∇L(θ)))

over the rows x of the subset and their label tokens L_x: the loss of the Trainer's own step on them. With several
processes each computes some rows' part of the gradient, and the sum of the parts is every process's.

Axes: K rows of the subset, S tokens, D trainable numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.backends import preserved_modes
from spice_trainer.gradients.forward import logits_of, move_inputs, without_cache
from spice_trainer.gradients.label_head import sample_losses
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.scoring.out_of_memory import TokenBudget, fits_in_memory, learning_error
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.sharing import share_micro_batches
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import seeded_random_state


class AdapterLearner:
    """Takes optimizer steps of a proxy's trainable weights, alike on every process; each has a copy of it.

    Dropout is drawn from (seed, update, process), so that a resumed run draws the same.
    """

    def __init__(self, proxy: ProxyModel, runtime: Runtime, *, tokens_per_batch: int) -> None:
        self.model = proxy.model
        self.max_grad_norm = proxy.max_grad_norm
        self.tokens_per_batch = tokens_per_batch
        self.budget = TokenBudget(tokens_per_batch)
        self.num_updates = 0
        self.processes = runtime.processes
        self._autocast = runtime.autocast
        self._label_loss = runtime.label_loss
        self._seed = runtime.seed
        self._parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self._parameters.values()), lr=proxy.learning_rate, weight_decay=proxy.weight_decay
        )
        self._extra_inputs = without_cache(self.model)

    def synchronize(self) -> None:
        """Gives every process the weights of process 0, as DDP does: users' scripts may draw adapters differently."""
        if self.processes.world_size > 1:
            for parameter in self._parameters.values():
                weights = parameter.detach().to(self.processes.device, copy=True)
                torch.distributed.broadcast(weights, src=0)
                parameter.data.copy_(weights)

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return next(iter(self._parameters.values())).device

    def learn(self, rows: Sequence[CandidateRow]) -> float | None:
        """Takes one optimizer step on the rows, the same on every process. A collective.

        Leaves no trace but the weights: random states, modes and `.grad` are as before.

        Returns the mean loss of a label token before the step; `None` where no step was taken, for want of a label
        token or of a finite gradient.
        """
        processes = self.processes
        rows = [row for row in rows if row.num_label_tokens > 0]
        num_label_tokens = sum(row.num_label_tokens for row in rows)
        if not rows:
            return None
        shares = share_micro_batches(
            [row.shape for row in rows], self.tokens_per_batch, num_shares=processes.world_size
        )
        seed = self._seed + processes.rank + processes.world_size * self.num_updates
        batches = [[rows[place] for place in batch] for batch in shares[processes.rank]]
        try:
            with preserved_modes(self.model):
                self.model.train()
                with processes.failing_together("training the proxy"):
                    total = self._backward_all(batches, num_label_tokens, seed)
            loss = sum(processes.gather(total))
            if not self._average_gradients():
                return None
            if self.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(list(self._parameters.values()), self.max_grad_norm)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        return loss

    def _backward_all(self, batches: Sequence[list[CandidateRow]], num_label_tokens: int, seed: int) -> float:
        """Forms this process's part of the gradient, anew in smaller passes where memory runs out."""
        losses: list[float] = []

        def attempt(rows: Sequence[CandidateRow]) -> None:
            losses.append(self._backward(rows, num_label_tokens))

        while True:
            is_whole = True
            with seeded_random_state(self.device, seed):
                for part in (batch[p.start : p.stop] for batch in batches for p in self.budget.split(_lengths(batch))):
                    if not fits_in_memory(partial(attempt, part)):
                        if not self.budget.reduce(_lengths(part)):
                            raise learning_error(part[0].num_tokens)
                        is_whole = False
                        break
            if is_whole:
                return float(sum(losses))
            # A backward that failed may have added to some of the gradients.
            self.optimizer.zero_grad(set_to_none=True)
            losses.clear()

    def _backward(self, rows: Sequence[CandidateRow], num_label_tokens: int) -> float:
        inputs, labels = pad_rows(rows)
        targets = labels[:, 1:]
        mask = targets != -100
        with torch.enable_grad():
            with self._autocast():
                outputs = self.model(**move_inputs(inputs, self.device), **self._extra_inputs)
            logits = logits_of(outputs)[:, :-1]
            losses = sample_losses(logits, targets.to(logits.device), mask.to(logits.device), self._label_loss)
            loss = (losses * mask.sum(1).to(losses)).sum() / num_label_tokens
            loss.backward()
        return float(loss.detach())

    def _average_gradients(self) -> bool:
        """Sums the processes' parts of the gradient. Returns whether it is finite."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        if self.processes.world_size > 1:
            flat = flat.to(self.processes.device)
            torch.distributed.all_reduce(flat)
        if not math.isfinite(float(flat.norm())):
            logger.warning("SPICE: the proxy's gradient is not finite, so it does not learn from this step's picks.")
            return False
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        return True

    # What resuming needs

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, moments and the number of updates, as tensors on the CPU."""
        tensors = {f"weights.{name}": value.detach() for name, value in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["num_updates"] = torch.tensor(self.num_updates)
        return {name: value.cpu().clone().contiguous() for name, value in tensors.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores [`AdapterLearner.state_dict`]; raises a `ValueError` for those of another model or adapter."""
        saved = {name.removeprefix("weights.") for name in tensors if name.startswith("weights.")}
        differing = sorted(saved ^ self._parameters.keys()) or sorted(
            name for name, value in self._parameters.items() if tensors[f"weights.{name}"].shape != value.shape
        )
        if differing:
            raise ValueError(
                f"The checkpoint holds the adapter of another proxy: {len(differing)} of its {len(saved)} weights "
                f"are not those of this one, such as {differing[0]!r}. Resume with the proxy and the LoRA settings of "
                "the run that wrote it, or start a new run."
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
        self.optimizer.state.clear()
        for name, parameter in self._parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is not None:
                    copied = value.clone() if key == "step" else value.to(parameter, copy=True)
                    self.optimizer.state[parameter][key] = copied
        self.num_updates = int(tensors["num_updates"])


def _lengths(rows: Sequence[CandidateRow]) -> list[int]:
    return [row.num_tokens for row in rows]
