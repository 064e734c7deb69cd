"""Greedy selection against the same algorithm written out on gradient vectors."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer.selection.coordinate_information import AdaFisherInformation, DiagonalInformation
from spice_trainer.selection.greedy import PickOptions, greedy, information_of, select, select_from_gradients
from spice_trainer.selection.information import ExactInformation, build_information
from spice_trainer.selection.results import Selection
from tests.support.greedy_oracle import adafisher_gain, diagonal_gain, greedy_oracle, log_det_gain, mpmath_gain

GAINS = {"exact": log_det_gain, "diagonal": diagonal_gain, "adafisher": adafisher_gain}


def random_rows(num_rows, dimension, seed=0, spread=1.0):
    """Rows whose norms spread over `spread`, some of them opposed to a common direction."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dimension, generator=generator, dtype=torch.float64)
    rows += torch.randn(dimension, generator=generator, dtype=torch.float64) * torch.sign(rows[:, :1])
    norms = torch.logspace(-0.5, 0.5, num_rows).double()[torch.randperm(num_rows, generator=generator)] ** spread
    return rows / rows.norm(dim=1, keepdim=True) * norms[:, None]


def assert_equals_oracle(selection, expected, tolerance=1e-9):
    picked, stopped_early = expected
    assert selection.indices == tuple(option[0] for option in picked)
    assert selection.gains == pytest.approx([option[1] for option in picked], abs=tolerance)
    assert selection.conflicts == pytest.approx([option[2] for option in picked], abs=1e-7)
    assert selection.scores == pytest.approx([option[3] for option in picked], abs=max(tolerance, 1e-7))
    assert selection.information == pytest.approx(sum(option[1] for option in picked), abs=10 * tolerance)
    assert selection.stopped_early is stopped_early


@pytest.mark.parametrize("reference", ["selected", "candidates"])
@pytest.mark.parametrize("penalty", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(("num_rows", "dimension", "num_selected"), [(15, 40, 6), (12, 4, 12), (20, 10, 30)])
def test_select_equals_brute_force(num_rows, dimension, num_selected, penalty, reference):
    for seed in range(3):
        rows = random_rows(num_rows, dimension, seed)
        rules = {"fisher_alpha": 2.0, "conflict_penalty": penalty, "conflict_reference": reference}
        expected = greedy_oracle(rows, num_selected, **rules)
        assert_equals_oracle(select(rows @ rows.T, num_selected, **rules), expected)
        assert_equals_oracle(select_from_gradients(rows, num_selected, **rules), expected)


@pytest.mark.parametrize("reference", ["selected", "candidates"])
@pytest.mark.parametrize("information", ["diagonal", "adafisher"])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0])
def test_lazy_measures_equal_brute_force(information, reference, spread):
    for seed in range(3):
        rows = random_rows(14, 30, seed, spread)
        rows[9] = rows[4]
        for penalty in (0.0, 0.1, 3.0):
            rules = {"fisher_alpha": 2.0, "conflict_penalty": penalty, "conflict_reference": reference}
            expected = greedy_oracle(rows, 9, gain_of=GAINS[information], **rules)
            assert_equals_oracle(select_from_gradients(rows, 9, information=information, **rules), expected)


def test_select_equals_brute_force_over_the_float64_range():
    # α‖g‖² from 1e-4 to 1e8.
    rows = random_rows(14, 25, seed=1, spread=12.0) * 10
    assert float(rows.square().sum(dim=1).min()) < 1.01e-10
    rows = rows * torch.where(rows.norm(dim=1, keepdim=True) < 1e-2, 1e-2 / rows.norm(dim=1, keepdim=True), 1.0)
    rows = rows * torch.where(rows.norm(dim=1, keepdim=True) > 1e4, 1e4 / rows.norm(dim=1, keepdim=True), 1.0)
    assert_equals_oracle(select(rows @ rows.T, 14), greedy_oracle(rows, 14), tolerance=1e-6)


def test_gradients_of_1e_minus_30_and_1e_plus_30_in_one_pool():
    rows = random_rows(9, 12, seed=2, spread=0.3)
    rows *= torch.tensor([1e30, 1.0, 1e-30, 1e30, 1e-30, 1e30, 1.0, 1e-30, 1.0], dtype=torch.float64)[:, None]
    rows[5] = rows[0]
    expected = greedy_oracle(rows, 9, gain_of=mpmath_gain)
    assert_equals_oracle(select_from_gradients(rows, 9), expected, tolerance=1e-5)
    float32 = rows.float()
    expected = greedy_oracle(float32.double(), 9, gain_of=mpmath_gain)
    assert_equals_oracle(select_from_gradients(float32, 9), expected, tolerance=1e-4)
    unpenalised = select_from_gradients(rows * 1e-30, 9, tie_tolerance=0.0)
    assert len(unpenalised.indices) == 9
    assert all(gain > 0 for gain in unpenalised.gains)


@pytest.mark.parametrize("information", ["exact", "diagonal", "adafisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_select_from_gradients_leaves_the_gradients_alone(information, dtype):
    rows = random_rows(8, 20, seed=3).to(dtype)
    rows[2] = 0
    rows[4, 1] = math.nan
    untouched = rows.clone()
    selection = select_from_gradients(rows, 4, information=information)
    assert torch.equal(rows.nan_to_num(123.0), untouched.nan_to_num(123.0))
    expected = greedy_oracle(rows.double(), 4, gain_of=GAINS[information])
    assert selection.gains == pytest.approx([option[1] for option in expected[0]], rel=0.02)


def test_gram_may_be_float32():
    rows = random_rows(10, 30, seed=4)
    assert select((rows @ rows.T).float(), 5).indices == select(rows @ rows.T, 5).indices


def test_select_does_not_modify_the_gram():
    rows = random_rows(6, 9, seed=5)
    rows[1] = math.nan
    gram = rows @ rows.T
    untouched = gram.clone()
    select(gram, 4)
    assert torch.equal(gram.nan_to_num(7.0), untouched.nan_to_num(7.0))


def test_information_of():
    rows = random_rows(8, 20, seed=6)
    gram = rows @ rows.T
    selection = select(gram, 5, conflict_penalty=0.0)
    assert information_of(ExactInformation(gram, fisher_alpha=1.0), selection.indices) == selection.information
    assert information_of(DiagonalInformation(rows, fisher_alpha=1.0), [2, 0]) == pytest.approx(
        diagonal_gain(rows, [], 2, 1.0) + diagonal_gain(rows, [2], 0, 1.0)
    )
    assert information_of(ExactInformation(gram, fisher_alpha=1.0), []) == 0.0
    with pytest.raises(ValueError, match="distinct positions"):
        information_of(ExactInformation(gram, fisher_alpha=1.0), [1, 1])
    with pytest.raises(ValueError, match=r"in \[0, 8\)"):
        information_of(ExactInformation(gram, fisher_alpha=1.0), [-1])
    used = ExactInformation(gram, fisher_alpha=1.0)
    used.add(0)
    with pytest.raises(ValueError, match="nothing added"):
        information_of(used, [1])


@pytest.mark.parametrize("measure_class", [DiagonalInformation, AdaFisherInformation])
def test_lazy_measures_evaluate_few_candidates(measure_class, monkeypatch):
    rows = random_rows(60, 200, seed=7, spread=2.0) / 10
    measure = measure_class(rows, fisher_alpha=1.0)
    evaluated = []
    gain = measure_class._gain
    monkeypatch.setattr(measure_class, "_gain", lambda self, index: evaluated.append(index) or gain(self, index))
    selection = greedy(measure, rows @ rows.T, 10, PickOptions())
    assert len(selection.indices) == 10
    assert len(evaluated) < 60  # Evaluating everything at every pick would be 60 + 59 + … + 51 = 555.


def test_greedy_rejects_a_measure_that_does_not_fit():
    measure = build_information("exact", gram=torch.eye(3), fisher_alpha=1.0)
    with pytest.raises(ValueError, match="measure is for 3 candidates but gram has 4 rows"):
        greedy(measure, torch.eye(4), 1, PickOptions())
    measure.add(0)
    with pytest.raises(ValueError, match="nothing added"):
        greedy(measure, torch.eye(3), 1, PickOptions())


pools = st.builds(
    random_rows,
    num_rows=st.integers(1, 14),
    dimension=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.5, 1.0, 3.0]),
)
measures = st.sampled_from(["exact", "diagonal", "adafisher"])
penalties = st.sampled_from([0.0, 0.1, 1.0, 10.0])
references = st.sampled_from(["selected", "candidates"])


@settings(deadline=None, max_examples=60)
@given(pools, measures, penalties, references, st.integers(1, 16), st.randoms(use_true_random=False))
def test_properties(rows, information, penalty, reference, num_selected, random):
    rules = {"information": information, "conflict_penalty": penalty, "conflict_reference": reference}
    selection = select_from_gradients(rows, num_selected, **rules)
    assert isinstance(selection, Selection)
    assert len(selection.indices) == min(num_selected, rows.shape[0]) == len(set(selection.indices))
    assert selection.information == pytest.approx(sum(selection.gains), rel=1e-12)
    assert all(0 <= value <= 1 for value in selection.conflicts)
    assert not selection.stopped_early
    if penalty == 0:
        # A tie may take the lower of two gains first.
        slack = 1.1e-6 * selection.gains[0]
        assert all(later <= earlier + slack for earlier, later in pairwise(selection.gains))

    # The first k of K picks are the k picks.
    fewer = random.randint(1, num_selected)
    prefix = select_from_gradients(rows, fewer, **rules)
    assert prefix.indices == selection.indices[:fewer]
    assert prefix.gains == selection.gains[:fewer]

    # Reordering the pool reorders the picks. No norms are equal, so there are no ties.
    order = random.sample(range(rows.shape[0]), rows.shape[0])
    reordered = select_from_gradients(rows[order], num_selected, tie_tolerance=1e-9, **rules)
    straight = select_from_gradients(rows, num_selected, tie_tolerance=1e-9, **rules)
    if tuple(order[index] for index in reordered.indices) != straight.indices:
        # One-dimensional pools can tie in conflict and gain alike; the scores must still agree.
        assert reordered.scores == pytest.approx(straight.scores, abs=1e-6)
