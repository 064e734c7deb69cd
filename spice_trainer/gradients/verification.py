"""A check of the sample gradients on the user's own model, adapter and precision, before training starts.

Two short rows in one padded batch must give, layer by layer, the gradients that plain autograd gives for each alone.
This catches every model nobody thought of: a forward that bypasses the LoRA layers, mixes the rows of a batch, or
calls a layer in a way the hooks don't see.

A check of the sample gradients where weights are sharded, and plain autograd cannot take a weight's gradient.

FSDP and ZeRO-3 reduce every weight's gradient as soon as it forms, so none may form. A layer y = W x is called as

    y + s V x,      V random, s = 0,      dℓ/ds = ⟨∂ℓ/∂W, V⟩

and autograd's derivative in the scalar s, one row alone, is compared with ⟨g, V⟩ of the batched sample gradient g.
Every process runs the same forwards on the same rows, so all come to the same verdict.

Axes: N samples, I/O features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.backends import (
    needs_whole_graph,
    rows_influence_each_other,
    training_flag_for_scoring,
    uncompiled,
)
from spice_trainer.gradients.label_head import sample_losses
from spice_trainer.gradients.layers import trainable_bias
from spice_trainer.gradients.lora import forward_parameters
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.utils.random import preserved_random_state

# Largest relative error per layer: rounding in fp32 is at most 1e-5; half precision rounds each product.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}


class GradientMismatchError(RuntimeError):
    """The batched sample gradients are not those of autograd on this model."""


class _Collected:
    def __init__(self) -> None:
        self.gradients: dict[int, Tensor] = {}
        self._rows: list[int] | None = None

    def begin(self) -> None:
        self._rows = None

    def add(self, module_index: int, gradients: Tensor) -> None:
        if self._rows is None:
            self.gradients[module_index] = gradients.double()
        else:
            self.gradients[module_index][self._rows] = gradients.double()

    def restart(self, rows: Sequence[int]) -> None:
        self._rows = list(rows)


def verify_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    rows: Sequence[CandidateRow],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> float:
    """Compares batched sample gradients with autograd, one row at a time.

    Args:
        model (`torch.nn.Module`): The model that will score.
        modules (`Mapping[str, torch.nn.Linear]`): Its trainable LoRA layers.
        rows (`Sequence[CandidateRow]`): Rows with label tokens, two are enough.
        device (`torch.device`): Where inputs go.
        autocast (`Callable`, *optional*): Makes the context of the training precision.

    Returns:
        `float`: Largest relative error over layers and rows.

    Raises:
        GradientMismatchError: If a layer's gradient is off, with its name.
        RuntimeError: If a layer is bypassed or fed something else than `(N, S, I)`.
        ValueError: If no row has a finite gradient.
    """
    context = autocast if autocast is not None else nullcontext
    with preserved_random_state(device), _without_zero_weights(modules):
        batched = batched_gradients(model, modules, rows, device=device, context=context)
        alone = [_autograd(model, modules, row, device, context) for row in rows]
    finite = [bool(torch.cat(gradients).isfinite().all()) for gradients in alone]
    if not any(finite):
        raise ValueError(
            f"The gradients of rows {', '.join(str(row.index) for row in rows)} of the training dataset are not "
            "finite, also by plain autograd. Likely causes: a weight that is not finite (a broken checkpoint), or an "
            "overflow in float16 (train in bf16). Training would fail with or without SPICE."
        )
    tolerance = rounding_tolerance(model, context, device)
    # A row whose own gradient is not finite says nothing about how it was computed.
    return max(
        compare_layers(
            list(modules), ours, theirs, row=row, scale=float(torch.cat(theirs).norm()), tolerance=tolerance
        )
        for row, ours, theirs, sound in zip(rows, batched, alone, finite, strict=True)
        if sound
    )


def batched_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    rows: Sequence[CandidateRow],
    *,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
) -> list[list[Tensor]]:
    """Sample gradients as scoring takes them, rows in one micro-batch where they can be: for each row its layers'."""
    collected = _Collected()
    can_share = all(row.can_be_padded for row in rows) and not rows_influence_each_other(model)
    groups = [list(rows)] if can_share else [[row] for row in rows]
    gradients: list[list[Tensor]] = []
    with SampleGradients(model, modules) as sample_gradients:
        for group in groups:
            inputs, labels = move_batch(group, device)
            collected.begin()
            with context():
                sample_gradients.compute(inputs, labels, collected)
            gradients += [
                [collected.gradients[index][row] for index in range(len(modules))] for row in range(len(group))
            ]
    return gradients


def compare_layers(
    names: Sequence[str],
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    *,
    row: CandidateRow,
    scale: float,
    tolerance: float,
) -> float:
    """Largest error of a layer of one row, relative to `scale`.

    Raises:
        GradientMismatchError: If it exceeds the tolerance.
    """
    largest = 0.0
    for name, found, expected in zip(names, ours, theirs, strict=True):
        error = float((found - expected).norm()) / max(scale, 1e-30)
        largest = max(largest, error)
        if not error <= tolerance:
            raise GradientMismatchError(
                f"The sample gradient of the LoRA layer {name!r} differs from autograd's by {error:.2g} of the "
                f"gradient's norm (row {row.index} of the training dataset; at most {tolerance:g} is rounding in this "
                "precision). This model calls the layer in a way that SPICE's hooks cannot follow, or the rows of a "
                "batch influence each other. Selection would be silently wrong, so it is refused. Leave this layer "
                "out of `target_modules`, or switch off kernels that replace the LoRA forward."
            )
    return largest


def has_whole_weights(model: nn.Module) -> bool:
    """Whether the model can run a forward by itself: its weights are not partitioned over processes.

    They are once FSDP wrapped the model, and as soon as a model is loaded under ZeRO-3. Only the main process asks
    with meaning: FSDP's efficient loading leaves the others without weights until it wraps the model.
    """
    return not (needs_whole_graph(model) or any(isinstance(module, FSDPModule) for module in model.modules()))


@contextmanager
def _without_zero_weights(modules: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Puts small random numbers in the place of weights that are all zero, and the weights back afterwards.

    B of a fresh adapter is zero, and with it every gradient of A: there would be nothing to compare.
    """
    zero = [(module, module.weight.data) for module in modules.values() if not module.weight.data.any()]
    try:
        for module, value in zero:
            # Small beside the base layer's output at any rank.
            module.weight.data = torch.empty_like(value).normal_(std=0.1 / math.sqrt(module.in_features))
        yield
    finally:
        for module, value in zero:
            module.weight.data = value


def _autograd(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    row: CandidateRow,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
) -> list[Tensor]:
    """Gradients of one row alone by plain autograd, per layer, in the order of `module_gradients`."""
    inputs, labels = move_batch([row], device)
    if "use_cache" in forward_parameters(model):
        # As in scoring and training: with a cache, models do not tell the documents of a packed row apart.
        inputs["use_cache"] = False
    modes = [(module, module.training) for module in model.modules()]
    parameters: list[Tensor] = []
    for linear in modules.values():
        parameters += [parameter for parameter in (linear.weight, linear.bias) if parameter is not None]
    try:
        for module, _ in modes:
            module.training = training_flag_for_scoring(module)
        with torch.enable_grad(), uncompiled(model), context():
            outputs = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
            targets = labels[:, 1:].to(logits.device)
            loss = sample_losses(logits[:, :-1], targets, targets != -100).sum()
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
    by_parameter = {
        id(parameter): torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(trained, gradients, strict=True)
    }
    return [
        torch.cat(
            [by_parameter[id(linear.weight)].flatten()]
            + ([by_parameter[id(linear.bias)].flatten()] if trainable_bias(linear) else [])
        )
        .double()
        .to(device)
        for linear in modules.values()
    ]


def rounding_tolerance(
    model: nn.Module, context: Callable[[], AbstractContextManager[Any]], device: torch.device
) -> float:
    """Largest error that is rounding in the precisions the forward computes in."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    with context():
        if torch.is_autocast_enabled(device.type):
            dtypes.add(torch.get_autocast_dtype(device.type))
    # A quantised base computes in half precision whatever the dtype of what is trainable.
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        dtypes.add(torch.bfloat16)
    return max(TOLERANCES.get(dtype, 0.15) for dtype in dtypes)


def move_batch(rows: Sequence[CandidateRow], device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Rows padded into one micro-batch on a device: model inputs and labels."""
    inputs, labels = pad_rows(rows)
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs, labels.to(device)


def verify_directions(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    rows: Sequence[CandidateRow],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> float:
    """Compares batched sample gradients with autograd along a random direction of each layer, one row at a time.

    Args:
        model (`torch.nn.Module`): The model that scores, wrapped as it trains.
        modules (`Mapping[str, torch.nn.Linear]`): Its trainable LoRA layers.
        rows (`Sequence[CandidateRow]`): Rows with label tokens, the same on every process; two are enough.
        device (`torch.device`): Where inputs go.
        autocast (`Callable`, *optional*): Makes the context of the training precision.

    Returns:
        `float`: Largest error of a layer, relative to the row's gradient norm.

    Raises:
        GradientMismatchError: If a layer's gradient is off, with its name.
        RuntimeError: If a layer is bypassed or fed something else than `(N, S, I)`.
    """
    context = autocast if autocast is not None else nullcontext
    generator = torch.Generator().manual_seed(0)
    directions = []
    for module in modules.values():
        weight = torch.randn(module.out_features, module.in_features, generator=generator)
        bias = torch.randn(module.out_features, generator=generator) if trainable_bias(module) else None
        directions.append((weight.to(device), None if bias is None else bias.to(device)))
    flat = [
        (weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])).double()
        for weight, bias in directions
    ]
    with preserved_random_state(device):
        batched = batched_gradients(model, modules, rows, device=device, context=context)
        alone = [_derivatives(model, modules, directions, row, device, context) for row in rows]
    tolerance = rounding_tolerance(model, context, device)
    largest = 0.0
    for row, gradients, derivatives in zip(rows, batched, alone, strict=True):
        # A row whose own gradient is not finite says nothing about how it was computed.
        if not torch.cat(derivatives).isfinite().all():
            continue
        ours = [(gradient * direction).sum()[None] for gradient, direction in zip(gradients, flat, strict=True)]
        # In a random direction each layer's derivative has about the size of its gradient.
        scale = float(torch.cat(derivatives).norm())
        error = compare_layers(list(modules), ours, derivatives, row=row, scale=scale, tolerance=tolerance)
        largest = max(largest, error)
    return largest


def _derivatives(
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    directions: Sequence[tuple[Tensor, Tensor | None]],
    row: CandidateRow,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
) -> list[Tensor]:
    """dℓ/ds of every layer for one row alone."""
    inputs, labels = move_batch([row], device)
    if "use_cache" in forward_parameters(model):
        inputs["use_cache"] = False
    scalars = [torch.zeros((), device=device, requires_grad=True) for _ in directions]
    leaves: list[Tensor] = []

    def replace_by_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1]

    def add_direction(index: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            weight, bias = directions[index]
            # In float32 whatever the training precision: the derivative is a sum over the row's tokens.
            with torch.autocast(device.type, enabled=False):
                along = nn.functional.linear(args[0].detach().float(), weight, bias)
                return output + (scalars[index] * along).to(output.dtype)

        return perturb

    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    modes = [(module, module.training) for module in model.modules()]
    handles = [embedding.register_forward_hook(replace_by_leaf)]
    handles += [module.register_forward_hook(add_direction(i)) for i, module in enumerate(modules.values())]
    try:
        for module, _ in modes:
            module.training = training_flag_for_scoring(module)
        with torch.enable_grad(), uncompiled(model):
            with context():
                outputs = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
            targets = labels[:, 1:].to(logits.device)
            loss = sample_losses(logits[:, :-1], targets, targets != -100).sum()
            torch.autograd.backward(loss, inputs=[*leaves, *scalars])
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return [
        torch.zeros(1, dtype=torch.float64, device=device) if scalar.grad is None else scalar.grad.double()[None]
        for scalar in scalars
    ]
