"""Puts together what selects for a step: the target's scorer, or a proxy's with its learner.

no proxy   target ─ scorer ─ selector
a proxy    proxy ─ scorer (its own rows) ─ learner ─ selector;   target ─ scorer, for comparison only
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import TargetRows
from spice_trainer.gradients.lora import UnsupportedModelError, find_trained_modules
from spice_trainer.gradients.optimizer_state import check_adam, check_momentum, learning_rate_of, unwrap_optimizer
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.proxy.rows import rows_for_proxy, shared_rows
from spice_trainer.proxy.scorer import ProxyScorer
from spice_trainer.sampling.schedule import PoolSchedule
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.scoring.once import OnceScorer
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.step_scorer import StepScorer
from spice_trainer.scoring.validation import ValidationRows


def check_optimizer(optimizer: Any, config: SpiceConfig) -> None:
    """Refuses an optimizer, or Accelerate's wrapper of one, that does not have what the settings look for in it."""
    if config.gradient_preconditioning == "adam":
        check_adam(unwrap_optimizer(optimizer))
    if config.takes_momentum:
        check_momentum(unwrap_optimizer(optimizer))
    if config.takes_learning_rate:
        learning_rate_of(optimizer)


def build_selector(
    config: SpiceConfig,
    schedule: PoolSchedule,
    runtime: Runtime,
    rows: TargetRows,
    *,
    proxy: ProxyModel | None = None,
    validation: Mapping[str, TargetRows] | None = None,
) -> StepSelector:
    """Builds what selects for the steps of a run: with the target's scores, or those of a proxy.

    `rows` are the training rows as the target reads them, and `validation` the validation sets by name.
    """
    if config.needs_validation and not validation:
        raise ValueError(
            f"{_what_needs(config)} compares candidates with a validation set, and there is none. Fix: pass "
            "`validation_dataset=` to attach_spice, select_subset or SpiceSampler.bind, with rows like those that the "
            "model shall do well on, or choose another."
        )
    if validation and not config.takes_validation:
        raise ValueError(
            f"SpiceConfig: strategy={config.strategy!r} reads no validation rows, and a validation_dataset was given. "
            'Fix: leave it out, or choose a rule that aims at it, such as strategy="targeted_matching".'
        )
    if proxy is None:
        for name in ("proxy_check_pools", "overlap_scoring"):
            if getattr(config, name):
                raise ValueError(
                    f"SpiceConfig: {name}={getattr(config, name)} without a proxy: the target scores at its own "
                    "weights of the moment, and there is nothing to compare or to run beside. Fix: pass "
                    "`proxy=ProxyModel(...)` to attach_spice, set proxy_model_name_or_path, or leave it out."
                )
        scorer: StepScorer = StepScorer(_build_scorer(config, runtime, rows, _validation_rows(config, validation)))
    else:
        scorer = _build_proxy_scorer(config, schedule, runtime, rows, proxy=proxy, validation=validation)
    if config.score_once_after is not None:
        if schedule.has_open_end:
            raise ValueError(
                f"SpiceConfig: score_once_after={config.score_once_after} scores every row, and the rows of a stream "
                "have no end. Fix: leave it out, or load the dataset without streaming=True."
            )
        scorer = OnceScorer(scorer)
    return StepSelector(scorer, config, shape=schedule.shape)


def _build_scorer(
    config: SpiceConfig, runtime: Runtime, rows: TargetRows, validation: ValidationRows | None
) -> GradientScorer:
    modules = find_trained_modules(runtime.get_model(), scoring_parameters=config.scoring_parameters)
    return GradientScorer(runtime, modules, rows, config, validation)


def _what_needs(config: SpiceConfig) -> str:
    quotas = config.length_quotas == "validation" and not config.takes_alignment
    return f"SpiceConfig: {'length_quotas=' + repr('validation') if quotas else f'strategy={config.strategy!r}'}"


def _validation_rows(
    config: SpiceConfig,
    sets: Mapping[str, TargetRows] | None,
    read: Callable[[TargetRows], TargetRows] = lambda rows: rows,
) -> ValidationRows | None:
    if not sets or not config.takes_validation:
        return None
    weights = None if config.validation_weights is None else tuple(config.validation_weights)
    read_sets = {name: read(rows) for name, rows in sets.items()}
    return ValidationRows(read_sets, config.validation_rows, config.strategy, weights)


def _build_proxy_scorer(
    config: SpiceConfig,
    schedule: PoolSchedule,
    runtime: Runtime,
    rows: TargetRows,
    *,
    proxy: ProxyModel,
    validation: Mapping[str, TargetRows] | None,
) -> ProxyScorer:
    # Every process has the whole proxy, whatever becomes of the target.
    alone = replace(runtime, get_model=lambda: proxy.model, processes=replace(runtime.processes, lockstep=False))
    learner = AdapterLearner(proxy, alone, tokens_per_batch=config.scoring_tokens_per_batch)
    alone = replace(alone, get_optimizer=lambda: learner.optimizer)
    of_proxy = _validation_rows(config, validation, lambda rows: shared_rows(proxy, rows))
    scorer = _build_scorer(config, alone, rows_for_proxy(proxy, rows), of_proxy)
    num_pools = schedule.shape.pools_per_step
    if config.overlap_scoring and scorer.pools_at_once(num_pools, schedule.pool_size) < num_pools:
        raise ValueError(
            f"SpiceConfig: overlap_scoring=True needs the gradient features of all {num_pools} pools of a step at "
            f"once, {scorer.feature_bytes(num_pools, num_pools * schedule.pool_size) / 1e9:.1f} GB. Fix: set a "
            "sketch_dim (or -1 for the default), or overlap_scoring=False."
        )
    target_scorer = None
    if config.proxy_check_pools > 0:
        try:
            target_scorer = _build_scorer(config, runtime, rows, _validation_rows(config, validation))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"SpiceConfig: proxy_check_pools={config.proxy_check_pools} compares the proxy with the gradients of "
                f"the model that trains, which cannot be taken. Fix: set proxy_check_pools=0. The reason: {error}"
            ) from error
    return ProxyScorer(scorer, learner, update_every=proxy.update_every, target_scorer=target_scorer)
