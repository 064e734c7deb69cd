"""Checks of the arguments that selection, its measures and its Gram matrix share.

Axes: N candidates, D gradient dimension.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

# Largest difference of K_ij and K_ji, relative to ‖g_i‖‖g_j‖, that rounding in a half-precision product can explain.
_ASYMMETRY = 0.05

# Rows of a Gram matrix that are compared at a time.
_BLOCK = 256


def check_matrix(matrix: Tensor, name: str) -> None:
    """Raises a `ValueError` unless `matrix` is a floating point matrix with at least one row and one column."""
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or not matrix.is_floating_point() or matrix.numel() == 0:
        got = f"{matrix.dtype} of shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"{name} must be a floating point torch.Tensor with two axes and at least one row and one column "
            f"(one row per candidate), got {got}."
        )


def check_gram(gram: Float[Tensor, "N N"]) -> Float64[Tensor, "N N"]:
    """Returns `gram` as float64 on the CPU after checking that it can be a Gram matrix; entries may be non-finite."""
    check_matrix(gram, "gram")
    if gram.shape[0] != gram.shape[1]:
        raise ValueError(
            f"gram must be square, one row and one column per candidate, got shape {tuple(gram.shape)}. "
            "For a matrix with one gradient per row use select_from_gradients, or pass gradients @ gradients.T."
        )
    gram = gram.detach().to("cpu").to(torch.float64)
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        row = int((diagonal < 0).nonzero()[0])
        raise ValueError(
            f"gram[{row}, {row}] is {float(diagonal[row]):.6g}, but the diagonal of a Gram matrix holds squared "
            "norms, which are never negative. For a matrix with one gradient per row use select_from_gradients."
        )
    sound = sound_rows(gram)
    sizes = torch.where(sound, diagonal, 0.0).sqrt()
    for start in range(0, len(gram), _BLOCK):
        rows = slice(start, start + _BLOCK)
        asymmetry = (gram[rows] - gram[:, rows].T).abs() > _ASYMMETRY * torch.outer(sizes[rows], sizes)
        asymmetry &= sound[rows, None] & sound
        if bool(asymmetry.any()):
            row, column = asymmetry.nonzero()[0].tolist()
            row += start
            raise ValueError(
                f"gram must be symmetric, but gram[{row}, {column}] is {float(gram[row, column]):.6g} and "
                f"gram[{column}, {row}] is {float(gram[column, row]):.6g}. "
                "For a matrix with one gradient per row use select_from_gradients."
            )
    return gram


def sound_rows(gram: Float64[Tensor, "N N"]) -> Bool[Tensor, " N"]:
    """Tells which rows of a Gram matrix may be picked: diagonal finite and positive, no non-finite entry among them.

    A non-finite gradient spoils its own row and one entry of every other row; the diagonal tells them apart.
    """
    diagonal = gram.diagonal()
    sound = torch.isfinite(diagonal) & (diagonal > 0)
    # A sum is cheap, and finite wherever all of it is and nothing is near the largest number.
    if bool(sound.all()) and math.isfinite(float(gram.sum())):
        return sound
    broken = ~torch.isfinite(gram)
    while bool((broken[sound][:, sound]).any()):
        counts = (broken & sound).sum(dim=1) * sound
        sound[int(counts.argmax())] = False
    return sound


def masked_gram(gram: Float[Tensor, "N N"], sound: Bool[Tensor, " N"]) -> Float64[Tensor, "N N"]:
    """Returns a checked Gram matrix as float64 on the CPU, with rows and columns of 0 for rows that are not sound."""
    check_mask(sound)
    check_matrix(gram, "gram")
    if gram.shape != (sound.shape[0], sound.shape[0]):
        raise ValueError(
            f"gram must have one row and one column for each of the {sound.shape[0]} candidates of sound, got shape "
            f"{tuple(gram.shape)}."
        )
    gram = check_gram(masked(gram.detach(), sound.to(gram.device)))
    return masked(gram, sound_rows(gram))


def masked(gram: Float[Tensor, "N N"], sound: Bool[Tensor, " N"]) -> Float[Tensor, "N N"]:
    """Returns a Gram matrix with rows and columns of 0 for rows that are not sound: itself, where all are."""
    return gram if bool(sound.all()) else torch.where(sound[:, None] & sound, gram, 0.0)


def check_mask(sound: Bool[Tensor, " N"]) -> None:
    """Raises a `ValueError` unless `sound` is a boolean vector with at least one entry."""
    if not isinstance(sound, Tensor) or sound.dtype != torch.bool or sound.ndim != 1 or sound.numel() == 0:
        got = f"{sound.dtype} of shape {tuple(sound.shape)}" if isinstance(sound, Tensor) else type(sound).__name__
        raise ValueError(
            f"sound must be a boolean torch.Tensor with one entry per candidate, got {got}. It tells which candidates "
            "may be picked: torch.ones(N, dtype=torch.bool) if all of them."
        )


def check_choice(name: str, value: object, choices: object) -> None:
    """Raises a `ValueError` unless `value` is one of the values of the `Literal` type `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")


def check_alpha(fisher_alpha: float) -> None:
    """Raises a `ValueError` unless α is positive and finite."""
    if not 0 < fisher_alpha < math.inf:
        raise ValueError(
            f"fisher_alpha scales the Fisher information and must be positive and finite, got {fisher_alpha}."
        )
