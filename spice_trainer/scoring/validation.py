"""The mean gradient of a validation set, which rules that need an `alignment` compare candidates with.

    v = (1/M) Σ_j h_j / ‖h_j‖,      alignment of a candidate: ⟨g_x, v⟩ = ‖g_x‖ ⟨f_x, v⟩ / ‖f_x‖

h_j are the gradients of the M validation rows at the current weights, never preconditioned: they say where the loss
falls, while a candidate's may say where Adam would go. Both are seen through the same features f, exact or sketched,
as the Gram matrix is; the norms ‖g‖ are exact.

Axes: M validation rows, m features kept per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from spice_trainer.data.rows import VALIDATION, CandidateRow, TargetRows, collate_row, fetch_rows
from spice_trainer.distributed import Processes
from spice_trainer.scoring.features import FeatureBuffer
from spice_trainer.scoring.measure import unit_rows
from spice_trainer.selection.gram import float64_device


@dataclass(frozen=True)
class ValidationRows:
    """The first `num_rows` rows of a validation set as the scoring model reads it; a `ValueError` if it has none."""

    rows: TargetRows
    num_rows: int
    strategy: str = "less"

    def __post_init__(self) -> None:
        """Checks that there is something to compare with."""
        if not len(self.rows.dataset):
            raise ValueError(
                f"SpiceConfig: strategy={self.strategy!r} compares candidates with a validation set, and this one "
                "has no row. Fix: give the Trainer an eval_dataset with rows of what the model shall learn."
            )

    @property
    def indices(self) -> tuple[int, ...]:
        """Which rows are used."""
        return tuple(range(min(self.num_rows, len(self.rows.dataset))))

    def collate(self, indices: Sequence[int]) -> list[CandidateRow]:
        """Fetches and collates some of the rows, each alone."""
        fetched = fetch_rows(self.rows.dataset, indices, source=VALIDATION)
        return [
            collate_row(index, row, self.rows.collate, source=VALIDATION)
            for index, row in zip(indices, fetched, strict=True)
        ]


def mean_gradient(buffer: FeatureBuffer, processes: Processes, validation: ValidationRows) -> Float64[Tensor, " m"]:
    """Returns v of the rows whose features the processes hold, the same on each of them. A collective.

    A `RuntimeError` if none of the rows has a finite gradient other than zero.
    """
    units, lengths = unit_rows(buffer.features)
    sound = (lengths > 0) & lengths.isfinite() & buffer.norms.cpu().isfinite() & buffer.losses.cpu().isfinite()
    total = torch.zeros(units.shape[1], dtype=torch.float64)
    for row in sound.nonzero().flatten().tolist():
        total += units[row].to(float64_device(units.device), torch.float64).cpu()
    gathered = processes.gather((total, int(sound.sum())))
    number = sum(count for _, count in gathered)
    if number == 0:
        raise RuntimeError(
            f"strategy={validation.strategy!r} found no gradient among the {len(validation.indices)} validation rows: "
            "each is zero or not finite. Likely causes: rows without label tokens (prompts longer than `max_length`), "
            "or a training that diverged."
        )
    mean: Tensor = torch.stack([part for part, _ in gathered]).sum(dim=0) / number
    return mean
