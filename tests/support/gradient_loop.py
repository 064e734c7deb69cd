"""Slow and obvious: one sample at a time through the model, its loss by hand, its gradient by autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spice_trainer.gradients.forward import without_cache
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.models import VOCAB_SIZE

Row = tuple[list[int], list[int]]


def example_rows(seed: int = 0) -> list[Row]:
    """Five rows (input_ids, labels): whole text, prompt masked, two turns, a single label, the shortest possible."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    whole, prompted, turns, single, shortest = draw(9), draw(14), draw(11), draw(6), draw(2)
    return [
        (whole, list(whole)),
        (prompted, [-100] * 8 + prompted[8:]),
        (turns, [-100] * 3 + turns[3:5] + [-100] * 3 + turns[8:]),
        (single, [-100] * 5 + single[5:]),
        (shortest, list(shortest)),
    ]


def collate(rows: Sequence[Row], *, extra_padding: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Right-pads with a token that means something, so that only the attention mask makes it harmless."""
    length = max(len(input_ids) for input_ids, _ in rows) + extra_padding
    input_ids = torch.full((len(rows), length), 5)
    attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    for index, (row_ids, row_labels) in enumerate(rows):
        input_ids[index, : len(row_ids)] = torch.tensor(row_ids)
        attention_mask[index, : len(row_ids)] = 1
        labels[index, : len(row_ids)] = torch.tensor(row_labels)
    return {"input_ids": input_ids, "attention_mask": attention_mask}, labels


class CollectingSink:
    """Keeps every module's gradients by row, and complains when a coordinate arrives twice."""

    def __init__(self) -> None:
        # By module and row, coordinates and their values as they came.
        self.gradients: dict[int, dict[int, list[tuple[Tensor, Tensor]]]] = {}
        self.restarted: list[list[int]] = []

    @property
    def rows(self) -> list[int] | None:
        """Rows that came again."""
        return self.restarted[-1] if self.restarted else None

    def add(self, module_index: int, gradients: Tensor, rows: slice = slice(None), start: int = 0) -> None:
        places = (self.rows or list(range(1000)))[rows]
        coordinates = torch.arange(start, start + gradients.shape[1])
        for row, gradient in zip(places[: len(gradients)], gradients, strict=True):
            self._keep(module_index, row, coordinates, gradient)

    def add_sparse(self, module_index: int, row: int, coordinates: Tensor, values: Tensor) -> None:
        self._keep(module_index, row if self.rows is None else self.rows[row], coordinates, values)

    def _keep(self, module_index: int, row: int, coordinates: Tensor, values: Tensor) -> None:
        assert values.dtype == torch.float32
        pieces = self.gradients.setdefault(module_index, {}).setdefault(row, [])
        known = torch.cat([coordinates, *(earlier for earlier, _ in pieces)])
        assert len(known.unique()) == len(known)
        pieces.append((coordinates, values.clone().cpu()))

    def restart(self, rows: Sequence[int]) -> None:
        self.restarted.append(list(rows))
        for by_row in self.gradients.values():
            for row in rows:
                by_row.pop(row, None)

    def by_module(self, modules: Mapping[str, nn.Module] | None = None, num_rows: int = 0) -> list[Tensor]:
        """Gradients `(N, D_l)` of each layer, 0 where nothing came; without the `modules` all must have come."""
        num_rows = num_rows or 1 + max((row for by_row in self.gradients.values() for row in by_row), default=0)
        if modules is None:
            pieces = [self.gradients[index] for index in range(len(self.gradients))]
            sizes = [1 + max(int(part.max()) for row in by_row.values() for part, _ in row) for by_row in pieces]
        else:
            sizes = [layer.num_coordinates for layer in scored_layers(modules)]
        found = []
        for index, size in enumerate(sizes):
            gradients = torch.zeros(num_rows, size)
            for row, pieces in self.gradients.get(index, {}).items():
                for coordinates, values in pieces:
                    gradients[row, coordinates.cpu()] = values
            found.append(gradients)
        return found


def batched_gradients(
    model: nn.Module, rows: Sequence[Row], *, extra_padding: int = 0, modules: Mapping[str, nn.Module] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Losses and, per module, the sample gradients `(N, D_l)` of one batch."""
    modules = find_trained_modules(model) if modules is None else modules
    sink = CollectingSink()
    with SampleGradients(model, modules) as sample_gradients:
        losses = sample_gradients.compute(*collate(rows, extra_padding=extra_padding), sink)
    return losses, sink.by_module(modules)


def looped_gradients(
    model: nn.Module, rows: Sequence[Row], *, allow_unused: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The same by one forward and one `torch.autograd.grad` a row, unpadded."""
    modules = find_trained_modules(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    losses, gradients = [], []
    for input_ids, labels in rows:
        outputs = model(input_ids=torch.tensor([input_ids]), **without_cache(model))
        logits = outputs["logits"][0]
        predictions = [
            logits[position].log_softmax(-1)[labels[position + 1]]
            for position in range(len(labels) - 1)
            if labels[position + 1] != -100
        ]
        loss = -sum(predictions) / len(predictions)
        parameters = [layer.parameters for layer in scored_layers(modules)]
        weights = [parameter for group in parameters for parameter in group]
        flat = iter(torch.autograd.grad(loss, weights, allow_unused=allow_unused, materialize_grads=allow_unused))
        gradients.append([torch.cat([next(flat).flatten() for _ in group]) for group in parameters])
        losses.append(loss.detach())
    for module, training in modes:
        module.training = training
    return torch.stack(losses), [torch.stack(module) for module in zip(*gradients, strict=True)]


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest ‖g − g*‖ / ‖g*‖ over the samples, over all modules together."""
    difference = torch.cat(list(found), dim=1).double() - torch.cat(list(expected), dim=1).double()
    return float((difference.norm(dim=1) / torch.cat(list(expected), dim=1).double().norm(dim=1)).max())
