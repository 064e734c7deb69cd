r"""`nn.Embedding`, from the ids that went in and the gradient of what came out.

    y_ns = c W[id_ns],    ∂ℓ_n/∂W[v] = c Σ_{s : id_ns = v} δ_ns

with c = 1, or the scale of models that multiply within the layer (Gemma). Of a padding id autograd takes no gradient.
Axes: N samples, S tokens, V vocabulary, E features, D_l = V·E, nearly all of which are 0 for a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.layers.base import ScoredLayer, holds_only, register_layer


@register_layer(nn.Embedding)
class EmbeddingLayer(ScoredLayer):
    """The weight, row-major V×E."""

    module: nn.Embedding
    is_sparse = True

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Those that look ids up and at most scale what they find."""
        looks_up = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return looks_up and holds_only(module, "weight") and module.max_norm is None and not module.scale_grad_by_freq

    @property
    def parameters(self) -> Sequence[Tensor]:
        """W."""
        return [self.module.weight]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(V, E)."""
        return [(self.module.num_embeddings, self.module.embedding_dim)]

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any], num_samples: int, num_tokens: int) -> Tensor | None:
        """The ids (N, S); positions may be given once for all samples."""
        ids: Tensor = args[0] if args else next(iter(kwargs.values()))
        if num_samples == 1:
            return ids.reshape(1, -1)
        return ids.expand(num_samples, -1) if ids.dim() == 2 and len(ids) in (1, num_samples) else None

    def _contributions(self, inputs: Int[Tensor, "N S"], output_gradients: Tensor) -> Float[Tensor, "N S E"]:
        values = output_gradients.reshape(*inputs.shape, -1).float()
        if self.module.padding_idx is not None:
            values = values.masked_fill((inputs == self.module.padding_idx)[..., None], 0.0)
        return values * getattr(self.module, "embed_scale", 1.0)

    def sample_gradients(
        self,
        inputs: Int[Tensor, "N S"],
        output_gradients: Float[Tensor, "N S E"],
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "N _"]:
        """Rows of the weight, most of them 0."""
        width = self.module.embedding_dim
        first, last = start // width, (self.num_coordinates if stop is None else stop) // width
        values = self._contributions(inputs, output_gradients)
        is_inside = (inputs >= first) & (inputs < last)
        samples = torch.arange(len(inputs), device=inputs.device)[:, None].expand_as(inputs)
        places = (samples * (last - first) + inputs - first)[is_inside]
        found = values.new_zeros(len(inputs) * (last - first), width)
        return found.index_add_(0, places, values[is_inside]).view(len(inputs), -1)

    def sparse_gradients(self, inputs: Tensor, output_gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the ids that the sample holds."""
        width = self.module.embedding_dim
        values = self._contributions(inputs, output_gradients)[0]
        ids, places = inputs[0].unique(return_inverse=True)
        summed = values.new_zeros(len(ids), width).index_add_(0, places, values)
        return (ids[:, None] * width + torch.arange(width, device=ids.device)).flatten(), summed.flatten()

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """V[id], scaled."""
        found = nn.functional.embedding(inputs, parameters[0], self.module.padding_idx)
        return found * getattr(self.module, "embed_scale", 1.0)
