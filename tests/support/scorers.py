"""Scorers of a model and some rows without a trainer, and pools measured from given features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer import PoolScores, ProxyModel, SpiceConfig
from spice_trainer.data.rows import RowShape, TargetRows
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.scoring.features import OwnedFeatures
from spice_trainer.scoring.measure import from_features, from_shapes
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.validation import ValidationRows


def make_scorer(
    model: nn.Module,
    config: SpiceConfig,
    *,
    rows: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    modules: Mapping[str, Any] | None = None,
    seed: int = 1,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
    processes: Processes | None = None,
    get_optimizer: Callable[[], Any] = lambda: None,
    validation: ValidationRows | None = None,
) -> GradientScorer:
    """A scorer of all LoRA layers, or of some."""
    runtime = Runtime(
        lambda: model, seed, processes or Processes(), nullcontext if autocast is None else autocast, get_optimizer
    )
    modules = find_trained_modules(model) if modules is None else modules
    return GradientScorer(runtime, modules, TargetRows(rows, collate), config, validation)


def make_learner(model: nn.Module, *, tokens_per_batch: int, **options: Any) -> AdapterLearner:
    """A proxy's learner, with a learning rate of 0.01."""
    proxy = ProxyModel(model, **({"learning_rate": 1e-2} | options))
    return AdapterLearner(proxy, Runtime(lambda: model), tokens_per_batch=tokens_per_batch)


def measured_pool(
    features: Tensor,
    shapes: Sequence[RowShape],
    config: SpiceConfig,
    *,
    norms: Tensor | None = None,
    losses: Tensor | None = None,
    pool: int = 0,
    candidates: Sequence[int] | None = None,
    momentum: Tensor | None = None,
) -> PoolScores:
    """A pool whose gradients are these rows; they are left as they are."""
    norms = features.double().norm(dim=1) if norms is None else norms
    found = OwnedFeatures(
        rows={},
        features=features.clone(),
        norms=norms,
        lengths=norms,
        losses=torch.zeros(len(features)) if losses is None else losses,
        out_of_memory=torch.zeros(len(features), dtype=torch.bool),
        momentum=momentum,
    )
    candidates = range(len(features)) if candidates is None else candidates
    return from_features(from_shapes(pool, candidates, shapes), found, config)
