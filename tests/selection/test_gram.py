"""Cosines, norms and normalised Gram matrices against float64 and mpmath."""

import math

import mpmath
import pytest
import torch

from spice_trainer.selection.gram import (
    _equate_parallel_rows,
    measure_rows,
    normalization_weights,
    normalized_gram,
    scaled_alpha,
)


def float64_cosines(rows):
    rows = rows.double()
    norms = rows.norm(dim=1)
    return (rows @ rows.T) / torch.outer(norms, norms)


def rounding_errors(rows, products=torch.float32, chunk_size=2**18):
    """Bounds of what rounding alone does to the norms (relatively) and cosines of `rows`.

    An operation rounds its result by at most u of it, √⅓ u if errors are evenly spread. Entries are rounded as rows
    are divided by their scales: at most by u each, and all of it counts, since the few different numbers that half
    precision has are rounded alike. Partial sums of products are rounded independently of each other (Higham and Mary,
    2019), so variances add: six standard deviations count, of one running sum over `chunk_size` columns, the worst
    order there is in use. Lanes and blocks have smaller partial sums.
    """
    of_entries, of_sums, of_doubles = (torch.finfo(each).eps / 2 for each in (rows.dtype, products, torch.float64))
    rows = rows.double() / rows.double().norm(dim=1, keepdim=True)
    pairs = rows[:, None] * rows[None, :]
    running = sum(part.cumsum(dim=2).square().sum(dim=2) for part in pairs.split(chunk_size, dim=2))
    # The expectation is a running sum itself.
    variance = (of_sums**2 * running + of_doubles**2 * pairs.cumsum(dim=2).square().sum(dim=2)) / 3
    of_products = 6 * variance.sqrt() + 2 * (of_entries + of_doubles) * pairs.abs().sum(dim=2)
    of_norms = of_products.diagonal() / 2
    return of_norms, of_products + (rows @ rows.T).abs() * (of_norms[:, None] + of_norms[None, :])


def assert_geometry(geometry, rows, products=torch.float32, chunk_size=2**18):
    of_cosines = rounding_errors(rows, products, chunk_size)[1]
    of_norms = rounding_errors(rows, products, min(chunk_size, 2**12))[0]
    assert bool(((geometry.cosines - float64_cosines(rows)).abs() <= of_cosines).all())
    assert bool(((geometry.norms / rows.double().norm(dim=1) - 1).abs() <= of_norms).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_size", [2**18, 1000, 7, 1])
def test_matches_float64(dtype, chunk_size):
    rows = torch.randn(9, 50 if chunk_size < 10 else 20_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3] = rows[5] + 0.01 * rows[1]
    geometry = measure_rows(rows.clone(), chunk_size=chunk_size)
    products = torch.promote_types(dtype, torch.float32)
    assert_geometry(geometry, rows, products=products, chunk_size=chunk_size)
    assert geometry.cosines.dtype == geometry.norms.dtype == geometry.scales.dtype == torch.float64
    assert torch.equal(geometry.cosines, geometry.cosines.T)
    assert torch.equal(geometry.cosines.diagonal(), torch.ones(9, dtype=torch.float64))


def test_products_of_less_than_float32_would_be_seen():
    rows = torch.randn(9, 20_000, generator=torch.Generator().manual_seed(0))
    rows[3] = rows[5] + 0.01 * rows[1]
    geometry = measure_rows(rows.bfloat16().float())
    with pytest.raises(AssertionError):
        assert_geometry(geometry, rows)


def test_many_columns_keep_float32_products_accurate():
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 600_000, generator=generator) * torch.rand(600_000, generator=generator).pow(8)
    assert_geometry(measure_rows(rows.clone()), rows)


def test_overwrites_features_with_rows_over_their_scale():
    rows = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    rows[1] *= 1e-25
    rows[2] = 0
    rows[3, 7] = math.nan
    features = rows.clone()
    geometry = measure_rows(features, chunk_size=64)
    assert torch.equal(geometry.scales[[0, 1, 4]], rows[[0, 1, 4]].double().abs().amax(dim=1))
    restored = features.double() * geometry.scales[:, None]
    torch.testing.assert_close(restored[[0, 1, 4]], rows[[0, 1, 4]].double(), rtol=1e-7, atol=0)
    assert features[[0, 1, 4]].abs().amax(dim=1).tolist() == [1.0] * 3
    assert not features[2:4].any()


def test_unsound_rows():
    features = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    features[1] = 0
    features[2, 3] = math.nan
    features[4, 0] = -math.inf
    sound_before = features[[0, 3, 5]].clone()
    geometry = measure_rows(features, chunk_size=16)
    assert geometry.finite.tolist() == [True, True, False, True, False, True]
    assert geometry.nonzero.tolist() == [True, False, True, True, True, True]
    assert geometry.sound.tolist() == [True, False, False, True, False, True]
    assert not geometry.cosines[[1, 2, 4]].any()
    assert not geometry.cosines[:, [1, 2, 4]].any()
    assert (
        geometry.norms.isnan().tolist() == geometry.scales.isnan().tolist() == [False, False, True, False, True, False]
    )
    assert geometry.norms[1] == geometry.scales[1] == 0
    kept = geometry.cosines[[0, 3, 5]][:, [0, 3, 5]]
    assert bool(((kept - float64_cosines(sound_before)).abs() <= rounding_errors(sound_before)[1]).all())


@pytest.mark.parametrize("product_dtype", [None, torch.float64])
def test_scales_from_1e_minus_30_to_1e_plus_30(product_dtype):
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    rows *= torch.tensor([1e-30, 1e30, 1.0, 3e-38, 1e-42])[:, None]
    exact = [[mpmath.mpf(value) for value in row] for row in rows.double().tolist()]
    of_norms, of_cosines = rounding_errors(rows, products=product_dtype or torch.float32)
    geometry = measure_rows(rows, product_dtype=product_dtype)
    with mpmath.workdps(60):
        norms = [mpmath.sqrt(mpmath.fdot(row, row)) for row in exact]
        for first in range(5):
            assert float(geometry.norms[first]) / float(norms[first]) == pytest.approx(1, abs=float(of_norms[first]))
            for second in range(5):
                cosine = mpmath.fdot(exact[first], exact[second]) / (norms[first] * norms[second])
                error = abs(float(geometry.cosines[first, second]) - float(cosine))
                assert error <= float(of_cosines[first, second])


@pytest.mark.parametrize("num_rows", [2, 5, 13, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_and_opposite_rows_are_exactly_parallel(num_rows, dtype):
    rows = torch.randn(num_rows, 997, generator=torch.Generator().manual_seed(num_rows), dtype=dtype)
    rows[-1] = rows[0]
    if num_rows > 3:
        rows[num_rows // 2] = -rows[0]
        rows[1] = rows[0] * 4
    cosines = measure_rows(rows, chunk_size=100).cosines
    assert cosines[0, -1] == cosines[-1, 0] == cosines[0, 0] == 1.0
    assert torch.equal(cosines[0], cosines[-1])
    if num_rows > 3:
        assert cosines[0, num_rows // 2] == cosines[num_rows // 2, 1] == -1.0
        assert torch.equal(cosines[0], -cosines[num_rows // 2])
        assert torch.equal(cosines, cosines.T)


def test_copies_have_a_cosine_of_exactly_one_in_every_pool():
    # Without care √p·√p misses p by one unit in the last place in about a quarter of pools.
    for seed in range(40):
        rows = torch.randn(1, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).repeat(2, 1)
        assert measure_rows(rows).cosines.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_copies_are_equal_even_where_products_round_differently():
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    rows[2], rows[4] = -rows[1], rows[1]
    noise = 1e-9 * torch.randn(5, 5, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    cosines = float64_cosines(rows) + noise + noise.T
    cosines.diagonal().fill_(1.0)
    _equate_parallel_rows(cosines, [rows[:, :20], rows[:, 20:]])
    assert cosines[1].tolist() == cosines[4].tolist() == (-cosines[2]).tolist()
    assert cosines[1, [1, 2, 4]].tolist() == [1.0, -1.0, 1.0]
    assert torch.equal(cosines, cosines.T)


def test_nearly_equal_rows_are_not_made_equal():
    rows = torch.randn(3, 2000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows[2] = rows[0]
    rows[2, -1] += 0.01
    geometry = measure_rows(rows.clone(), chunk_size=512)
    assert geometry.cosines[0, 2] < 1
    assert_geometry(geometry, rows, products=torch.float64, chunk_size=512)


def test_autocast_and_medium_precision_do_not_degrade_products():
    rows = torch.randn(4, 5000, generator=torch.Generator().manual_seed(6))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        medium = measure_rows(rows.clone()).cosines
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = measure_rows(rows.clone())
    assert torch.equal(medium, measure_rows(rows.clone(), product_dtype=torch.float64).cosines)
    assert not torch.equal(medium, measure_rows(rows.clone(), product_dtype=torch.float32).cosines)
    assert_geometry(autocast, rows)


@pytest.mark.wrong_arrays
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(3), "two axes"),
        (torch.ones(0, 4), "at least one row"),
        (torch.ones(2, 3, dtype=torch.long), "torch.int64 of shape"),
        ([[1.0]], "got list"),
    ],
)
def test_measure_rows_rejects(features, message):
    with pytest.raises(ValueError, match=message):
        measure_rows(features)


def test_measure_rows_rejects_chunk_size():
    with pytest.raises(ValueError, match="chunk_size"):
        measure_rows(torch.ones(2, 2), chunk_size=0)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("none", [1, 1, 1, 1]),
        ("sqrt_tokens", [2, 3, 1, 5]),
        ("tokens", [4, 9, 1, 25]),
        ("unit", [0.5, 4, 0, 0]),
    ],
)
def test_normalization_weights(normalization, expected):
    norms = torch.tensor([2.0, 0.25, 0.0, math.nan], dtype=torch.float64)
    weights = normalization_weights(norms, torch.tensor([4, 9, 1, 25]), normalization)
    assert weights.tolist() == expected
    assert weights.dtype == torch.float64


@pytest.mark.wrong_arrays
def test_normalization_weights_rejects():
    with pytest.raises(ValueError, match="gradient_normalization must be one of 'none', 'sqrt_tokens'"):
        normalization_weights(torch.ones(2), torch.ones(2), "l2")
    with pytest.raises(ValueError, match="one entry per candidate"):
        normalization_weights(torch.ones(2), torch.ones(3), "none")


@pytest.mark.parametrize("normalization", ["none", "sqrt_tokens", "tokens", "unit"])
def test_normalized_gram_is_the_gram_of_normalised_gradients(normalization):
    rows = torch.randn(7, 30, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rows[2] *= 1e12
    tokens = torch.tensor([3, 1, 8, 20, 4, 5, 9])
    norms = rows.norm(dim=1)
    multipliers = {"none": torch.ones(7), "sqrt_tokens": tokens.sqrt(), "tokens": tokens, "unit": 1 / norms}
    normalised = rows * multipliers[normalization].double()[:, None]
    geometry = measure_rows(rows)
    weights = normalization_weights(geometry.norms, tokens, normalization)
    gram = normalized_gram(geometry.cosines, geometry.norms, weights, unit=normalization == "unit")
    sizes = normalised.norm(dim=1)
    difference = (gram - normalised @ normalised.T) / torch.outer(sizes, sizes)
    assert float(difference.abs().max()) < 1e-6
    assert torch.equal(gram, gram.T)
    if normalization == "unit":
        assert torch.equal(gram.diagonal(), torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("unit", [False, True])
def test_normalized_gram_zeroes_unsound_rows_and_keeps_extreme_ones(unit):
    rows = torch.randn(5, 30, generator=torch.Generator().manual_seed(8))
    rows[0] *= 1e30
    rows[1] *= 1e-30
    rows[2] = 0
    rows[3, 3] = math.inf
    geometry = measure_rows(rows)
    weights = normalization_weights(geometry.norms, torch.ones(5), "unit" if unit else "none")
    gram = normalized_gram(geometry.cosines, geometry.norms, weights, unit=unit)
    assert gram.isfinite().all()
    assert not gram[2:4].any()
    assert not gram[:, 2:4].any()
    expected = [1, 1, 0, 0, 1] if unit else [float(n) ** 2 if n > 0 else 0.0 for n in geometry.norms]
    assert gram.diagonal().tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    assert float(gram[0, 1]) == pytest.approx(float(gram[0, 0].sqrt() * gram[1, 1].sqrt() * geometry.cosines[0, 1]))


@pytest.mark.wrong_arrays
def test_normalized_gram_uses_given_norms():
    cosines = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    gram = normalized_gram(cosines, torch.tensor([2.0, 4.0]), torch.tensor([3.0, 1.0]), unit=False)
    assert gram.tolist() == [[36, 12], [12, 16]]
    with pytest.raises(ValueError, match=r"got \(2, 2\), \(3,\) and \(2,\)"):
        normalized_gram(cosines, torch.ones(3), torch.ones(2), unit=False)


def test_unit_diagonal_is_exactly_one_whatever_the_cosines_round_to():
    cosines = torch.tensor([[1 - 1e-9, 0.5], [0.5, 1 + 1e-9]], dtype=torch.float64)
    gram = normalized_gram(cosines, torch.tensor([2.0, 4.0]), torch.tensor([0.5, 0.25]), unit=True)
    assert gram.tolist() == [[1, 0.5], [0.5, 1]]


def test_scaled_alpha():
    gram = torch.diag(torch.tensor([4.0, 0.0, math.nan, 2.0], dtype=torch.float64))
    finite = torch.tensor([True, True, False, True])
    assert scaled_alpha(gram, finite, fisher_alpha=3.0, alpha_scaling="fixed") == 3.0
    # Rows of zeros count in the mean: (4 + 0 + 2) / 3.
    assert scaled_alpha(gram, finite, fisher_alpha=3.0, alpha_scaling="pool") == 1.5
    assert scaled_alpha(gram * 0, finite, fisher_alpha=3.0, alpha_scaling="pool") == 3.0
    assert scaled_alpha(gram, torch.zeros(4, dtype=torch.bool), fisher_alpha=3.0, alpha_scaling="pool") == 3.0
    assert 0 < scaled_alpha(gram * 1e-308, finite, fisher_alpha=1e10, alpha_scaling="pool") < math.inf
    assert 0 < scaled_alpha(gram * 1e307, finite, fisher_alpha=1e-300, alpha_scaling="pool") < math.inf
    with pytest.raises(ValueError, match="alpha_scaling must be one of 'fixed', 'pool', got 'mean'"):
        scaled_alpha(gram, finite, fisher_alpha=1.0, alpha_scaling="mean")
