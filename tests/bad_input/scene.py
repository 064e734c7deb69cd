"""What a row of the table of bad input is, and where it is played."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from spice_trainer import SpiceConfig, attach_spice, select_subset
from tests.support.models import tiny_lora_model
from tests.support.traces import model_state, trainer_state
from tests.support.trainers import make_trainer, tiny_dataset

CREATING = "on creation"
ATTACHING = "attaching"
STARTING = "`train()`, before the first step"
TRAINING = "while training"
CALLING = "at once"
# Under raw gradients a run warns of what it picks.
SETTINGS: dict[str, Any] = {"pool_size": 10, "num_selected": 4, "gradient_normalization": "sqrt_tokens"}
# What a run may write while it trains.
RECORDS = "run/spice/"

_finished: dict[str, Path] = {}


@dataclass(frozen=True)
class BadInput:
    """One thing that a user can get wrong.

    Args:
        name: Of the test.
        wrong: What the user did, for people.
        when: When it is noticed.
        error: What is raised; `None` goes on, with a warning.
        says: Parts of the text, in order.
        prepare: Sets the scene up to where the user makes the mistake, and returns that.
        skip: Whether the installed libraries don't know the case.
    """

    name: str
    wrong: str
    when: str
    error: type[BaseException] | None
    says: tuple[str, ...]
    prepare: Callable[[Scene], Callable[[], Any]]
    skip: bool = False


class Scene:
    """A folder, tiny models and trainers for one row, and what must be as before.

    Args:
        folder: An empty folder.
        patch: For what this machine has not.
        cache: Folder of finished runs that many rows start from.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, cache: Path) -> None:
        self.folder = folder
        self.patch = patch
        self._cache = cache
        self.trainer: Any = None
        self.models: list[Any] = []
        self.datasets: list[Any] = []

    # What rows begin with

    def make(self, **options: Any) -> Any:
        """A trainer, SPICE not attached."""
        self.trainer = make_trainer(self.folder / "run", **options)
        self.datasets.append(self.trainer.train_dataset)
        return self.trainer

    def attach(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        proxy: Any = None,
        validation_dataset: Any = None,
        **options: Any,
    ) -> Callable[[], Any]:
        """Attaching to a new trainer."""
        trainer = self.make(**options)
        config = SpiceConfig(**(SETTINGS | dict(settings or {})))
        return lambda: attach_spice(trainer, config, proxy=proxy, validation_dataset=validation_dataset)

    def train(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        proxy: Any = None,
        resume: str | bool | None = None,
        validation_dataset: Any = None,
        **options: Any,
    ) -> Callable[[], Any]:
        """Training a new trainer with SPICE attached."""
        self.make(**options)
        config = SpiceConfig(**(SETTINGS | dict(settings or {})))
        attach_spice(self.trainer, config, proxy=proxy, validation_dataset=validation_dataset, verify=False)
        return lambda: self.trainer.train(resume_from_checkpoint=resume)

    def finished(self, settings: Mapping[str, Any] | None = None, name: str = "plain", **options: Any) -> Path:
        """A copy of a finished run's folder, with the checkpoints 2, 4 and 6."""
        if name not in _finished or not _finished[name].exists():
            source = self._cache / name
            saving = {"save_strategy": "steps", "save_steps": 2}
            trainer = make_trainer(source, **saving, **options)
            if name != "without":
                attach_spice(trainer, SpiceConfig(**(SETTINGS | dict(settings or {}))), verify=False)
            trainer.train()
            _finished[name] = source
        return Path(shutil.copytree(_finished[name], self.folder / "earlier"))

    def select(self, dataset: Any = None, model: Any = None, **options: Any) -> Callable[[], Any]:
        """Selecting a subset."""
        model = tiny_lora_model() if model is None else model
        dataset = tiny_dataset() if dataset is None else dataset
        self.models.append(model)
        self.datasets.append(dataset)
        values = {"config": SpiceConfig(**SETTINGS), "output_dir": self.folder / "run"} | options
        return lambda: select_subset(model, dataset, **values)

    # What must be as before

    def state(self, when: str) -> dict[str, Any]:
        """Everything that the mistake must not alter, to be compared."""
        files = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }
        if when == TRAINING:
            files = {name: content for name, content in files.items() if not name.startswith(RECORDS)}
        state: dict[str, Any] = {"files": files, "datasets": [_rows(dataset) for dataset in self.datasets]}
        state["models"] = [_compact(model_state(model)) for model in self.models if hasattr(model, "state_dict")]
        if self.trainer is not None and when in (STARTING, TRAINING):
            # A run sets attributes and modes of its own.
            found = _compact(model_state(self.trainer.model))
            state |= {key: found[key] for key in ("weights", "trainable", "hooks")}
        elif self.trainer is not None:
            found = trainer_state(self.trainer)
            state["trainer"] = found | {"model": _compact(found["model"])}
        # NaN is not equal to itself.
        return {key: repr(value) for key, value in state.items()}


def _rows(dataset: Any) -> Any:
    return list(dataset) if isinstance(dataset, Dataset | list) else type(dataset)


def _compact(found: dict[str, Any]) -> dict[str, Any]:
    """A model's weights as bytes, which are compared faster than numbers as text."""
    weights = found["weights"]
    return found | {"weights": (list(weights), pickle.dumps(list(weights.values())))}
