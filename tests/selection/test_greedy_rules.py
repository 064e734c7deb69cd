"""The rules of the greedy pass: conflicts, ties, stopping, unsound rows, and what it rejects."""

import math

import pytest
import torch

from spice_trainer.selection.greedy import PickOptions, greedy, select, select_from_gradients
from spice_trainer.selection.information import ExactInformation
from spice_trainer.selection.results import Selection
from tests.support.greedy_oracle import conflict, greedy_oracle, log_det_gain
from tests.support.strategy_oracles import against_reference


def random_rows(num_rows, dimension, seed=0):
    return torch.randn(num_rows, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(num_rows, dimension, seed=0):
    rows = random_rows(num_rows, dimension, seed)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8])
def test_conflict_is_against_the_mean_of_the_picks(scale):
    rows = random_rows(8, 3, seed=1) * scale
    selection = select(rows @ rows.T, 8, conflict_penalty=0.5)
    expected = [conflict(rows, list(selection.indices[:k]), index) for k, index in enumerate(selection.indices)]
    assert selection.conflicts == pytest.approx(expected, abs=1e-9)
    assert selection.conflicts[0] == 0.0
    assert max(expected) > (0.1 if scale > 1e-8 else 0)
    for gain, value, score in zip(selection.gains, selection.conflicts, selection.scores, strict=True):
        assert score == gain - 0.5 * value


def test_conflict_against_candidates_counts_the_candidate_itself():
    rows = random_rows(7, 3, seed=2)
    rows[:, 0] += 2
    rows[4] = -3 * rows[4]
    selection = select(rows @ rows.T, 7, conflict_reference="candidates", conflict_penalty=0.0)
    remaining = list(range(7))
    expected = []
    for index in selection.indices:
        expected.append(conflict(rows, remaining, index))
        remaining.remove(index)
    assert selection.conflicts == pytest.approx(expected, abs=1e-12)
    assert max(expected) > 0.1
    assert selection.conflicts[-1] == 0.0  # Alone, it agrees with itself.


def test_candidates_reference_ignores_unsound_rows():
    rows = random_rows(6, 3, seed=3)
    rows[2, 0] = math.inf
    rows[4] = 0
    gram = torch.nan_to_num(rows, posinf=0.0) @ torch.nan_to_num(rows, posinf=0.0).T
    gram[2] = gram[:, 2] = math.nan
    selection = select(gram, 3, conflict_reference="candidates", conflict_penalty=1.0)
    picked, _ = greedy_oracle(rows, 3, conflict_reference="candidates", conflict_penalty=1.0)
    assert selection.indices == tuple(option[0] for option in picked)
    assert selection.conflicts == pytest.approx([option[2] for option in picked], abs=1e-12)


def test_conflict_against_the_pool_is_against_its_mean_throughout():
    rows = random_rows(9, 3, seed=4)
    rows[7] = math.nan
    rows[8] = 0.0
    selection = select(rows @ rows.T, 7, conflict_reference="pool", conflict_penalty=3.0)
    expected = [conflict(rows[:7], list(range(7)), index) for index in selection.indices]
    assert selection.conflicts == pytest.approx(expected, abs=1e-9) and max(expected) > 0.1
    picked = against_reference(
        rows, rows[:7].mean(dim=0), 7, fisher_alpha=1.0, conflict_penalty=3.0, gain_of=log_det_gain
    )
    assert selection.indices == tuple(option[0] for option in picked)
    assert selection.scores == pytest.approx([option[3] for option in picked])
    others = [
        select(rows @ rows.T, 7, conflict_reference=name, conflict_penalty=3.0).indices
        for name in ("selected", "candidates")
    ]
    assert selection.indices not in others


@pytest.mark.wrong_arrays
def test_conflict_with_a_gradient_that_is_no_mean_of_candidates():
    rows = random_rows(9, 4, seed=6)
    rows[5] = math.nan
    reference = random_rows(1, 4, seed=7)[0]
    cosines = rows @ reference / (rows.norm(dim=1) * reference.norm())
    gram = rows @ rows.T
    for penalty in (0.0, 0.5, 5.0):
        # Whatever the other reference is.
        for other in ("selected", "candidates", "pool"):
            measure = ExactInformation(gram.nan_to_num(), fisher_alpha=1.0)
            options = PickOptions(conflict_penalty=penalty, conflict_reference=other)
            selection = greedy(measure, gram, 8, options, reference_cosines=cosines.float())
            picked = against_reference(
                rows, reference, 8, fisher_alpha=1.0, conflict_penalty=penalty, gain_of=log_det_gain
            )
            assert selection.indices == tuple(option[0] for option in picked)
            assert selection.conflicts == pytest.approx([option[2] for option in picked], abs=1e-6)
    for wrong, says in (
        (cosines[:4], "one cosine for each of the 9 candidates of gram, got torch.float64 of shape \\(4,\\)"),
        (torch.ones(9, dtype=torch.long), "got torch.int64 of shape"),
        ([0.0] * 9, "got <class 'list'>"),
        (torch.full((9,), math.inf), "reference_cosines must be finite for every candidate"),
    ):
        with pytest.raises(ValueError, match=says):
            greedy(
                ExactInformation(gram.nan_to_num(), fisher_alpha=1.0), gram, 2, PickOptions(), reference_cosines=wrong
            )


def test_penalty_turns_opposed_samples_away():
    rows = torch.tensor([[2.0, 0.0], [-1.9, 0.0], [0.1, 0.1]], dtype=torch.float64)
    assert select(rows @ rows.T, 2, conflict_penalty=0.0).indices == (0, 1)
    penalised = select(rows @ rows.T, 2, conflict_penalty=1.0)
    assert penalised.indices == (0, 2)
    opposed = -conflict(rows, [0, 2], 1)
    assert select(rows @ rows.T, 3, conflict_penalty=1.0).conflicts == pytest.approx((0.0, 0.0, -opposed), abs=1e-9)
    assert opposed < -0.99


def test_first_pick_under_unit_norm_is_the_first_sound_row():
    for seed in range(5):
        rows = unit_rows(20, 10, seed)
        rows[0] = 0
        gram = rows @ rows.T  # The diagonal differs from 1 by rounding, which must not choose.
        assert select(gram, 3).indices[0] == 1
        assert select_from_gradients(rows, 3).indices[0] == 1
        assert select_from_gradients(rows.float(), 3, information="adafisher").indices[0] == 1


def test_ties_go_to_the_lowest_position_within_the_tolerance():
    gram = torch.diag(torch.tensor([1.0, 1.0 + 1e-7, 1.0 + 2e-7], dtype=torch.float64))
    assert select(gram, 3).indices == (0, 1, 2)
    assert select(gram, 3, tie_tolerance=0.0).indices == (2, 1, 0)
    assert select(gram, 3, tie_tolerance=1e-9).indices == (2, 1, 0)
    # Gains are 1e-7 and 0.5e-7 below the best, and the tolerance is 1e-7 · log 2.
    assert select(gram, 3, tie_tolerance=1e-7).indices == (1, 2, 0)
    assert select(torch.eye(4), 4, tie_tolerance=0.0).indices == (0, 1, 2, 3)


def test_tie_tolerance_scales_with_the_first_gain():
    # The last two differ by 1e-4 of themselves, but by far less than 1e-6 of the first gain.
    gram = torch.diag(torch.tensor([1e-3, 1.0001e-3, 1e6], dtype=torch.float64))
    assert select(gram, 3).indices == (2, 0, 1)
    assert select(gram[:2, :2], 2).indices == (1, 0)
    assert select(gram, 3, tie_tolerance=0.0).indices == (2, 1, 0)


def test_first_tie_scales_with_the_gain_of_the_best_candidate():
    # Scores near zero (gain 1 − λ c), gains near log 2: the tolerance follows the larger.
    rows = torch.tensor([[-1.0, 1e-3], [-1.0, 1.0005e-3], [3.0, 0.0]], dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    rules = {"conflict_reference": "candidates", "conflict_penalty": 0.69, "tie_tolerance": 1e-6}
    for penalty in (0.1, 0.69, 0.7, 5.0):
        rules["conflict_penalty"] = penalty
        expected, _ = greedy_oracle(rows, 3, **rules)
        assert select(rows @ rows.T, 3, **rules).indices == tuple(option[0] for option in expected)


@pytest.mark.parametrize("stop_ratio", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_stop_ratio(stop_ratio, penalty):
    rows = random_rows(12, 4, seed=4)
    rules = {"stop_ratio": stop_ratio, "conflict_penalty": penalty}
    selection = select(rows @ rows.T, 12, **rules)
    picked, stopped_early = greedy_oracle(rows, 12, **rules)
    assert selection.indices == tuple(option[0] for option in picked)
    assert selection.stopped_early is stopped_early is True
    assert 0 < len(selection.indices) < 12
    full = select(rows @ rows.T, 12, conflict_penalty=penalty)
    assert selection.indices == full.indices[: len(selection.indices)]
    following = full.gains[len(selection.indices)]
    assert following <= stop_ratio * full.gains[0] < min(selection.gains)


def test_stop_ratio_stops_on_equality_and_compares_gains_not_scores():
    gram = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))  # log 4 and log 2: exactly half.
    assert select(gram, 2, stop_ratio=0.5, tie_tolerance=0.0) == Selection(
        (0,), (math.log(4),), (0.0,), (math.log(4),), math.log(4), True
    )
    assert select(gram, 2, stop_ratio=0.499).indices == (0, 1)
    opposed = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    selection = select(opposed @ opposed.T, 2, conflict_penalty=50.0, stop_ratio=0.4)
    assert selection.indices == (1, 0)
    assert selection.scores[1] < 0 < selection.gains[1]


def test_min_gain():
    gram = torch.diag(torch.tensor([1.0, 7.0, 3.0], dtype=torch.float64))  # log 2, log 8, log 4
    assert select(gram, 3, min_gain=1.0).indices == (1, 2)
    assert select(gram, 3, min_gain=1.0).stopped_early
    assert select(gram, 2, min_gain=1.0).stopped_early is False
    assert select(gram, 3, min_gain=float(torch.log1p(gram[0, 0]))).indices == (1, 2, 0)
    assert select(gram, 3, min_gain=3.0) == Selection((), (), (), (), 0.0, True)
    assert select(gram, 3, min_gain=1.0, stop_ratio=0.9).indices == (1,)
    assert select(gram * 1e-9, 3).indices == (1, 2, 0)


def test_not_stopped_early_when_the_pool_runs_out():
    selection = select(torch.eye(3), 9, stop_ratio=0.5, min_gain=0.1)
    assert selection.indices == (0, 1, 2)
    assert not selection.stopped_early


@pytest.mark.parametrize("information", ["exact", "diagonal", "adafisher"])
@pytest.mark.parametrize("rules", [{"stop_ratio": 0.6}, {"min_gain": 2.0}])
def test_stopping_with_every_measure(information, rules):
    rows = random_rows(10, 4, seed=5)
    full = select_from_gradients(rows, 10, information=information)
    selection = select_from_gradients(rows, 10, information=information, **rules)
    lowest = rules.get("min_gain", rules.get("stop_ratio", 0) * full.gains[0])
    count = next(k for k, gain in enumerate(full.gains) if gain <= lowest)
    assert 0 < count < 10
    assert selection.indices == full.indices[:count]
    assert selection.stopped_early
    assert selection.information == pytest.approx(sum(full.gains[:count]))


@pytest.mark.parametrize("information", ["exact", "diagonal", "adafisher"])
def test_unsound_rows_are_never_picked(information):
    rows = random_rows(9, 6, seed=6)
    rows[0, 1] = math.nan
    rows[3, 5] = -math.inf
    rows[5] = 0
    selection = select_from_gradients(rows, 9, information=information)
    assert sorted(selection.indices) == [1, 2, 4, 6, 7, 8]
    alone = select_from_gradients(rows[[1, 2, 4, 6, 7, 8]], 9, information=information)
    assert selection.gains == pytest.approx(alone.gains, rel=1e-12)
    assert all(math.isfinite(value) for value in (*selection.scores, selection.information))
    empty = Selection((), (), (), (), 0.0, False)
    assert select_from_gradients(rows[[0, 3, 5]], 2, information=information) == empty


def test_unsound_rows_of_a_gram_are_found_by_their_diagonal():
    rows = random_rows(6, 8, seed=7)
    rows[2, 0] = math.nan
    rows[4] = 0
    gram = rows @ rows.T
    assert gram[0].isnan().any()  # A bad row reaches into the others.
    selection = select(gram, 6)
    assert sorted(selection.indices) == [0, 1, 3, 5]
    kept = rows[[0, 1, 3, 5]]
    assert selection.gains == pytest.approx(select(kept @ kept.T, 6).gains, rel=1e-12)
    assert select(torch.full((3, 3), math.nan), 2).indices == ()
    assert select(torch.zeros(3, 3), 2).indices == ()


def test_a_non_finite_entry_between_finite_diagonals_costs_one_row():
    gram = torch.eye(5)
    gram[3, :3] = gram[:3, 3] = math.inf
    assert select(gram, 5).indices == (0, 1, 2, 4)


def test_copies_are_picked_last():
    rows = unit_rows(6, 40, seed=8)
    rows[3] = rows[0]
    selection = select(rows @ rows.T, 6, conflict_penalty=0.0)
    assert selection.indices[-1] == 3
    assert selection.gains[-1] == pytest.approx(math.log(1.5), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_selected": 0}, "num_selected .* must be an integer >= 1, got 0"),
        ({"num_selected": 2.0}, "got 2.0"),
        ({"num_selected": True}, "got True"),
        ({"fisher_alpha": -1.0}, "fisher_alpha"),
        ({"fisher_alpha": math.inf}, "fisher_alpha"),
        ({"conflict_penalty": -0.1}, "conflict_penalty must be finite and >= 0"),
        ({"conflict_penalty": math.nan}, "conflict_penalty"),
        ({"conflict_reference": "all"}, "must be one of 'selected', 'candidates', 'pool', got 'all'"),
        ({"stop_ratio": 0.0}, "stop_ratio .* strictly between 0 and 1, got 0.0"),
        ({"stop_ratio": 1.0}, "stop_ratio"),
        ({"min_gain": -1.0}, "min_gain"),
        ({"min_gain": math.nan}, "min_gain"),
        ({"tie_tolerance": 1.0}, "tie_tolerance"),
        ({"tie_tolerance": -1e-9}, "tie_tolerance"),
    ],
)
def test_rejects_arguments(arguments, message):
    arguments = {"num_selected": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        select(torch.eye(3), **arguments)
    with pytest.raises(ValueError, match=message):
        select_from_gradients(torch.eye(3), **arguments)


@pytest.mark.wrong_arrays
@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(2, 3), r"must be square.*\(2, 3\).*select_from_gradients"),
        (torch.ones(4), "two axes"),
        (torch.eye(3, dtype=torch.long), "floating point"),
        (torch.ones(0, 0), "at least one row"),
        (torch.tensor([[1.0, 0.5], [0.1, 1.0]]), r"symmetric, but gram\[0, 1\] is 0.5 and gram\[1, 0\] is 0.1"),
        (torch.tensor([[1.0, 0.0], [0.0, -2.0]]), r"gram\[1, 1\] is -2, but .* squared norms"),
    ],
)
def test_rejects_what_is_no_gram_matrix(gram, message):
    with pytest.raises(ValueError, match=message):
        select(gram, 1)


@pytest.mark.wrong_arrays
def test_select_from_gradients_rejects():
    with pytest.raises(ValueError, match="information must be one of 'exact'"):
        select_from_gradients(torch.eye(3), 1, information="full")
    with pytest.raises(ValueError, match="gradients must be a floating point"):
        select_from_gradients(torch.ones(3), 1)
