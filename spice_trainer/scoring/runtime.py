"""What scoring needs of the run around it, in one piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from spice_trainer.distributed import Processes


def _no_optimizer() -> None:
    """For runs whose settings do not look into one."""


@dataclass(frozen=True)
class Runtime:
    """The model that scores, how it runs, and with whom.

    Args:
        get_model (`Callable[[], torch.nn.Module]`): Gives the model at the moment of scoring, unwrapped from DDP or
            DeepSpeed.
        seed (`int`, *optional*, defaults to `0`): Of the run's own draws: the sketch, a proxy's dropout.
        processes ([`Processes`], *optional*): Those that share the work; by default this one.
        autocast (`Callable`, *optional*): Makes the context of the training precision.
        get_optimizer (`Callable`, *optional*): Gives the model's optimizer, for settings that look into it.
    """

    get_model: Callable[[], nn.Module]
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    get_optimizer: Callable[[], Any] = _no_optimizer
