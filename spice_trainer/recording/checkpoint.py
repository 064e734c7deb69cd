"""SPICE's part of a checkpoint: `checkpoint-N/spice/`, never pickle.

    state.json, state.safetensors   position, replayed picks, a proxy's adapter and optimizer, logging window, totals
    records/                        the record files up to it, in segments

The schedule is a function of (rows, settings, seed, step), so the state is small. Nothing in it names a path.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from spice_trainer.sampling.schedule import PoolSchedule
from spice_trainer.utils.files import make_folder, read_regular, replace_file
from spice_trainer.utils.logging import logger, printable
from spice_trainer.utils.saved import parse_json, reading_saved

STATE_FOLDER = "spice"
RECORDS_COPY = f"{STATE_FOLDER}/records"
FORMAT_VERSION = 3
TRAINER_STATE = "trainer_state.json"

# What decides which rows are candidates when: continuing under another value would break "no row twice an epoch".
_SCHEDULE_KEYS = (
    "num_rows",
    "dataset_fingerprint",
    "steps_per_epoch",
    "samples_per_step",
    "pool_size",
    "pools_per_step",
    "pool_seed",
)
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")


def save_state(checkpoint: str | os.PathLike[str], state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes SPICE's state, JSON values and tensors, into a checkpoint's folder.

    An error ends the run, as one of the Trainer's own files there does: it would count a checkpoint that cannot be
    resumed as whole, and may remove the last good one for it. Without `trainer_state.json`, which comes later, this
    one is passed over on resume.
    """
    folder = Path(checkpoint) / STATE_FOLDER
    values = save(dict(tensors))
    sha256 = hashlib.sha256(values).hexdigest()
    text = json.dumps({"format_version": FORMAT_VERSION, **state, "tensors_sha256": sha256}, indent=1, allow_nan=False)
    try:
        make_folder(folder)
        replace_file(folder / "state.safetensors", values)
        replace_file(folder / "state.json", text + "\n")
    except OSError as error:
        raise OSError(
            error.errno,
            printable(
                f"SPICE's state cannot be written to {folder} ({error.strerror or error}), so that checkpoint is not "
                "complete. Free space there or make it writable, then resume with resume_from_checkpoint=True: the "
                "checkpoint before it is taken."
            ),
        ) from error


def describe_schedule(schedule: PoolSchedule, *, dataset_fingerprint: str | None = None) -> dict[str, Any]:
    """What decides which rows are candidates when, as JSON values; rows may have no fingerprint."""
    # How far a stream is read follows from `max_steps`, which a resumed run may raise.
    return {
        "num_rows": None if schedule.has_open_end else schedule.num_rows,
        "dataset_fingerprint": dataset_fingerprint,
        "steps_per_epoch": None if schedule.has_open_end else schedule.steps_per_epoch,
        "samples_per_step": schedule.shape.samples_per_step,
        "pool_size": schedule.pool_size,
        "pools_per_step": schedule.shape.pools_per_step,
        "pool_seed": schedule.seed,
    }


def load_state(
    checkpoint: str | os.PathLike[str], *, schedule: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the JSON values and tensors that [`save_state`] wrote, and checks that this run continues them.

    `schedule` and `config` are this run's, as saved under these names. A state that is missing, damaged, of another
    format or of another schedule is a `ValueError`; other settings are a warning.
    """
    folder = Path(checkpoint) / STATE_FOLDER
    path = folder / "state.json"
    if not os.path.lexists(path):
        raise _refusal(
            f"The checkpoint {checkpoint} has no {STATE_FOLDER}/state.json: it was written by a run without SPICE, "
            "whose steps are other steps. Detach SPICE to continue that run, or start a new run from its weights "
            "(`PeftModel.from_pretrained(model, checkpoint, is_trainable=True)`) instead of `resume_from_checkpoint`."
        )
    try:
        if folder.is_symlink():
            raise OSError("the folder is a link, which is not followed")
        state: dict[str, Any] = parse_json(read_regular(path))
        values = read_regular(folder / "state.safetensors")
        tensors = load(values)
        # Of another checkpoint it would be read just as well.
        sha256 = hashlib.sha256(values).hexdigest()
        if isinstance(state, dict) and state.get("tensors_sha256", sha256) != sha256:
            raise ValueError("state.safetensors is not the one that was written with state.json")
    except (ValueError, OSError, SafetensorError) as error:
        why = "damaged, or its writing was interrupted. Resume from an earlier checkpoint."
        if folder.is_symlink() or path.is_symlink():
            why = "a tree of links, as the hub's cache is. Copy it: `snapshot_download(..., local_dir=...)`."
        raise _refusal(f"SPICE's state in {folder} cannot be read ({error}): the checkpoint is {why}") from error
    with reading_saved(folder):
        _check_continues(state, path, checkpoint, schedule=schedule, config=config)
    return state, tensors


def _check_continues(
    state: Mapping[str, Any],
    path: Path,
    checkpoint: str | os.PathLike[str],
    *,
    schedule: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    if state.get("format_version") != FORMAT_VERSION:
        raise _refusal(
            f"{path} is of format version {state.get('format_version')}, this version of spice_trainer reads "
            f"{FORMAT_VERSION}. Resume with the version that wrote it."
        )
    changed = [
        f"{key} was {state['schedule'].get(key)} and is {schedule.get(key)}"
        for key in _SCHEDULE_KEYS
        if state["schedule"].get(key) != schedule.get(key)
        and not (key == "dataset_fingerprint" and None in (state["schedule"].get(key), schedule.get(key)))
    ]
    if changed:
        raise _refusal(
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


def checkpoint_to_resume(wanted: Any, output_dir: str | os.PathLike[str]) -> Any:
    """What the Trainer should resume for this `resume_from_checkpoint`; a `ValueError` if it is not whole.

    Of `True` the latest complete checkpoint. The Trainer itself would take an incomplete one, and fail.
    """
    if wanted is True:
        return last_complete_checkpoint(output_dir) or True
    if isinstance(wanted, str | os.PathLike) and (folder := Path(wanted)).is_dir() and not _is_complete(folder):
        complete = _checkpoints(folder)[0] or _checkpoints(folder.absolute().parent)[0]
        fix = f"resume_from_checkpoint={os.fspath(complete)!r}, the latest complete one" if complete else (
            "start the run anew, without resume_from_checkpoint: none beside it is complete"
        )  # fmt: skip
        raise _refusal(
            f"The checkpoint {folder} is not complete: it has no readable {TRAINER_STATE}, which is written last. "
            f"Likely cause: its writing was interrupted, or it is no checkpoint. Fix: {fix}."
        )
    return wanted


def check_same_step(checkpoint: str | os.PathLike[str], steps_trained: int, global_step: int) -> None:
    """Raises a `ValueError` if SPICE's state in a checkpoint is not of the step that the Trainer's is of."""
    if steps_trained != global_step:
        raise ValueError(
            f"The checkpoint {os.fspath(checkpoint)} is put together of two: SPICE's state in it was written after "
            f"{steps_trained} steps, and the Trainer's {TRAINER_STATE} after {global_step}. Rows would be skipped or "
            "trained on twice. Resume from a checkpoint that was not copied together."
        )


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The complete checkpoint with the highest number, which "the latest" means; `None` without any checkpoint.

    The Trainer takes the one with the highest number, also if its writing was interrupted. It writes
    `trainer_state.json` last, so a checkpoint without it is not complete. If none is, that is a `ValueError`.
    """
    folder = Path(output_dir)
    complete, incomplete = _checkpoints(folder)
    if incomplete and complete is None:
        raise _refusal(
            f"No checkpoint in {folder} is complete: {', '.join(incomplete)} without a readable {TRAINER_STATE}, "
            "because writing the first one was interrupted. Start the run anew, without resume_from_checkpoint."
        )
    if incomplete and complete is not None:
        is_one = len(incomplete) == 1
        logger.warning(
            "SPICE: %s in %s %s not complete, %s writing was interrupted. The run continues from %s.",
            ", ".join(incomplete), folder, "is" if is_one else "are", "its" if is_one else "their", complete.name,
        )  # fmt: skip
    return None if complete is None else os.fspath(complete)


def _checkpoints(folder: Path) -> tuple[Path | None, list[str]]:
    """The latest complete checkpoint in a folder, and the names of later ones that are not."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and (match := _CHECKPOINT_FOLDER.fullmatch(path.name))
    ]
    incomplete: list[str] = []
    for _, path in sorted(found, reverse=True):
        if _is_complete(path):
            return path, incomplete
        incomplete.append(path.name)
    return None, incomplete


def mark_incomplete(checkpoint: str | os.PathLike[str]) -> None:
    """Called before a checkpoint of the same number is overwritten: until its last file is written it is not whole."""
    (Path(checkpoint) / TRAINER_STATE).unlink(missing_ok=True)


def _is_complete(checkpoint: Path) -> bool:
    try:
        # The Trainer follows a link here too, and logs losses that are NaN.
        json.loads(read_regular((checkpoint / TRAINER_STATE).resolve()))
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def _refusal(text: str) -> ValueError:
    """An error that quotes a checkpoint or the name of a folder."""
    return ValueError(printable(text))
