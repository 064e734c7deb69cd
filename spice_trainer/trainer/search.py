"""SPICE's settings in `hyperparameter_search`, by their own names beside those of the `TrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from transformers import TrainingArguments

from spice_trainer.config import SpiceConfig
from spice_trainer.utils.logging import logger

SEARCHABLE = frozenset(field.name for field in fields(SpiceConfig))
# What a proxy is made of when SPICE is attached.
_OF_THE_PROXY = ("proxy_model_name_or_path", "proxy_learning_rate", "proxy_update_every")


def searched_config(config: SpiceConfig, values: Mapping[str, Any]) -> SpiceConfig:
    """The settings of a trial; a ValueError for those that a run cannot change any more."""
    fixed = [name for name in _OF_THE_PROXY if name in values]
    if fixed:
        raise ValueError(
            f"The search varies {', '.join(fixed)}, and the proxy was made when SPICE was attached, so every trial "
            "would have the same. Fix: leave this out of hp_space, and compare proxies in runs of their own."
        )
    # Samplers draw NumPy's numbers too.
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return replace(config, **plain)


def warn_of_settings_in_arguments(args: TrainingArguments, config: SpiceConfig) -> None:
    """Says so where a search's best values were set as the Trainer's arguments, which SPICE does not read."""
    own = {field.name for field in fields(args)}
    for name, value in vars(args).items():
        if name in SEARCHABLE and name not in own and value != getattr(config, name):
            logger.warning(
                "SPICE: args.%s=%r has no effect, %s stays %r. Settings are read when SPICE is attached. Fix: call "
                "detach_spice(trainer), then attach_spice(trainer, SpiceConfig(%s=%r)).",
                name, value, name, getattr(config, name), name, value,
            )  # fmt: skip
