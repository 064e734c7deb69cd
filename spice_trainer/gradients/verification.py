"""A check of the sample gradients on the user's own model, adapter and precision, before training starts.

Two short rows in one padded batch must give, layer by layer, the gradients that plain autograd gives for each alone.
This catches every model nobody thought of: a forward that bypasses layers, or calls one in a way the hooks don't see.
Where padding or a batch mate changes a row's gradient, rows are scored one at a time from then on.

Where weights are sharded autograd cannot take a weight's gradient: FSDP and ZeRO-3 reduce it as soon as it forms, so
none may form. A layer y = f(x; W), linear in W, is called there as

    y + s f(x; V),      V random, s = 0,      dℓ/ds = ⟨∂ℓ/∂W, V⟩

and autograd's derivative in the scalar s, one row alone, is compared with ⟨g, V⟩ of the batched sample gradient g.
Every process runs the same forwards on the same rows, so all come to the same verdict. Of a model that trains in full
layers are compared a group at a time, and of a large one some of each kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.backends import must_score_alone, score_unpadded, scored_alone, scoring_mode
from spice_trainer.gradients.forward import input_embedding, logits_of, move_inputs, without_cache
from spice_trainer.gradients.label_head import PLAIN, LabelLoss, sample_losses
from spice_trainer.gradients.layers.base import NotLinearError, ScoredLayer
from spice_trainer.gradients.layers.registry import layer_kind, scored_layers
from spice_trainer.gradients.per_sample import ALL, SampleGradients
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

    def compare() -> _Comparison:
        comparison = _Comparison(rows)
        for group in _groups(layers):
            members = {part.name: part.module for layer in group for part in layer.parts}
            batched = _batched_gradients(model, members, rows, device, autocast, label_loss)
            alone = [_autograd(model, group, row, device, autocast, label_loss) for row in rows]
            comparison.add(group, batched, alone)
        if not any(comparison.is_finite):
            raise ValueError(
                f"The gradients of rows {', '.join(str(row.index) for row in rows)} of the training dataset are not "
                "finite, also by plain autograd. Likely causes: a weight that is not finite (a broken checkpoint), or "
                "an overflow in float16 (train in bf16). Training would fail with or without SPICE."
            )
        return comparison

    with preserved_random_state(device), _without_zero_weights(layers):
        return _largest_error(model, compare, tolerance=_rounding_tolerance(model, autocast, device))


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

    def compare() -> _Comparison:
        comparison = _Comparison(rows)
        generator = torch.Generator().manual_seed(0)
        # What is autograd's own needs no check.
        for group in _groups([layer for layer in scored_layers(modules) if not layer.takes_autograd]):
            members = {part.name: part.module for layer in group for part in layer.parts}
            directions = [
                [torch.randn(shape, generator=generator).to(device) for shape in layer.shapes] for layer in group
            ]
            flat = [torch.cat([part.flatten() for part in direction]).double() for direction in directions]
            batched = _batched_gradients(model, members, rows, device, autocast, label_loss)
            ours = [
                [(gradient * direction).sum()[None] for gradient, direction in zip(gradients, flat, strict=True)]
                for gradients in batched
            ]
            # In a random direction each layer's derivative has about the size of its gradient.
            alone = [_derivatives(model, group, directions, row, device, autocast, label_loss) for row in rows]
            # Those that turned out to be bypassed are autograd's own by now.
            kept = [not any(layer_kind(part.module).takes_autograd for part in layer.parts) for layer in group]
            comparison.add(
                list(compress(group, kept)),
                [list(compress(of_row, kept)) for of_row in ours],
                [list(compress(of_row, kept)) for of_row in alone],
            )
        return comparison

    with preserved_random_state(device):
        return _largest_error(model, compare, tolerance=_rounding_tolerance(model, autocast, device))


def _largest_error(model: nn.Module, compare: Callable[[], _Comparison], *, tolerance: float) -> float:
    """That of a comparison, which is made once more with each row alone if batch mates or padding change its gradient.

    If they do, rows are scored one at a time from here on.
    """
    comparison = compare()
    try:
        return comparison.largest_error(tolerance=tolerance)
    except GradientMismatchError as error:
        if must_score_alone(model):
            raise
        with scored_alone(model):
            try:
                found = compare().largest_error(tolerance=tolerance)
            except GradientMismatchError:
                raise error from None
    score_unpadded(model)
    return found


# Coordinates of layers that are compared together, and of all that are compared.
_GROUP_NUMBERS, _MAX_NUMBERS = 2**24, 2**27


def _groups(layers: Sequence[ScoredLayer]) -> Iterator[list[ScoredLayer]]:
    """Layers to compare together: all of them, or of very many coordinates some of each kind, small ones first."""
    by_kind: dict[Any, list[ScoredLayer]] = {}
    for layer in sorted(layers, key=lambda layer: layer.num_coordinates):
        by_kind.setdefault((type(layer), *layer.shapes), []).append(layer)
    chosen: list[ScoredLayer] = []
    for round_ in range(max(map(len, by_kind.values()), default=0)):
        for of_kind in by_kind.values():
            used = sum(layer.num_coordinates for layer in chosen)
            # One of each kind in any case.
            if round_ < len(of_kind) and (round_ == 0 or used + of_kind[round_].num_coordinates <= _MAX_NUMBERS):
                chosen.append(of_kind[round_])
    group: list[ScoredLayer] = []
    for layer in (layer for layer in layers if layer in chosen):
        if group and sum(other.num_coordinates for other in [*group, layer]) > _GROUP_NUMBERS:
            yield group
            group = []
        group.append(layer)
    if group:
        yield group


class _Collected:
    """Gradients of each row of a batch by layer, which may come row by row and piece by piece."""

    def __init__(self, num_rows: int, sizes: Sequence[int], device: torch.device) -> None:
        self.by_row = [[torch.zeros(size, device=device) for size in sizes] for _ in range(num_rows)]
        self._rows: Sequence[int] = range(num_rows)

    def add(self, module_index: int, gradients: Tensor, rows: slice = ALL, start: int = 0) -> None:
        for row, gradient in zip(self._rows[rows], gradients, strict=True):
            self.by_row[row][module_index][start : start + len(gradient)] = gradient

    def add_sparse(self, module_index: int, row: int, coordinates: Tensor, values: Tensor) -> None:
        self.by_row[self._rows[row]][module_index][coordinates] = values

    def restart(self, rows: Sequence[int]) -> None:
        self._rows = rows
        for row in rows:
            for gradient in self.by_row[row]:
                gradient.zero_()


class _Comparison:
    """Errors of layers, relative to the norm of their row over all layers, and which rows tell something."""

    def __init__(self, rows: Sequence[CandidateRow]) -> None:
        self._rows = rows
        self._squares = [0.0] * len(rows)
        self._errors: list[list[tuple[str, float]]] = [[] for _ in rows]
        # A row whose own gradient is not finite says nothing about how it was computed.
        self.is_finite = [True] * len(rows)

    def add(
        self,
        layers: Sequence[ScoredLayer],
        ours: Sequence[Sequence[Tensor]],
        theirs: Sequence[Sequence[Tensor]],
    ) -> None:
        """Takes gradients of a group of layers by row."""
        for row, (of_row, expected_of_row) in enumerate(zip(ours, theirs, strict=True)):
            for layer, found, expected in zip(layers, of_row, expected_of_row, strict=True):
                self.is_finite[row] &= bool(expected.isfinite().all())
                expected = expected.double()
                self._squares[row] += float(expected.square().sum())
                self._errors[row].append((layer.name, float((found.double() - expected).norm())))

    def largest_error(self, *, tolerance: float) -> float:
        """The largest; refuses one above the tolerance."""
        if self._errors[0] and all(square == 0.0 for square in self._squares):
            raise ValueError(
                f"No scored layer gets a gradient from rows {', '.join(str(row.index) for row in self._rows)} of the "
                "training dataset, also by plain autograd: these rows would train nothing. Likely cause: "
                "`target_modules` names only a part of the model that they don't use, such as a vision tower for rows "
                "without an image. Fix: name layers that every row uses, too."
            )
        largest = 0.0
        for row, square, is_finite, errors in zip(
            self._rows, self._squares, self.is_finite, self._errors, strict=True
        ):
            if not is_finite:
                continue
            for name, difference in errors:
                error = difference / max(math.sqrt(square), 1e-30)
                largest = max(largest, error)
                if not error <= tolerance:
                    raise GradientMismatchError(
                        f"The sample gradient of the layer {name!r} differs from autograd's by {error:.2g} of the "
                        f"gradient's norm (row {row.index} of the training dataset; at most {tolerance:g} is rounding "
                        "in this precision). This model calls the layer in a way that SPICE's hooks cannot follow. "
                        "Selection would be silently wrong, so it is refused. Leave this layer out of "
                        "`target_modules` or of SpiceConfig(scoring_target_modules=[...]), or switch off kernels that "
                        "replace the layer's forward."
                    )
        return largest


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
    sizes = [layer.num_coordinates for layer in scored_layers(modules)]
    with SampleGradients(model, modules, label_loss=label_loss) as sample_gradients:
        for places in groups.values():
            collected = _Collected(len(places), sizes, device)
            with autocast():
                sample_gradients.compute(*_make_batch([rows[place] for place in places], device), collected)
            gradients |= dict(zip(places, collected.by_row, strict=True))
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
    return [torch.cat([next(gradients).flatten() for _ in layer.shapes]).to(device) for layer in layers]


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

    def add_direction(index: int, layer: ScoredLayer) -> Callable[..., Tensor | None]:
        is_inner = False

        def perturb(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            nonlocal is_inner
            kept = None
            # Of one that turned out to be another kind autograd's own gradient is taken.
            with suppress(NotLinearError):
                kept = None if is_inner else layer.keep(args, kwargs, 1, labels.shape[1])
            if kept is None:
                return None
            # In float32 whatever the training precision: the derivative is a sum over the row's tokens.
            with torch.autocast(device.type, enabled=False):
                # What a layer reads of itself comes here again.
                is_inner = True
                inputs = layer.inputs(kept)
                is_inner = False
                inputs = inputs.float() if inputs.is_floating_point() else inputs
                along = layer.output(inputs, directions[index])
                return output + (scalars[index] * along).to(output.dtype).view_as(output)

        return perturb

    with ExitStack() as hooks:
        embedding = input_embedding(model)
        scored = {id(part.module) for layer in layers for part in layer.parts}
        # Not behind one that is scored, within PEFT's wrapper.
        embedding = next((module for module in embedding.modules() if id(module) in scored), embedding)
        hooks.callback(embedding.register_forward_hook(replace_by_leaf).remove)
        for index, layer in enumerate(layers):
            for part in layer.parts:
                hook = part.module.register_forward_hook(add_direction(index, part), with_kwargs=True)
                hooks.callback(hook.remove)
        with scoring_mode(model), torch.enable_grad():
            with autocast():
                outputs = model(**inputs, **without_cache(model))
            torch.autograd.backward(_sample_loss(outputs, labels, label_loss), inputs=[*leaves, *scalars])
    return [
        torch.zeros(1, dtype=torch.float64, device=device) if scalar.grad is None else scalar.grad.double()[None]
        for scalar in scalars
    ]


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
