"""Synthetic rows have the paper's lengths, and the shapes are those of the published models."""

from __future__ import annotations

import math
import statistics
from statistics import NormalDist

import pytest
import torch

from tests.benchmarks.flops import DecoderShape
from tests.benchmarks.synthetic import (
    LOG_DEVIATION,
    LOG_MEAN,
    LONGEST,
    SHORTEST,
    build_model,
    draw_lengths,
    draw_rows,
    qwen2_config,
)

pytestmark = pytest.mark.slow


def test_the_distribution_has_the_median_and_the_mean() -> None:
    """In closed form: a cut lognormal's median, and its mean by the shifted normal."""
    normal = NormalDist()
    low, high = ((math.log(bound) - LOG_MEAN) / LOG_DEVIATION for bound in (SHORTEST, LONGEST))
    mass = normal.cdf(high) - normal.cdf(low)
    median = math.exp(LOG_MEAN + LOG_DEVIATION * normal.inv_cdf(normal.cdf(low) + mass / 2))
    shifted = normal.cdf(high - LOG_DEVIATION) - normal.cdf(low - LOG_DEVIATION)
    mean = math.exp(LOG_MEAN + LOG_DEVIATION**2 / 2) * shifted / mass
    assert (median, mean) == (pytest.approx(250, abs=0.1), pytest.approx(360, abs=0.1))


@pytest.mark.parametrize(("num_rows", "tolerance"), [(120, 0.03), (20000, 0.002)])
def test_drawn_lengths_have_them_too(num_rows: int, tolerance: float) -> None:
    lengths = draw_lengths(num_rows, seed=0)
    assert statistics.median(lengths) == pytest.approx(250, rel=tolerance)
    assert statistics.mean(lengths) == pytest.approx(360, rel=tolerance)
    assert min(lengths) >= SHORTEST and LONGEST >= max(lengths) > 1600
    # Neither sorted nor always the same.
    assert lengths != sorted(lengths) and lengths != draw_lengths(num_rows, seed=1)
    assert lengths == draw_lengths(num_rows, seed=0)


def test_lengths_do_not_pile_up_at_the_bounds() -> None:
    lengths = draw_lengths(20000, seed=0)
    assert sum(length == LONGEST for length in lengths) < 10 and sum(length == SHORTEST for length in lengths) < 30


def test_rows_have_a_masked_prompt_and_labels() -> None:
    rows = draw_rows(400, seed=0, vocab_size=97)
    assert [len(row.input_ids) for row in rows] == draw_lengths(400, seed=0)
    shares = []
    for row in rows:
        num_prompt = row.labels.count(-100)
        assert 1 <= num_prompt < len(row.labels)
        assert row.labels == [-100] * num_prompt + row.input_ids[num_prompt:]
        shares.append(num_prompt / len(row.labels))
    assert statistics.mean(shares) == pytest.approx(0.4, abs=0.02)
    assert 0.08 < min(shares) < 0.15 and 0.65 < max(shares) < 0.72
    ids = {token for row in rows for token in row.input_ids}
    assert ids == set(range(97))
    with pytest.raises(ValueError, match="within"):
        draw_rows(4, seed=0, vocab_size=97, prompt_share=0.1)


@pytest.mark.parametrize(("size", "num_parameters"), [("0.5B", 494_032_768), ("7B", 7_615_616_512)])
def test_the_shapes_are_the_published_ones(size: str, num_parameters: int) -> None:
    model = build_model(qwen2_config(size), device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    shape = DecoderShape.from_config(model.config)
    tied = size == "0.5B"
    # Beside the matrices: biases of q, k and v, and two norms a layer; a last norm.
    biases = (shape.num_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    rest = shape.num_layers * (biases + 2 * shape.hidden_size) + shape.hidden_size
    matrices = shape.layer_parameters + shape.head_parameters * (1 if tied else 2)
    assert matrices + rest == num_parameters
    with pytest.raises(ValueError, match="'0.5B', '7B'"):
        qwen2_config("72B")


def test_a_built_model_runs_and_is_seeded() -> None:
    config = qwen2_config("0.5B", hidden_size=28, intermediate_size=32, num_hidden_layers=1, vocab_size=50)
    first, second = (build_model(config, device="cpu") for _ in range(2))
    logits = first(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 50) and logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training
