"""Per-sample LoRA gradients from one batched forward and backward.

For sample n with label tokens L_n (labels ≠ −100 after the causal shift) the gradient of the paper is

    g_n = ∇_θ ℓ_n,    ℓ_n = −(1/|L_n|) Σ_{s ∈ L_n} log p_θ(y_ns | y_n,<s)

with θ the trainable LoRA weights and dropout off. A linear layer y = W x gives, with δ_ns = ∂(Σ_n ℓ_n)/∂y_ns,

    ∂ℓ_n/∂W = Σ_s δ_ns x_nsᵀ        (module `layer_gradients`)

so the input x kept by a forward hook and the output's gradient δ brought by a tensor hook are all that is needed: rows
of a batch don't interact, and one backward serves them all.

    embedding ─ detached ─ layers below: no graph ─ lowest scored layers: y replaced by a leaf ─ … ─ head ─ ℓ
                                                    └──────────── backward, toward these leaves alone ────┘

The backward ends at the outputs of the lowest scored layers, which a forward hook has replaced by detached leaves.
Hence no parameter gradient is ever formed, no reduction of DDP, FSDP or DeepSpeed fires, and what lies below costs a
forward alone. Losses are taken at label positions, in chunks, where the model's head allows it (module `label_head`).
Under FSDP1 and ZeRO-3 the one leaf is the embedding's output, and losses come from the model's logits.

Axes: N samples, S tokens, I/O input and output features, D gradient dimension, V vocabulary.

The scale of losses whose gradients are computed in float16.

    g_n = ∇(s ℓ_n) / s,    s = 2¹⁰,    and s = 1 for a sample whose gradient overflows under 2¹⁰

Activation gradients of a mean over tokens are often below float16's smallest number (6e-8) and would vanish; under the
scale those above 64 would be infinite instead. A training run's own scaler goes down when that happens, and so does
this one, for the samples alone that need it: their batch mates might vanish.

Axes: N samples, S tokens, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.backends import (
    check_quantized_layers,
    needs_whole_graph,
    training_flag_for_scoring,
    uncompiled,
)
from spice_trainer.gradients.forward import ForwardLosses
from spice_trainer.gradients.layers import module_gradients, trainable_bias

# A power of two, so that multiplying the losses and dividing the gradients rounds nothing.
FLOAT16_LOSS_SCALE = 2.0**10


class LossScale:
    """The scale of one batch's losses, and which samples' gradients overflowed under it."""

    def __init__(self) -> None:
        self.value = 1.0
        self._overflowed: Tensor | None = None

    def start(self, logits: Tensor, *, repeats: bool) -> None:
        """Sets the scale of a backward.

        Args:
            logits (`torch.Tensor`): What the forward gave, still under its autocast.
            repeats (`bool`): Whether the samples overflowed under the scale before.
        """
        self.value = FLOAT16_LOSS_SCALE if _computes_in_float16(logits) and not repeats else 1.0
        self._overflowed = None

    def watch(self, output_gradients: Float[Tensor, "N S O"]) -> None:
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
    """Takes one module's sample gradients as soon as the backward has formed them."""

    def add(self, module_index: int, gradients: Float[Tensor, "N D_l"]) -> None:
        """Takes the gradients of module `module_index`, float32, which the sink may overwrite."""

    def restart(self, rows: Sequence[int]) -> None:
        """Forgets what came for these samples of the batch: what comes from here on is theirs alone, in this order."""


class SampleGradients:
    """Context manager that computes sample gradients of LoRA layers and leaves no trace behind.

    While it is open every module is in evaluation mode (LoRA dropout, NEFTune and gradient checkpointing are off;
    quantised linear layers alone train, see module `kernels`), compiled modules run uncompiled and the hooks are in
    place. On exit, also after an exception, each module's own mode is restored and every hook removed.

    Args:
        model (`torch.nn.Module`):
            The causal language model, without its DDP or DeepSpeed wrapper.
        modules (`Mapping[str, torch.nn.Linear]`):
            The trainable LoRA layers by name, from [`find_lora_modules`], or some of them:
            below the lowest of these the others leave no graph.
        can_repeat (`bool`, *optional*, defaults to `True`):
            Whether a batch may be run again for samples whose float16 gradient overflowed under the loss scale. With
            sharded weights a process cannot do so by itself, and such samples count as not finite.

    Example:
    ```python
    >>> with SampleGradients(model, find_lora_modules(model)) as sample_gradients:
    ...     losses = sample_gradients.compute(inputs, labels, sink)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Linear],
        *,
        can_repeat: bool = True,
    ) -> None:
        self.model = model
        self._is_whole = needs_whole_graph(model)
        self.forward = ForwardLosses(model, takes_head=not self._is_whole)
        self._names = tuple(modules)
        self._modules = tuple(modules.values())
        self._biases = tuple(trainable_bias(module) for module in self._modules)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._contexts = ExitStack()
        self._leaves: list[Tensor] = []
        self._sink: GradientSink | None = None
        self._num_samples = 0
        self._can_repeat = can_repeat
        self._loss_scale = LossScale()
        # The samples of a batch that is run again; `None` is all of them.
        self._chosen: Tensor | None = None
        self._is_backward = False
        self._num_waiting: dict[int, int] = {}
        self._partial: dict[int, Tensor] = {}

    def __enter__(self) -> SampleGradients:
        check_quantized_layers(self.model)
        self._modes = [(module, module.training) for module in self.model.modules()]
        try:
            self._contexts.enter_context(uncompiled(self.model))
            # The flag itself, not `eval()`: models override `train()` with side effects (frozen parts, buffers).
            for module, _ in self._modes:
                module.training = training_flag_for_scoring(module)
            self._handles += self.forward.attach()
            if self._is_whole:
                embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
                self._handles.append(embedding.register_forward_hook(self._start_at_embedding))
            for module in _other_trainable_modules(self.model, self._modules):
                self._handles.append(module.register_forward_hook(_detach_below))
            for index, module in enumerate(self._modules):
                self._handles.append(module.register_forward_hook(self._make_hook(index)))
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        self._contexts.close()
        for handle in self._handles:
            handle.remove()
        for module, training in self._modes:
            module.training = training
        self._handles, self._modes = [], []
        self._forget()

    def _forget(self) -> None:
        self._leaves, self._sink = [], None
        self._num_waiting, self._partial = {}, {}

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"], sink: GradientSink) -> Float[Tensor, "N"]:
        """Runs one forward and one backward, and hands each module's sample gradients to `sink`.

        Args:
            inputs (`Mapping[str, Any]`):
                Model inputs without labels: `input_ids` of shape `(N, S)` and what else the model takes.
            labels (`torch.Tensor` of shape `(N, S)`):
                Token labels, −100 where no loss is taken. Unshifted, as the Trainer's collators make them.
            sink ([`GradientSink`]):
                Receives the gradients.

        Returns:
            `torch.Tensor` of shape `(N,)`: mean negative log-likelihood of each sample's label tokens in float32, 0
            for a sample without any.

        Raises:
            RuntimeError: If a LoRA layer was not called, got no gradient, or was fed something else than `(N, S, I)`,
                which means that its gradient cannot be told apart by sample.
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
        """Runs a forward alone, about half of the work.

        Args:
            inputs (`Mapping[str, Any]`): As for [`SampleGradients.compute`].
            labels (`torch.Tensor` of shape `(N, S)`): As there.

        Returns:
            `torch.Tensor` of shape `(N,)`: As there.
        """
        self._num_samples = labels.shape[0]
        try:
            with torch.no_grad():
                return self.forward.compute(inputs, labels)[0]
        finally:
            self._forget()

    def _run(
        self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"], chosen: Int[Tensor, "M"] | None
    ) -> Float[Tensor, "N"]:
        self._chosen, self._leaves = chosen, []
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
        self._check_all_received()
        return losses.detach()

    def _start_at_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not self._is_backward:
            self._leaves.append(output.requires_grad_(True))

    def _make_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def keep_input(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            inputs = args[0].detach()
            if inputs.dim() != 3 or inputs.shape[0] != self._num_samples:
                raise RuntimeError(
                    f"The LoRA layer {self._names[index]!r} was fed a tensor of shape {tuple(inputs.shape)} where "
                    f"({self._num_samples} samples, tokens, features) was expected, so its gradient cannot be told "
                    "apart by sample. This happens in mixture-of-experts layers, which flatten the batch. Leave this "
                    "layer out of `target_modules`."
                )
            # Checkpointing that evaluation mode does not switch off (FSDP's) runs forwards again within the backward;
            # no gradient comes to their outputs.
            if not output.requires_grad or self._is_backward:
                return None
            if not args[0].requires_grad:
                # Nothing below is scored: the backward ends here.
                output = output.detach().requires_grad_(True)
                self._leaves.append(output)
            # A module may be called more than once in a forward (shared layers); its gradient is the sum.
            self._num_waiting[index] = self._num_waiting.get(index, 0) + 1
            output.register_hook(lambda gradient: self._receive(index, inputs, gradient))
            return output

        return keep_input

    def _receive(self, index: int, inputs: Tensor, output_gradient: Tensor) -> None:
        if self._chosen is not None:
            where = self._chosen.to(inputs.device)
            inputs, output_gradient = inputs[where], output_gradient[where]
        self._loss_scale.watch(output_gradient)
        gradients = module_gradients(inputs, output_gradient.detach(), bias=self._biases[index])
        if self._loss_scale.value != 1.0:
            gradients /= self._loss_scale.value
        if index in self._partial:
            gradients += self._partial.pop(index)
        self._num_waiting[index] -= 1
        if self._num_waiting[index] > 0:
            self._partial[index] = gradients
        elif self._sink is not None:
            self._sink.add(index, gradients)

    def _check_all_received(self) -> None:
        missing = [name for index, name in enumerate(self._names) if self._num_waiting.get(index) != 0]
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise RuntimeError(
                f"{len(missing)} of {len(self._names)} LoRA layers got no gradient while scoring: {listed}. Either "
                "the forward bypasses these modules (fused LoRA kernels such as Unsloth's, merged adapters) or the "
                "loss does not depend on the text through them. Switch the fused kernels off, unmerge the adapter, or "
                "leave these layers out of `target_modules`."
            )


def _other_trainable_modules(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    scored = set(map(id, modules))
    for module in model.modules():
        if id(module) not in scored and any(weight.requires_grad for weight in module.parameters(recurse=False)):
            yield module


def _detach_below(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Lets a trainable layer that is not scored leave no graph where nothing below it is scored."""
    if not isinstance(output, Tensor) or any(isinstance(value, Tensor) and value.requires_grad for value in args):
        return None
    return output.detach()
