"""One forward of a micro-batch: from token ids to the mean loss of each sample's labels.

    ids ─ embedding, detached ─ layers ─ head at label positions, in chunks ─ ℓ_n
                                       └ or logits of the columns that carry a label ─ ℓ_n

The first way is for models whose logits are their head's output; the other is for all others.

Axes: N samples, S tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.label_head import PLAIN, LabelHead, LabelLoss, sample_losses


def base_model(model: nn.Module) -> nn.Module:
    """The model within PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def input_embedding(model: nn.Module) -> nn.Module:
    """The layer that takes the token ids."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return embedding


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes; PEFT's own is (*args, **kwargs), so the base model's tells."""
    return inspect.signature(base_model(model).forward).parameters


def without_cache(model: nn.Module) -> dict[str, Any]:
    """The input that switches a cache off: with one, models do not tell the documents of a packed row apart."""
    return {"use_cache": False} if "use_cache" in forward_parameters(model) else {}


def move_inputs(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Model inputs with their tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def logits_of(outputs: Any) -> Float[Tensor, "N S V"]:
    """The logits in what a model's forward returned."""
    logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return logits


class ForwardLosses:
    """Runs a model's forward for the losses of its labels, with a stand-in for its head unless `takes_head` is off."""

    def __init__(self, model: nn.Module, *, takes_head: bool = True, label_loss: LabelLoss = PLAIN) -> None:
        self.model = model
        self.label_loss = label_loss
        self.head = LabelHead.of(model, label_loss) if takes_head else None
        self._keeps_logits = "logits_to_keep" in forward_parameters(model)
        self._extra_inputs = without_cache(model)
        self._saw_embedding = False

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks the model's embedding and head; removing the handles undoes it."""
        handles = [input_embedding(self.model).register_forward_hook(self._note_embedded)]
        return handles if self.head is None else handles + self.head.attach()

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> tuple[Float[Tensor, "N"], Tensor]:
        """Mean loss of each sample's labels in float32, 0 without any, and the logits of some positions at least.

        The losses are negative log-likelihoods, their gradients those of `label_loss`.
        The labels are unshifted, −100 where no loss is taken. Call it while the hooks are attached.
        """
        targets = labels[:, 1:]
        mask = targets != -100
        if self.head is not None and self.head.is_plain is None:
            self._look_at_head(self.head, inputs)
        if self.head is not None and self.head.is_plain:
            with self.head.expecting(targets, mask):
                logits = self._call(inputs)
                return self.head.losses(), logits
        keep: dict[str, Any] = {}
        if self._keeps_logits:
            # Only columns where some sample has a label go through the head: it is the largest matrix of a small
            # model.
            # The index stays on the CPU: the head may be on another device than the labels (`device_map`).
            columns = mask.any(0).nonzero().squeeze(1).cpu()
            keep, targets, mask = {"logits_to_keep": columns}, targets[:, columns], mask[:, columns]
        logits = self._call({**inputs, **keep})
        if not self._keeps_logits:
            logits = logits[:, :-1]
        targets, mask = targets.to(logits.device), mask.to(logits.device)
        return sample_losses(logits, targets, mask, self.label_loss), logits

    def _look_at_head(self, head: LabelHead, inputs: Mapping[str, Any]) -> None:
        """A forward more, once for a model: what a sample's gradient is must not depend on when it is computed."""
        keep = {"logits_to_keep": 1} if self._keeps_logits else {}
        with torch.no_grad(), head.observing():
            head.judge(self._call({**inputs, **keep}))

    def _call(self, inputs: Mapping[str, Any]) -> Tensor:
        self._saw_embedding = False
        outputs = self.model(**inputs, **self._extra_inputs)
        if not self._saw_embedding:
            raise RuntimeError(
                "The model's input embedding was not called while scoring, so no gradient can be taken. SPICE "
                "scores token ids: it cannot score a model that is fed `inputs_embeds`."
            )
        return logits_of(outputs)

    def _note_embedded(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._saw_embedding = True
