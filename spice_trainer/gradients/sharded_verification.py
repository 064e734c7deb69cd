"""A check of the sample gradients where weights are sharded, and plain autograd cannot take a weight's gradient.

FSDP and ZeRO-3 reduce every weight's gradient as soon as it forms, so none may form. A layer y = W x is called as

    y + s V x,      V random, s = 0,      dℓ/ds = ⟨∂ℓ/∂W, V⟩

and autograd's derivative in the scalar s, one row alone, is compared with ⟨g, V⟩ of the batched sample gradient g.
Every process runs the same forwards on the same rows, so all come to the same verdict.

Axes: N samples, I/O features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow
from spice_trainer.gradients.backends import training_flag_for_scoring, uncompiled
from spice_trainer.gradients.label_losses import sample_losses
from spice_trainer.gradients.layers import trainable_bias
from spice_trainer.gradients.lora import forward_parameters
from spice_trainer.gradients.verification import batched_gradients, compare_layers, move_batch, rounding_tolerance
from spice_trainer.utils.random import preserved_random_state


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
