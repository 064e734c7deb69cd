r"""`nn.Embedding`, from the ids that went in and the gradient of what came out.

    y_ns = c W[id_ns],    ∂ℓ_n/∂W[v] = c Σ_{s : id_ns = v} δ_ns

with c = 1. Of a padding id autograd takes no gradient. A subclass with a forward of its own (OPT's positions begin at
2, Gemma scales what it finds) tells ids and c itself, called again with other numbers in the place of its weight.
Axes: N samples, S tokens, V vocabulary, E features, D_l = V·E, nearly all of which are 0 for a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import NotLinearError, ScoredLayer, holds_only, register_layer, stand_ins

# Subclasses whose output was found to be linear in their weight.
_linear: WeakSet[nn.Module] = WeakSet()


@register_layer(nn.Embedding)
class EmbeddingLayer(ScoredLayer):
    """The weight, row-major V×E."""

    module: nn.Embedding
    is_sparse = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Those that look ids up, as far as can be told before they are called."""
        return holds_only(module, "weight") and module.max_norm is None and not module.scale_grad_by_freq

    @property
    def parameters(self) -> Sequence[Tensor]:
        """W."""
        return [self.module.weight]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(V, E)."""
        return [(self.module.num_embeddings, self.module.embedding_dim)]

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_tokens: int) -> Tensor | None:
        """The ids (N, S), or ids and scales (N, S, 2); positions may be given once for all samples."""
        is_plain = type(self.module).forward is nn.Embedding.forward
        found: Tensor = (args[0] if args else next(iter(kwargs.values()))) if is_plain else self._look_up(args, kwargs)
        own = () if is_plain else (2,)
        if num_samples == 1:
            return found.reshape(1, -1, *own)
        has_samples = found.dim() == 2 + len(own) and len(found) in (1, num_samples)
        return found.expand(num_samples, *found.shape[1:]) if has_samples else None

    def _look_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "... 2"]:
        """Which rows a forward takes, and what it multiplies them with, 0 where no gradient goes to the weight."""
        weight = self.module.weight
        numbers = torch.arange(self.module.num_embeddings, device=weight.device, dtype=torch.float64)
        probe = torch.stack([numbers, torch.ones_like(numbers)], 1).requires_grad_()
        try:
            found = self._call(probe, args, kwargs)
            # In the weight's own precision, which may round the scale.
            scales = self._call(torch.ones_like(numbers, dtype=weight.dtype)[:, None], args, kwargs)[..., 0].double()
            (slopes,) = torch.autograd.grad(found[..., 1].sum(), probe, allow_unused=True, materialize_grads=True)
            found = found.detach()
            ids = torch.where(found[..., 1] == 0, 0.0, found[..., 0] / found[..., 1])
            is_linear = bool((ids - ids.round()).abs().lt(1e-6).all()) and bool(
                self.module in _linear or self._call(2 * probe.detach(), args, kwargs).allclose(2 * found)
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # It needs a weight of its own shape.
            raise NotLinearError from None
        if not is_linear:
            raise NotLinearError
        _linear.add(self.module)
        ids = ids.round()
        return torch.stack([ids, torch.where(slopes[ids.long(), 1] == 0, 0.0, scales)], -1)

    def _call(self, weight: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with torch.enable_grad(), stand_ins(self.module, {"weight": weight}):
            output: Tensor = self.module.forward(*args, **kwargs)
        return output

    def _split(self, inputs: Tensor) -> tuple[Int[Tensor, "N S"], Tensor]:
        """Ids, and what their contributions are multiplied with."""
        if inputs.dim() == 3:
            return inputs[..., 0].long(), inputs[..., 1].float()
        padding = self.module.padding_idx
        return inputs, torch.ones_like(inputs) if padding is None else (inputs != padding)

    def _contributions(self, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Float[Tensor, "N S E"]]:
        ids, scales = self._split(inputs)
        return ids, output_gradients.reshape(*ids.shape, -1).float() * scales[..., None]

    def sample_gradients(
        self,
        inputs: Tensor,
        output_gradients: Float[Tensor, "N S E"],
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "N _"]:
        """Rows of the weight, most of them 0."""
        width = self.module.embedding_dim
        first, last = start // width, (self.num_coordinates if stop is None else stop) // width
        ids, values = self._contributions(inputs, output_gradients)
        is_inside = (ids >= first) & (ids < last)
        samples = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        places = (samples * (last - first) + ids - first)[is_inside]
        found = values.new_zeros(len(inputs) * (last - first), width)
        return found.index_add_(0, places, values[is_inside]).view(len(inputs), -1)

    def sparse_gradients(self, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the ids that the sample holds."""
        width = self.module.embedding_dim
        all_ids, (values,) = self._contributions(inputs, output_gradients)
        ids, places = all_ids[0].unique(return_inverse=True)
        summed = values.new_zeros(len(ids), width).index_add_(0, places, values)
        return (ids[:, None] * width + torch.arange(width, device=ids.device)).flatten(), summed.flatten()

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """V[id], scaled."""
        ids, scales = self._split(inputs)
        return nn.functional.embedding(ids, parameters[0]) * scales[..., None]
