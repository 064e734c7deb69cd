"""Per-sample gradients of what trains from one batched forward and backward.

For sample n with label tokens L_n (labels ≠ −100 after the causal shift) the gradient of the paper is

    g_n = ∇_θ ℓ_n,    ℓ_n = −(1/|L_n|) Σ_{s ∈ L_n} log p_θ(y_ns | y_n,<s)

with θ the trainable weights (the paper: LoRA's) and dropout off. A layer's input x, kept by a forward hook, and the
gradient δ of its output, brought by a tensor hook, are all that its kind needs to form it (linear layers:
Σ_s δ_ns x_nsᵀ). Rows of a batch don't interact, so one backward serves them all. Where a layer is fed the tokens of
all rows in an order of its own, or its weights are used without a call (experts), rows go through one at a time.
Gradients of a layer are formed in pieces of bounded size, each given away before the next: those of a layer that
trains in full never exist for all rows together.

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
from dataclasses import dataclass
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
    score_alone_by,
    scoring_mode,
    warn_of_scoring_alone,
)
from spice_trainer.gradients.forward import ForwardLosses, input_embedding
from spice_trainer.gradients.graph import LossGraph
from spice_trainer.gradients.label_head import PLAIN, LabelLoss
from spice_trainer.gradients.layers.base import NotLinearError, ScoredLayer
from spice_trainer.gradients.layers.registry import score_by_autograd, scored_layers
from spice_trainer.gradients.lora import why_switched_off
from spice_trainer.gradients.loss_scale import LossScale

# Numbers of a piece of gradients: 16 MB, and on a GPU 256 MB.
PIECE_NUMBERS = {"cpu": 2**22}
_PIECE_NUMBERS_ELSEWHERE = 2**26
ALL = slice(None)


class GradientSink(Protocol):
    """Takes one layer's sample gradients as soon as the backward has formed them."""

    def add(self, module_index: int, gradients: Float[Tensor, "n w"], rows: slice = ALL, start: int = 0) -> None:
        """Takes coordinates of layer `module_index` from `start` on, float32, which the sink may overwrite.

        They are those of some `rows` of the batch; each coordinate of a row comes once.
        """

    def add_sparse(
        self, module_index: int, row: int, coordinates: Int[Tensor, " w"], values: Float[Tensor, " w"]
    ) -> None:
        """Takes those of a row that are not 0, by which coordinates they are; no others come for it."""

    def restart(self, rows: Sequence[int]) -> None:
        """Forgets what came for these samples of the batch: what comes from here on is theirs alone, in this order."""


class _MixedRowsError(Exception):
    """A layer of this name was fed the tokens of several rows, which cannot be told apart."""


class _BypassedError(Exception):
    """The loss depends on the weights of these layers, by number, in a way that hooks do not see, and in which."""


class _AutogradNeededError(Exception):
    """Rows of a batch use this layer, by number, whose gradients are autograd's own: those of the rows' sum."""


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what its gradients are formed from, by sample and position."""

    layer: ScoredLayer
    inputs: Tensor
    output_gradients: Tensor


class SampleGradients:
    """Context manager that computes sample gradients of layers and leaves no trace behind.

    While it is open every module is in evaluation mode (LoRA dropout, NEFTune and gradient checkpointing are off;
    quantised linear layers alone train), compiled modules run uncompiled and the hooks are in place. On exit, also
    after an exception, each module's own mode is restored and every hook removed.

    The model comes without its DDP or DeepSpeed wrapper; `modules` are the layers of `find_trained_modules` or some of
    them, and below the lowest of these the others leave no graph. `can_repeat` says whether a batch may be run again
    for samples whose float16 gradient overflowed under the loss scale: with sharded weights a process cannot do so by
    itself, and such samples count as not finite. Gradients are those of `label_loss`.

    Example:
    ```python
    >>> with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
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
        self._modules = dict(modules)
        self._layers, self._by_autograd = self._find_layers()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        is_head_scored = head is not None and self._is_scored(head)
        takes_head = not self._is_whole and not is_head_scored
        self.forward = ForwardLosses(model, takes_head=takes_head, label_loss=label_loss)
        self._open = ExitStack()
        self._leaves: list[Tensor] = []
        self._sink: GradientSink | None = None
        self._num_samples = self._num_tokens = 0
        # Something else than a scored layer makes activations require a gradient: the backward ends there, too.
        self._follows_others = False
        self._can_repeat = can_repeat
        self._loss_scale = LossScale()
        # The samples of a batch that is run again; `None` is all of them.
        self._chosen: Tensor | None = None
        self._is_backward = False
        # By layer, the `grad_fn` of each call whose gradient has not come yet, and the sum of those that have.
        self._waiting: dict[int, dict[int, Any]] = {}
        self._arrived: dict[int, list[_Call]] = {}

    def _find_layers(self) -> tuple[list[ScoredLayer], list[int]]:
        """The layers, and which of them are left to autograd."""
        layers = scored_layers(self._modules)
        by_autograd = [index for index, layer in enumerate(layers) if layer.takes_autograd]
        if by_autograd and is_sharded(self.model):
            layer = layers[by_autograd[0]]
            raise RuntimeError(
                f"The trained parameters of {layer.name!r} ({type(layer.module).__name__}) cannot be scored where "
                "FSDP or ZeRO-3 shards them: only autograd itself gives their gradients. Score by others: "
                'SpiceConfig(scoring_parameters="lora"), or scoring_target_modules=["q_proj", "v_proj"] where LoRA '
                'is on experts too ("all-linear" takes them in), or use DDP.'
            )
        return layers, by_autograd

    @property
    def layer_names(self) -> list[str]:
        """The layers' names, in the order of their numbers."""
        return [layer.name for layer in self._layers]

    def _is_scored(self, module: nn.Module) -> bool:
        """Whether a module, or another that shares a weight of its own, is scored."""
        weights = set(map(id, module.parameters(recurse=False)))
        return any(
            module is part.module or weights & set(map(id, layer.parameters))
            for layer in self._layers
            for part in layer.parts
        )

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
        self._waiting, self._arrived = {}, {}

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"], sink: GradientSink) -> Float[Tensor, "N"]:
        """Runs one forward and one backward, and hands each layer's sample gradients to `sink`.

        Inputs come without labels; labels are unshifted, −100 where no loss is taken, as the Trainer's collators make
        them. Returns the mean negative log-likelihood of each sample's label tokens in float32, 0 for a sample
        without any. Of a layer that no sample uses nothing comes. Raises a RuntimeError if the loss depends on
        a layer in a way that hooks do not see.
        """
        self._sink = sink
        rows = range(len(labels))
        try:
            while True:
                by_autograd = [self._layers[index].module for index in self._by_autograd]
                is_alone = len(rows) > 1 and must_score_alone(self.model, by_autograd)
                try:
                    return (self._compute_alone if is_alone else self._compute_rows)(inputs, labels, rows)
                except _MixedRowsError as error:
                    score_alone(self.model, str(error))
                except _AutogradNeededError as error:
                    layer = self._layers[error.args[0]]
                    score_alone_by(self.model, layer.name, layer.module)
                except _BypassedError as error:
                    self._leave_to_autograd(*error.args)
                self._restart(rows)
        finally:
            # Also after an error, such as a lack of memory, after which the caller goes on with fewer samples.
            self._forget()

    def _leave_to_autograd(
        self, indices: Sequence[int], why: str = "is bypassed: its weights are used without calling it"
    ) -> None:
        layers = [self._layers[index] for index in indices]
        warn_of_scoring_alone(self.model, layers[0].name, why)
        score_by_autograd([part.module for layer in layers for part in layer.parts])
        self._layers, self._by_autograd = self._find_layers()

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

    def _compute_alone(
        self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"], rows: Sequence[int]
    ) -> Float[Tensor, "N"]:
        """The same, a row at a time and without its padding."""
        if not self._can_repeat:
            raise RuntimeError(
                "Some layers take the tokens of all rows together, or padding changes a row's gradient, so rows must "
                "be scored one at a time, and where weights are sharded all processes in step. Set "
                "SpiceConfig(scoring_tokens_per_batch=1), or leave such layers out: "
                "SpiceConfig(scoring_target_modules=[...])."
            )
        losses = []
        for row in rows:
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
        self._chosen, self._leaves, self._waiting, self._arrived = chosen, [], {}, {}
        with torch.enable_grad():
            losses, logits = self.forward.compute(inputs, labels)
            self._loss_scale.start(logits, repeats=chosen is not None)
            total = (losses if chosen is None else losses[chosen.to(losses.device)]).sum()
            if self._by_autograd and self._num_samples > 1:
                self._check_without_autograd(total)
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

    def _check_without_autograd(self, total: Tensor) -> None:
        """Lets a batch pass whose rows leave the layers out that are autograd's, as texts do a vision tower."""
        graph = LossGraph(total)
        for index in self._by_autograd:
            if any(map(graph.has_weight, self._layers[index].parameters)):
                raise _AutogradNeededError(index)

    def _backward(self, total: Tensor) -> None:
        scaled, leaves = total * self._loss_scale.value, self._leaves
        by_autograd = self._by_autograd if self._num_samples == 1 else []
        if not (self._follows_others or by_autograd):
            if leaves:
                torch.autograd.backward(scaled, inputs=leaves)
            return
        others = LossGraph(total).other_leaves(leaves) if self._follows_others else []
        weights = [weight for index in by_autograd for weight in self._layers[index].parameters]
        if not total.requires_grad:
            return
        # Nothing is written into `.grad`, and no reduction fires.
        found = torch.autograd.grad(scaled, [*weights, *leaves, *others], allow_unused=True, materialize_grads=True)
        remaining = iter(found)
        for index in by_autograd:
            parts = [next(remaining).flatten() for _ in self._layers[index].parameters]
            gradients = torch.cat(parts)[None]
            self._loss_scale.watch(gradients)
            self._waiting[index] = {}
            layer = self._layers[index]
            for start, stop in layer.cuts(self._piece_numbers(gradients)):
                self._give(index, gradients[:, start:stop].float(), slice(0, 1), start)

    def _attach(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        yield from self.forward.attach()
        if self._is_whole:
            yield input_embedding(self.model).register_forward_hook(self._start_at_embedding)
        scored = {id(part.module) for layer in self._layers for part in layer.parts}
        scored |= {id(weight) for layer in self._layers for weight in layer.parameters}
        for module in self.model.modules():
            if not scored.isdisjoint(map(id, (module, *module.parameters(recurse=False)))):
                continue
            if any(weight.requires_grad for weight in module.parameters(recurse=False)):
                # Of a module around a scored one the output has a graph, whatever its inputs.
                if scored.isdisjoint(map(id, module.modules())):
                    yield module.register_forward_hook(_detach_below)
            elif module._forward_hooks and not self._is_whole:
                yield module.register_forward_hook(self._detach_leaf)
            elif module._forward_hooks and scored.isdisjoint(map(id, module.modules())):
                yield module.register_forward_hook(self._end_at_images, with_kwargs=True)
        # Before the user's own hooks, which may change the output. Those of FSDP and ZeRO-3 gather weights first.
        is_first = not is_sharded(self.model)
        for index, layer in enumerate(self._layers):
            for part in layer.parts:
                if not part.takes_autograd:
                    hook = self._make_hook(index, part)
                    yield part.module.register_forward_hook(hook, with_kwargs=True, prepend=is_first)

    def _start_at_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled() or self._is_backward or any(output is leaf for leaf in self._leaves):
            return None
        self._leaves.append(output.detach().requires_grad_(True))
        return self._leaves[-1]

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

    def _make_hook(self, index: int, layer: ScoredLayer) -> Callable[..., Any]:
        def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            # Checkpointing that evaluation mode does not switch off (FSDP's) runs forwards again within the backward;
            # no gradient comes to their outputs.
            if self._is_backward or self._layers[index].takes_autograd:
                return None
            given = (*args, *kwargs.values())
            if not isinstance(output, Tensor) or not (given and isinstance(given[0], Tensor)):
                raise _BypassedError([index])
            if not output.requires_grad:
                return None
            try:
                kept = layer.keep(args, kwargs, self._num_samples, self._num_tokens)
            except NotLinearError:
                raise _BypassedError([index], f"({type(module).__name__}) has no rule of its own") from None
            if len(output) == 1 < self._num_samples and kept is not None:
                # Positions that all samples share.
                output = output.expand(self._num_samples, *output.shape[1:])
            is_around = any(isinstance(value, nn.Module) for value in given)
            if is_around or not any(isinstance(value, Tensor) and value.requires_grad for value in given):
                # The backward ends here where nothing below is scored; DoRA calls layers within it, which may be. No
                # leaf itself, which the model could not change in place.
                self._leaves.append(output.new_zeros((), requires_grad=True))
                output = (output if is_around else output.detach()) + self._leaves[-1]
            # A module may be called more than once in a forward (shared layers); its gradient is the sum.
            calls = self._waiting.setdefault(index, {})
            call = len(calls)
            calls[call] = output.grad_fn
            output.register_hook(lambda gradient: self._receive(index, call, layer, kept, gradient))
            return output

        return keep_input

    def _receive(self, index: int, call: int, layer: ScoredLayer, kept: Any, output_gradient: Tensor) -> None:
        if kept is None:
            # Not before a gradient comes: DoRA calls its matrices with an identity first, of which none is taken.
            raise _MixedRowsError(layer.name)
        inputs = layer.inputs(kept)
        # Not -1: of an aLoRA a row without its invocation uses no token.
        output_gradient = output_gradient.detach().reshape(*inputs.shape[:2], output_gradient.shape[-1])
        if self._chosen is not None:
            where = self._chosen.to(inputs.device)
            inputs, output_gradient = inputs[where], output_gradient[where]
        self._loss_scale.watch(output_gradient)
        self._arrived.setdefault(index, []).append(_Call(layer, inputs, output_gradient))
        calls = self._waiting[index]
        del calls[call]
        if not calls:
            self._form(index)

    def _form(self, index: int) -> None:
        """Gives the sink the gradients of a layer, once those of all its calls' outputs have come."""
        calls, layer = self._arrived.pop(index), self._layers[index]
        num_samples, limit = len(calls[0].inputs), self._piece_numbers(calls[0].inputs)
        if layer.is_sparse and len(calls) == 1 and limit < num_samples * layer.num_coordinates:
            for row in range(num_samples):
                only = slice(row, row + 1)
                coordinates, values = layer.sparse_gradients(calls[0].inputs[only], calls[0].output_gradients[only])
                if self._sink is not None:
                    self._sink.add_sparse(index, row, coordinates, values / self._loss_scale.value)
            return
        for start, stop in layer.cuts(limit // num_samples):
            # All rows together, or fewer where a piece of one weight's row is too many.
            step = max(1, limit // (stop - start))
            for first in range(0, num_samples, step):
                rows = slice(first, min(first + step, num_samples))
                parts = [
                    call.layer.sample_gradients(call.inputs[rows], call.output_gradients[rows], start, stop)
                    for call in calls
                ]
                self._give(index, parts[0] if len(parts) == 1 else torch.stack(parts).sum(0), rows, start)

    def _give(self, index: int, gradients: Tensor, rows: slice, start: int) -> None:
        if self._loss_scale.value != 1.0:
            gradients = gradients / self._loss_scale.value
        if self._sink is not None:
            self._sink.add(index, gradients, rows, start)

    def _piece_numbers(self, like: Tensor) -> int:
        return PIECE_NUMBERS.get(like.device.type, _PIECE_NUMBERS_ELSEWHERE)

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
            if index not in self._arrived and any(map(graph.has_weight, self._layers[index].parameters))
        ]
        used = sorted({*unreached, *bypassed})
        if used and not self._is_whole and not is_sharded(self.model):
            raise _BypassedError(used)
        self._check_unused(missing, used)
        for index in missing:
            # Of a layer that is not used nothing comes: its gradient is 0.
            if index in self._arrived:
                self._form(index)
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
            f"{len(names)} of {len(self._layers)} scored layers got no gradient while scoring: {', '.join(names[:5])}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}. {reason}"
        )


def _detach_below(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Lets a trainable layer that is not scored leave no graph where nothing below it is scored."""
    if not isinstance(output, Tensor) or any(isinstance(value, Tensor) and value.requires_grad for value in args):
        return None
    return output.detach()
