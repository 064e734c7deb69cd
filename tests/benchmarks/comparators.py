"""Other libraries that compute per-sample gradients, each through its own public machinery, behind one signature.

    with COMPARATORS[name].open(model, modules, micro_batches) as collect:
        gradients = collect()    # (N, D), float32

`micro_batches` are `(inputs, labels)` as `pad_rows` makes them. Row n of the result is the n-th row of the
micro-batches in their order; the columns are the weights of `modules` in theirs, each row-major. All compute

    g_n = ∇_θ ℓ_n,    ℓ_n = mean negative log-likelihood of row n's label tokens,    θ the LoRA A and B weights

in evaluation mode, like our own scoring. What is done once for a model (hooks, wrapping, rows as a data set) is done
when the context opens, and undone when it closes; `collect` is what a benchmark takes the time of. `label_columns`
computes logits only at columns that carry a label, where the library leaves the forward to its caller (not bergson).

- Opacus 1.6: `GradSampleModule` on the PEFT model. A backward hook forms `einsum("n...i,n...j->nij")` in the dtype of
  the output's gradient and copies it into a buffer of zeros; the ordinary `.grad` forms beside it.
- bergson 2.5: `CollectorComputer` with a `TraceCollector`, which leaves gradients on the device; its in-memory and
  index builders move them to the CPU. Its loop makes logits and cross-entropies at every position, in the model's
  dtype, without an attention mask. Its own loader freezes everything but the input embedding, whose `.grad`
  (vocabulary × width) then forms, and with tied weights the head's too; `adapters trainable` is the cheaper other way.
- dattri-llm 0.1: `HookManager` with materialised capture. `linear_io` also lets `.grad` form; `invasive_linear_io`
  replaces the linear layers' forward by one without weight gradients. Every row's tokens are hashed, with SHA-256.
"""

from __future__ import annotations

import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spice_trainer.gradients.label_head import sample_losses

MicroBatch = tuple[dict[str, Tensor], Tensor]
Collect = Callable[[], Tensor]


class Unavailable(RuntimeError):
    """A comparator cannot run here. Its text is the reason, for the table."""


class Opener(Protocol):
    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        micro_batches: Sequence[MicroBatch],
        *,
        label_columns: bool = False,
    ) -> AbstractContextManager[Collect]: ...


@dataclass(frozen=True)
class Comparator:
    """`requirement` is what to install, `open` makes the context whose value collects the gradients."""

    requirement: str
    open: Opener


class GradientTable:
    """The gradients of all rows, filled a module and a micro-batch at a time."""

    def __init__(self, modules: Mapping[str, nn.Module], micro_batches: Sequence[MicroBatch]) -> None:
        self.columns: dict[str, slice] = {}
        stop = 0
        for name, module in modules.items():
            self.columns[name] = slice(stop, stop := stop + module.weight.numel())
        self.rows: list[slice] = []
        start = 0
        for _, labels in micro_batches:
            self.rows.append(slice(start, start := start + len(labels)))
        self.gradients = torch.empty(start, stop, device=next(iter(modules.values())).weight.device)

    def put(self, number: int, name: str, gradients: Tensor) -> None:
        """Takes module `name`'s gradients, `(n, O, I)` or `(n, O·I)`, of micro-batch `number`."""
        self.gradients[self.rows[number], self.columns[name]] = gradients.flatten(1)


def summed_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, *, label_columns: bool) -> Tensor:
    """Σ_n ℓ_n by the model's own forward, with all logits or those of columns that carry a label."""
    targets = labels[:, 1:]
    if label_columns:
        columns = (targets != -100).any(0).nonzero().squeeze(1)
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        targets = targets[:, columns]
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    return sample_losses(logits, targets, targets != -100).sum()


@contextmanager
def opacus_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    label_columns: bool = False,
) -> Iterator[Collect]:
    opacus = _load("opacus.grad_sample", OPACUS)
    # Its hooks ignore a module in evaluation mode. LoRA's linear layers alone train: they do the same in both modes.
    with _left_as_found(model, training=modules.values()):
        wrapped = opacus.GradSampleModule(model, loss_reduction="sum")

        def collect() -> Tensor:
            table = GradientTable(modules, micro_batches)
            for number, (inputs, labels) in enumerate(micro_batches):
                summed_losses(wrapped, inputs, labels, label_columns=label_columns).backward()
                for name, module in modules.items():
                    table.put(number, name, module.weight.grad_sample)
                wrapped.zero_grad(set_to_none=True)
            return table.gradients

        try:
            yield collect
        finally:
            wrapped.to_standard_module()


@contextmanager
def bergson_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    label_columns: bool = False,
    adapters_trainable: bool = False,
) -> Iterator[Collect]:
    bergson, collectors = _load("bergson", BERGSON), _load("bergson.collector.gradient_collectors", BERGSON)
    datasets = _load("datasets", "datasets")
    if label_columns:
        raise Unavailable("bergson's own loop computes the logits of every position")
    # It reads rows from a data set and pads them itself, to the same length: each micro-batch holds its longest row.
    rows = [
        (ids[: int(mask.sum())].tolist(), row_labels[: int(mask.sum())].tolist())
        for inputs, labels in micro_batches
        for ids, mask, row_labels in zip(inputs["input_ids"], inputs["attention_mask"], labels, strict=True)
    ]
    data = datasets.Dataset.from_dict({"input_ids": [row[0] for row in rows], "labels": [row[1] for row in rows]})
    # The names below PEFT's wrapper, which is where its collectors look.
    names = {name.removeprefix("base_model."): name for name in modules}

    class TableCollector(collectors.TraceCollector):  # type: ignore[misc, name-defined]
        """Hands on a micro-batch's gradients before the next one."""

        def setup(self) -> None:
            super().setup()
            kind = torch.device(self.device).type
            if torch.is_autocast_enabled(kind):
                # The bounds that gradients are clamped to must be numbers of their own, narrower type.
                bounds = torch.finfo(torch.get_autocast_dtype(kind))
                self.lo, self.hi = bounds.min, bounds.max

        def process_batch(self, indices: list[int], **kwargs: Any) -> None:
            number = next(number for number, rows in enumerate(self.table.rows) if rows.start == indices[0])
            for name in list(self.mod_grads):
                (gradients,) = self.mod_grads.pop(name)
                self.table.put(number, names[name], gradients)

    with tempfile.TemporaryDirectory() as folder, _left_as_found(model):
        config = bergson.IndexConfig(run_path=str(Path(folder) / "run"), loss_reduction="mean")
        config.partial_run_path.mkdir(parents=True)
        if not adapters_trainable:
            model.requires_grad_(False)
            model.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]

        def collect() -> Tensor:
            table = GradientTable(modules, micro_batches)
            collector = TableCollector(
                model=model.base_model,
                target_modules=set(names),
                device=table.gradients.device,
                dtype=table.gradients.dtype,
            )
            collector.table = table
            batches = [list(range(rows.start, rows.stop)) for rows in table.rows]
            computer = bergson.CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
            with redirect_stderr(io.StringIO()):  # its progress bar
                computer.run_with_collector_hooks()
            return table.gradients

        try:
            yield collect
        finally:
            for module in modules.values():
                vars(module).pop("_collect_bias", None)


@contextmanager
def dattri_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    micro_batches: Sequence[MicroBatch],
    *,
    label_columns: bool = False,
    hook_type: str,
) -> Iterator[Collect]:
    dattri_llm = _load("dattri_llm", DATTRI_LLM)
    with _left_as_found(model):
        config = dattri_llm.HookManagerConfig(
            hook_types=dict.fromkeys(modules, hook_type), capture_style="materialized"
        )
        manager = dattri_llm.HookManager(model, config=config)

        def collect() -> Tensor:
            table = GradientTable(modules, micro_batches)
            with manager.collect():
                for number, (inputs, labels) in enumerate(micro_batches):
                    summed_losses(model, inputs, labels, label_columns=label_columns).backward()
                    found = manager.get_gradient().data
                    for name in modules:
                        table.put(number, name, found[name])
                    model.zero_grad(set_to_none=True)
            return table.gradients

        try:
            yield collect
        finally:
            manager.remove()


OPACUS = "opacus==1.6.0"
BERGSON = "bergson==2.5.1"
DATTRI_LLM = "dattri-llm==0.1.0"
COMPARATORS: dict[str, Comparator] = {
    "Opacus GradSampleModule": Comparator(OPACUS, opacus_gradients),
    "bergson, as it loads models": Comparator(BERGSON, bergson_gradients),
    "bergson, adapters trainable": Comparator(BERGSON, partial(bergson_gradients, adapters_trainable=True)),
    "dattri-llm, linear_io": Comparator(DATTRI_LLM, partial(dattri_gradients, hook_type="linear_io")),
    "dattri-llm, invasive_linear_io": Comparator(
        DATTRI_LLM, partial(dattri_gradients, hook_type="invasive_linear_io")
    ),
}


@contextmanager
def _left_as_found(model: nn.Module, *, training: Any = ()) -> Iterator[None]:
    """Evaluation mode but for the `training` modules; modes, `requires_grad` and `.grad` afterwards as they were."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for module in training:
        module.training = True
    for parameter, _, _ in parameters:
        parameter.grad = None
    try:
        with warnings.catch_warnings():
            # The lowest layers' inputs need no gradient, which changes nothing here.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, requires_grad, gradient in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


def _load(module: str, requirement: str) -> Any:
    """Imports an optional library, without letting it replace the handlers of the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # Out of its hands: `logging.basicConfig(force=True)` closes what it finds.
    root.handlers.clear()
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Unavailable(f"{type(error).__name__}: {error}; pip install {requirement}") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
