"""Keeps what is known of the validation rows: their lengths, gradients and hidden states, as far as a rule reads them.

Gradients are computed anew every `validation_every` steps, hidden states likewise where training changes them.

Axes: m validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import RowReference
from spice_trainer.data.validation_sets import warn_of_copies
from spice_trainer.distributed import Processes
from spice_trainer.scoring.hidden import HiddenScorer
from spice_trainer.scoring.passes import ScoringPasses
from spice_trainer.scoring.sharing import SharedCandidates
from spice_trainer.scoring.validation import ValidationGradients, ValidationRows, gather_gradients
from spice_trainer.selection.target import Target
from spice_trainer.utils.saved import saved_whole_number


class TargetReader:
    """Reads the validation rows and scores them, when a step begins and what is known is too old."""

    def __init__(self, validation: ValidationRows, config: SpiceConfig, processes: Processes) -> None:
        self.validation = validation
        self._config = config
        self._processes = processes
        self.target: Target | None = None
        self.gradients: ValidationGradients | None = None
        self.hidden: Tensor | None = None
        self._num_steps = 0
        # Whether the hidden states in use can change no more.
        self._is_final = False
        self._has_warned = False

    def look(
        self,
        share: Callable[[], SharedCandidates],
        passes: ScoringPasses,
        hidden: HiddenScorer | None,
        *,
        is_frozen: bool = False,
    ) -> None:
        """Brings what the rule reads up to date at the beginning of a step; frozen, only what is missing.

        A collective.
        """
        is_due = not is_frozen and self._num_steps % self._config.validation_every == 0
        self._num_steps += 1
        takes_gradients = self._config.takes_gradient_cosines and (is_due or self.gradients is None)
        is_final = hidden is not None and hidden.is_constant
        takes_hidden = hidden is not None and (self.hidden is None or (is_due and not (is_final and self._is_final)))
        if self.target is not None and not (takes_gradients or takes_hidden):
            return
        shared = share()
        if takes_gradients:
            is_apart = self._processes.lockstep
            with nullcontext() if is_apart else self._processes.failing_together("scoring validation rows"):
                buffer = passes.compute_features(shared, preconditioned=not self._config.rule.target_is_raw)
            self.gradients = gather_gradients(buffer, shared, self._processes)
        if takes_hidden:
            assert hidden is not None
            self.hidden, self._is_final = hidden.compute(passes, shared), is_final
        norms = {} if self.gradients is None else {"gradient_norms": self.gradients.norms}
        self.target = self.validation.describe(shared, **norms)

    def without_copies(self, candidates: Sequence[RowReference]) -> Target | None:
        """The validation rows beside a pool's candidates; those that are candidates too have no label token then."""
        target = self.target
        if target is None:
            return None
        known = {reference.token_hash for reference in candidates} - {None}
        copies = [row for row, token_hash in enumerate(target.token_hashes) if token_hash in known]
        if not copies:
            return target
        if not self._has_warned:
            self._has_warned = True
            warn_of_copies(" and ".join(self.validation.sets), copies, "the pools that hold them")
        label_tokens = tuple(0 if row in copies else n for row, n in enumerate(target.label_tokens))
        return replace(target, label_tokens=label_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Steps since the run began, and whether what is known of the rows is final."""
        return {"num_validation_steps": self._num_steps, "validation_is_final": self._is_final}

    def tensors(self) -> dict[str, Tensor]:
        """What was computed in an earlier step and is still in use."""
        if self._config.validation_every == 1 and self._config.score_once_after is None:
            return {}
        found = {"hidden": self.hidden}
        if self.gradients is not None:
            found |= {"gradients": self.gradients.features, "norms": self.gradients.norms}
        return {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restores both."""
        self._num_steps = saved_whole_number(state.get("num_validation_steps", 0))
        self._is_final = state.get("validation_is_final") is True
        self.hidden = tensors.get("hidden")
        if "gradients" in tensors:
            norms = tensors["norms"].to(torch.float64)
            self.gradients = ValidationGradients(tensors["gradients"], norms)


def describe_aim(config: SpiceConfig, validation: ValidationRows | None, hidden: HiddenScorer | None) -> str:
    """What a run's picks aim at, on which features, and whether these change while it trains; "" if at nothing."""
    if not config.takes_validation:
        return ""
    by_length = config.length_quotas == "validation"
    layer = "" if hidden is None else f"the hidden states that layer {hidden.layer} takes"
    if validation is None:
        by = f", by {layer}" if layer else " and their answer lengths" if not config.takes_model else ""
        return f"Without validation rows picks are like the candidates of their pool{by}."
    sets = ", ".join(f"{number} of {name!r}" for name, number in validation.description["rows"].items())
    every = "every step" if config.validation_every == 1 else f"every {config.validation_every} steps"
    if config.score_once_after is not None:
        every = f"until step {config.score_once_after}"
    if hidden is not None:
        lasts = "which stay as they are while training" if hidden.is_constant else f"computed anew {every}"
        features = f"{layer}, {lasts}"
    elif config.takes_gradient_cosines:
        features = f"their gradients, computed anew {every}"
    elif config.takes_alignment:
        features = "their mean gradient, computed anew every step"
    else:
        features = "their answer lengths alone" if not by_length or not config.takes_model else "their answer lengths"
    also = " and their answer lengths" if by_length and "lengths" not in features else ""
    return f"Picks aim at {len(validation.places)} validation rows ({sets}) by {features}{also}."
