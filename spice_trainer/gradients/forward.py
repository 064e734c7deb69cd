"""One forward of a micro-batch: from token ids to the mean loss of each sample's labels.

    ids ─ embedding, detached ─ layers ─ head at label positions, in chunks ─ ℓ_n
                                       └ or logits of the columns that carry a label ─ ℓ_n

The first way is for models whose logits are their head's output (module `label_head`); the other is for all others.

Axes: N samples, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spice_trainer.gradients.label_head import LabelHead, sample_losses
from spice_trainer.gradients.lora import forward_parameters


class ForwardLosses:
    """Runs a model's forward for the losses of its labels.

    Args:
        model (`torch.nn.Module`): The causal language model, without its DDP or DeepSpeed wrapper.
        takes_head (`bool`, *optional*, defaults to `True`): Whether something may stand in for the model's head.
    """

    def __init__(self, model: nn.Module, *, takes_head: bool = True) -> None:
        self.model = model
        self.head = LabelHead.of(model) if takes_head else None
        parameters = forward_parameters(model)
        self._keeps_logits = "logits_to_keep" in parameters
        self._extra_inputs = {"use_cache": False} if "use_cache" in parameters else {}
        self._saw_embedding = False

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks the model's embedding and head; removing the handles undoes it."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        handles = [embedding.register_forward_hook(self._detach_embedded)]
        return handles if self.head is None else handles + self.head.attach()

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> tuple[Float[Tensor, "N"], Tensor]:
        """Runs a forward, while the hooks are attached.

        Args:
            inputs (`Mapping[str, Any]`): Model inputs without labels.
            labels (`torch.Tensor` of shape `(N, S)`): Token labels, unshifted, −100 where no loss is taken.

        Returns:
            `tuple`: The mean loss of each sample's labels in float32, 0 for a sample without any, and the model's
            logits, of some positions at least.

        Raises:
            RuntimeError: If the model's input embedding was not called.
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
        return sample_losses(logits, targets.to(logits.device), mask.to(logits.device)), logits

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
        logits: Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        return logits

    def _detach_embedded(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # PEFT lets it require a gradient where a model trains with checkpointing.
        self._saw_embedding = True
        return output.detach()
