"""What the transfer benchmark derives from one scoring is what scoring again would say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spice_trainer import SpiceConfig
from spice_trainer.selection.scores import PoolScores
from tests.benchmarks.fidelity import NORMALIZATIONS
from tests.benchmarks.proxy_transfer import lengths_alone, renormalized
from tests.support.models import tiny_lora_model
from tests.support.scorers import make_scorer
from tests.support.trainers import collate, tiny_rows

pytestmark = pytest.mark.slow


def score(rows: list[Any], **spice: Any) -> PoolScores:
    model = tiny_lora_model()
    scorer = make_scorer(
        model, SpiceConfig(**({"gradient_normalization": "none"} | spice)), rows=rows, collate=collate, seed=0
    )
    return next(iter(scorer.score([range(len(rows))])))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("sketch_dim", [0, 256])
def test_normalizations_follow_from_the_raw_gram(normalization: Any, sketch_dim: int) -> None:
    rows = tiny_rows(9)
    rows[4]["labels"] = [-100] * len(rows[4]["labels"])  # its gradient is zero
    derived = renormalized(score(rows, sketch_dim=sketch_dim), normalization)
    again = score(rows, sketch_dim=sketch_dim, gradient_normalization=normalization)
    torch.testing.assert_close(derived.gram, again.gram, rtol=1e-9, atol=1e-12)
    assert not derived.gram[4].any() and not derived.sound[4]


def test_lengths_alone_are_orthogonal_gradients() -> None:
    scores = lengths_alone(score(tiny_rows(5)))
    expected = torch.diag(1 / torch.tensor(scores.label_tokens, dtype=torch.float64))
    torch.testing.assert_close(renormalized(scores, "none").gram, expected)
    assert torch.allclose(renormalized(scores, "sqrt_tokens").gram, torch.eye(5, dtype=torch.float64))
