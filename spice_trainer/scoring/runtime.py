"""What scoring needs of the run around it, in one piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spice_trainer.distributed import Processes
from spice_trainer.gradients.label_head import PLAIN, LabelLoss


def _no_optimizer() -> None:
    """For runs whose settings do not look into one."""


@dataclass(frozen=True)
class Runtime:
    """The model that scores, how it runs, and with whom."""

    get_model: Callable[[], nn.Module]  # The model of the moment, unwrapped from DDP or DeepSpeed.
    seed: int = 0  # Of the run's own draws: the sketch, a proxy's dropout.
    processes: Processes = field(default_factory=Processes)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # The context of the training precision.
    get_optimizer: Callable[[], Any] = _no_optimizer
    label_loss: LabelLoss = PLAIN  # The loss that gradients are taken of.
