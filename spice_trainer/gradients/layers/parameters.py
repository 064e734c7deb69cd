"""Any other module: autograd's own gradient of its parameters, so that rows are scored one at a time.

Slow and always right: convolutions, adapters of other kinds (AdaLoRA, LoRA on embeddings, trained tokens), routers,
and layers whose weights a kernel uses without calling them. Where weights are sharded no gradient of one can form.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spice_trainer.gradients.layers.base import ScoredLayer, register_layer, trains


class ParameterLayer(ScoredLayer):
    """The module's own trained parameters (or its `holders`'), and those of other layers that share some of them."""

    takes_autograd = True

    def __init__(
        self, name: str, module: nn.Module, others: Sequence[ScoredLayer] = (), holders: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__(name, module)
        self._others = others
        holders = [*(holders or [module]), *(other.module for other in others)]
        found = [parameter for holder in holders for parameter in holder.parameters(recurse=False)]
        self._parameters = list({id(parameter): parameter for parameter in found if trains(parameter)}.values())

    @property
    def parameters(self) -> Sequence[Tensor]:
        """As the module holds them."""
        return self._parameters

    @property
    def parts(self) -> Sequence[ScoredLayer]:
        """This one and the others."""
        return [self, *self._others]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """Theirs; sharded ones are not scored."""
        return [tuple(parameter.shape) for parameter in self._parameters]


@register_layer("peft.tuners.lora.layer.ParamWrapper")
class ExpertParameters(ParameterLayer):
    """A and B of one stacked weight: PEFT's `target_parameters`, and what "all-linear" makes of fused experts.

    They are never called: they change the experts' stacked weight, which all tokens of a batch go through.
    """

    owns_children = True

    def __init__(self, name: str, module: nn.Module) -> None:
        matrices = [*module.lora_A.values(), *module.lora_B.values()]  # type: ignore[operator]
        super().__init__(name, module, holders=matrices)
