"""Ways to get every candidate's gradient, on the same model and rows, and the passes that they are held against.

A method is a context that yields a call. The call returns nothing (plain passes), the rows' gradients `(N, D)`, or
what scoring found out about each pool.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.gradients.lora import find_trained_modules
from tests.benchmarks.clock import Open, timed
from tests.benchmarks.comparators import COMPARATORS, MicroBatch, summed_losses
from tests.benchmarks.workload import Workload, as_candidate

SORTED = "plain, sorted by length"
ARRIVAL = "plain, in order of arrival"
LABEL_COLUMNS = "plain, sorted, logits at label columns"
LOOP = "one row at a time"
VMAP = "torch.func.vmap(grad)"


@dataclass(frozen=True)
class Method:
    """`order`: rows of the result in its order, where that is not the rows' own. `exact`: compared with the loop."""

    name: str
    open: Open
    order: tuple[int, ...] | None = None
    exact: bool = True


class Contestants:
    """The methods for the rows of a workload."""

    def __init__(self, workload: Workload, model: nn.Module, *, vmap_chunk: int = 4) -> None:
        self.workload, self.model, self.vmap_chunk = workload, model, vmap_chunk
        self.rows = workload.rows()
        self.modules = find_trained_modules(model)
        self.parameters = [module.weight for module in self.modules.values()]
        self.plan, self.batches = workload.sorted_batches(self.rows)
        self.arrivals = workload.arrival_batches(self.rows)
        self.order = tuple(position for batch in self.plan for position in batch)
        # Seconds of the Gram products inside each of ours, call by call.
        self.gram_seconds: dict[str, list[float]] = {}

    def plain(self, batches: Sequence[MicroBatch], *, label_columns: bool = False) -> None:
        """A training step's forward and backward: into `.grad` of the LoRA weights, without an optimizer."""
        for inputs, labels in batches:
            with self.workload.autocast():
                if label_columns:
                    loss = summed_losses(self.model, inputs, labels, label_columns=True)
                else:
                    loss = self.model(**inputs, labels=labels, use_cache=False).loss
            loss.backward()
        for parameter in self.parameters:
            parameter.grad = None

    def one_at_a_time(self, rows: Sequence[Any] | None = None) -> Tensor:
        """A loop of single rows through autograd: slow and obvious."""
        rows = self.rows if rows is None else rows
        gradients = self._table(len(rows))
        for position, row in enumerate(rows):
            candidate = as_candidate(row)
            inputs, labels = self.workload.to_device((candidate.inputs, candidate.labels))
            with self.workload.autocast():
                logits = self.model(**inputs, use_cache=False).logits[:, :-1]
                loss = nn.functional.cross_entropy(logits[0].float(), labels[0, 1:], ignore_index=-100)
            parts = torch.autograd.grad(loss, self.parameters)
            gradients[position] = torch.cat([part.flatten() for part in parts])
        return gradients

    def vmap_grad(self) -> Tensor:
        """`vmap` over `grad` of one row's loss, in chunks of a padded batch."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        trainable = {names[id(parameter)]: parameter.detach() for parameter in self.parameters}

        def loss_of_one(weights: dict[str, Tensor], input_ids: Tensor, labels: Tensor) -> Tensor:
            # Right padding needs no attention mask in a causal model.
            outputs = torch.func.functional_call(
                self.model, weights, kwargs={"input_ids": input_ids[None], "use_cache": False}
            )
            mask = labels[1:] != -100
            losses = nn.functional.cross_entropy(outputs.logits[0, :-1].float(), labels[1:], reduction="none")
            return (losses * mask).sum() / mask.sum().clamp(min=1)

        per_sample = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
        gradients = self._table(len(self.rows))
        with warnings.catch_warnings():
            # Attention has no batching rule on the CPU, so `vmap` loops over it: its own limit, and its own seconds.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            self._fill_by_vmap(gradients, per_sample, trainable)
        return gradients

    def _fill_by_vmap(self, gradients: Tensor, per_sample: Any, trainable: dict[str, Tensor]) -> None:
        for positions, (inputs, labels) in zip(self.plan, self.batches, strict=True):
            for start in range(0, len(positions), self.vmap_chunk):
                part = slice(start, start + self.vmap_chunk)
                with self.workload.autocast():
                    found = per_sample(trainable, inputs["input_ids"][part], labels[part])
                gradients[positions[part]] = torch.cat([found[name].flatten(1) for name in trainable], dim=1).float()

    def _table(self, num_rows: int) -> Tensor:
        return torch.empty(num_rows, sum(p.numel() for p in self.parameters), device=self.workload.device)

    def plain_methods(self) -> list[Method]:
        return [
            Method(SORTED, always(lambda: self.plain(self.batches))),
            Method(ARRIVAL, always(lambda: self.plain(self.arrivals))),
            Method(LABEL_COLUMNS, always(lambda: self.plain(self.batches, label_columns=True))),
        ]

    def ours(self, name: str, *, exact: bool = True, **spice: Any) -> Method:
        """Our scoring of all pools with these settings, the Gram products' seconds set aside."""
        scorer = self.workload.make_scorer(self.model, **spice)
        clock = self.gram_seconds.setdefault(name, [])

        def score() -> Any:
            with gram_clock(self.workload.device) as seconds:
                scores = self.workload.score(scorer)
            clock.append(sum(seconds))
            return scores

        return Method(name, always(score), exact=exact)

    def others(self) -> list[Method]:
        """The loop, `vmap`, and other libraries with the logits of all positions or of those with a label."""
        methods = [Method(LOOP, always(self.one_at_a_time)), Method(VMAP, always(self.vmap_grad))]
        for name in COMPARATORS:
            methods.append(Method(name, partial(self._library, name, False), self.order))
            if "bergson" not in name:
                methods.append(Method(f"{name}, label columns", partial(self._library, name, True), self.order))
        return methods

    @contextmanager
    def _library(self, name: str, label_columns: bool) -> Iterator[Callable[[], Tensor]]:
        comparator = COMPARATORS[name]
        with comparator.open(self.model, self.modules, self.batches, label_columns=label_columns) as collect:

            def run() -> Tensor:
                with self.workload.autocast():
                    return collect()

            yield run


def always(run: Callable[[], Any]) -> Open:
    """A method that nothing needs to be set up for."""

    @contextmanager
    def opened() -> Iterator[Callable[[], Any]]:
        yield run

    return opened


@contextmanager
def gram_clock(device: torch.device) -> Iterator[list[float]]:
    """Seconds of each pool's Gram product while it is in place."""
    import spice_trainer.scoring.measure as module

    original, seconds = module.measure_rows, []

    def measured(*args: Any, **kwargs: Any) -> Any:
        spent, geometry = timed(device, original, *args, **kwargs)
        seconds.append(spent)
        return geometry

    module.measure_rows = measured  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        module.measure_rows = original
