"""Information measures against log-determinants in D dimensions, mpmath and the formulas written out."""

import math

import mpmath
import pytest
import torch

from spice_trainer.selection import cholesky
from spice_trainer.selection import coordinate_information as diagonal
from spice_trainer.selection.coordinate_information import AdaFisherInformation, DiagonalInformation
from spice_trainer.selection.greedy import select_from_gradients
from spice_trainer.selection.information import ExactInformation, build_information


def log_det(gradients, picks, alpha):
    """F(S) = log det(I + α Σ g gᵀ) in D dimensions."""
    picked = gradients[list(picks)]
    return float(torch.linalg.slogdet(torch.eye(gradients.shape[1]).double() + alpha * picked.T @ picked)[1])


def mpmath_log_det(gram, picks, alpha):
    """Log det(I + α K_SS) with 400 digits."""
    with mpmath.workdps(400):
        matrix = mpmath.matrix(len(picks), len(picks))
        for row, first in enumerate(picks):
            for column, second in enumerate(picks):
                matrix[row, column] = (row == column) + mpmath.mpf(alpha) * mpmath.mpf(float(gram[first, second]))
        return mpmath.log(mpmath.det(matrix))


def diagonal_gain(gradients, picks, candidate, alpha):
    total = 0.0
    for coordinate in range(gradients.shape[1]):
        seen = sum(float(gradients[pick, coordinate]) ** 2 for pick in picks)
        total += math.log1p(alpha * float(gradients[candidate, coordinate]) ** 2 / (1 + alpha * seen))
    return total


def adafisher_gain(gradients, picks, candidate, alpha):
    total = 0.0
    for coordinate in range(gradients.shape[1]):
        denominator = 1 + alpha * sum(float(gradients[pick, coordinate]) ** 4 for pick in picks)
        total += float(gradients[candidate, coordinate]) ** 2 / denominator
    return math.log1p(alpha * total)


def random_rows(num_rows, dimension, seed=0):
    return torch.randn(num_rows, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dimension", [3, 8, 40])
@pytest.mark.parametrize("alpha", [1e-4, 1.0, 50.0])
def test_exact_gains_equal_differences_of_log_determinants(dimension, alpha):
    gradients = random_rows(10, dimension)
    measure = ExactInformation(gradients @ gradients.T, fisher_alpha=alpha)
    picks = [3, 0, 7, 9, 1]
    for count, pick in enumerate(picks):
        before = picks[:count]
        expected = [log_det(gradients, [*before, x], alpha) - log_det(gradients, before, alpha) for x in range(10)]
        unpicked = [x for x in range(10) if x not in before]
        assert measure.gains(unpicked).tolist() == pytest.approx([expected[x] for x in unpicked], abs=1e-11)
        assert measure.add(pick) == pytest.approx(expected[pick], abs=1e-11)
    assert measure.information == pytest.approx(log_det(gradients, picks, alpha), abs=1e-11)


def test_exact_is_right_over_the_whole_float64_range():
    # α‖g‖² spread over [1e-4, 1e8] in one pool, with a copy of the largest.
    gradients = random_rows(9, 30, seed=1)
    gradients = gradients / gradients.norm(dim=1, keepdim=True) * torch.logspace(-2, 4, 9).double()[:, None] * 0.9999
    gradients[0] = gradients[8]
    measure = ExactInformation(gradients @ gradients.T, fisher_alpha=1.0)
    assert isinstance(measure._factor, cholesky.Float64Cholesky)
    picks = [8, 4, 0, 7, 1, 5]
    gains = [measure.add(pick) for pick in picks]
    for count in range(1, 7):
        expected = mpmath_log_det(gradients @ gradients.T, picks[:count], 1.0)
        assert sum(gains[:count]) == pytest.approx(float(expected), abs=1e-6)
    assert gains[2] == pytest.approx(math.log(2), abs=1e-6)


def dyadic_gradients(exponents, dimension=4, seed=2):
    """Rows of small integers times powers of two: every inner product is exact in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-3, 4, (len(exponents), dimension), generator=generator).double()
    rows[:, 0] = 1
    return rows * torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    "exponents",
    [
        [100, 100, 100, 100, 100, 100, 100, 100],  # More rows of 1e+30 than dimensions
        [-100, 100, 0, -100, 100, 0, 100, 100],
        [14, 15, 16, 14, 15, 16, 0, -10],
        [300, -300, 300, 0, 299, -500, 5, 300],
    ],
)
def test_exact_matches_mpmath_at_extreme_scales(exponents):
    gradients = dyadic_gradients(exponents)
    gradients[4] = gradients[0]
    gram = gradients @ gradients.T
    measure = ExactInformation(gram, fisher_alpha=0.7)
    assert isinstance(measure._factor, cholesky.DecimalCholesky)
    picks = [0, 4, 1, 7, 2, 3, 6, 5]
    previous = mpmath.mpf(0)
    for count, pick in enumerate(picks):
        gain = measure.add(pick)
        current = mpmath_log_det(gram, picks[: count + 1], 0.7)
        with mpmath.workdps(400):
            assert gain == pytest.approx(float(current - previous), rel=1e-12, abs=0)
        previous = current
    assert measure.information == pytest.approx(float(previous), rel=1e-13)


def test_float64_alone_would_be_wrong_at_extreme_scales():
    gradients = dyadic_gradients([100] * 8)
    gram = gradients @ gradients.T
    naive = cholesky.Float64Cholesky(gram, 1.0)
    exact = ExactInformation(gram, fisher_alpha=1.0)
    for pick in range(5):
        naive.add(pick)
        exact.add(pick)
    assert float((naive.gains()[5:] - exact.gains([5, 6, 7])).abs().max()) > 0.1


@pytest.mark.parametrize("scale", [1e-60, 1e-4, 1.0, 1e7, 1e9, 1e62])
def test_copies_have_the_gain_of_copies(scale):
    measure = ExactInformation(torch.full((6, 6), scale, dtype=torch.float64), fisher_alpha=1.0)
    for copies in range(6):
        expected = mpmath.log1p(mpmath.mpf(scale) / (1 + copies * mpmath.mpf(scale)))
        assert measure.add(copies) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e7, 1e10, 1e30, 1e62])
def test_a_rounded_gram_never_gives_negative_or_growing_gains(scale):
    rows = random_rows(20, 5, seed=3).float()
    gram = (rows @ rows.T).double() * scale
    measure = ExactInformation(gram, fisher_alpha=1.0)
    previous = measure.gains()
    for pick in range(20):
        measure.add(pick)
        current = measure.gains()
        assert current.isfinite().all()
        assert (current >= 0).all()
        assert (current <= previous).all()
        previous = current


@pytest.mark.parametrize(("scale", "noise"), [(1e7, 10.0), (1e10, 1e4)])
def test_rounding_in_the_gram_does_not_eat_the_gain_of_others(scale, noise):
    # Rows 0 and 1 are copies, 2 and 3 are copies; products across are zero but for one rounded entry.
    gram = torch.block_diag(torch.full((2, 2), scale), torch.full((2, 2), scale)).double()
    gram[0, 1] = gram[1, 0] = scale + noise
    gram[1, 3] = gram[3, 1] = noise
    measure = ExactInformation(gram, fisher_alpha=1.0)
    measure.add(2)
    measure.add(0)
    assert float(measure.gains([1])) == pytest.approx(math.log(2), rel=1e-6)
    measure.add(1)
    assert float(measure.gains([3])) >= math.log(1.5) - 1e-6


def test_exact_never_raises_at_the_ends_of_float64():
    gram = torch.diag(torch.tensor([1e308, 5e-324, 1.0], dtype=torch.float64))
    measure = ExactInformation(gram, fisher_alpha=1e300)
    expected = [608 * math.log(10), float(mpmath.log1p(mpmath.mpf(1e300) * mpmath.mpf(5e-324))), 300 * math.log(10)]
    assert [measure.add(pick) for pick in range(3)] == pytest.approx(expected, rel=1e-12)


def test_exact_gives_unsound_rows_no_gain():
    gradients = random_rows(5, 7, seed=4)
    sound = ExactInformation((gradients @ gradients.T)[[0, 2, 4]][:, [0, 2, 4]], fisher_alpha=1.0)
    gradients[1, 2] = math.nan
    gradients[3] = 0
    measure = ExactInformation(gradients @ gradients.T, fisher_alpha=1.0)
    assert measure.gains([1, 3]).tolist() == [0, 0]
    assert measure.add(1) == 0
    assert measure.gains([0, 2, 4]).tolist() == pytest.approx(sound.gains().tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("measure_class", "oracle"), [(DiagonalInformation, diagonal_gain), (AdaFisherInformation, adafisher_gain)]
)
@pytest.mark.parametrize("chunk_size", [2**17, 32, 5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_coordinate_measures_match_their_formulas(monkeypatch, measure_class, oracle, chunk_size, scale):
    monkeypatch.setattr(diagonal, "_CHUNK_SIZE", chunk_size)
    gradients = random_rows(6, 67, seed=5) * scale
    rows = gradients.float()
    weights = torch.tensor([1.0, 2.0, 1e-3, 0.5, 1.0, 1.0], dtype=torch.float64)
    gradients = rows.double() * weights[:, None]
    untouched = rows.clone()
    measure = measure_class(rows, fisher_alpha=0.3, row_weights=weights)
    picks = [4, 0, 2, 1]
    total = 0.0
    for count, pick in enumerate(picks):
        expected = [oracle(gradients, picks[:count], x, 0.3) for x in range(6)]
        bounds, exact = measure.gain_bounds()
        for bound, is_exact, gain in zip(bounds.tolist(), exact.tolist(), expected, strict=True):
            assert bound == pytest.approx(gain, rel=1e-12) if is_exact else bound >= gain * (1 - 1e-13)
        assert measure.gains([5]).tolist() == pytest.approx([expected[5]], rel=1e-12)
        assert measure.gains().tolist() == pytest.approx(expected, rel=1e-12)
        assert measure.add(pick) == pytest.approx(expected[pick], rel=1e-12)
        total += expected[pick]
    assert measure.information == pytest.approx(total, rel=1e-12)
    assert torch.equal(rows, untouched)


@pytest.mark.parametrize("measure_class", [DiagonalInformation, AdaFisherInformation])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinate_measures_at_extreme_scales(measure_class, dtype):
    gradients = random_rows(4, 256, seed=6).to(dtype)
    gradients *= torch.tensor([1e30, 1e-30, 1.0, 1e30]).to(dtype)[:, None]
    oracle = diagonal_gain if measure_class is DiagonalInformation else adafisher_gain
    measure = measure_class(gradients, fisher_alpha=1.0)
    for count, pick in enumerate([0, 2, 3, 1]):
        expected = oracle(gradients.double(), [0, 2, 3, 1][:count], pick, 1.0)
        assert measure.add(pick) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("measure_class", [DiagonalInformation, AdaFisherInformation])
def test_coordinate_measures_give_unsound_rows_no_gain(measure_class):
    gradients = random_rows(5, 9, seed=7).float()
    gradients[1, 0] = math.nan
    gradients[2] = 0
    weights = torch.tensor([1.0, 1.0, 1.0, math.nan, 1.0], dtype=torch.float64)
    measure = measure_class(gradients, fisher_alpha=1.0, row_weights=weights)
    assert [measure.add(pick) for pick in (1, 2, 3)] == [0, 0, 0]
    fresh = measure_class(gradients, fisher_alpha=1.0)
    assert measure.gains([0, 4]).tolist() == fresh.gains([0, 4]).tolist()
    assert (measure.gains([0, 4]) > 0).all()


def test_adafisher_says_what_it_is_and_is_it():
    assert "top-K by gradient norm" in AdaFisherInformation.__doc__
    gradients = random_rows(12, 400, seed=8) * torch.linspace(0.001, 0.01, 12).double()[:, None]
    measure = AdaFisherInformation(gradients, fisher_alpha=1.0)
    for pick in range(8):
        measure.add(pick)
    unchanged = torch.log1p(gradients.square().sum(dim=1))
    torch.testing.assert_close(measure.gains(), unchanged, rtol=1e-3, atol=0)


def test_build_information():
    gradients = random_rows(4, 6, seed=9)
    gram = gradients @ gradients.T
    for kind, kind_class in (
        ("exact", ExactInformation),
        ("diagonal", DiagonalInformation),
        ("adafisher", AdaFisherInformation),
    ):
        measure = build_information(kind, gram=gram, gradients=gradients, fisher_alpha=1.0)
        assert type(measure) is kind_class
        assert (measure.num_candidates, measure.information) == (4, 0.0)
    doubled = build_information(
        "diagonal", gram=gram, gradients=gradients, fisher_alpha=1.0, row_weights=torch.full((4,), 2.0)
    )
    assert doubled.gains().tolist() == DiagonalInformation(2 * gradients, fisher_alpha=1.0).gains().tolist()
    assert build_information("exact", gram=gram, fisher_alpha=1.0).num_candidates == 4


@pytest.mark.wrong_arrays
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "full"}, "information must be one of 'exact', 'diagonal', 'adafisher', got 'full'"),
        ({"kind": "diagonal", "gradients": None}, "gradients is None. Pass the unsketched gradients, or use"),
        ({"kind": "adafisher", "gradients": torch.ones(3, 2)}, "gradients has 3 rows but gram is for 2 candidates"),
        ({"kind": "diagonal", "row_weights": torch.ones(3)}, "row_weights must have one entry per row"),
        ({"kind": "diagonal", "fisher_alpha": 0.0}, "fisher_alpha .* must be positive and finite, got 0.0"),
        ({"kind": "exact", "fisher_alpha": math.nan}, "fisher_alpha"),
        ({"kind": "exact", "gram": torch.ones(2, 3)}, "gram must be square"),
    ],
)
def test_build_information_rejects(arguments, message):
    given = {"gram": torch.eye(2), "gradients": torch.ones(2, 3), "fisher_alpha": 1.0, **arguments}
    with pytest.raises(ValueError, match=message):
        build_information(given.pop("kind"), **given)


@pytest.mark.parametrize("information", ["diagonal", "adafisher"])
def test_an_alpha_beyond_float64_is_an_error_that_names_it(information):
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = select_from_gradients(rows * 1e6, 3, fisher_alpha=1e300)
    assert exact.gains == pytest.approx([math.log(1e300) + math.log(1e12) + math.log(50)] * 3, rel=1e-3)
    assert select_from_gradients(rows, 3, information=information, fisher_alpha=1e300).information > 0
    with pytest.raises(
        ValueError, match=r"fisher_alpha=1e\+300 with gradients of squared norms up to .*beyond float64"
    ):
        select_from_gradients(rows * 1e6, 3, information=information, fisher_alpha=1e300)
