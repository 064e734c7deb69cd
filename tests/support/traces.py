"""What a trainer and a model look like, to be compared before and after something that must leave no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def random_states() -> tuple[Any, ...]:
    """States of every generator a training run draws from on a CPU."""
    numpy_state = np.random.get_state()
    return (
        random.getstate(),
        (numpy_state[1].tolist(), *numpy_state[2:]),
        torch.get_rng_state().tolist(),
    )


def model_state(model: nn.Module) -> dict[str, Any]:
    """Weights, gradients, modes, hooks and forwards of every module."""
    return {
        "weights": {name: value.detach().clone().tolist() for name, value in model.state_dict().items()},
        "gradients": {
            name: None if parameter.grad is None else parameter.grad.tolist()
            for name, parameter in model.named_parameters()
        },
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: [list(getattr(module, table)) for table in HOOK_TABLES] for name, module in model.named_modules()
        },
        "bound": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def trainer_state(trainer: Any) -> dict[str, Any]:
    """Attributes by identity, callbacks, prepared loaders, the model, and the random states."""
    return {
        "attributes": {name: id(value) for name, value in vars(trainer).items()},
        "callbacks": [id(callback) for callback in trainer.callback_handler.callbacks],
        "arguments": trainer.args.to_dict(),
        "loaders": [id(loader) for loader in trainer.accelerator._dataloaders],
        "model": model_state(trainer.model),
        "random": random_states(),
    }
