"""LoRA on expert parameters: PEFT's `target_parameters`, and what its "all-linear" makes of fused experts.

The matrices A and B are never called: they change the experts' stacked weight, which all tokens of a batch go through.
One row's gradient of them is autograd's, so rows are scored one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from spice_trainer.gradients.layers.base import ScoredLayer, register_layer


@register_layer(ParamWrapper)
class ExpertParameters(ScoredLayer):
    """The trained A and B of one stacked weight, A first."""

    takes_autograd = True

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The weights of the matrices that train."""
        found = [*self.module.lora_A.parameters(), *self.module.lora_B.parameters()]  # type: ignore[union-attr]
        return [weight for weight in found if weight.requires_grad]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Theirs; sharded experts are not scored."""
        return [tuple(weight.shape) for weight in self.parameters]
