"""Whether the loss that a trainer trains is divided by the step's label tokens. It is tried rather than read.

    ℓ(batch, n) = Σ_s ℓ_s / n      ⇒      ℓ(batch, 2n) ≠ ℓ(batch, n)

Only then do micro-batches of unequal size train exactly like one batch. A `compute_loss` of somebody's own may pass n
on or drop it, and a model may take n and ignore it: the trainer's own loss of one row tells, once with n label tokens
and once with twice as many. No gradient is taken, and nothing is left behind.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from packaging.version import Version

from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.distributed import Processes
from spice_trainer.gradients.backends import scoring_mode
from spice_trainer.gradients.forward import move_inputs
from spice_trainer.scoring.passes import input_device
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state

# What changes by less is no division.
_RELATIVE_CHANGE = 1e-3
# By trainer: what the answer is of, and the answer. In mid-run a loader may be asked for, and nothing is to be tried.
_known: WeakKeyDictionary[Any, tuple[tuple[Any, ...], bool]] = WeakKeyDictionary()


def is_token_normalized(trainer: Any, rows: Sequence[CandidateRow] = ()) -> bool:
    """Whether the loss sums over a step's micro-batches and devices and divides by the step's label tokens.

    `rows` are some of the training set, needed the first time. A trainer that says itself how its loss is scaled is
    believed.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return bool(scaled)
    if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
        # The Trainer does not count the tokens then.
        return False
    if trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices:
        return False
    of = (id(trainer.model), type(trainer), trainer.compute_loss_func, vars(trainer).get("compute_loss"))
    before, answer = _known.get(trainer, (None, False))
    if before != of:
        tried = _try(trainer, rows)
        answer = _read(trainer) if tried is None else tried
        if rows:
            _known[trainer] = (of, answer)
    return answer


def _try(trainer: Any, rows: Sequence[CandidateRow]) -> bool | None:
    """What the loss of the shortest labelled row says; `None` where it cannot be computed, or is not finite."""
    labelled = [row for row in rows if row.num_label_tokens > 0]
    # Sharded weights are whole on no process, and before they are sharded perhaps on one alone.
    if not labelled or Processes.of(trainer.accelerator).lockstep:
        return None
    row = min(labelled, key=lambda row: row.num_tokens)
    try:
        first, second = (_loss(trainer, row, times * row.num_label_tokens) for times in (1, 2))
    except Exception as error:
        logger.debug("SPICE: the loss could not be tried (%s: %s).", type(error).__name__, error)
        return None
    if not (math.isfinite(first) and math.isfinite(second)):
        return None
    return abs(first - second) > _RELATIVE_CHANGE * abs(first)


def _loss(trainer: Any, row: CandidateRow, num_items: int) -> float:
    device = input_device(trainer.model)
    inputs, labels = pad_rows([row])
    batch = move_inputs(inputs | {"labels": labels}, device)
    with _leaving_no_trace(trainer), torch.no_grad(), trainer.accelerator.autocast():
        return float(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(num_items).to(device)))


def _read(trainer: Any) -> bool:
    """What is known of the loss without trying: that of transformers and TRL divides."""
    owner = next(cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    if "compute_loss" in vars(trainer) or owner.__module__.split(".")[0] not in ("transformers", "trl"):
        return False
    # LabelSmoother takes num_items_in_batch since transformers 5.15; before, it is a mean per micro-batch.
    return trainer.label_smoother is None or Version(transformers.__version__) >= Version("5.15.0")


@contextmanager
def _leaving_no_trace(trainer: Any) -> Iterator[None]:
    """Context after which modes, random states and what the trainer counts are as before.

    Within, metrics of the processes are not brought together: each tries alone.
    """
    restore = [_keep(vars(trainer)), _keep(vars(trainer.accelerator))]
    with scoring_mode(trainer.model), preserved_random_state(trainer.args.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda value, *args, **kwargs: value
        try:
            yield
        finally:
            for put_back in restore:
                put_back()


def _keep(values: dict[Any, Any], *, depth: int = 3) -> Callable[[], None]:
    """Keeps a dict's entries and, within it, those of dicts and the lengths of lists; returns what puts them back."""
    entries = dict(values)
    lengths = [(value, len(value)) for value in entries.values() if isinstance(value, list)]
    inner = [_keep(value, depth=depth - 1) for value in entries.values() if isinstance(value, dict) and depth]

    def put_back() -> None:
        for value, length in lengths:
            del value[length:]
        for one in inner:
            one()
        for name in values.keys() - entries.keys():
            del values[name]
        values.update(entries)

    return put_back
