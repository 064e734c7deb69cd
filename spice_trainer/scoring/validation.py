"""The validation rows, which rules that aim compare candidates with, as the model that scores sees them.

    v = Σ_j w_j h_j / ‖h_j‖,      alignment of a candidate: ⟨g_x, v⟩ = ‖g_x‖ ⟨f_x, v⟩ / ‖f_x‖

h_j are the gradients of the validation rows, never preconditioned: they say where the loss falls, while a candidate's
may say where Adam would go. Both are seen through the same features f, exact or sketched, as the Gram matrix is; the
norms ‖g‖ are exact. w_j is the weight of the row's set, shared by its rows.

Axes: m validation rows, F features kept per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from spice_trainer.data.fingerprints import fingerprint_sets
from spice_trainer.data.references import hash_tokens
from spice_trainer.data.rows import VALIDATION, CandidateRow, RowReference, TargetRows, fetch_rows
from spice_trainer.distributed import Processes
from spice_trainer.scoring.features import FeatureBuffer
from spice_trainer.scoring.measure import unit_rows
from spice_trainer.scoring.sharing import SharedCandidates
from spice_trainer.selection.gram import float64_device
from spice_trainer.selection.target import Target


@dataclass(frozen=True)
class ValidationRows:
    """The first `num_rows` rows of one or several validation sets as the scoring model reads them.

    A `ValueError` if a set has none, or weights are not one a set. Rows count through all sets.
    """

    sets: dict[str, TargetRows]
    num_rows: int
    strategy: str = "less"
    set_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Checks that there is something to compare with."""
        for name, rows in self.sets.items():
            if not len(rows.dataset):
                which = "the validation set" if len(self.sets) == 1 else f"the validation set {name!r}"
                raise ValueError(
                    f"SpiceConfig: strategy={self.strategy!r} compares candidates with {which}, which has no row. "
                    "Fix: pass a validation_dataset with rows like those that the model shall do well on."
                )
        if self.set_weights is not None and len(self.set_weights) != len(self.sets):
            raise ValueError(
                f"SpiceConfig: validation_weights={list(self.set_weights)} for {len(self.sets)} validation sets "
                f"({', '.join(map(repr, self.sets))}). Fix: give one weight for each, in their order."
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        """How many rows of each set are read, and their fingerprint, as JSON values."""
        sets = {name: rows.dataset for name, rows in self.sets.items()}
        numbers = {name: min(self.num_rows, len(dataset)) for name, dataset in sets.items()}
        return {"rows": numbers, "fingerprint": fingerprint_sets(sets, self.num_rows)}

    @property
    def places(self) -> list[tuple[str, int]]:
        """Each row's set, and its number within it."""
        return [
            (name, row) for name, rows in self.sets.items() for row in range(min(self.num_rows, len(rows.dataset)))
        ]

    @property
    def indices(self) -> tuple[int, ...]:
        """Which rows are used."""
        return tuple(range(len(self.places)))

    def collate(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Fetches and collates some of the rows, each alone."""
        places, found = self.places, dict[int, CandidateRow]()
        for name, rows in self.sets.items():
            of_set = [index for index in indices if places[index][0] == name]
            numbers = [places[index][1] for index in of_set]
            source = VALIDATION if len(self.sets) == 1 else f"{VALIDATION} {name!r}"
            fetched = fetch_rows(rows.dataset, numbers, source=source)
            for index, collated in zip(of_set, rows.collate_each(numbers, fetched, source=source), strict=True):
                reference = RowReference(token_hash=hash_tokens(collated.inputs["input_ids"]))
                found[index] = replace(collated, reference=reference)
        return [found[index] for index in indices]

    def describe(self, shared: SharedCandidates, **known: Tensor) -> Target:
        """What is known of the rows beside their features."""
        names = list(self.sets)
        return Target(
            label_tokens=tuple(shape.num_label_tokens for shape in shared.shapes),
            sets=tuple(names.index(name) for name, _ in self.places),
            set_weights=self.set_weights or (1.0,) * len(names),
            token_hashes=tuple(shape.reference.token_hash for shape in shared.shapes),
            **known,
        )


@dataclass(frozen=True, eq=False)
class ValidationGradients:
    """Features of all validation rows, on every process, in their order; float32 on the CPU."""

    features: Float[Tensor, "m F"]
    norms: Float64[Tensor, " m"]  # Exact, of the raw gradients; 0 for rows whose gradient or loss is not finite.


def gather_gradients(buffer: FeatureBuffer, shared: SharedCandidates, processes: Processes) -> ValidationGradients:
    """Brings the features of what each process scored to all. A collective."""
    is_finite = buffer.norms.cpu().isfinite() & buffer.losses.cpu().isfinite() & ~buffer.out_of_memory.cpu()
    norms = torch.where(is_finite, buffer.norms.cpu(), 0.0)
    gathered = processes.gather((shared.held, buffer.features.cpu(), norms))
    features = torch.empty(len(shared.shapes), buffer.features.shape[1], dtype=torch.float32)
    of_all = torch.zeros(len(shared.shapes), dtype=torch.float64)
    for held, part, part_norms in gathered:
        features[list(held)], of_all[list(held)] = part, part_norms
    features[of_all == 0] = 0.0
    return ValidationGradients(features, of_all)


def mean_gradient(
    buffer: FeatureBuffer, shared: SharedCandidates, processes: Processes, validation: ValidationRows
) -> Float64[Tensor, " F"]:
    """Returns v of the rows whose features the processes hold, the same on each of them. A collective.

    A `RuntimeError` if none of the rows has a finite gradient other than zero.
    """
    units, lengths = unit_rows(buffer.features)
    is_sound = (lengths > 0) & lengths.isfinite() & buffer.norms.cpu().isfinite() & buffer.losses.cpu().isfinite()
    sound = torch.zeros(len(shared.shapes), dtype=torch.bool)
    for held, found in processes.gather((shared.held, is_sound)):
        sound[list(held)] = found
    if not bool(sound.any()):
        raise RuntimeError(
            f"strategy={validation.strategy!r} found no gradient among the {len(validation.indices)} validation rows: "
            "each is zero or not finite. Likely causes: rows without label tokens (prompts longer than `max_length`), "
            "or a training that diverged."
        )
    weights = validation.describe(shared).weights(sound)
    total = torch.zeros(units.shape[1], dtype=torch.float64)
    for place, position in enumerate(shared.held):
        if weights[position] > 0:
            total += weights[position] * units[place].to(float64_device(units.device), torch.float64).cpu()
    return torch.stack(processes.gather(total)).sum(dim=0)
