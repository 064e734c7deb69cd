"""SPICE for the Hugging Face Trainer: each step trains on the candidates that add most information, least conflict.

The paper is SPICE (arXiv 2601.23155). One line adds it to a working script:

```python
>>> attach_spice(trainer, SpiceConfig())
>>> trainer.train()
```
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# The rules that `SpiceConfig(strategy=...)` may name register themselves.
from spice_trainer.selection import (
    PickOptions,
    Picks,
    PoolScores,
    Selection,
    Strategy,
    register_strategy,
    select,
    select_from_gradients,
)

if TYPE_CHECKING:
    from spice_trainer.config import SpiceConfig
    from spice_trainer.pilot.report import PilotReport
    from spice_trainer.pilot.run import run_pilot
    from spice_trainer.proxy.model import ProxyModel
    from spice_trainer.sampling.sampler import SpiceSampler
    from spice_trainer.subset.select import SelectedSubset, select_subset
    from spice_trainer.trainer.attach import SpiceTrainer, SpiceTrainerMixin, attach_spice, detach_spice
    from spice_trainer.trainer.callback import SpiceCallback
    from spice_trainer.trainer.handle import SpiceHandle
    from spice_trainer.trainer.sft import SpiceSFTTrainer

try:
    __version__ = _version("spice-trainer")
except _PackageNotFoundError:
    # A source tree on PYTHONPATH, not installed.
    __version__ = "0+unknown"

__all__ = [
    "PickOptions",
    "Picks",
    "PilotReport",
    "PoolScores",
    "ProxyModel",
    "SelectedSubset",
    "Selection",
    "SpiceCallback",
    "SpiceConfig",
    "SpiceHandle",
    "SpiceSFTTrainer",
    "SpiceSampler",
    "SpiceTrainer",
    "SpiceTrainerMixin",
    "Strategy",
    "__version__",
    "attach_spice",
    "detach_spice",
    "register_strategy",
    "run_pilot",
    "select",
    "select_from_gradients",
    "select_subset",
]

if not TYPE_CHECKING:
    if find_spec("trl") is None:
        # What looks at every public name, as `import *` does, must not fail where TRL is not installed.
        __all__.remove("SpiceSFTTrainer")

    # Imported when first asked for: transformers, PEFT and accelerate cost seconds that selecting on a Gram matrix and
    # reading a manifest have no use for.
    _MODULES = {
        "PilotReport": "pilot.report",
        "ProxyModel": "proxy.model",
        "SelectedSubset": "subset.select",
        "SpiceCallback": "trainer.callback",
        "SpiceConfig": "config",
        "SpiceHandle": "trainer.handle",
        "SpiceSFTTrainer": "trainer.sft",
        "SpiceSampler": "sampling.sampler",
        "SpiceTrainer": "trainer.attach",
        "SpiceTrainerMixin": "trainer.attach",
        "attach_spice": "trainer.attach",
        "detach_spice": "trainer.attach",
        "run_pilot": "pilot.run",
        "select_subset": "subset.select",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        except ImportError as error:
            if name != "SpiceSFTTrainer":
                raise
            raise ImportError(f"SpiceSFTTrainer needs TRL: pip install trl. ({error})") from error
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
