"""A model on the CPU that runs out of memory as one on a small GPU would: in passes of more than so many tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ...")


class ShortMemory:
    """Makes a model raise an out-of-memory error in every pass of more than `max_tokens` tokens, padding included.

    Args:
        model (`torch.nn.Module`): The model.
        max_tokens (`int`): What fits.
        in_backward (`bool`, *optional*, defaults to `False`): Raise in the backward, when the gradients of the later
            layers have been taken already.
        training (`bool`, *optional*, defaults to `False`): Which passes it concerns: those of training, or scoring.
        error (`Exception`, *optional*): What is raised.
    """

    def __init__(
        self,
        model: nn.Module,
        max_tokens: int,
        *,
        in_backward: bool = False,
        training: bool = False,
        error: Exception = CUDA,
    ) -> None:
        self.max_tokens, self.in_backward, self.training, self.error = max_tokens, in_backward, training, error
        self.num_raised = 0
        self.passes: list[int] = []
        self._model, self._tokens = model, 0
        layers = [module for name, module in model.named_modules() if name.endswith("layers.0")]
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            layers[0].register_forward_hook(self._after_first_layer),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._tokens = kwargs["input_ids"].numel() if module.training == self.training else 0
        if self._tokens:
            self.passes.append(self._tokens)
        if not self.in_backward:
            self._check()

    def _after_first_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.in_backward and hidden.requires_grad:
            hidden.register_hook(lambda gradient: self._check())

    def _check(self) -> None:
        if self._tokens > self.max_tokens:
            self.num_raised += 1
            raise type(self.error)(*self.error.args)
