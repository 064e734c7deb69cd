"""SPICE for the Hugging Face Trainer: each step trains on the candidates that add most information, least conflict.

The paper is SPICE (arXiv 2601.23155). One line adds it to a working script:

```python
>>> attach_spice(trainer, SpiceConfig())
>>> trainer.train()
```
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from spice_trainer.config import SpiceConfig
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.selection.greedy import Selection, select, select_from_gradients
from spice_trainer.subset.select import select_subset
from spice_trainer.trainer.attach import SpiceTrainer, SpiceTrainerMixin, attach_spice, detach_spice
from spice_trainer.trainer.callback import SpiceCallback

if TYPE_CHECKING:
    from spice_trainer.trainer.sft import SpiceSFTTrainer

__version__ = version("spice-trainer")

__all__ = [
    "ProxyModel",
    "Selection",
    "SpiceCallback",
    "SpiceConfig",
    "SpiceSFTTrainer",
    "SpiceSampler",
    "SpiceTrainer",
    "SpiceTrainerMixin",
    "__version__",
    "attach_spice",
    "detach_spice",
    "select",
    "select_from_gradients",
    "select_subset",
]


def __getattr__(name: str) -> Any:
    if name == "SpiceSFTTrainer":
        # TRL is optional and slow to import.
        try:
            from spice_trainer.trainer.sft import SpiceSFTTrainer
        except ImportError as error:
            raise ImportError(f"SpiceSFTTrainer needs TRL: pip install trl. ({error})") from error
        return SpiceSFTTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
