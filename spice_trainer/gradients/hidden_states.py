"""One vector a row from a forward alone: the mean of its tokens' hidden states at one layer.

    h_n = Σ_t t x_nt / Σ_t t,      x_nt what layer l takes for token t = 1, 2, ... of row n

Later tokens weigh more, since in a causal model they have read more of the row. The forward ends at that layer. Below
everything that trains the states never change.

Axes: N samples, S tokens, H numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.backends import is_sharded, scoring_mode
from spice_trainer.gradients.forward import (
    base_model,
    forward_parameters,
    input_embedding,
    move_inputs,
    without_cache,
)


class _ReachedError(Exception):
    """The layer was reached, and nothing behind it is wanted."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model's language model, in the order in which they run; a `ValueError` if they are not told."""
    base, decoder = base_model(model), _decoder(model)
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    number = getattr(config, "num_hidden_layers", None)
    stacks = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    fitting = [stack for stack in stacks if len(stack) == number] or stacks[:1]
    if not fitting:
        raise ValueError(
            f"The model ({type(base).__name__}) has no list of layers whose hidden states could be compared. Fix: "
            'SpiceConfig(matching_features="gradients"), or a strategy that reads no hidden states.'
        )
    return list(fitting[0])


def _decoder(model: nn.Module) -> nn.Module:
    """The part of the model that holds the layers, or all of it if it does not tell."""
    base = base_model(model)
    get_decoder = getattr(base, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    # One that is called so may be a single linear layer behind all others.
    return decoder if decoder is not None and any(decoder.children()) else base


def lowest_trained_layer(model: nn.Module) -> int:
    """The lowest layer with a weight that trains; 0 if something below all layers does, their number if none does."""
    layers = decoder_layers(model)
    inside = {
        id(weight): number for number, layer in reversed(list(enumerate(layers))) for weight in layer.parameters()
    }
    base = base_model(model)
    head = getattr(base, "get_output_embeddings", lambda: None)()
    above = (
        set() if head is None else set(map(id, head.parameters())) - set(map(id, input_embedding(model).parameters()))
    )
    above |= set(map(id, _behind(base, layers)))
    found = [
        inside.get(id(weight), len(layers) if id(weight) in above else 0)
        for weight in base.parameters()
        if weight.requires_grad
    ]
    return min(found, default=len(layers))


def _behind(base: nn.Module, layers: list[nn.Module]) -> list[Tensor]:
    """Weights of what stands behind the layers in the module that holds them, such as the last norm."""
    for module in base.modules():
        children = list(module.children())
        for place, child in enumerate(children):
            if isinstance(child, nn.ModuleList) and len(child) == len(layers) and child[0] is layers[0]:
                names = [name for name, _ in module.named_children()]
                return [
                    weight
                    for name, other in zip(names[place + 1 :], children[place + 1 :], strict=True)
                    if "norm" in name or name.startswith("ln")
                    for weight in other.parameters()
                ]
    return []


def last_layer(model: nn.Module) -> int:
    """The layer whose hidden states the head reads: behind all layers, and the norm that may follow."""
    return len(decoder_layers(model)) + 1


class HiddenStates:
    """Context manager that computes them at one layer and leaves no trace; see [`SampleGradients`].

    `layer` counts from 0; the number of layers is what the last one gives, and one more what the head reads. The model
    comes without its DDP or DeepSpeed wrapper.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model = model
        layers = decoder_layers(model)
        if not 0 <= layer <= len(layers) + 1:
            raise ValueError(
                f"SpiceConfig: hidden_layer={layer}, and the model has the layers 0 to {len(layers) - 1}. Fix: set "
                f"hidden_layer to at most {len(layers)}, which is the output of the last, or {len(layers) + 1}, which "
                "is what the head reads, or leave it out."
            )
        self._layer, self._is_output = (layers[layer], False) if layer < len(layers) else (layers[-1], True)
        if layer == len(layers) + 1:
            decoder = _decoder(model)
            # A model that is nothing but a decoder gives logits.
            self._layer = self._layer if decoder is base_model(model) else decoder
        # Elsewhere a module's own hooks have to come to their end: they let go of weights.
        self._stops = not is_sharded(model) and not hasattr(base_model(model), "hf_device_map")
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
        self._open = ExitStack()
        self._states: Tensor | None = None

    def __enter__(self) -> HiddenStates:
        with ExitStack() as opening:
            opening.enter_context(scoring_mode(self.model))
            handle = (
                self._layer.register_forward_hook(self._keep_output)
                if self._is_output
                else self._layer.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            )
            opening.callback(handle.remove)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._states = None

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> Float[Tensor, "N H"]:
        """The rows' vectors in float32; the labels tell only how many rows and columns there are."""
        self._states = None
        with torch.no_grad():
            with suppress(_ReachedError):
                self.model(**inputs, **without_cache(self.model), **self._keep)
            states = self._states
            if states is None or states.dim() != 3 or len(states) != len(labels):
                shape = None if states is None else tuple(states.shape)
                raise ValueError(
                    f"The layer ({type(self._layer).__name__}) whose hidden states are compared took {shape} for a "
                    f"micro-batch of {len(labels)} rows, where (rows, tokens, numbers) was expected. Fix: "
                    'SpiceConfig(matching_features="gradients"), or another hidden_layer.'
                )
            states = states.float()
            mask = inputs.get("attention_mask")
            is_told = isinstance(mask, Tensor) and mask.shape == states.shape[:2]
            attended = mask.to(states) if is_told else states.new_ones(states.shape[:2])
            weights = attended.cumsum(dim=1) * attended
            weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
            # A padded position may hold anything, also nan.
            states = states.masked_fill(attended[..., None] == 0, 0.0)
            # Under the training's precision the mean itself would be rounded to it.
            with torch.autocast(states.device.type, enabled=False):
                return torch.einsum("ns,nsh->nh", weights, states)

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        self._reach(given)

    def _keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last = getattr(output, "last_hidden_state", None)
        self._reach(last if last is not None else output[0] if isinstance(output, tuple) else output)

    def _reach(self, states: Any) -> None:
        if self._states is None and isinstance(states, Tensor):
            self._states = states.detach()
        if self._stops:
            raise _ReachedError


def states_are_alone(model: nn.Module, layer: int, rows: Sequence[CandidateRow], device: torch.device) -> bool:
    """Whether two rows of the same kind have the same states together as each alone; one row tells nothing.

    A `ValueError` if the layer gives none that could be compared.
    """
    with HiddenStates(model, layer) as hidden_states:

        def states_of(some: Sequence[CandidateRow]) -> Float[Tensor, "N H"]:
            inputs, labels = pad_rows(some)
            return hidden_states.compute(move_inputs(inputs, device), labels.to(device))

        alone = torch.cat([states_of([row]) for row in rows])
        if len(rows) < 2 or not all(row.can_be_padded for row in rows):
            return True
        difference = (states_of(rows) - alone).norm(dim=1)
    return bool((difference <= _SAME_STATES * alone.norm(dim=1)).all())


# Relative; rounding of bf16 states is below it, and what another row does to one is above.
_SAME_STATES = 0.05
