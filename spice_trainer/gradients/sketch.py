"""A seeded count sketch that bounds the memory of sample gradients.

A sample gradient g ∈ ℝ^D is stored as m = `sketch_dim` numbers

    (Sg)_b = Σ_{j : h(j) = b} s(j) g_j,      h(j) = (j − start_c + r_c) mod m,   s(j) ∈ {−1, +1}

where coordinate j lies in block c: each module is cut into blocks of m consecutive coordinates, a block begins at
`start_c` and is rotated by a random r_c. Signs and rotations are independent, two coordinates of a block never share a
bucket and any other two do with probability 1/m, so

    E⟨Sg, Sh⟩ = ⟨g, h⟩,      Var⟨Sg, Sh⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / m

as for a textbook count sketch. Each piece of a module's gradient is folded into the sketch as soon as it is formed;
the D-dimensional gradient of the whole model never exists.

Why this sketch: consecutive buckets turn the scatter of a textbook count sketch into a few contiguous additions. The
random rotations keep large coordinates that recur at a fixed stride (one outlier feature in every row of a LoRA
matrix, in every module of the same shape) from colliding systematically.

A module of very many blocks (a layer that trains in full) has one rotation, and blocks of p < m coordinates, p the
largest prime below m: of any stride but p's multiples no two coordinates in p meet, and the sum over blocks is one
operation. Its signs come from a table that several modules share where the model is large, each with a sign and a
place of its own.

Axes: N samples, D gradient dimension, m sketch dimension, L modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A module of more blocks has a single rotation.
_MAX_ROTATIONS = 256
# A table of signs takes 64 MB.
_MAX_SIGNS = 2**26


class GradientSketch:
    """Folds sample gradients of modules with `sizes` coordinates into m = `sketch_dim` numbers a sample.

    The same seed gives the same sketch on every process and device. A table of signs, D bytes, lives on the device.
    """

    def __init__(
        self, sizes: Sequence[int], sketch_dim: int, *, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        if sketch_dim < 1:
            raise ValueError(f"sketch_dim must be at least 1, got {sketch_dim}.")
        if any(size < 1 for size in sizes):
            raise ValueError(f"every module must have at least one coordinate, got sizes {list(sizes)}.")
        self.sketch_dim = sketch_dim
        self.sizes = tuple(sizes)
        generator = torch.Generator().manual_seed(seed)
        self._block = [
            sketch_dim if size <= sketch_dim * _MAX_ROTATIONS else _prime_below(sketch_dim) for size in sizes
        ]
        self._rotations = [
            torch.randint(sketch_dim, (-(-size // sketch_dim) if block == sketch_dim else 1,), generator=generator)
            for size, block in zip(sizes, self._block, strict=True)
        ]
        # Drawn on the CPU and moved, so that every device and process folds alike. int8: one byte a coordinate.
        num_signs = min(sum(sizes), _MAX_SIGNS)
        signs = torch.randint(2, (num_signs,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        self._signs = signs.to(device)
        self._places = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        self._flips = [1] * len(sizes)
        if sum(sizes) > num_signs:
            self._places = torch.randint(num_signs, (len(sizes),), generator=generator).tolist()
            self._flips = torch.randint(2, (len(sizes),), generator=generator).mul_(2).sub_(1).tolist()

    def fold_(
        self, sketches: Float[Tensor, "N m"], module_index: int, gradients: Float[Tensor, "N w"], start: int = 0
    ) -> Float[Tensor, "N m"]:
        """Adds the sketch of one module's sample gradients, coordinates from `start` on, to `sketches`, in place.

        The gradients are overwritten with the signed ones.
        """
        stop = start + gradients.shape[1]
        if stop > self.sizes[module_index]:
            raise ValueError(f"module {module_index} has {self.sizes[module_index]} coordinates, got {stop}.")
        signed = self._sign_(gradients, module_index, start)
        size, rotations = self._block[module_index], self._rotations[module_index].tolist()
        if len(rotations) == 1:
            # One rotation: whole blocks are summed first.
            whole = -(-start // size) * size, stop // size * size
            if whole[1] - whole[0] > size:
                summed = signed[:, whole[0] - start : whole[1] - start].unflatten(1, (-1, size)).sum(1)
                parts = [
                    (0, summed),
                    (start % size, signed[:, : whole[0] - start]),
                    (0, signed[:, whole[1] - start :]),
                ]
                for place, part in parts:
                    self._add_at_(sketches, (place + rotations[0]) % self.sketch_dim, part)
                return sketches
        for block in range(start // size, -(-stop // size)):
            begin, end = max(start, block * size), min(stop, (block + 1) * size)
            rotation = rotations[min(block, len(rotations) - 1)]
            place = (begin - block * size + rotation) % self.sketch_dim
            self._add_at_(sketches, place, signed[:, begin - start : end - start])
        return sketches

    def fold_sparse_(
        self,
        sketch: Float[Tensor, " m"],
        module_index: int,
        coordinates: Int[Tensor, " w"],
        values: Float[Tensor, " w"],
    ) -> Float[Tensor, " m"]:
        """Adds the sketch of a gradient of which these coordinates, each once, are not 0."""
        size, rotations = self._block[module_index], self._rotations[module_index].to(coordinates.device)
        blocks = (coordinates // size).clamp_(max=len(rotations) - 1)
        buckets = (coordinates % size + rotations[blocks]) % self.sketch_dim
        signs = self._signs[(coordinates + self._places[module_index]) % len(self._signs)]
        return sketch.index_add_(0, buckets, values * signs * self._flips[module_index])

    def _sign_(self, gradients: Tensor, module_index: int, start: int) -> Tensor:
        width, length = gradients.shape[1], len(self._signs)
        first = (self._places[module_index] + start) % length
        done = 0
        while done < width:
            # A part of the table, which goes around.
            step = min(width - done, length - first)
            gradients[:, done : done + step] *= self._signs[first : first + step]
            done, first = done + step, 0
        return gradients if self._flips[module_index] == 1 else gradients.neg_()

    def _add_at_(self, sketches: Tensor, place: int, values: Tensor) -> None:
        """Adds at most m numbers from a place on, which wrap around the end of the sketch at most once."""
        wrap = min(self.sketch_dim - place, values.shape[1])
        sketches[:, place : place + wrap] += values[:, :wrap]
        sketches[:, : values.shape[1] - wrap] += values[:, wrap:]


def _prime_below(number: int) -> int:
    """The largest prime that is at most this number, or 1."""
    for candidate in range(number, 1, -1):
        if all(candidate % divisor for divisor in range(2, math.isqrt(candidate) + 1)):
            return candidate
    return 1
