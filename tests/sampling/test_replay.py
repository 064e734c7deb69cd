"""Replayed epochs: dealt once, the same after a resume, and no work for all picks in a step."""

from __future__ import annotations

import pytest
import torch

import spice_trainer.sampling.schedule
from spice_trainer.sampling.replay import PickReplay
from spice_trainer.sampling.schedule import PoolSchedule, plan_step

NUM_ROWS = 40


def _schedule() -> PoolSchedule:
    shape = plan_step(pool_size=4, num_selected=3, pools_per_step=2, samples_per_step=6, num_slots=2)
    return PoolSchedule(NUM_ROWS, shape, pool_size=4, seed=3)


def _trained(schedule: PoolSchedule) -> PickReplay:
    replay = PickReplay(selection_epochs=1)
    for step in range(schedule.steps_per_epoch):
        pools = schedule.pools(0, step).pools
        replay.remember(0, step, [row for pool in pools for row in pool[:3]])
    return replay


def _steps(replay: PickReplay, schedule: PoolSchedule, epoch: int) -> list[tuple[int, ...]]:
    steps = range(schedule.steps_per_epoch)
    return [replay.step(schedule, epoch, step, global_step=epoch * len(steps) + step).indices for step in steps]


@pytest.fixture
def permuted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was permuted."""
    permute = spice_trainer.sampling.schedule._seeded_permutation
    done: list[str] = []

    def counted(purpose: str, *arguments: int) -> torch.Tensor:
        done.append(purpose)
        return permute(purpose, *arguments)

    monkeypatch.setattr(spice_trainer.sampling.schedule, "_seeded_permutation", counted)
    return done


def test_a_replayed_epoch_is_dealt_once(permuted: list[str]) -> None:
    schedule = _schedule()
    replay = _trained(schedule)
    picks = sorted(replay.tensors()["picks_of_epoch"].tolist())
    epochs = [_steps(replay, schedule, epoch) for epoch in (1, 2)]
    assert permuted.count("replay") == 2
    assert [sorted(sum(steps, ())) for steps in epochs] == [picks, picks]
    assert epochs[0] != epochs[1]
    # And back: a view of an earlier epoch is the same again.
    assert _steps(replay, schedule, 1) == epochs[0]


def test_a_resumed_replay_goes_on_with_the_same_steps() -> None:
    schedule = _schedule()
    replay = _trained(schedule)
    expected = _steps(replay, schedule, 1)
    resumed = _trained(schedule)
    # What it dealt before the state came is forgotten.
    resumed.remember(0, 0, [1, 2, 3])
    _steps(resumed, schedule, 1)
    resumed.load_state_dict(replay.state_dict(), replay.tensors(), num_rows=NUM_ROWS)
    assert _steps(resumed, schedule, 1) == expected
    resumed.remember(0, 4, [7])
    assert resumed.tensors()["picks_of_epoch"].tolist() == [*replay.tensors()["picks_of_epoch"].tolist(), 7]


def test_the_tokens_of_picks_stay_with_them() -> None:
    schedule, resumed = _schedule(), PickReplay(selection_epochs=1)
    replay = PickReplay(selection_epochs=1)
    for step in range(schedule.steps_per_epoch):
        rows = [row for pool in schedule.pools(0, step).pools for row in pool[:3]]
        replay.remember(0, step, rows, [1000 + row for row in rows])
    resumed.load_state_dict(replay.state_dict(), replay.tensors(), num_rows=NUM_ROWS)
    for step in range(schedule.steps_per_epoch):
        replayed = [one.step(schedule, 1, step, global_step=9) for one in (replay, resumed)]
        assert replayed[0] == replayed[1] and replayed[0].indices
        assert replayed[0].num_tokens == tuple(1000 + row for row in replayed[0].indices)
    replay.remember(1, 0, [5, 6])
    assert "tokens_of_epoch" not in replay.tensors()


def test_a_new_selecting_epoch_forgets_what_was_dealt() -> None:
    schedule = _schedule()
    replay = _trained(schedule)
    _steps(replay, schedule, 1)
    replay.remember(0, 0, [5, 6])
    assert sorted(sum(_steps(replay, schedule, 1), ())) == [5, 6]


@pytest.mark.parametrize("picks", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([True])])
def test_saved_picks_of_another_kind_are_refused(picks: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="no whole numbers in a row"):
        PickReplay(1).load_state_dict({"epoch": 0}, {"picks_of_epoch": picks}, num_rows=9)


def test_saved_tokens_of_other_picks_are_refused() -> None:
    saved = {"picks_of_epoch": torch.tensor([3, 4]), "tokens_of_epoch": torch.tensor([7])}
    with pytest.raises(IndexError, match="2 replayed picks have the tokens of 1"):
        PickReplay(1).load_state_dict({"epoch": 0}, saved, num_rows=9)


@pytest.mark.parametrize("row", [-1, 9])
def test_saved_picks_beyond_the_dataset_are_refused(row: int) -> None:
    with pytest.raises(IndexError, match="none of the 9 rows"):
        PickReplay(1).load_state_dict({"epoch": 0}, {"picks_of_epoch": torch.tensor([3, row])}, num_rows=9)
