"""A check of the sample gradients on the user's own model, adapter and precision, before training starts.

Two short rows in one padded batch must give, layer by layer, the gradients that plain autograd gives for each alone.
This catches every model nobody thought of: a forward that bypasses the LoRA layers, mixes the rows of a batch, or
calls a layer in a way the hooks don't see.

Where weights are sharded autograd cannot take a weight's gradient: FSDP and ZeRO-3 reduce it as soon as it forms, so
none may form. A layer y = f(x; W), linear in W, is called there as

    y + s f(x; V),      V random, s = 0,      dℓ/ds = ⟨∂ℓ/∂W, V⟩

and autograd's derivative in the scalar s, one row alone, is compared with ⟨g, V⟩ of the batched sample gradient g.
Every process runs the same forwards on the same rows, so all come to the same verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.backends import must_score_alone, scoring_mode
from spice_trainer.gradients.forward import input_embedding, logits_of, move_inputs, without_cache
from spice_trainer.gradients.label_head import PLAIN, LabelLoss, sample_losses
from spice_trainer.gradients.layers.base import ScoredLayer
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.utils.random import preserved_random_state

# Largest relative error per layer: rounding in fp32 is at most 1e-5; half precision rounds each product.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}

_Autocast = Callable[[], AbstractContextManager[Any]]


class GradientMismatchError(RuntimeError):
    """The batched sample gradients are not those of autograd on this model."""


def verify_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rows: Sequence[CandidateRow],
    *,
    device: torch.device,
    autocast: _Autocast = nullcontext,
    label_loss: LabelLoss = PLAIN,
) -> float:
    """Compares batched sample gradients of some labelled rows (two are enough) with autograd, one row at a time.

    Returns the largest relative error over layers and rows. Raises a GradientMismatchError that names a layer whose
    gradient is off, a RuntimeError if one is bypassed, and a ValueError if no row has a finite gradient or none
    has one that is not zero.
    """
    layers = scored_layers(modules)
    with preserved_random_state(device), _without_zero_weights(layers):
        batched = _batched_gradients(model, modules, rows, device, autocast, label_loss)
        alone = [_autograd(model, layers, row, device, autocast, label_loss) for row in rows]
    if not any(torch.cat(gradients).isfinite().all() for gradients in alone):
        raise ValueError(
            f"The gradients of rows {', '.join(str(row.index) for row in rows)} of the training dataset are not "
            "finite, also by plain autograd. Likely causes: a weight that is not finite (a broken checkpoint), or an "
            "overflow in float16 (train in bf16). Training would fail with or without SPICE."
        )
    return _largest_error(layers, rows, batched, alone, tolerance=_rounding_tolerance(model, autocast, device))


def verify_directions(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rows: Sequence[CandidateRow],
    *,
    device: torch.device,
    autocast: _Autocast = nullcontext,
    label_loss: LabelLoss = PLAIN,
) -> float:
    """Compares them along a random direction of each layer, on a model wrapped as it trains.

    The rows are the same on every process. Returns the largest error of a layer, relative to the row's gradient norm,
    and raises as above.
    """
    # What is autograd's own needs no check.
    layers = [layer for layer in scored_layers(modules) if not layer.takes_autograd]
    modules = {layer.name: layer.module for layer in layers}
    generator = torch.Generator().manual_seed(0)
    directions = [[torch.randn(shape, generator=generator).to(device) for shape in layer.shapes] for layer in layers]
    flat = [torch.cat([part.flatten() for part in direction]).double() for direction in directions]
    with preserved_random_state(device):
        batched = _batched_gradients(model, modules, rows, device, autocast, label_loss)
        alone = [_derivatives(model, layers, directions, row, device, autocast, label_loss) for row in rows]
    ours = [
        [(gradient * direction).sum()[None] for gradient, direction in zip(gradients, flat, strict=True)]
        for gradients in batched
    ]
    # In a random direction each layer's derivative has about the size of its gradient.
    return _largest_error(layers, rows, ours, alone, tolerance=_rounding_tolerance(model, autocast, device))


class _Collected:
    """Gradients of each row of a batch by layer, which may come row by row."""

    def __init__(self, num_rows: int) -> None:
        self._by_row: list[dict[int, Tensor]] = [{} for _ in range(num_rows)]
        self._rows: Sequence[int] = range(num_rows)

    def add(self, module_index: int, gradients: Tensor) -> None:
        for row, gradient in zip(self._rows, gradients.double(), strict=True):
            self._by_row[row][module_index] = gradient

    def restart(self, rows: Sequence[int]) -> None:
        self._rows = rows

    def of_row(self, row: int) -> list[Tensor]:
        return [self._by_row[row][index] for index in range(len(self._by_row[row]))]


def _batched_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    rows: Sequence[CandidateRow],
    device: torch.device,
    autocast: _Autocast,
    label_loss: LabelLoss,
) -> list[list[Tensor]]:
    """Sample gradients as scoring takes them, like rows in one micro-batch where they can be: for each its layers'."""
    is_alone = must_score_alone(model)
    groups: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.shape.keys if row.can_be_padded and not is_alone else place, []).append(place)
    gradients: dict[int, list[Tensor]] = {}
    with SampleGradients(model, modules, label_loss=label_loss) as sample_gradients:
        for places in groups.values():
            collected = _Collected(len(places))
            with autocast():
                sample_gradients.compute(*_make_batch([rows[place] for place in places], device), collected)
            gradients |= {place: collected.of_row(number) for number, place in enumerate(places)}
    return [gradients[place] for place in range(len(rows))]


def _autograd(
    model: nn.Module,
    layers: Sequence[ScoredLayer],
    row: CandidateRow,
    device: torch.device,
    autocast: _Autocast,
    label_loss: LabelLoss,
) -> list[Tensor]:
    """Gradients of one row alone by plain autograd, per layer, in the order of its coordinates."""
    inputs, labels = _make_batch([row], device)
    with scoring_mode(model), torch.enable_grad(), autocast():
        loss = _sample_loss(model(**inputs, **without_cache(model)), labels, label_loss)
        trained = [parameter for layer in layers for parameter in layer.parameters]
        # A row that uses no scored layer has a loss without a graph.
        loss = loss + 0.0 * trained[0].sum()
        gradients = iter(torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True))
    return [torch.cat([next(gradients).flatten() for _ in layer.shapes]).double().to(device) for layer in layers]


def _derivatives(
    model: nn.Module,
    layers: Sequence[ScoredLayer],
    directions: Sequence[Sequence[Tensor]],
    row: CandidateRow,
    device: torch.device,
    autocast: _Autocast,
    label_loss: LabelLoss,
) -> list[Tensor]:
    """dℓ/ds of every layer for one row alone."""
    inputs, labels = _make_batch([row], device)
    scalars = [torch.zeros((), device=device, requires_grad=True) for _ in directions]
    leaves: list[Tensor] = []

    def replace_by_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    def add_direction(index: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # In float32 whatever the training precision: the derivative is a sum over the row's tokens.
            with torch.autocast(device.type, enabled=False):
                along = layers[index].output(args[0].detach().float(), directions[index])
                return output + (scalars[index] * along).to(output.dtype)

        return perturb

    with ExitStack() as hooks:
        hooks.callback(input_embedding(model).register_forward_hook(replace_by_leaf).remove)
        for index, layer in enumerate(layers):
            hooks.callback(layer.module.register_forward_hook(add_direction(index)).remove)
        with scoring_mode(model), torch.enable_grad():
            with autocast():
                outputs = model(**inputs, **without_cache(model))
            torch.autograd.backward(_sample_loss(outputs, labels, label_loss), inputs=[*leaves, *scalars])
    return [
        torch.zeros(1, dtype=torch.float64, device=device) if scalar.grad is None else scalar.grad.double()[None]
        for scalar in scalars
    ]


def _largest_error(
    layers: Sequence[ScoredLayer],
    rows: Sequence[CandidateRow],
    ours: Sequence[Sequence[Tensor]],
    theirs: Sequence[Sequence[Tensor]],
    *,
    tolerance: float,
) -> float:
    """Largest error of a layer, relative to its row's norm over all layers; refuses one above the tolerance."""
    if all(not gradient.any() for of_row in theirs for gradient in of_row):
        raise ValueError(
            f"No LoRA layer gets a gradient from rows {', '.join(str(row.index) for row in rows)} of the training "
            "dataset, also by plain autograd: these rows would train nothing. Likely cause: `target_modules` names "
            "only a part of the model that they don't use, such as a vision tower for rows without an image. Fix: "
            "name layers that every row uses, too."
        )
    largest = 0.0
    for row, of_row, expected_of_row in zip(rows, ours, theirs, strict=True):
        together = torch.cat(list(expected_of_row))
        # A row whose own gradient is not finite says nothing about how it was computed.
        if not together.isfinite().all():
            continue
        for layer, found, expected in zip(layers, of_row, expected_of_row, strict=True):
            error = float((found - expected).norm()) / max(float(together.norm()), 1e-30)
            largest = max(largest, error)
            if not error <= tolerance:
                raise GradientMismatchError(
                    f"The sample gradient of the LoRA layer {layer.name!r} differs from autograd's by {error:.2g} of "
                    f"the gradient's norm (row {row.index} of the training dataset; at most {tolerance:g} is rounding "
                    "in this precision). This model calls the layer in a way that SPICE's hooks cannot follow, or the "
                    "rows of a batch influence each other. Selection would be silently wrong, so it is refused. Leave "
                    "this layer out of `target_modules`, or switch off kernels that replace the LoRA forward."
                )
    return largest


@contextmanager
def _without_zero_weights(layers: Sequence[ScoredLayer]) -> Iterator[None]:
    """Puts small random numbers in the place of weights that are all zero, and the weights back afterwards.

    B of a fresh adapter is zero, and with it every gradient of A: there would be nothing to compare.
    """
    weights = [parameter for layer in layers for parameter in layer.parameters if parameter.dim() > 1]
    zero = [(weight, weight.data) for weight in weights if not weight.data.any()]
    try:
        for weight, value in zero:
            # Small beside the base layer's output at any rank.
            weight.data = torch.empty_like(value).normal_(std=0.1 / math.sqrt(value[0].numel()))
        yield
    finally:
        for weight, value in zero:
            weight.data = value


def _rounding_tolerance(model: nn.Module, autocast: _Autocast, device: torch.device) -> float:
    """Largest error that is rounding in the precisions the forward computes in."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    with autocast():
        if torch.is_autocast_enabled(device.type):
            dtypes.add(torch.get_autocast_dtype(device.type))
    # A quantised base computes in half precision whatever the dtype of what is trainable.
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        dtypes.add(torch.bfloat16)
    return max(TOLERANCES.get(dtype, 0.15) for dtype in dtypes)


def _make_batch(rows: Sequence[CandidateRow], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Rows padded into one micro-batch on a device: model inputs and labels."""
    inputs, labels = pad_rows(rows)
    return move_inputs(inputs, device), labels.to(device)


def _sample_loss(outputs: Any, labels: Tensor, label_loss: LabelLoss) -> Tensor:
    logits = logits_of(outputs)
    targets = labels[:, 1:].to(logits.device)
    return sample_losses(logits[:, :-1], targets, targets != -100, label_loss).sum()
