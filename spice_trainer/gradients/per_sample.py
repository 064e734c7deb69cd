"""Per-sample LoRA gradients from one batched forward and backward.

For sample n with label tokens L_n (labels ≠ −100 after the causal shift) the gradient of the paper is

    g_n = ∇_θ ℓ_n,    ℓ_n = −(1/|L_n|) Σ_{s ∈ L_n} log p_θ(y_ns | y_n,<s)

with θ the trainable LoRA weights and dropout off. A layer's input x, kept by a forward hook, and the gradient δ of its
output, brought by a tensor hook, are all that its kind needs to form it (linear layers: Σ_s δ_ns x_nsᵀ). Rows of a
batch don't interact, so one backward serves them all.

    embedding ─ detached ─ layers below: no graph ─ lowest scored layers: y replaced by a leaf ─ … ─ head ─ ℓ
                                                    └──────────── backward, toward these leaves alone ────┘

The backward ends at the outputs of the lowest scored layers, which a forward hook has replaced by detached leaves.
Hence no parameter gradient is ever formed, no reduction of DDP, FSDP or DeepSpeed fires, and what lies below costs a
forward alone. Losses are taken at label positions, in chunks, where the model's head allows it.
Under FSDP1 and ZeRO-3 the one leaf is the embedding's output, and losses come from the model's logits.

Where the forward computes in float16 losses are scaled:

    g_n = ∇(s ℓ_n) / s,    s = 2¹⁰,    and s = 1 for a sample whose gradient overflows under 2¹⁰

Activation gradients of a mean over tokens are often below float16's smallest number (6e-8) and would vanish; under the
scale those above 64 would be infinite instead. A training run's own scaler goes down when that happens, and so does
this one, for the samples alone that need it: their batch mates might vanish.

Axes: N samples, S tokens, D_l gradient coordinates of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.backends import needs_whole_graph, scoring_mode
from spice_trainer.gradients.forward import ForwardLosses, input_embedding
from spice_trainer.gradients.graph import LossGraph
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import why_switched_off

# A power of two, so that multiplying the losses and dividing the gradients rounds nothing.
FLOAT16_LOSS_SCALE = 2.0**10


class LossScale:
    """The scale of one batch's losses, and which samples' gradients overflowed under it."""

    def __init__(self) -> None:
        self.value = 1.0
        self._overflowed: Tensor | None = None

    def start(self, logits: Tensor, *, repeats: bool) -> None:
        """Sets the scale of a backward from what the forward gave, still under its autocast."""
        self.value = FLOAT16_LOSS_SCALE if _computes_in_float16(logits) and not repeats else 1.0
        self._overflowed = None

    def watch(self, output_gradients: Float[Tensor, "N *_"]) -> None:
        """Looks at what reached one layer; waits for nothing."""
        if self.value == 1.0:
            return
        found = ~output_gradients.isfinite().flatten(1).all(1)
        self._overflowed = found if self._overflowed is None else self._overflowed | found.to(self._overflowed.device)

    def overflowed(self, losses: Float[Tensor, "N"]) -> list[int]:
        """Samples whose gradient is not finite although their loss is, so that the scale may be what broke it."""
        if self._overflowed is None:
            return []
        rows: list[int] = (self._overflowed & losses.isfinite().to(self._overflowed.device)).nonzero()[:, 0].tolist()
        return rows


def _computes_in_float16(logits: Tensor) -> bool:
    kind = logits.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return autocast or logits.dtype == torch.float16


class GradientSink(Protocol):
    """Takes one layer's sample gradients as soon as the backward has formed them."""

    def add(self, module_index: int, gradients: Float[Tensor, "N D_l"]) -> None:
        """Takes the gradients of layer `module_index`, float32, which the sink may overwrite."""

    def restart(self, rows: Sequence[int]) -> None:
        """Forgets what came for these samples of the batch: what comes from here on is theirs alone, in this order."""


class SampleGradients:
    """Context manager that computes sample gradients of LoRA layers and leaves no trace behind.

    While it is open every module is in evaluation mode (LoRA dropout, NEFTune and gradient checkpointing are off;
    quantised linear layers alone train), compiled modules run uncompiled and the hooks are in place. On exit, also
    after an exception, each module's own mode is restored and every hook removed.

    The model comes without its DDP or DeepSpeed wrapper; `modules` are the layers of `find_lora_modules` or some of
    them, and below the lowest of these the others leave no graph. `can_repeat` says whether a batch may be run again
    for samples whose float16 gradient overflowed under the loss scale: with sharded weights a process cannot do so by
    itself, and such samples count as not finite.

    Example:
    ```python
    >>> with SampleGradients(model, find_lora_modules(model)) as sample_gradients:
    ...     losses = sample_gradients.compute(inputs, labels, sink)
    ```
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module], *, can_repeat: bool = True) -> None:
        self.model = model
        self._is_whole = needs_whole_graph(model)
        self.forward = ForwardLosses(model, takes_head=not self._is_whole)
        self._layers = scored_layers(modules)
        self._open = ExitStack()
        self._leaves: list[Tensor] = []
        self._sink: GradientSink | None = None
        self._num_samples = 0
        self._can_repeat = can_repeat
        self._loss_scale = LossScale()
        # The samples of a batch that is run again; `None` is all of them.
        self._chosen: Tensor | None = None
        self._is_backward = False
        # By layer, the `grad_fn` of each call whose gradient has not come yet, and the sum of those that have.
        self._waiting: dict[int, dict[int, Any]] = {}
        self._partial: dict[int, Tensor] = {}

    def __enter__(self) -> SampleGradients:
        with ExitStack() as opening:
            opening.enter_context(scoring_mode(self.model))
            for handle in self._attach():
                opening.callback(handle.remove)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()
        self._forget()

    def _forget(self) -> None:
        self._leaves, self._sink = [], None
        self._waiting, self._partial = {}, {}

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"], sink: GradientSink) -> Float[Tensor, "N"]:
        """Runs one forward and one backward, and hands each layer's sample gradients to `sink`.

        Inputs come without labels; labels are unshifted, −100 where no loss is taken, as the Trainer's collators make
        them. Returns the mean negative log-likelihood of each sample's label tokens in float32, 0 for a sample
        without any. A layer that the samples do not use has gradient 0. Raises a RuntimeError if the loss depends on
        a layer in a way that hooks do not see, or one was fed something that cannot be told apart by sample.
        """
        self._num_samples, self._sink = labels.shape[0], sink
        try:
            losses = self._run(inputs, labels, None)
            again = self._loss_scale.overflowed(losses) if self._can_repeat else []
            if again:
                sink.restart(again)
                self._run(inputs, labels, torch.tensor(again))
            return losses
        finally:
            # Also after an error, such as a lack of memory, after which the caller goes on with fewer samples.
            self._forget()

    def losses(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> Float[Tensor, "N"]:
        """The same losses from a forward alone, about half of the work."""
        self._num_samples = labels.shape[0]
        try:
            with torch.no_grad():
                return self.forward.compute(inputs, labels)[0]
        finally:
            self._forget()

    def _run(
        self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"], chosen: Int[Tensor, "M"] | None
    ) -> Float[Tensor, "N"]:
        self._chosen, self._leaves, self._waiting, self._partial = chosen, [], {}, {}
        with torch.enable_grad():
            losses, logits = self.forward.compute(inputs, labels)
            self._loss_scale.start(logits, repeats=chosen is not None)
            total = (losses if chosen is None else losses[chosen.to(losses.device)]).sum()
            self._is_backward = True
            try:
                if self._leaves:
                    torch.autograd.backward(total * self._loss_scale.value, inputs=self._leaves)
            finally:
                self._is_backward = False
        self._complete(total)
        return losses.detach()

    def _attach(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield from self.forward.attach()
        if self._is_whole:
            yield input_embedding(self.model).register_forward_hook(self._start_at_embedding)
        scored = {id(layer.module) for layer in self._layers}
        for module in self.model.modules():
            if id(module) not in scored and any(weight.requires_grad for weight in module.parameters(recurse=False)):
                yield module.register_forward_hook(_detach_below)
        for index, layer in enumerate(self._layers):
            yield layer.module.register_forward_hook(self._make_hook(index))

    def _start_at_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not self._is_backward:
            self._leaves.append(output.requires_grad_(True))

    def _make_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        layer = self._layers[index]

        def keep_input(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            inputs = args[0].detach()
            layer.check_input(inputs, self._num_samples)
            # Checkpointing that evaluation mode does not switch off (FSDP's) runs forwards again within the backward;
            # no gradient comes to their outputs.
            if not output.requires_grad or self._is_backward:
                return None
            if not args[0].requires_grad:
                # Nothing below is scored: the backward ends here.
                output = output.detach().requires_grad_(True)
                self._leaves.append(output)
            # A module may be called more than once in a forward (shared layers); its gradient is the sum.
            calls = self._waiting.setdefault(index, {})
            call = len(calls)
            calls[call] = output.grad_fn
            output.register_hook(lambda gradient: self._receive(index, call, inputs, gradient))
            return output

        return keep_input

    def _receive(self, index: int, call: int, inputs: Tensor, output_gradient: Tensor) -> None:
        if self._chosen is not None:
            where = self._chosen.to(inputs.device)
            inputs, output_gradient = inputs[where], output_gradient[where]
        self._loss_scale.watch(output_gradient)
        gradients = self._layers[index].sample_gradients(inputs, output_gradient.detach())
        if self._loss_scale.value != 1.0:
            gradients /= self._loss_scale.value
        if index in self._partial:
            gradients += self._partial.pop(index)
        calls = self._waiting[index]
        del calls[call]
        if calls:
            self._partial[index] = gradients
        elif self._sink is not None:
            self._sink.add(index, gradients)

    def _complete(self, total: Tensor) -> None:
        """Gives the sink what is left: layers that the loss does not depend on, or not through every call."""
        missing = [index for index in range(len(self._layers)) if self._waiting.get(index, True)]
        if not missing or self._sink is None:
            return
        self._check_unused(missing, LossGraph(total))
        num_samples = self._num_samples if self._chosen is None else len(self._chosen)
        for index in missing:
            zeros = torch.zeros(num_samples, self._layers[index].num_coordinates, device=total.device)
            self._sink.add(index, self._partial.pop(index, zeros))

    def _check_unused(self, missing: Sequence[int], graph: LossGraph) -> None:
        """Refuses layers that the loss does depend on, and adapters that were switched off."""
        bypassed = [
            self._layers[index]
            for index in missing
            if any(map(graph.has_node, self._waiting.get(index, {}).values()))
            or (index not in self._partial and any(map(graph.has_weight, self._layers[index].parameters)))
        ]
        reason = (
            "The forward uses their weights and bypasses the modules (fused LoRA kernels such as Unsloth's), or in a "
            "way that no gradient reaches them. Switch the fused kernels off, or leave these layers out of "
            "`target_modules`."
        )
        if not bypassed:
            found = why_switched_off(self.model, [self._layers[index].module for index in missing])
            if found is None:
                return
            bypassed, reason = [self._layers[index] for index in missing], found
        listed = ", ".join(layer.name for layer in bypassed[:5])
        raise RuntimeError(
            f"{len(bypassed)} of {len(self._layers)} LoRA layers got no gradient while scoring: {listed}"
            f"{f' and {len(bypassed) - 5} more' if len(bypassed) > 5 else ''}. {reason}"
        )


def _detach_below(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Lets a trainable layer that is not scored leave no graph where nothing below it is scored."""
    if not isinstance(output, Tensor) or any(isinstance(value, Tensor) and value.requires_grad for value in args):
        return None
    return output.detach()
