"""From sample gradients to the normalised Gram matrix that selection works on.

    K_ij = (c_i ‖g_i‖) cos(g_i, g_j) (c_j ‖g_j‖)

with g_i the gradient of candidate i and c_i the multiplier of its gradient normalisation. Cosines and norms are kept
apart: with a sketch the cosines come from sketched rows while the norms are exact. Every row is divided by its largest
magnitude before any product, so gradients of 1e-30 or 1e+30 neither vanish nor overflow.

Axes: N candidates, D gradient (or sketch) dimension.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Real
from torch import Tensor

from spice_trainer.config import AlphaScaling, GradientNormalization
from spice_trainer.selection.checks import check_choice, check_matrix, masked, masked_gram

# Columns whose squares are summed in the rows' own precision.
_NORM_BLOCK = 2**12

# What float64 rounding leaves of a squared norm that is 0, relative to the terms that it is the difference of.
_ROUNDING = 1e-13

# Rows that are multiplied with those before them at a time.
_PRODUCT_BLOCK = 2048

# Rows of a matrix of cosines that are looked at at a time.
_BLOCK = 256

# Rows closer than this may be equal up to sign. Wide enough for the rounding of float32 products.
_NEARLY_PARALLEL = 1.0 - 1e-5


@dataclass(frozen=True, eq=False)
class RowLengths:
    """Lengths of N gradients, on the CPU."""

    norms: Float64[Tensor, " N"]  # Euclidean, of the given rows; nan for non-finite rows.
    scales: Float64[Tensor, " N"]  # Largest magnitude of each given row; nan for non-finite rows.
    finite: Bool[Tensor, " N"]
    nonzero: Bool[Tensor, " N"]  # nan counts as not zero.

    @property
    def sound(self) -> Bool[Tensor, " N"]:
        """Rows that may be picked: finite and not zero."""
        return self.finite & self.nonzero


@dataclass(frozen=True, eq=False, kw_only=True)
class RowGeometry(RowLengths):
    """Directions and lengths of N gradients, on the CPU."""

    cosines: Float64[Tensor, "N N"]  # The diagonal is exactly 1 for sound rows; unsound rows and columns are 0.


@torch.no_grad()
def scale_rows(
    features: Float[Tensor, "N D"], *, chunk_size: int = 2**18, product_dtype: torch.dtype | None = None
) -> RowLengths:
    """Measures the rows of `features`, and **overwrites `features`**.

    Afterwards a sound row of `features` holds the given row divided by its largest magnitude (so the given row is
    `scales[i] * features[i]`), and every other row is zero. Columns are processed in chunks.
    """
    check_matrix(features, "features")
    if chunk_size < 1:
        raise ValueError(
            f"chunk_size is the number of columns processed at a time and must be >= 1, got {chunk_size}."
        )
    chunks = _chunks(features, chunk_size)
    largest = torch.stack([torch.maximum(chunk.amax(dim=1), -chunk.amin(dim=1)) for chunk in chunks]).amax(dim=0)
    finite = torch.isfinite(largest)
    nonzero = largest != 0
    unsound = ~(finite & nonzero)
    any_unsound = bool(unsound.any())
    divisor = largest.masked_fill(unsound, 1)[:, None]
    device, dtype = float64_device(features.device), product_dtype or default_product_dtype(features)
    squared_norms = torch.zeros(features.shape[0], dtype=torch.float64, device=device)
    for chunk in chunks:
        if any_unsound:
            chunk.masked_fill_(unsound[:, None], 0)
        chunk.div_(divisor)
        squared_norms += _squared_norms(chunk, device, dtype)
    scales = largest.cpu().to(torch.float64).masked_fill(~finite.cpu(), math.nan)
    norms = squared_norms.cpu().sqrt() * scales
    return RowLengths(norms=norms, scales=scales, finite=finite.cpu(), nonzero=nonzero.cpu())


@torch.no_grad()
def measure_rows(
    features: Float[Tensor, "N D"], *, chunk_size: int = 2**18, product_dtype: torch.dtype | None = None
) -> RowGeometry:
    """Measures cosines and norms of the rows of `features`, which it **overwrites** as [`scale_rows`] does.

    No second copy of `features` is ever made: the columns are processed in chunks, their products in `product_dtype`
    (see [`default_product_dtype`]), the sums over chunks in float64.
    """
    found = scale_rows(features, chunk_size=chunk_size, product_dtype=product_dtype)
    product_dtype = product_dtype or default_product_dtype(features)
    chunks = _chunks(features, chunk_size)
    device = float64_device(features.device)
    products = torch.zeros(features.shape[0], features.shape[0], dtype=torch.float64, device=device)
    scratch = None
    if product_dtype != features.dtype or device != features.device:
        scratch = torch.empty_like(chunks[0], dtype=product_dtype, device=device)
    with torch.autocast(device_type=features.device.type, enabled=False):
        for chunk in chunks:
            rows = chunk
            if scratch is not None:
                rows = scratch[:, : chunk.shape[1]].copy_(chunk)
            for start in range(0, len(rows), _PRODUCT_BLOCK):
                # Half of a symmetric matrix; the other half follows below.
                block = slice(start, start + _PRODUCT_BLOCK)
                products[block, : block.stop] += (rows[block] @ rows[: block.stop].T).to(torch.float64)

    products = products.cpu()
    lengths = products.diagonal().sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    for start in range(0, len(products), _PRODUCT_BLOCK):
        block = slice(start, start + _PRODUCT_BLOCK)
        cosines = products[block, : block.stop]
        cosines.div_(torch.outer(lengths[block], lengths[: block.stop]))
        within = cosines[:, start:]
        within.copy_(0.5 * (within + within.T))
        cosines.clamp_(-1.0, 1.0)
        products[:start, block] = cosines[:, :start].T
    products.diagonal().copy_(found.sound.to(torch.float64))
    _equate_parallel_rows(products, chunks)
    return RowGeometry(found.norms, found.scales, found.finite, found.nonzero, cosines=products)


def default_product_dtype(features: Float[Tensor, "N D"]) -> torch.dtype:
    """Float32 for features on the CPU below float64 while that is multiplied in its own precision, else float64."""
    single = features.device.type == "cpu" and features.dtype != torch.float64
    return torch.float32 if single and torch.get_float32_matmul_precision() == "highest" else torch.float64


def _chunks(features: Float[Tensor, "N D"], chunk_size: int) -> list[Tensor]:
    return [features[:, start : start + chunk_size] for start in range(0, features.shape[1], chunk_size)]


def _squared_norms(rows: Float[Tensor, "N C"], device: torch.device, dtype: torch.dtype) -> Float64[Tensor, " N"]:
    """Returns ‖row‖² summed in float64 over blocks of columns, for entries of at most 1.

    Inside a block the precision of products is enough (2e-8 off in float32), and ten times faster than float64.
    """
    blocks = (rows[:, start : start + _NORM_BLOCK] for start in range(0, rows.shape[1], _NORM_BLOCK))
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=device)
    for block in blocks:
        total += torch.linalg.vector_norm(block.to(device, dtype), dim=1).to(torch.float64).square()
    return total


def _equate_parallel_rows(cosines: Float64[Tensor, "N N"], chunks: list[Tensor]) -> None:
    """Gives rows that are equal up to sign exactly equal cosines, whatever order the products were summed in.

    A rounding error of 1e-16 in the cosine of two copies of a gradient of norm 1e+30 would look like a new direction
    of norm 1e+22.
    """
    parallel = torch.cat([(rows.abs() > _NEARLY_PARALLEL).sum(dim=1) for rows in cosines.split(_BLOCK)])
    for copy, (first, _) in find_copies(chunks, (parallel > 1).nonzero()[:, 0].tolist()).items():
        sign = math.copysign(1.0, float(cosines[first, copy]))
        cosines[copy] = cosines[first] * sign
        cosines[:, copy] = cosines[:, first] * sign
        cosines[first, copy] = cosines[copy, first] = sign
        cosines[copy, copy] = 1.0


def find_copies(chunks: list[Tensor], candidates: Sequence[int]) -> dict[int, tuple[int, float]]:
    """Finds, among some rows that are cut into chunks of columns, those equal up to sign to an earlier one.

    Returns the first one and the sign, by copy. Takes one look at each row, and another at each copy.
    """
    firsts: dict[int, int] = {}
    copies: dict[int, tuple[int, float]] = {}
    for row in candidates:
        parts = [chunk[row].abs().cpu().contiguous() for chunk in chunks]
        key = hash(tuple(hash(part.view(torch.uint8).numpy().tobytes()) for part in parts))
        first = firsts.setdefault(key, row)
        for sign in (1.0, -1.0) if first != row else ():
            if all(torch.equal(chunk[first], chunk[row] * sign) for chunk in chunks):
                copies[row] = first, sign
                break
    return copies


@torch.no_grad()
def cosines_with(
    features: Float[Tensor, "N D"], reference: Float[Tensor, " D"], *, chunk_size: int = 2**18
) -> Float64[Tensor, " N"]:
    """Returns the cosine of each row with one more vector, such as the optimizer's momentum, float64 on the CPU.

    The squares of the rows must neither vanish nor overflow: [`measure_rows`] leaves such rows. 0 for rows of zeros,
    and for a vector that is zero or not finite.
    """
    device = float64_device(features.device)
    products = torch.zeros(features.shape[0], dtype=torch.float64, device=device)
    squares, length = torch.zeros_like(products), 0.0
    largest = float(reference.abs().max())
    if not 0.0 < largest < math.inf:
        return products.cpu()
    with torch.autocast(device_type=features.device.type, enabled=False):
        for start in range(0, features.shape[1], chunk_size):
            rows = features[:, start : start + chunk_size].to(device, torch.float64)
            other = reference[start : start + chunk_size].to(device, torch.float64) / largest
            products += rows @ other
            squares += rows.square().sum(dim=1)
            length += float(other.square().sum())
    lengths = squares.sqrt() * math.sqrt(length)
    cosines = torch.where(lengths > 0, products / lengths.masked_fill(lengths == 0, 1), 0.0)
    return cosines.clamp(-1.0, 1.0).cpu()


def normalization_weights(
    norms: Float[Tensor, " N"],
    label_tokens: Real[Tensor, " N"],
    gradient_normalization: GradientNormalization,
) -> Float64[Tensor, " N"]:
    """Returns the multiplier c_i that turns raw gradient i into its normalised form c_i·g_i.

    "none": 1; "sqrt_tokens": √tokens; "tokens": tokens, the row's share in a token-mean loss; "unit": 1/‖g_i‖, and 0
    where the norm is zero or not finite.
    """
    if norms.shape != label_tokens.shape or norms.ndim != 1:
        raise ValueError(
            f"norms and label_tokens must both have one entry per candidate, got shapes {tuple(norms.shape)} and "
            f"{tuple(label_tokens.shape)}."
        )
    check_choice("gradient_normalization", gradient_normalization, GradientNormalization)
    norms = norms.to("cpu").to(torch.float64)
    tokens = label_tokens.to("cpu").to(torch.float64)
    match gradient_normalization:
        case "none":
            return torch.ones_like(norms)
        case "sqrt_tokens":
            return tokens.sqrt()
        case "tokens":
            return tokens
    usable = torch.isfinite(norms) & (norms > 0)
    return torch.where(usable, 1.0 / norms.masked_fill(~usable, 1.0), 0.0)


def normalized_gram(
    cosines: Float[Tensor, "N N"], norms: Float[Tensor, " N"], weights: Float[Tensor, " N"], *, unit: bool
) -> Float64[Tensor, "N N"]:
    """Returns K_ij = (c_i‖g_i‖) cos_ij (c_j‖g_j‖), with zero rows and columns for unsound gradients.

    The cosines are those of [`measure_rows`] (of sketched rows, where there is a sketch), the norms exact and of raw
    gradients. For `unit` lengths K is the cosines themselves, with a diagonal of exactly 1 for sound rows.
    """
    num_candidates = norms.shape[0]
    if cosines.shape != (num_candidates, num_candidates) or norms.ndim != 1 or weights.shape != norms.shape:
        raise ValueError(
            "cosines, norms and weights must be of shape (N, N), (N,) and (N,), got "
            f"{tuple(cosines.shape)}, {tuple(norms.shape)} and {tuple(weights.shape)}."
        )
    cosines, norms, weights = (values.to("cpu").to(torch.float64) for values in (cosines, norms, weights))
    sound = norms.isfinite() & (norms > 0) & (cosines.diagonal() > 0)
    lengths = torch.where(sound, torch.ones_like(norms) if unit else weights * norms, 0.0)
    gram = torch.outer(lengths, lengths).mul_(masked(cosines, sound))
    if unit:
        gram.diagonal().copy_(sound.to(torch.float64))
    return gram


def centred_gram(gram: Float[Tensor, "N N"], sound: Bool[Tensor, " N"]) -> Float64[Tensor, "N N"]:
    """Returns the Gram matrix of g_i − μ, μ being the mean of the sound gradients, as float64 on the CPU.

        C_ij = K_ij − a_i − a_j + ‖μ‖²,      a_i = ⟨g_i, μ⟩

    Makes sense where one direction that all candidates share drowns their differences. Costs O(N²). 0 in rows and
    columns that are not sound, and in those of a gradient that is the mean itself (always so for a pool with one sound
    row), which no rule then picks.
    """
    gram = masked_gram(gram, sound)
    kept = gram.diagonal() > 0
    if not bool(kept.any()):
        return gram
    to_mean = gram[:, kept].mean(dim=1)
    mean_square = to_mean[kept].mean()
    centred = gram - to_mean[:, None] - to_mean + mean_square
    centred = (centred + centred.T) / 2.0
    squared_norms = centred.diagonal()
    lengths = gram.diagonal().sqrt()
    kept = kept & (squared_norms > _ROUNDING * (lengths + lengths[kept].mean()).square())
    return torch.where(kept[:, None] & kept, centred, 0.0)


@runtime_checkable
class HasDiagonal(Protocol):
    """A Gram matrix, or what stands for one."""

    def diagonal(self) -> Tensor:
        """Squared norms."""


def scaled_alpha(
    gram: HasDiagonal, finite: Bool[Tensor, " N"], *, fisher_alpha: float, alpha_scaling: AlphaScaling
) -> float:
    """Returns the α of log det(I + α Σ g gᵀ) for one pool.

    "pool" divides the configured α by the mean squared norm of the pool's finite rows, those of zeros included, so
    that a `stop_ratio` means the same on any model; where that mean is zero, and for "fixed", it is as configured.
    """
    check_choice("alpha_scaling", alpha_scaling, AlphaScaling)
    squared_norms = gram.diagonal().to("cpu").to(torch.float64)[finite.to("cpu")]
    mean = float(squared_norms.mean()) if squared_norms.numel() else 0.0
    if alpha_scaling == "fixed" or mean == 0.0:
        return fisher_alpha
    return min(max(fisher_alpha / mean, sys.float_info.min), sys.float_info.max)


def float64_device(device: torch.device) -> torch.device:
    """Returns `device`, or the CPU where the device has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device
