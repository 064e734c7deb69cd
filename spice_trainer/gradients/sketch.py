"""A seeded count sketch that bounds the memory of sample gradients.

A sample gradient g ∈ ℝ^D is stored as m = `sketch_dim` numbers

    (Sg)_b = Σ_{j : h(j) = b} s(j) g_j,      h(j) = (j − start_c + r_c) mod m,   s(j) ∈ {−1, +1}

where coordinate j lies in block c: each module is cut into blocks of m consecutive coordinates, a block begins at
`start_c` and is rotated by a random r_c. Signs and rotations are independent, two coordinates of a block never share a
bucket and any other two do with probability 1/m, so

    E⟨Sg, Sh⟩ = ⟨g, h⟩,      Var⟨Sg, Sh⟩ ≤ (‖g‖²‖h‖² + ⟨g, h⟩²) / m

as for a textbook count sketch. Each module's gradient is folded into the sketch as soon as it is formed; the
D-dimensional gradient of the whole model never exists.

Why this sketch: consecutive buckets turn the scatter of a textbook count sketch into a few contiguous additions. The
random rotations keep large coordinates that recur at a fixed stride (one outlier feature in every row of a LoRA
matrix, in every module of the same shape) from colliding systematically.

Axes: N samples, D gradient dimension, m sketch dimension, L modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


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
        self._rotations = [
            torch.randint(sketch_dim, (-(-size // sketch_dim),), generator=generator).tolist() for size in self.sizes
        ]
        # Drawn on the CPU and moved, so that every device and process folds alike. int8: one byte a coordinate.
        signs = torch.randint(2, (sum(self.sizes),), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        self._signs = list(signs.to(device).split(self.sizes))

    def fold_(
        self, sketches: Float[Tensor, "N m"], module_index: int, gradients: Float[Tensor, "N D_l"]
    ) -> Float[Tensor, "N m"]:
        """Adds the sketch of one module's sample gradients to `sketches`, in place.

        The gradients are overwritten with the signed ones.
        """
        signed = gradients.mul_(self._signs[module_index])
        size, m = self.sizes[module_index], self.sketch_dim
        for block, bucket in enumerate(self._rotations[module_index]):
            start, stop = block * m, min((block + 1) * m, size)
            # A rotated block wraps around the end of the sketch at most once.
            wrap = min(start + m - bucket, stop)
            sketches[:, bucket : bucket + wrap - start] += signed[:, start:wrap]
            sketches[:, : stop - wrap] += signed[:, wrap:stop]
        return sketches
