"""The model of a command, as TRL's `ModelConfig` names it, with a fresh adapter."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from peft import LoraConfig

from spice_trainer.config import SpiceConfig
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.utils.random import seeded_random_state


def load_model(model: Any, config: SpiceConfig, *, accelerator: Accelerator, seed: int) -> ProxyModel:
    """Loads the model and puts LoRA on it, the same on every process and when the command is repeated."""
    from trl import get_quantization_config

    quantization = get_quantization_config(model)
    model_kwargs: dict[str, Any] = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        # TRL 1.16's ModelConfig no longer asks; who needs it works from Python.
        "trust_remote_code": getattr(model, "trust_remote_code", False),
    }
    if quantization is not None:
        model_kwargs |= {"quantization_config": quantization, "device_map": {"": accelerator.device}}
    lora = LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        # `None` leaves them to the selector.
        target_modules=model.lora_target_modules,
        use_rslora=model.use_rslora,
        task_type="CAUSAL_LM",
    )
    with seeded_random_state(accelerator.device, seed):
        return ProxyModel.from_pretrained(
            model.model_name_or_path,
            lora_config=lora,
            model_kwargs=model_kwargs,
            learning_rate=config.proxy_learning_rate,
            update_every=config.proxy_update_every,
        )
