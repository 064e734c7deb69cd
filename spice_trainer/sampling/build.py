"""Puts together what selects for a step: the target's scorer, or a proxy's with its learner.

no proxy   target ─ scorer ─ selector
a proxy    proxy ─ scorer (its own rows) ─ selector ─ learner;   target ─ scorer, for comparison only
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import TargetRows
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import UnsupportedModelError, find_lora_modules
from spice_trainer.gradients.optimizer_state import check_adam, check_momentum, unwrap_optimizer
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.proxy.rows import rows_for_proxy, shared_rows
from spice_trainer.sampling.schedule import PoolSchedule
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.validation import ValidationRows


def check_optimizer(optimizer: Any, config: SpiceConfig) -> None:
    """Refuses an optimizer that the settings look into and that does not have what they need.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or Accelerate's wrapper of it, or `None`.
        config ([`SpiceConfig`]): The settings.

    Raises:
        ValueError: With the setting, the reason and the fix.
    """
    if config.gradient_preconditioning == "adam":
        check_adam(unwrap_optimizer(optimizer))
    if config.takes_momentum:
        check_momentum(unwrap_optimizer(optimizer))


def build_selector(
    config: SpiceConfig,
    schedule: PoolSchedule,
    *,
    get_model: Callable[[], nn.Module],
    rows: TargetRows,
    proxy: ProxyModel | None = None,
    validation: TargetRows | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    processes: Processes | None = None,
    get_optimizer: Callable[[], Any] = lambda: None,
) -> StepSelector:
    """Builds what selects for the steps of a run.

    Args:
        config ([`SpiceConfig`]): The settings.
        schedule ([`PoolSchedule`]): Candidates of every step.
        get_model (`Callable[[], torch.nn.Module]`): Gives the target, unwrapped from DDP or DeepSpeed.
        rows ([`TargetRows`]): The training rows as the target reads them.
        proxy ([`ProxyModel`], *optional*): Scores instead of the target.
        validation ([`TargetRows`], *optional*): The validation rows as the target reads
            them, which the strategy `less` compares candidates with.
        autocast (`Callable`, *optional*): Makes the context of the training precision.
        processes ([`Processes`], *optional*): Those that share the work.
        get_optimizer (`Callable`, *optional*): Gives the target's optimizer, for settings that look into it.

    Returns:
        [`StepSelector`]

    Raises:
        ValueError: If what scores has no plain LoRA layers, the proxy cannot read the rows, or a setting needs a
            proxy or validation rows and there are none.
    """
    processes = processes if processes is not None else Processes()
    if config.strategy == "less" and validation is None:
        raise ValueError(
            "SpiceConfig: strategy='less' compares candidates with a validation set, and there is none. Fix: give the "
            "Trainer an eval_dataset with rows of what the model shall learn, pass `validation_dataset=` to "
            "select_subset or SpiceSampler.bind, or choose another strategy."
        )

    def validation_of(read: Callable[[TargetRows], TargetRows]) -> ValidationRows | None:
        if config.strategy != "less" or validation is None:
            return None
        return ValidationRows(read(validation), config.validation_rows)

    def score_with(
        get_scoring_model: Callable[[], nn.Module],
        rows: TargetRows,
        processes: Processes,
        get_optimizer: Callable[[], Any],
    ) -> GradientScorer:
        return GradientScorer(
            get_scoring_model,
            find_lora_modules(get_scoring_model()),
            dataset=rows.dataset,
            collate=rows.collate,
            config=config,
            seed=schedule.seed,
            autocast=autocast,
            processes=processes,
            get_optimizer=get_optimizer,
        )

    if proxy is None:
        for name in ("proxy_check_pools", "overlap_scoring"):
            if getattr(config, name):
                raise ValueError(
                    f"SpiceConfig: {name}={getattr(config, name)} without a proxy: the target scores at its own "
                    "weights of the moment, and there is nothing to compare or to run beside. Fix: pass "
                    "`proxy=ProxyModel(...)` to attach_spice, set proxy_model_name_or_path, or leave it out."
                )
        return StepSelector(
            score_with(get_model, rows, processes, get_optimizer),
            config,
            shape=schedule.shape,
            validation=validation_of(lambda rows: rows),
        )

    def build_target_scorer() -> GradientScorer:
        try:
            return score_with(get_model, rows, processes, get_optimizer)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"SpiceConfig: proxy_check_pools={config.proxy_check_pools} compares the proxy with the gradients of "
                f"the model that trains, which cannot be taken. Fix: set proxy_check_pools=0. The reason: {error}"
            ) from error

    # Every process has the whole proxy, whatever becomes of the target.
    alone = replace(processes, lockstep=False)
    learner = AdapterLearner(
        proxy.model,
        learning_rate=proxy.learning_rate,
        weight_decay=proxy.weight_decay,
        max_grad_norm=proxy.max_grad_norm,
        tokens_per_batch=config.scoring_tokens_per_batch,
        seed=schedule.seed,
        autocast=autocast,
        processes=alone,
    )
    scorer = score_with(lambda: proxy.model, rows_for_proxy(proxy, rows), alone, lambda: learner.optimizer)
    num_pools = schedule.shape.pools_per_step
    if config.overlap_scoring and scorer.pools_at_once(num_pools, schedule.pool_size) < num_pools:
        raise ValueError(
            f"SpiceConfig: overlap_scoring=True needs the gradient features of all {num_pools} pools of a step at "
            f"once, {scorer.feature_bytes(num_pools, num_pools * schedule.pool_size) / 1e9:.1f} GB. Fix: set a "
            "sketch_dim (or -1 for the default), or overlap_scoring=False."
        )
    return StepSelector(
        scorer,
        config,
        shape=schedule.shape,
        learner=learner,
        update_every=proxy.update_every,
        validation=validation_of(lambda rows: shared_rows(proxy, rows)),
        target_scorer=build_target_scorer() if config.proxy_check_pools > 0 else None,
    )
