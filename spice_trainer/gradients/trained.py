"""Which modules of a model train at the moment. Looked at again in each step, since callbacks freeze layers.

What trains is what requires a gradient and is in the optimizer, as far as that is known: a layer unfrozen after the
Trainer has made its optimizer gets gradients that nobody applies, and so does a parameter put in another's place.

Names are those from before a wrapper changed them. An adapter that was switched, merged or taken out is another matter
than a frozen layer: the model no longer computes what the run began with, which ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

from torch import nn

from spice_trainer.config import ScoringParameters
from spice_trainer.distributed import Processes
from spice_trainer.gradients.layers.base import set_idle
from spice_trainer.gradients.lora import adapter_state, find_trained_modules, split_adapter
from spice_trainer.utils.logging import logger


class TrainedLayers:
    """Follows what trains; `modules` are those of now, at first those of `find_trained_modules`."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        get_optimizer: Callable[[], Any] = lambda: None,
        scoring_parameters: ScoringParameters = "all",
    ) -> None:
        self._scoring_parameters: ScoringParameters = scoring_parameters
        self.modules = dict(modules)
        self._model = model
        self._get_optimizer = get_optimizer
        self._named = dict(model.named_modules())
        self._holders = [module for module in self._named.values() if module._parameters]
        # What is compared in each step: each parameter's flag and identity, and the optimizer's number of parameters.
        self._flags, self._identities = self._read()
        self._num_held, self._is_held, self._trains = 0, False, self._flags
        self._adapted = [_AdaptedLayer(self._named, *key) for key in dict.fromkeys(map(split_adapter, modules))]

    @property
    def names(self) -> list[str]:
        """What may train: LoRA layers and others that hold weights, also those that are frozen."""
        return [name for name, module in self._named.items() if split_adapter(name)[1] or module._parameters]

    def follow(self, processes: Processes, model: nn.Module | None = None) -> bool:
        """Looks again, at the `model` that works now; whether something changed. A collective.

        A RuntimeError if nothing trains any more, the adapter is another one or the processes train different layers,
        an UnsupportedModelError if what trains now cannot be scored.
        """
        with processes.failing_together("looking at which layers train"):
            if model is not None and model is not self._model:
                self._check_model(model)
            is_changed = self._follow()
        everyones = processes.gather((len(self.modules), crc32("\n".join(self.modules).encode())))
        for rank, theirs in enumerate(everyones):
            if theirs != everyones[0]:
                raise RuntimeError(
                    f"Process {rank} of {len(everyones)} trains {theirs[0]} layers, and process 0 trains "
                    f"{everyones[0][0]}{' others' if theirs[0] == everyones[0][0] else ''}. Likely cause: a callback "
                    "that freezes layers on some of the processes. Fix: let it do the same on all."
                )
        return is_changed

    def _check_model(self, model: nn.Module) -> None:
        """A wrapper may have come around the model, and may be another each time."""
        there = set(map(id, model.modules()))
        # FSDP1 and compiled regions may hide some.
        if there.isdisjoint(map(id, self._named.values())):
            raise RuntimeError(
                f"The trainer's model is another {type(model).__name__} than the run began with, which goes on "
                "training. Likely cause: a callback that sets `trainer.model`. Fix: leave it until the run has ended."
            )

    def _follow(self) -> bool:
        for layer in self._adapted:
            layer.check()
        groups = getattr(self._get_optimizer(), "param_groups", ())
        (flags, identities), num_held = self._read(), sum(len(group["params"]) for group in groups)
        # Sharded into flat parameters, most modules have none of their own: what they trained stays.
        if len(flags) != len(self._flags) or (flags, identities, num_held) == (
            self._flags, self._identities, self._num_held
        ):  # fmt: skip
            return False
        if not any(flags):
            raise RuntimeError(
                "Every layer was frozen since the last step, so nothing trains and there is no gradient to score "
                "by. Likely cause: a callback that freezes layers. Fix: let it leave one that trains, or end the run "
                "with `control.should_training_stop = True`."
            )
        held = {id(parameter) for group in groups for parameter in group["params"]}
        was_held = self._is_held
        self._is_held = any(id(weight) in held for module in self.modules.values() for weight in module.parameters())
        if was_held and not self._is_held:
            raise RuntimeError(
                "None of the layers that trained has a parameter in the optimizer any more, so no step changes them. "
                "Likely cause: a callback put other parameters in their place (`module.weight = nn.Parameter(...)`). "
                "Fix: let it write into those that are there (`module.weight.data.copy_(...)`)."
            )
        if not self._is_held:
            # There is none yet, or it has others in their place.
            held = {id(parameter) for module in self._holders for parameter in module.parameters(recurse=False)}
        self._warn_of_idle(held)
        for module in self._holders:
            for weight in module.parameters(recurse=False):
                set_idle(weight, is_idle=id(weight) not in held)
        found = find_trained_modules(
            self._model,
            self._named,
            lambda parameter: parameter.requires_grad and id(parameter) in held,
            scoring_parameters=self._scoring_parameters,
        )
        trains = [flag and identity in held for flag, identity in zip(flags, identities, strict=True)]
        is_same = trains == self._trains and found.keys() == self.modules.keys()
        self.modules, self._flags, self._identities, self._num_held = found, flags, identities, num_held
        self._trains = trains
        return not is_same

    def _read(self) -> tuple[list[bool], list[int]]:
        weights = [weight for module in self._holders for weight in module._parameters.values() if weight is not None]
        return [weight.requires_grad for weight in weights], list(map(id, weights))

    def _warn_of_idle(self, held: set[int]) -> None:
        """Says so where something requires a gradient in vain."""
        idle = [
            name
            for name, module in self._named.items()
            if any(weight.requires_grad and id(weight) not in held for weight in module.parameters(recurse=False))
        ]
        if idle:
            logger.warning(
                "SPICE: %d layers have parameters that require a gradient but are not in the optimizer, so they "
                "neither train nor score (%s). The Trainer gives its optimizer what requires a gradient when training "
                "begins. Fix: freeze layers in on_train_begin and unfreeze them later, or use "
                "optimizer.add_param_group; write into a parameter rather than put another in its place.",
                len(idle),
                idle[0],
            )


class _AdaptedLayer:
    """A layer of PEFT's around one of the model's, and the adapters that worked when scoring began."""

    def __init__(self, named: Mapping[str, nn.Module], name: str, adapter: str) -> None:
        self.name, self.adapter = name, adapter
        self._layer: Any = named[name]
        parent, _, self._child = name.rpartition(".")
        self._siblings = named[parent]._modules if name else {self._child: self._layer}
        self._state = self._read()
        self._active = list(adapter_state(self._layer, "active_adapters", ()))

    def _read(self) -> tuple[Any, ...]:
        layer = self._layer
        state = [adapter_state(layer, name, None) for name in ("active_adapter", "disable_adapters", "merged")]
        return (*state, self._siblings.get(self._child))

    def check(self) -> None:
        """Raises a RuntimeError if another adapter works now, or none."""
        state = self._read()
        if state == self._state:
            return
        done, undo = self._change()
        if done:
            what = f"adapter {self.adapter!r}" if self.adapter else f"layer {self.name!r}"
            raise RuntimeError(
                f"The {what} was {done} in mid-run: {self.name!r} no longer computes what SPICE "
                f"scores by and the optimizer trains. Likely cause: a callback. Fix: have it {undo} before the next "
                "step begins, or do this to a copy of the model or after `train()`."
            )
        self._state = state

    def _change(self) -> tuple[str, str]:
        """What was done to the adapter and what undoes it, if it is another one."""
        layer, now = self._layer, self._siblings.get(self._child)
        if self.adapter not in getattr(layer, "lora_A", (self.adapter,)):
            return "deleted", "keep the adapter"
        if getattr(layer, "merged", False):
            return "merged into the base weights", "call `model.unmerge_adapter()`"
        # A wrapper may have come around it.
        if now is None or all(module is not layer for module in now.modules()):
            return "taken out of the model", f"keep the {'adapter' if self.adapter else 'layer'}"
        if adapter_state(layer, "disable_adapters", False):
            return "switched off", "call `model.enable_adapter_layers()`"
        active = list(adapter_state(layer, "active_adapters", self._active))
        if active != self._active:
            others = ", ".join(map(repr, active)) or "none"
            return f"replaced by {others}", f"call `model.set_adapter({self.adapter!r})`"
        return "", ""
