"""What the worker sees of a run: whole weights from sharded models, and what scoring found.

Weights are read where they are whole in every mode: inside a layer's forward, where FSDP and ZeRO-3 have
gathered them. Nothing is asked of the wrappers, so nothing is added to what they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.scores import PoolScores

WRAPPER = "ParamWrapper"
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")


def plain_name(name: str) -> str:
    """A module's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


class LoaderWalk(TrainerCallback):
    """Builds and walks training loaders between the steps, as a callback of one process alone may."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Looks at every batch."""
        for loader in (train_dataloader, self.trainer.get_train_dataloader()):
            assert sum(1 for _ in loader) == len(loader)


class WeightProbe(TrainerCallback):
    """Copies what trains, whole, from the first training forward of every step."""

    def __init__(self) -> None:
        self.before_step: list[dict[str, Tensor]] = []
        self._current: dict[str, Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Sets the hooks, after the wrappers have set theirs, so that they come second."""
        self.watch(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for the weights of the step's first forward."""
        self._current = {}
        self.before_step.append(self._current)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops asking before the weights change."""
        self._current = None

    def watch(self, model: nn.Module) -> None:
        """Sets the hooks."""
        for name, module in model.named_modules():
            keys = [key for key, value in module.named_parameters(recurse=False) if value.requires_grad]
            # The matrices on experts are used within their wrapper's call, without one of their own.
            caller = module
            if ".lora_" in name and type(wrapper := model.get_submodule(name.split(".lora_")[0])).__name__ == WRAPPER:
                caller = wrapper
            if keys:
                caller.register_forward_pre_hook(self._hook(plain_name(name), module, keys))

    def _hook(self, name: str, holder: nn.Module, keys: Sequence[str]) -> Any:
        def copy(module: nn.Module, args: Any) -> None:
            for key in keys if self._current is not None else ():
                self._current.setdefault(f"{name}.{key}", getattr(holder, key).detach().clone())

        return copy

    def read(self, trainer: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of this moment, from a forward that every process does."""
        self._current = weights = {}
        model = trainer.model_wrapped
        was_training = model.training
        model.eval()
        with torch.no_grad():
            model(**batch)
        model.train(was_training)
        self._current = None
        return weights


@dataclass
class ScoreWatch:
    """Keeps what scoring found about the pools that this process owns."""

    steps: list[list[PoolScores]] = field(default_factory=list)

    def install(self) -> None:
        """Watches every scorer of this process."""
        score = GradientScorer.score
        watch = self

        def watched(self: GradientScorer, *args: Any, **kwargs: Any) -> Iterator[PoolScores]:
            pools: list[PoolScores] = []
            watch.steps.append(pools)
            for scores in score(self, *args, **kwargs):
                pools.append(scores)
                yield scores

        GradientScorer.score = watched

    def tensors(self) -> dict[str, Tensor]:
        """Gram matrices, norms and, where kept, normalised gradients, by step and pool."""
        found: dict[str, Tensor] = {}
        for step, pools in enumerate(self.steps):
            for scores in pools:
                name = f"step{step}.pool{scores.pool}"
                found[f"{name}.gram"] = scores.gram
                found[f"{name}.norms"] = scores.gradient_norms
                if scores.gradients is not None:
                    found[f"{name}.gradients"] = scores.gradients.double() * scores.row_weights[:, None]
        return found
