"""The pools of a stream: its next rows in its own order."""

from __future__ import annotations

import pytest

from spice_trainer.data.stream import StreamRows
from spice_trainer.sampling.schedule import StepShape, plan_step
from spice_trainer.sampling.stream_schedule import StreamSchedule
from tests.support.streams import CountedStream
from tests.support.trainers import tiny_rows


def shape(*, equal_slots: bool = False) -> StepShape:
    return plan_step(
        pool_size=6, num_selected=3, pools_per_step=2, samples_per_step=6, num_slots=2, equal_slots=equal_slots
    )


def schedule(num_rows: int, *, drop_last: bool = False, equal_slots: bool = False) -> StreamSchedule:
    rows = StreamRows(CountedStream(tiny_rows(num_rows)))
    return StreamSchedule(rows, 10, shape(equal_slots=equal_slots), pool_size=6, seed=0, drop_last=drop_last)


def test_pools_are_the_next_rows_and_a_pass_ends_with_what_is_left() -> None:
    found = schedule(20)
    assert (found.steps_per_epoch, found.num_rows) == (10, 120)
    steps = [found.pools(epoch, step) for epoch, step in ((0, 0), (0, 1), (1, 0))]
    assert [step.pools for step in steps] == [
        (tuple(range(6)), tuple(range(6, 12))),
        (tuple(range(12, 18)), (18, 19)),
        (tuple(range(20, 26)), tuple(range(26, 32))),
    ]
    # As the last step of an epoch: ceil(3 · 2 / 6).
    assert [step.budgets for step in steps] == [(3, 3), (3, 1), (3, 3)]
    assert [found.has_step(0, step) for step in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(("options", "budgets"), [({"drop_last": True}, ()), ({"equal_slots": True}, (3, 1))])
def test_a_short_last_step(options: dict[str, bool], budgets: tuple[int, ...]) -> None:
    found = schedule(20, **options)
    assert found.pools(0, 1).budgets == budgets
    assert found.has_step(0, 1) == bool(budgets)
    # What is left out is passed over.
    assert found.pools(1, 0).pools[0] == tuple(range(20, 26))


def test_a_stream_too_short_for_equal_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="ended after 2 rows, .* each of the 2 micro-batches of a step must hold"):
        schedule(2, equal_slots=True).has_step(0, 0)


def test_a_look_reads_nothing_that_is_not_held() -> None:
    found = schedule(40)
    assert found.held_pools(0, 0).pools == found.pools(0, 0).pools
    found.finish_step(0, 0, keep=4)
    assert found.held_pools(0, 1).pools == (tuple(range(6)), tuple(range(6, 12)))
    assert len(found.rows) == 12
