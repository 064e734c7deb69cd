"""SPICE's part of a checkpoint: `checkpoint-N/spice/state.json` and `state.safetensors`, never pickle.

The schedule is a function of (rows, settings, seed, step), so the state is small: replayed picks, the logging window,
the run's totals, and how many bytes of the record files belong to the steps done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from spice_trainer.logs import logger
from spice_trainer.pools import PoolSchedule

STATE_FOLDER = "spice"
FORMAT_VERSION = 1

# What decides which rows are candidates when: continuing under another value would break "no row twice an epoch".
_SCHEDULE_KEYS = ("num_rows", "steps_per_epoch", "samples_per_step", "pool_size", "pools_per_step", "pool_seed")


def save_state(checkpoint: str | os.PathLike[str], state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes SPICE's state into a checkpoint.

    Args:
        checkpoint (`str` or `os.PathLike`): The checkpoint's folder.
        state (`Mapping[str, Any]`): JSON values.
        tensors (`Mapping[str, torch.Tensor]`): Tensors.
    """
    folder = Path(checkpoint) / STATE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "state.safetensors")
    text = json.dumps({"format_version": FORMAT_VERSION, **state}, indent=1, allow_nan=False)
    (folder / "state.json").write_text(text + "\n")


def describe_schedule(schedule: PoolSchedule) -> dict[str, Any]:
    """What decides which rows are candidates when, as JSON values.

    Args:
        schedule ([`~spice_trainer.pools.PoolSchedule`]): The run's schedule.
    """
    return {
        "num_rows": schedule.num_rows,
        "steps_per_epoch": schedule.steps_per_epoch,
        "samples_per_step": schedule.shape.samples_per_step,
        "pool_size": schedule.pool_size,
        "pools_per_step": schedule.shape.pools_per_step,
        "pool_seed": schedule.seed,
    }


def load_state(
    checkpoint: str | os.PathLike[str], *, schedule: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads SPICE's state from a checkpoint and checks that this run continues it.

    Args:
        checkpoint (`str` or `os.PathLike`): The checkpoint's folder.
        schedule (`Mapping[str, Any]`): This run's schedule, as saved under `"schedule"`.
        config (`Mapping[str, Any]`): This run's settings, as saved under `"config"`.

    Returns:
        `tuple`: The JSON values and the tensors.

    Raises:
        ValueError: If the checkpoint has no SPICE state, one of another format, or one of another schedule.
    """
    folder = Path(checkpoint) / STATE_FOLDER
    path = folder / "state.json"
    if not path.exists():
        raise ValueError(
            f"The checkpoint {checkpoint} has no {STATE_FOLDER}/state.json: it was written by a run without SPICE, "
            "whose steps are other steps. Detach SPICE to continue that run, or start a new run from its weights "
            "(`PeftModel.from_pretrained(model, checkpoint, is_trainable=True)`) instead of `resume_from_checkpoint`."
        )
    state: dict[str, Any] = json.loads(path.read_text())
    if state.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} is of format version {state.get('format_version')}, this version of spice_trainer reads "
            f"{FORMAT_VERSION}. Resume with the version that wrote it."
        )
    changed = [
        f"{key} was {state['schedule'].get(key)} and is {schedule.get(key)}"
        for key in _SCHEDULE_KEYS
        if state["schedule"].get(key) != schedule.get(key)
    ]
    if changed:
        raise ValueError(
            f"The checkpoint {checkpoint} belongs to another selection schedule: {'; '.join(changed)}. The epoch's "
            "pools would not be the ones it was cut into. Resume with the dataset, batch size, seed and pool settings "
            "of the run that wrote it, or start a new run."
        )
    others = [
        f"{key} was {state['config'].get(key)} and is {value}"
        for key, value in config.items()
        if state["config"].get(key) != value
    ]
    if others:
        logger.warning(
            "SPICE: settings changed since the checkpoint %s: %s. Picks from here on use the new ones.",
            checkpoint,
            "; ".join(others),
        )
    return state, load_file(folder / "state.safetensors")
