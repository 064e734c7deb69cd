"""The mean gradient of a validation set, which the strategy `less` compares candidates with.

    v = (1/M) Σ_j h_j / ‖h_j‖,      alignment of a candidate: ⟨g_x, v⟩ = ‖g_x‖ ⟨f_x, v⟩ / ‖f_x‖

h_j are the gradients of the M validation rows at the current weights, never preconditioned: they say where the loss
falls, while a candidate's may say where Adam would go. Both are seen through the same features f, exact
or sketched, as the Gram matrix is; the norms ‖g‖ are exact.

Axes: M validation rows, N candidates, m features kept per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from spice_trainer.data.checks import check_token_ids
from spice_trainer.data.rows import VALIDATION, CandidateRow, TargetRows, collate_row, fetch_rows
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.sharing import share_candidates
from spice_trainer.selection.gram import float64_device
from spice_trainer.utils.random import preserved_random_state

# Float64 numbers that are converted at a time.
_CHUNK = 2**24


@dataclass(frozen=True)
class ValidationRows:
    """The rows whose mean gradient is asked for.

    Args:
        rows ([`TargetRows`]): The validation set as the scoring model reads it.
        num_rows (`int`): How many of its first rows are used.

    Raises:
        ValueError: If it has no row.
    """

    rows: TargetRows
    num_rows: int

    def __post_init__(self) -> None:
        """Checks that there is something to compare with."""
        if not len(self.rows.dataset):
            raise ValueError(
                "SpiceConfig: strategy='less' compares candidates with a validation set, and this one has no row. "
                "Fix: give the Trainer an eval_dataset with rows of what the model shall learn."
            )

    def collate(self, scorer: GradientScorer, indices: Sequence[int]) -> list[CandidateRow]:
        """Fetches and collates some of the rows, each alone."""
        fetched = fetch_rows(self.rows.dataset, indices)
        rows = [
            collate_row(index, row, self.rows.collate, source=VALIDATION)
            for index, row in zip(indices, fetched, strict=True)
        ]
        check_token_ids(rows, scorer.vocabulary)
        return [scorer.shorten(row) for row in rows]

    def mean_gradient(self, scorer: GradientScorer) -> Float64[Tensor, " m"]:
        """Scores the validation rows at the current weights. A collective of the scorer's processes.

        Args:
            scorer ([`GradientScorer`]): The candidates' scorer.

        Returns:
            `torch.Tensor` of shape `(m,)`: v, float64, the same on every process.

        Raises:
            RuntimeError: If no row has a finite gradient other than zero.
        """
        processes = scorer.processes
        indices = tuple(range(min(self.num_rows, len(self.rows.dataset))))
        with preserved_random_state(scorer.device):
            shared = share_candidates(
                {0: indices},
                lambda some: self.collate(scorer, some),
                tokens_per_batch=scorer.plan_tokens(),
                processes=processes,
            )
            with scorer.failing_together():
                buffer = scorer.passes.compute_features(shared, preconditioned=False)
        units, lengths = unit_rows(buffer.features)
        sound = (lengths > 0) & lengths.isfinite() & buffer.norms.cpu().isfinite() & buffer.losses.cpu().isfinite()
        total = torch.zeros(units.shape[1], dtype=torch.float64)
        for row in sound.nonzero().flatten().tolist():
            total += units[row].to(float64_device(units.device), torch.float64).cpu()
        gathered = processes.gather((total, int(sound.sum())))
        number = sum(count for _, count in gathered)
        if number == 0:
            raise RuntimeError(
                f"strategy='less' found no gradient among the {len(indices)} validation rows: each is zero or not "
                "finite. Likely causes: rows without label tokens (prompts longer than `max_length`), or a training "
                "that diverged."
            )
        mean: Tensor = torch.stack([part for part, _ in gathered]).sum(dim=0) / number
        return mean


def align(
    features: Float[Tensor, "N m"], norms: Float64[Tensor, " N"], reference: Float64[Tensor, " m"]
) -> Float64[Tensor, " N"]:
    """Returns ⟨g_x, v⟩ of each candidate, 0 for a zero gradient. **Overwrites `features`** with unit rows.

    Args:
        features (`torch.Tensor` of shape `(N, m)`): Features of the candidates.
        norms (`torch.Tensor` of shape `(N,)`): Exact norms of their gradients.
        reference (`torch.Tensor` of shape `(m,)`): v.
    """
    units, lengths = unit_rows(features)
    device = float64_device(units.device)
    reference = reference.to(device)
    chunk = max(1, _CHUNK // max(1, units.shape[1]))
    cosines = torch.cat([part.to(device, torch.float64) @ reference for part in units.split(chunk)]).cpu()
    return torch.where(lengths > 0, cosines * norms, 0.0)


def unit_rows(features: Float[Tensor, "N m"]) -> tuple[Float[Tensor, "N m"], Float64[Tensor, " N"]]:
    """Divides rows by their lengths, in place, by their largest magnitude first: 1e-30 squared would be 0.

    Args:
        features (`torch.Tensor` of shape `(N, m)`): Rows.

    Returns:
        `tuple`: The same rows, zeros where they were zero, and their lengths, float64, on the CPU.
    """
    if not len(features):
        return features, torch.zeros(0, dtype=torch.float64)
    largest = features.abs().amax(dim=1, keepdim=True)
    features /= torch.where(largest > 0, largest, 1.0)
    relative = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    features /= torch.where(relative > 0, relative, 1.0)
    return features, largest.cpu().double()[:, 0] * relative.cpu().double()[:, 0]
