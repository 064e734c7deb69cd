"""Whether checkpoints of a sharded model will hold its adapter.

With PEFT 0.21 they don't under FSDP1: PEFT looks in the full state dict for names that it makes from the model's
modules, and every layer that FSDP1 wraps adds `_fsdp_wrapped_module` to them, which the state dict's names lack. The
adapter file is then written empty, and resuming goes on from the weights the run began with, both without a word.
PEFT itself is asked here, with names alone, so that a release that finds them needs no change.
"""

from __future__ import annotations

import peft
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from spice_trainer.utils.logging import logger

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def check_adapter_is_saved(model: nn.Module, *, is_resumed: bool) -> None:
    """Warns before training that checkpoints will lack the adapter, and refuses to resume from one that does.

    Args:
        model (`torch.nn.Module`): The model as it trains, wrapped.
        is_resumed (`bool`): Whether the run goes on from a checkpoint.

    Raises:
        ValueError: If the run is resumed and the checkpoint's adapter cannot have been loaded.
    """
    # By name: torch builds without distributed support have no such class.
    if type(model).__name__ != "FullyShardedDataParallel" or finds_adapter(model):
        return
    problem = (
        f"PEFT {peft.__version__} does not find the adapter in a model that FSDP1 has wrapped, so a checkpoint's "
        "adapter file is empty"
    )
    fix = 'Use FSDP2: `fsdp_version: 2` in the accelerate configuration, or `fsdp_config={"version": 2}`'
    if is_resumed:
        raise ValueError(
            f"This run cannot be resumed: {problem} and nothing of it is loaded. Training would go on from the "
            f"adapter's initial weights with the optimizer's later state. {fix}, and start anew."
        )
    logger.warning("SPICE: %s, and so will be what is saved at the end. %s.", problem, fix)


def finds_adapter(model: nn.Module) -> bool:
    """Whether PEFT finds adapter weights among a wrapped model's names, as they stand in its full state dict."""
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if peft_model is None:
        return True
    prefix = next(name for name, module in model.named_modules() if module is peft_model)
    names = [name.removeprefix(f"{prefix}.") for name, _ in model.named_parameters()]
    state_dict = {_plain(name): torch.empty(0, device="meta") for name in names}
    return bool(get_peft_model_state_dict(peft_model, state_dict=state_dict))


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
