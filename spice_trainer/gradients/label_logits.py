"""Two things that a forward's logits tell of a row: their nuclear norm, and a sketch of them.

    Z_n (label positions × vocabulary),      ‖Z_n‖_* = Σ singular values,      f_n = vec(P Z_n Q)

P and Q put positions and tokens into a few buckets with random signs (count sketches), so that ‖f_n − f_m‖ is about
‖Z_n − Z_m‖, the rows' answers laid over each other. A token that the model rules out (−inf) counts as 0.

Axes: N samples, S tokens, L label positions of a row, V vocabulary, F numbers of a sketch, W = F + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from spice_trainer.gradients.backends import scoring_mode
from spice_trainer.gradients.forward import forward_parameters, logits_of, without_cache

# Buckets of positions and of tokens, and positions that have a bucket of their own draw.
NUM_POSITION_BUCKETS, NUM_TOKEN_BUCKETS = 8, 128
_NUM_POSITIONS = 2**14
# Logits below this say that a token is ruled out.
_RULED_OUT = -1e30
# Numbers of a row's logits that are converted to float64 at a time.
_CHUNK = 2**22


class LabelLogits:
    """Context manager that computes both in forwards, and leaves no trace; see [`SampleGradients`]."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model = model
        self._seed = seed
        self._keeps = "logits_to_keep" in forward_parameters(model)
        self._buckets: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._open = ExitStack()

    def __enter__(self) -> LabelLogits:
        self._open.enter_context(scoring_mode(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def compute(self, inputs: Mapping[str, Any], labels: Int[Tensor, "N S"]) -> Float64[Tensor, "N W"]:
        """The norm and the sketch of each row, on the CPU; 0 for a row without labels."""
        mask, keep = labels[:, 1:] != -100, dict[str, Any]()
        columns = mask.any(0).nonzero().squeeze(1)
        found = torch.zeros(len(labels), 1 + NUM_POSITION_BUCKETS * NUM_TOKEN_BUCKETS, dtype=torch.float64)
        with torch.no_grad():
            if self._keeps:
                keep, mask = {"logits_to_keep": columns.cpu()}, mask[:, columns]
            logits = logits_of(self.model(**inputs, **without_cache(self.model), **keep))
            if not self._keeps:
                logits = logits[:, :-1]
            mask = mask.to(logits.device)
            for row in range(len(labels)):
                of_row = logits[row][mask[row]].float()
                if len(of_row):
                    of_row = of_row.masked_fill(of_row < _RULED_OUT, 0.0)
                    found[row, 0] = nuclear_norm(of_row)
                    found[row, 1:] = self.sketch(of_row).cpu()
        return found

    def sketch(self, logits: Float[Tensor, "L V"]) -> Float[Tensor, " F"]:
        """P Z Q, flat."""
        num_labels, num_tokens = logits.shape
        buckets, signs = self._draw(num_tokens, NUM_TOKEN_BUCKETS, logits.device)
        narrow = logits.new_zeros(num_labels, NUM_TOKEN_BUCKETS).index_add_(1, buckets, logits * signs)
        buckets, signs = self._draw(_NUM_POSITIONS, NUM_POSITION_BUCKETS, logits.device)
        places = torch.arange(num_labels, device=logits.device) % _NUM_POSITIONS
        short = logits.new_zeros(NUM_POSITION_BUCKETS, NUM_TOKEN_BUCKETS)
        return short.index_add_(0, buckets[places], narrow * signs[places, None]).flatten()

    def _draw(self, number: int, num_buckets: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Bucket and sign of each, the same on every process."""
        key = (number, num_buckets, device)
        if key not in self._buckets:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + num_buckets) % 2**63)
            buckets = torch.randint(num_buckets, (number,), generator=generator)
            signs = torch.randint(2, (number,), generator=generator) * 2.0 - 1.0
            self._buckets[key] = (buckets.to(device), signs.to(device))
        return self._buckets[key]


def nuclear_norm(matrix: Float[Tensor, "L V"]) -> float:
    """The sum of singular values, from the products of the rows; nan where anything is not finite."""
    dtype = torch.float32 if matrix.device.type == "mps" else torch.float64
    products = torch.zeros(len(matrix), len(matrix), dtype=dtype, device=matrix.device)
    for part in matrix.split(max(1, _CHUNK // len(matrix)), dim=1):
        columns = part.to(dtype)
        products += columns @ columns.T
    if not bool(products.isfinite().all()):
        return float("nan")
    return float(torch.linalg.eigvalsh(products.cpu().double()).clamp_min(0.0).sqrt().sum())
