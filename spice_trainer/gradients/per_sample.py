"""Per-sample LoRA gradients from one batched forward and backward.

For sample n with label tokens L_n (labels ≠ −100 after the causal shift) the gradient of the paper is

    g_n = ∇_θ ℓ_n,    ℓ_n = −(1/|L_n|) Σ_{s ∈ L_n} log p_θ(y_ns | y_n,<s)

with θ the trainable LoRA weights and dropout off. A layer's input x, kept by a forward hook, and the gradient δ of its
output, brought by a tensor hook, are all that its kind needs to form it (linear layers: Σ_s δ_ns x_nsᵀ). Rows of a
batch don't interact, so one backward serves them all. Where a layer is fed the tokens of all rows in an order of its
own, or its weights are used without a call (experts), rows go through one at a time.

    embedding ─ detached ─ layers below: no graph ─ lowest scored layers: y replaced by a leaf ─ … ─ head ─ ℓ
                                                    └──────────── backward, toward these leaves alone ────┘

The backward ends at the outputs of the lowest scored layers, which a forward hook has replaced by detached leaves.
Hence no parameter gradient is ever formed, no reduction of DDP, FSDP or DeepSpeed fires, and what lies below costs a
forward alone. Losses are taken at label positions, in chunks, where the model's head allows it.
Under FSDP1 and ZeRO-3 the one leaf is the embedding's output, and losses come from the model's logits.

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
from torch.utils._pytree import tree_leaves

from spice_trainer.gradients.backends import (
    is_sharded,
    must_score_alone,
    needs_whole_graph,
    score_alone,
    scoring_mode,
)
from spice_trainer.gradients.forward import ForwardLosses, input_embedding
from spice_trainer.gradients.graph import LossGraph
from spice_trainer.gradients.label_head import PLAIN, LabelLoss
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import why_switched_off
from spice_trainer.gradients.loss_scale import LossScale


class GradientSink(Protocol):
    """Takes one layer's sample gradients as soon as the backward has formed them."""

    def add(self, module_index: int, gradients: Float[Tensor, "N D_l"]) -> None:
        """Takes the gradients of layer `module_index`, float32, which the sink may overwrite."""

    def restart(self, rows: Sequence[int]) -> None:
        """Forgets what came for these samples of the batch: what comes from here on is theirs alone, in this order."""


class _MixedRowsError(Exception):
    """A layer of this name was fed the tokens of several rows, which cannot be told apart."""


class SampleGradients:
    """Context manager that computes sample gradients of LoRA layers and leaves no trace behind.

    While it is open every module is in evaluation mode (LoRA dropout, NEFTune and gradient checkpointing are off;
    quantised linear layers alone train), compiled modules run uncompiled and the hooks are in place. On exit, also
    after an exception, each module's own mode is restored and every hook removed.

    The model comes without its DDP or DeepSpeed wrapper; `modules` are the layers of `find_lora_modules` or some of
    them, and below the lowest of these the others leave no graph. `can_repeat` says whether a batch may be run again
    for samples whose float16 gradient overflowed under the loss scale: with sharded weights a process cannot do so by
    itself, and such samples count as not finite. Gradients are those of `label_loss`.

    Example:
    ```python
    >>> with SampleGradients(model, find_lora_modules(model)) as sample_gradients:
    ...     losses = sample_gradients.compute(inputs, labels, sink)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        can_repeat: bool = True,
        label_loss: LabelLoss = PLAIN,
    ) -> None:
        self.model = model
        self._is_whole = needs_whole_graph(model)
        self.forward = ForwardLosses(model, takes_head=not self._is_whole, label_loss=label_loss)
        self._layers = scored_layers(modules)
        self._by_autograd = [index for index, layer in enumerate(self._layers) if layer.takes_autograd]
        self._open = ExitStack()
        self._leaves: list[Tensor] = []
        self._sink: GradientSink | None = None
        self._num_samples = self._num_tokens = 0
        if self._by_autograd and is_sharded(model):
            raise RuntimeError(
                f"LoRA on the expert parameters of {self._layers[self._by_autograd[0]].name!r} cannot be scored where "
                'FSDP or ZeRO-3 shards them. Name the attention\'s layers alone in `target_modules` ("all-linear" '
                'takes the experts in), or in SpiceConfig(scoring_target_modules=["q_proj", "v_proj"]), or use DDP.'
            )
        # Something else than a scored layer makes activations require a gradient: the backward ends there, too.
        self._follows_others = False
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
        a layer in a way that hooks do not see.
        """
        self._sink = sink
        rows = range(len(labels))
        try:
            if len(rows) == 1 or not (self._by_autograd or must_score_alone(self.model)):
                try:
                    return self._compute_rows(inputs, labels, rows)
                except _MixedRowsError as error:
                    score_alone(self.model, str(error))
            return self._compute_alone(inputs, labels)
        finally:
            # Also after an error, such as a lack of memory, after which the caller goes on with fewer samples.
            self._forget()

    def _compute_rows(
        self, inputs: Mapping[str, Any], labels: Int[Tensor, "M S"], rows: Sequence[int]
    ) -> Float[Tensor, "M"]:
        """One forward and backward for some rows of the batch, and another for those that overflowed."""
        losses = self._run(inputs, labels, rows, None)
        again = self._loss_scale.overflowed(losses) if self._can_repeat else []
        if again:
            self._restart([rows[number] for number in again])
            self._run(inputs, labels, rows, torch.tensor(again))
        return losses

    def _compute_alone(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> Float[Tensor, "N"]:
        """The same, a row at a time and without its padding."""
        if not self._can_repeat:
            raise RuntimeError(
                "Some LoRA layers take the tokens of all rows together, so rows must be scored one at a time, and "
                "where weights are sharded all processes in step. Set SpiceConfig(scoring_tokens_per_batch=1), or "
                "leave these layers out: SpiceConfig(scoring_target_modules=[...])."
            )
        losses = []
        for row in range(len(labels)):
            attended = inputs["attention_mask"][row].nonzero()
            length = int(attended[-1]) + 1 if len(attended) else labels.shape[1]
            part = {key: value[row : row + 1, :length] for key, value in inputs.items()}
            self._restart([row])
            losses.append(self._compute_rows(part, labels[row : row + 1, :length], [row]))
        return torch.cat(losses)

    def _restart(self, rows: Sequence[int]) -> None:
        if self._sink is not None:
            self._sink.restart(rows)

    def losses(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> Float[Tensor, "N"]:
        """The same losses from a forward alone, about half of the work."""
        self._num_samples = labels.shape[0]
        try:
            with torch.no_grad():
                return self.forward.compute(inputs, labels)[0]
        finally:
            self._forget()

    def _run(
        self,
        inputs: Mapping[str, Any],
        labels: Int[Tensor, "M S"],
        rows: Sequence[int],
        chosen: Int[Tensor, "C"] | None,
    ) -> Float[Tensor, "M"]:
        self._num_samples, self._num_tokens = labels.shape
        self._chosen, self._leaves, self._waiting, self._partial = chosen, [], {}, {}
        with torch.enable_grad():
            losses, logits = self.forward.compute(inputs, labels)
            self._loss_scale.start(logits, repeats=chosen is not None)
            total = (losses if chosen is None else losses[chosen.to(losses.device)]).sum()
            self._is_backward = True
            try:
                self._backward(total)
            finally:
                self._is_backward = False
        if not self._complete(total):
            self._follows_others = True
            self._restart(rows if chosen is None else [rows[number] for number in chosen.tolist()])
            return self._run(inputs, labels, rows, chosen)
        return losses.detach()

    def _backward(self, total: Tensor) -> None:
        scaled, leaves = total * self._loss_scale.value, self._leaves
        if not (self._follows_others or self._by_autograd):
            if leaves:
                torch.autograd.backward(scaled, inputs=leaves)
            return
        others = LossGraph(total).other_leaves(leaves) if self._follows_others else []
        weights = [weight for index in self._by_autograd for weight in self._layers[index].parameters]
        if not total.requires_grad:
            return
        # Nothing is written into `.grad`, and no reduction fires.
        found = torch.autograd.grad(scaled, [*weights, *leaves, *others], allow_unused=True, materialize_grads=True)
        remaining = iter(found)
        for index in self._by_autograd:
            parts = [next(remaining).flatten() for _ in self._layers[index].parameters]
            gradients = torch.cat(parts)[None].float()
            self._loss_scale.watch(gradients)
            self._waiting[index] = {}
            if self._sink is not None:
                self._sink.add(index, gradients / self._loss_scale.value)

    def _attach(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield from self.forward.attach()
        if self._is_whole:
            yield input_embedding(self.model).register_forward_hook(self._start_at_embedding)
        scored = {id(layer.module) for layer in self._layers}
        for module in self.model.modules():
            if id(module) in scored:
                continue
            if any(weight.requires_grad for weight in module.parameters(recurse=False)):
                yield module.register_forward_hook(_detach_below)
            elif module._forward_hooks and not self._is_whole:
                yield module.register_forward_hook(self._detach_leaf)
            elif module._forward_hooks and not any(id(part) in scored for part in module.modules()):
                yield module.register_forward_hook(self._end_at_images, with_kwargs=True)
        for index, layer in enumerate(self._layers):
            if not layer.takes_autograd:
                yield layer.module.register_forward_hook(self._make_hook(index))

    def _start_at_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() and not self._is_backward:
            self._leaves.append(output.requires_grad_(True))

    def _end_at_images(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """Ends the backward where hooks for checkpointing let a vision tower's embeddings require a gradient."""
        if not isinstance(output, Tensor) or not output.requires_grad or self._is_backward:
            return None
        is_ours = any(output is leaf for leaf in self._leaves)
        if is_ours or any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves((args, kwargs))):
            return None
        self._leaves.append(output.detach().requires_grad_(True))
        return self._leaves[-1]

    def _detach_leaf(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Undoes what hooks for checkpointing do to embeddings, of images too: below the scored layers no graph."""
        is_leaf = isinstance(output, Tensor) and output.is_leaf and output.requires_grad
        return output.detach() if is_leaf and not any(output is leaf for leaf in self._leaves) else None

    def _make_hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        layer = self._layers[index]

        def keep_input(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            # Checkpointing that evaluation mode does not switch off (FSDP's) runs forwards again within the backward;
            # no gradient comes to their outputs.
            if not output.requires_grad or self._is_backward:
                return None
            inputs = layer.by_sample(args[0].detach(), self._num_samples, self._num_tokens)
            if inputs is None:
                raise _MixedRowsError(layer.name)
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
        output_gradient = output_gradient.reshape(*inputs.shape[:2], -1)
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

    def _complete(self, total: Tensor) -> bool:
        """Gives the sink what is left: layers that the loss does not depend on, or not through every call.

        Returns `False` if the backward must go on toward what else requires a gradient.
        """
        missing = [index for index in range(len(self._layers)) if self._waiting.get(index, True)]
        if not missing or self._sink is None:
            return True
        graph = LossGraph(total)
        unreached = [index for index in missing if any(map(graph.has_node, self._waiting.get(index, {}).values()))]
        if unreached and not (self._follows_others or self._is_whole) and graph.other_leaves(self._leaves):
            return False
        bypassed = [
            index
            for index in missing
            if index not in self._partial and any(map(graph.has_weight, self._layers[index].parameters))
        ]
        self._check_unused(missing, sorted({*unreached, *bypassed}))
        num_samples = self._num_samples if self._chosen is None else len(self._chosen)
        for index in missing:
            size = num_samples, self._layers[index].num_coordinates
            zeros = torch.zeros(size, dtype=torch.float32, device=total.device)
            self._sink.add(index, self._partial.pop(index, zeros))
        return True

    def _check_unused(self, missing: Sequence[int], used: Sequence[int]) -> None:
        """Refuses layers that the loss does depend on, and adapters that were switched off."""
        reason: str | None = (
            "The forward uses their weights and bypasses the modules (fused LoRA kernels such as Unsloth's), or in a "
            "way that no gradient reaches them. Switch the fused kernels off, or leave these layers out of "
            "`target_modules`."
        )
        if not used:
            used = missing
            reason = why_switched_off(self.model, [self._layers[index].module for index in missing])
        if reason is None:
            return
        names = [self._layers[index].name for index in used]
        raise RuntimeError(
            f"{len(names)} of {len(self._layers)} LoRA layers got no gradient while scoring: {', '.join(names[:5])}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}. {reason}"
        )


def _detach_below(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Lets a trainable layer that is not scored leave no graph where nothing below it is scored."""
    if not isinstance(output, Tensor) or any(isinstance(value, Tensor) and value.requires_grad for value in args):
        return None
    return output.detach()
