"""Finds out on a few hundred rows whether a selection could help: before a GPU is paid for.

    some steps on random rows ─ a few pools and the validation rows scored ─┬─ do they differ at all
                                                                            ├─ how much of that is answer length
                                                                            ├─ where each rule's picks point
                                                                            └─ what it costs here

Weights, modes and random states of the model are as before when it is done.

Axes: N rows of the training set, m rows of the validation set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.reading import read_rows
from spice_trainer.data.rows import TargetRows
from spice_trainer.data.validation_sets import find_copies, named_sets, warn_of_copies
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.pilot.evidence import Pointing, explained_by_length, measure_pointing
from spice_trainer.pilot.report import PILOT_LEVEL, PilotCosts, PilotReport, ShiftFound
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.scoring.measure import from_shapes
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.store import ScoredRows
from spice_trainer.scoring.validation import ValidationRows
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.target import Target, lengths_differ, measure_shift
from spice_trainer.utils.fields import RealNumber, WholeNumber

# Rules whose picks are looked at, each with what makes it differ from the settings' defaults.
RULES: dict[str, dict[str, Any]] = {
    "length_matched": {"strategy": "length_matched"},
    "targeted_matching, hidden_states": {"strategy": "targeted_matching", "matching_features": "hidden_states"},
    "targeted_matching, gradients": {"strategy": "targeted_matching", "matching_features": "gradients"},
    "matching": {"strategy": "matching", "gradient_normalization": "unit"},
    "spice": {"strategy": "spice"},
}


def run_pilot(
    model: nn.Module,
    dataset: Any,
    validation_dataset: Any,
    config: SpiceConfig | None = None,
    *,
    processing_class: Any = None,
    data_collator: Any = None,
    num_rows: int = 240,
    warmup_steps: int = 8,
    learning_rate: float = 2e-4,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    seed: int = 42,
) -> PilotReport:
    """Tells from a few hundred rows whether selecting could help to do well on the validation rows.

    Args:
        model (`torch.nn.Module`):
            A causal language model with what shall train, such as a LoRA adapter. Its weights are put back.
        dataset (`datasets.Dataset` or sequence):
            Training rows, raw (`messages`, `prompt` and `completion`, or `text`) or tokenised.
        validation_dataset (`datasets.Dataset`, sequence, or `dict` of these):
            Rows like those that the model shall do well on; the first `config.validation_rows` of each set are read.
            At least 4, better 24.
        config ([`SpiceConfig`], *optional*):
            `pool_size`, `num_selected`, `validation_rows` and how to score. Defaults to `SpiceConfig()`.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer. Needed for raw rows.
        data_collator (`Callable`, *optional*):
            Collates tokenised rows. Defaults to right padding.
        num_rows (`int`, *optional*, defaults to 240):
            Training rows that are scored, drawn by the seed, in whole pools.
        warmup_steps (`int`, *optional*, defaults to 8):
            Steps on `num_selected` random rows beforehand.
        learning_rate (`float`, *optional*, defaults to 2e-4):
            Of these.
        max_length (`int`, *optional*, defaults to 1024):
            Tokens that a raw row is cut to.
        completion_only_loss (`bool`, *optional*):
            As in `SFTConfig`.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            As in `SFTConfig`.
        seed (`int`, *optional*, defaults to 42):
            Of the rows, the sketch and the tests.

    Returns:
        [`PilotReport`]: `print(report)` shows it; `report.strategy` and `report.recommendation` are what follows.

    Raises:
        ValueError: If there are too few rows for a pool or to compare with, or an argument is out of range.

    Example:
    ```python
    >>> report = run_pilot(model, dataset, wanted, processing_class=tokenizer)
    >>> print(report.recommendation)
    ```
    """
    started = time.perf_counter()
    config = SpiceConfig() if config is None else config
    WholeNumber(1, "there must be a row to score")("run_pilot", "num_rows", num_rows)
    WholeNumber(0, "it counts steps")("run_pilot", "warmup_steps", warmup_steps)
    RealNumber("at least 0", "a negative rate would unlearn", lambda x: x >= 0)(
        "run_pilot", "learning_rate", learning_rate
    )
    options = {
        "model": model,
        "processing_class": processing_class,
        "data_collator": data_collator,
        "caller": "run_pilot",
        "max_length": max_length,
        "completion_only": completion_only_loss,
        "assistant_only": assistant_only_loss,
    }
    rows = read_rows(dataset, **options)
    sets = {name: read_rows(given, **options) for name, given in named_sets(validation_dataset).items()}
    pools, warmup = _draw(len(rows.dataset), config, num_rows, warmup_steps, seed)
    with _restored(model):
        proxy = ProxyModel(model, processing_class=processing_class, learning_rate=learning_rate)
        learner = AdapterLearner(proxy, Runtime(lambda: model, seed), tokens_per_batch=config.scoring_tokens_per_batch)
        runtime = Runtime(lambda: model, seed, get_optimizer=lambda: learner.optimizer)
        pilot = _Pilot(runtime, rows, sets, config)
        seconds, num_trained = 0.0, 0
        for step_rows in warmup:
            collated = pilot.scorer.collate_alone(step_rows)
            began = time.perf_counter()
            learner.learn(collated)
            seconds, num_trained = seconds + time.perf_counter() - began, num_trained + len(step_rows)
        pilot.score([index for pool in pools for index in pool])
        places = [range(start * len(pools[0]), (start + 1) * len(pools[0])) for start in range(len(pools))]
        pointing = pilot.point(places, seed)
        return PilotReport(
            num_rows=sum(map(len, pools)),
            num_validation=pilot.target.num_rows,
            shifts=pilot.shifts(seed),
            length_p_value=lengths_differ(
                [length for length in pilot.lengths if length > 0],
                [length for length in pilot.target.label_tokens if length > 0],
                seed=seed,
                num_shuffles=_NUM_SHUFFLES,
            ),
            pointing=pointing,
            costs=PilotCosts(
                scoring_row=pilot.seconds_scoring / (len(pilot.lengths) + pilot.target.num_rows),
                hidden_row=pilot.seconds_hidden / (len(pilot.lengths) + pilot.target.num_rows),
                training_row=seconds / max(num_trained, 1),
                pilot=time.perf_counter() - started,
            ),
            pool_size=config.pool_size,
            num_selected=config.num_selected,
        )


def _draw(
    num_rows: int, config: SpiceConfig, num_scored: int, warmup_steps: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of the pools that are scored, and of the steps before, no row twice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_rows, generator=generator).tolist()
    num_pools = min(max(num_scored // config.pool_size, 1), num_rows // config.pool_size)
    if num_pools == 0:
        raise ValueError(
            f"run_pilot: the dataset has {num_rows} rows, fewer than a pool of {config.pool_size}. Fix: lower "
            "pool_size and num_selected, or give more rows."
        )
    size, picks = config.pool_size, config.num_selected
    pools = [order[start * size : (start + 1) * size] for start in range(num_pools)]
    rest = order[num_pools * size :] or order
    warmup = [[rest[(step * picks + place) % len(rest)] for place in range(picks)] for step in range(warmup_steps)]
    return pools, warmup


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Gives the weights that train back as they were."""
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in before:
                    weight.copy_(before[name])


class _Pilot:
    """The scored rows of a pilot."""

    def __init__(self, runtime: Runtime, rows: TargetRows, sets: dict[str, TargetRows], config: SpiceConfig) -> None:
        self.config = replace(
            config,
            strategy="targeted_matching",
            matching_features="gradients",
            gradient_preconditioning="none",
            score_once_after=None,
            max_repeats=None,
            length_quotas="auto",
            conflict_reference="selected",
        )
        self.validation = ValidationRows(sets, config.validation_rows, "targeted_matching")
        modules = find_trained_modules(runtime.get_model(), scoring_parameters=config.scoring_parameters)
        on_steps = replace(self.config, gradient_preconditioning="adam")
        on_states = replace(self.config, matching_features="hidden_states")
        self.scorer, self._of_steps, self._of_states = (
            GradientScorer(runtime, modules, rows, settings, self.validation)
            for settings in (self.config, on_steps, on_states)
        )
        self.seconds_scoring = self.seconds_hidden = 0.0

    def score(self, indices: list[int]) -> None:
        """Scores the rows and the validation rows at the weights of the moment."""
        copies = find_copies(self.validation.collate(self.validation.indices), self.scorer.rows.dataset)
        if copies:
            warn_of_copies(" and ".join(self.validation.sets), sorted(copies), "the pilot")
        began = time.perf_counter()
        found, self.shapes = self.scorer.score_rows(tuple(indices))
        self.scorer.look_at_target()
        self.seconds_scoring = time.perf_counter() - began
        began = time.perf_counter()
        states, _ = self._of_states.score_rows(tuple(indices))
        self._of_states.look_at_target()
        self.seconds_hidden = time.perf_counter() - began
        assert found is not None and states is not None and self.scorer.target is not None
        self._states, self._gradients = states, found
        # Preconditioned by what the steps before left in the optimizer.
        steps, _ = self._of_steps.score_rows(tuple(indices)) if self._has_moments() else (found, ())
        assert steps is not None and steps.features is not None and steps.lengths is not None
        self.lengths = [shape.num_label_tokens for shape in self.shapes]
        units = torch.nn.functional.normalize(steps.features.double(), dim=1)
        # A row's part in a step is that of its label tokens.
        self._steps = units * (steps.lengths * torch.tensor(self.lengths, dtype=torch.float64))[:, None]
        self._steps[~self._steps.isfinite().all(dim=1)] = 0.0
        target = self.scorer.target.target
        assert target is not None
        kept = tuple(0 if row in copies else n for row, n in enumerate(target.label_tokens))
        self.target = replace(target, label_tokens=kept)
        if sum(length > 0 for length in kept) < _LEAST_VALIDATION:
            raise ValueError(
                f"run_pilot: {sum(length > 0 for length in kept)} validation rows have label tokens and are no copies "
                f"of training rows, too few to tell anything. Fix: give at least {_LEAST_VALIDATION}, better 24."
            )

    def _has_moments(self) -> bool:
        optimizer = self.scorer.runtime.get_optimizer()
        return bool(optimizer.state)

    def _known(self, places: range) -> PoolScores:
        return from_shapes(0, tuple(places), self.shapes[places.start : places.stop])

    def _matrix(self, features: str, places: range) -> PoolScores:
        scorer, rows = (self.scorer, self._gradients) if features == "gradients" else (self._of_states, self._states)
        return scorer.put_together(self._known(places), _part(rows, places), None)

    def shifts(self, seed: int) -> dict[str, ShiftFound]:
        """Whether the training rows differ from the validation rows, by each kind of features."""
        found = {}
        for features in ("hidden_states", "gradients"):
            scores = self._matrix(features, range(len(self.lengths)))
            matrix = scores.values("gradient_cosines" if features == "gradients" else "hidden_cosines")
            sound = matrix.diagonal() > 0
            sound[: len(self.lengths)] &= scores.eligible()
            sound[len(self.lengths) :] &= torch.tensor(self.target.label_tokens) > 0
            shift = measure_shift(matrix, sound, self.target, seed=seed, num_shuffles=_NUM_SHUFFLES, level=PILOT_LEVEL)
            by_length = explained_by_length(matrix, sound, self.lengths, self.target)
            found[features] = ShiftFound(shift.p_value, shift.shrinkage, by_length)
        return found

    def point(self, pools: list[range], seed: int) -> dict[str, Pointing]:
        """Where each rule's picks point, aimed at one half of the validation rows and held against the other.

        Of the two ways to halve them, the mean.
        """
        assert self.scorer.target is not None and self.scorer.target.gradients is not None
        held = self.scorer.target.gradients
        lengths = torch.tensor(self.target.label_tokens, dtype=torch.float64)
        units = torch.nn.functional.normalize(held.features.double(), dim=1)
        gradients = units * (held.norms * lengths)[:, None]
        labelled = [row for row, length in enumerate(self.target.label_tokens) if length > 0]
        halves = labelled[::2], labelled[1::2]
        found: dict[str, list[Pointing]] = {name: [] for name in RULES}
        for aim, other in (halves, halves[::-1]):
            target = replace(
                self.target,
                label_tokens=tuple(n if row in aim else 0 for row, n in enumerate(self.target.label_tokens)),
            )
            for name, rule in RULES.items():
                picks = [self._pick(rule, pool, target, seed) for pool in pools]
                found[name].append(measure_pointing(self._steps, gradients[other], pools, picks, seed=seed))
        return {name: _mean(both) for name, both in found.items()}

    def _pick(self, rule: dict[str, Any], pool: range, target: Target, seed: int) -> list[int]:
        config = replace(self.config, **rule)
        if config.takes_hidden_states:
            scores = self._matrix("hidden_states", pool)
        elif config.takes_gradients:
            scorer = self.scorer if config.takes_gradient_cosines else self.scorer.with_config(config)
            scores = scorer.put_together(self._known(pool), _part(self._gradients, pool), None)
        else:
            scores = self._known(pool)
        scores = replace(scores, target=target if scores.target is not None or config.takes_validation else None)
        return list(select_pool(scores, config.num_selected, config, seed=seed, step=pool.start).indices)


_LEAST_VALIDATION = 4
_NUM_SHUFFLES = 1999


def _part(rows: ScoredRows, places: range) -> ScoredRows:
    def cut(values: Tensor | None) -> Tensor | None:
        # What is put together may be overwritten.
        return None if values is None else values[places.start : places.stop].clone()

    return ScoredRows(**{name: cut(value) for name, value in vars(rows).items()})


def _mean(both: list[Pointing]) -> Pointing:
    return Pointing(*(sum(values) / len(values) for values in zip(*(vars(one).values() for one in both), strict=True)))
