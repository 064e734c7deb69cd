"""The schedule's arithmetic against its definition, written out the slow way, over many sizes."""

import math
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer.sampling.loader import deal, slot_index
from spice_trainer.sampling.schedule import EpochReplay, PoolSchedule, StepShape, plan_step

booleans = st.booleans()
many = settings(max_examples=300, deadline=None)
small = st.integers(1, 40)


@st.composite
def plans(draw, equal_slots=booleans):
    """Legal arguments of `plan_step`; the batch is per-device batch × slots as in the Trainer."""
    pool_size = draw(st.integers(1, 30))
    num_selected = draw(st.integers(1, pool_size))
    num_slots = draw(st.integers(1, 12))
    equal = draw(equal_slots)
    if draw(st.booleans()):
        pools_per_step = None
        samples_per_step = num_slots * draw(st.integers(1, 12))
    else:
        fewest = math.ceil(num_slots / num_selected)
        pools_per_step = draw(st.integers(fewest, fewest + 8))
        total = pools_per_step * num_selected
        if equal and total // num_slots * num_slots < pools_per_step:
            equal = False
        samples_per_step = num_slots * draw(st.integers(math.ceil(total / num_slots), 40 + total))
    return {
        "pool_size": pool_size,
        "num_selected": num_selected,
        "pools_per_step": pools_per_step,
        "samples_per_step": samples_per_step,
        "num_slots": num_slots,
        "equal_slots": equal,
    }


def schedule_or_none(num_rows, plan, **options):
    """A schedule of these plans, or `None` where too few rows are left for any step."""
    try:
        return PoolSchedule(num_rows, plan_step(**plan), pool_size=plan["pool_size"], **options)
    except ValueError as error:
        assert "no step remains" in str(error)
        return None


def replay_epoch(indices, *, num_steps, **options):
    """All steps of a replayed epoch."""
    replay = EpochReplay(torch.tensor(list(indices), dtype=torch.int64), num_steps=num_steps, **options)
    return tuple(replay.step(step) for step in range(num_steps))


def all_steps(schedule, epoch=0):
    return [schedule.pools(epoch, step) for step in range(schedule.steps_per_epoch)]


# ---------------------------------------------------------------------------------------------------- plan_step


def test_the_paper():
    for pools_per_step in (None, 10):
        shape = plan_step(
            pool_size=120, num_selected=12, pools_per_step=pools_per_step, samples_per_step=120, num_slots=8
        )
        assert shape == StepShape(120, 8, 10, (12,) * 10, 0.1, 0.1, False)
    plus = plan_step(
        pool_size=120, num_selected=60, pools_per_step=10, samples_per_step=600, num_slots=8, adaptive=True
    )
    assert plus.budgets == (60,) * 10 and plus.effective_share == 0.5


@pytest.mark.parametrize(
    ("batch", "budgets"),
    [
        (1, (1,)),
        (8, (8,)),
        (16, (16,)),
        (17, (17,)),
        (18, (9, 9)),  # 18 / 12 = 1.5 rounds up
        (29, (15, 14)),
        (30, (10, 10, 10)),  # 2.5 rounds up, where round() would give 2
        (32, (11, 11, 10)),
        (64, (13, 13, 13, 13, 12)),
        (120, (12,) * 10),
    ],
)
def test_default_budgets(batch, budgets):
    shape = plan_step(pool_size=120, num_selected=12, pools_per_step=None, samples_per_step=batch, num_slots=1)
    assert shape.budgets == budgets and shape.pools_per_step == len(budgets)
    assert shape.effective_share == pytest.approx(batch / (120 * len(budgets)), rel=1e-15)


@pytest.mark.parametrize(
    ("batch", "pool_size", "num_selected", "budgets"),
    [(14, 10, 10, (7, 7)), (14, 10, 9, (7, 7)), (11, 8, 8, (6, 5)), (1, 1, 1, (1,)), (5, 2, 2, (2, 2, 1))],
)
def test_a_pool_never_gives_more_than_it_holds(batch, pool_size, num_selected, budgets):
    shape = plan_step(
        pool_size=pool_size, num_selected=num_selected, pools_per_step=None, samples_per_step=batch, num_slots=1
    )
    assert shape.budgets == budgets


@many
@given(plan=plans())
def test_plan_step(plan):
    shape = plan_step(**plan)
    batch, slots, pool_size, num_selected = (
        plan[name] for name in ("samples_per_step", "num_slots", "pool_size", "num_selected")
    )
    budgets = shape.budgets
    assert (shape.samples_per_step, shape.num_slots) == (batch, slots)
    assert shape.equal_slots == plan["equal_slots"]
    assert len(budgets) == shape.pools_per_step
    assert all(1 <= budget <= pool_size for budget in budgets)
    assert max(budgets) - min(budgets) <= 1 and list(budgets) == sorted(budgets, reverse=True)
    assert slots <= sum(budgets) <= batch
    assert shape.effective_share == pytest.approx(sum(budgets) / (len(budgets) * pool_size), rel=1e-12)
    assert shape.requested_share == num_selected / pool_size
    if plan["equal_slots"]:
        assert sum(budgets) % slots == 0
    if plan["pools_per_step"] is None:
        assert sum(budgets) == batch
        half_up = max(1, math.floor(Fraction(batch, num_selected) + Fraction(1, 2)))
        fits = math.ceil(Fraction(batch, half_up)) <= pool_size
        assert shape.pools_per_step == (half_up if fits else math.ceil(Fraction(batch, pool_size)))
    else:
        assert shape.pools_per_step == plan["pools_per_step"]
        total = shape.pools_per_step * num_selected
        if plan["equal_slots"]:
            assert total - slots < sum(budgets) <= total and max(budgets) <= num_selected
        else:
            assert budgets == (num_selected,) * shape.pools_per_step


def test_equal_slots_spreads_what_is_left():
    shape = plan_step(
        pool_size=20, num_selected=5, pools_per_step=3, samples_per_step=16, num_slots=4, equal_slots=True
    )
    assert shape.budgets == (4, 4, 4)
    shape = plan_step(
        pool_size=20, num_selected=5, pools_per_step=5, samples_per_step=30, num_slots=6, equal_slots=True
    )
    assert shape.budgets == (5, 5, 5, 5, 4)
    # Without a given T a batch that is no multiple of the slots is rounded down too.
    shape = plan_step(
        pool_size=20, num_selected=5, pools_per_step=None, samples_per_step=31, num_slots=4, equal_slots=True
    )
    assert sum(shape.budgets) == 28


PLAN = {"pool_size": 120, "num_selected": 12, "pools_per_step": 10, "samples_per_step": 120, "num_slots": 8}


def plan_error(**changes):
    with pytest.raises(ValueError) as caught:
        plan_step(**{**PLAN, **changes})
    return str(caught.value)


@pytest.mark.parametrize("name", PLAN)
@pytest.mark.parametrize("value", [0, -3])
def test_numbers_below_one(name, value):
    assert plan_error(**{name: value}) == f"{name}={value} must be at least 1."


def test_more_picks_than_candidates():
    assert plan_error(num_selected=121) == (
        "num_selected=121 is more than pool_size=120: a pool cannot give more samples than it has candidates. Lower "
        "num_selected to at most 120."
    )


def test_batch_smaller_than_slots():
    assert plan_error(samples_per_step=7) == (
        "A step of 7 samples cannot fill 8 micro-batches (number of processes × gradient_accumulation_steps). "
        "samples_per_step must be per_device_train_batch_size × gradient_accumulation_steps × number of processes, "
        "here a multiple of 8."
    )


def test_more_picks_than_the_batch():
    assert plan_error(samples_per_step=64) == (
        "pools_per_step × num_selected = 10 × 12 = 120 samples, more than the 64 of an optimizer step "
        "(per_device_train_batch_size × gradient_accumulation_steps × number of processes). To fix it, raise "
        "per_device_train_batch_size to 15, or lower pools_per_step to 5, or lower num_selected to 6, or leave "
        "pools_per_step unset to fill the step whatever its size."
    )
    text = plan_error(samples_per_step=8)
    assert "raise per_device_train_batch_size to 15, or leave pools_per_step unset" in text  # no fix of 0
    assert "lower" not in text


def test_fewer_picks_than_slots():
    assert plan_error(samples_per_step=256, num_slots=128) == (
        "pools_per_step × num_selected = 10 × 12 = 120 samples, fewer than the 128 micro-batches of an optimizer step "
        "(number of processes × gradient_accumulation_steps), so some would be empty in every step. To fix it, raise "
        "pools_per_step to 11, or raise num_selected to 13, or lower gradient_accumulation_steps until there are at "
        "most 120 micro-batches."
    )
    text = plan_error(pool_size=12, samples_per_step=256, num_slots=128)
    assert "raise num_selected" not in text  # 13 of 12 candidates is no fix


@many
@given(pool_size=small, num_selected=small, pools=small, per_device=small, slots=small)
def test_the_numbers_in_the_errors_fit(pool_size, num_selected, pools, per_device, slots):
    """Whatever fix with a number an error names, following it gives a legal plan (or the next error)."""
    num_selected = min(num_selected, pool_size)
    plan = {
        "pool_size": pool_size,
        "num_selected": num_selected,
        "pools_per_step": pools,
        "samples_per_step": per_device * slots,
        "num_slots": slots,
    }
    try:
        plan_step(**plan)
        assert slots <= pools * num_selected <= per_device * slots
        return
    except ValueError as caught:
        text = str(caught)
    words = text.split("To fix it, ")[1].replace(",", " ").split()
    fixes = {words[i - 2]: int(word) for i, word in enumerate(words) if word.isdigit() and words[i - 1] == "to"}
    assert fixes
    for name, value in fixes.items():
        fixed = dict(plan)
        if name == "per_device_train_batch_size":
            fixed["samples_per_step"] = value * slots
        else:
            fixed[name] = value
        try:
            plan_step(**fixed)
        except ValueError as error:
            # Too large a batch was named first; then only the slots, or the batch, can still be in the way.
            first = "more than the" in text
            assert ("fewer than the" if first else "more than the") in str(error)


def test_adaptive_errors():
    assert plan_error(pools_per_step=None, adaptive=True) == (
        "Adaptive stopping (stop_ratio or min_gain) needs pools_per_step: num_selected is then only a cap, so the "
        "number of pools of a step cannot follow from the batch size. Set pools_per_step, for example "
        "pools_per_step=10."
    )
    assert plan_error(adaptive=True, equal_slots=True) == (
        "Adaptive stopping (stop_ratio or min_gain) cannot be used here: this model's or trainer's loss is not "
        "normalised by num_items_in_batch over all devices, so every micro-batch must hold the same number of "
        "samples, and adaptive stopping gives any number. Use a fixed num_selected, or a trainer and model that "
        "normalise by num_items_in_batch (average_tokens_across_devices=True)."
    )


def test_equal_slots_with_idle_pools():
    assert plan_error(num_selected=1, equal_slots=True) == (
        "pools_per_step × num_selected = 10 × 1 picks must be rounded down to 8 here, a multiple of the 8 "
        "micro-batches of a step (number of processes × gradient_accumulation_steps), which leaves 2 pools with "
        "nothing to give. Set pools_per_step=8, or num_selected to at least 2."
    )
    for fix in ({"pools_per_step": 8, "num_selected": 1}, {"num_selected": 2}):
        assert min(plan_step(**{**PLAN, "equal_slots": True, **fix}).budgets) >= 1


# ------------------------------------------------------------------------------------------------- PoolSchedule


@many
@given(plan=plans(), num_rows=st.integers(1, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_schedule(plan, num_rows, seed, epoch):
    schedule = schedule_or_none(num_rows, plan, seed=seed)
    shape, pool_size = plan_step(**plan), plan["pool_size"]
    num_pools = math.ceil(num_rows / pool_size)
    num_steps = math.ceil(num_pools / shape.pools_per_step)
    if schedule is None:
        assert plan["equal_slots"] and num_steps == 1
        return
    steps = all_steps(schedule, epoch)
    rows = [row for step in steps for pool in step.pools for row in pool]

    assert len(set(rows)) == len(rows) and set(rows) <= set(range(num_rows))
    if not plan["equal_slots"]:
        assert sorted(rows) == list(range(num_rows))
        assert schedule.steps_per_epoch == num_steps
    assert num_steps - 1 <= schedule.steps_per_epoch <= num_steps
    assert schedule.samples_per_epoch == sum(sum(step.budgets) for step in steps)
    for number, step in enumerate(steps):
        assert (step.epoch, step.step_in_epoch) == (epoch, number)
        assert len(step.pools) == len(step.budgets)
        assert all(1 <= budget <= len(pool) for pool, budget in zip(step.pools, step.budgets, strict=True))
        if plan["equal_slots"]:
            assert sum(step.budgets) % shape.num_slots == 0
    for step in steps[:-1]:
        assert step.budgets == shape.budgets and {len(pool) for pool in step.pools} == {pool_size}
    last = steps[-1]
    assert all(len(pool) == pool_size for pool in last.pools[:-1])
    if not plan["equal_slots"]:
        for pool, budget, full_budget in zip(last.pools, last.budgets, shape.budgets, strict=False):
            assert budget == max(1, math.ceil(Fraction(full_budget * len(pool), pool_size)))


@many
@given(plan=plans(equal_slots=st.just(True)), num_rows=st.integers(1, 700))
def test_last_step_with_equal_slots(plan, num_rows):
    """Against the unrounded schedule: picks are taken one at a time from the last pool that still gives any."""
    shape = plan_step(**plan)
    free = StepShape(**{**shape.__dict__, "equal_slots": False})
    wanted = all_steps(PoolSchedule(num_rows, free, pool_size=plan["pool_size"], seed=3))
    budgets = list(wanted[-1].budgets)
    while plan["equal_slots"] and sum(budgets) % shape.num_slots:
        budgets[max(p for p, budget in enumerate(budgets) if budget)] -= 1
    kept = sum(budget > 0 for budget in budgets)
    schedule = schedule_or_none(num_rows, plan, seed=3)
    steps = [] if schedule is None else all_steps(schedule)
    if kept == 0:
        assert steps == wanted[:-1]
    else:
        assert steps[:-1] == wanted[:-1]
        assert steps[-1].budgets == tuple(budgets[:kept])
        assert steps[-1].pools == wanted[-1].pools[:kept]


@many
@given(plan=plans(), num_rows=st.integers(1, 700))
def test_drop_last(plan, num_rows):
    shape, pool_size = plan_step(**plan), plan["pool_size"]
    dropped = schedule_or_none(num_rows, plan, seed=1, drop_last=True)
    num_full = num_rows // pool_size // shape.pools_per_step
    if num_full == 0:
        assert dropped is None
        return
    assert dropped.steps_per_epoch == num_full
    assert dropped.samples_per_epoch == num_full * sum(shape.budgets)
    everything = schedule_or_none(num_rows, plan, seed=1)
    assert all_steps(dropped) == all_steps(everything)[:num_full]


@many
@given(
    num_rows=st.integers(1, 700),
    pool_size=st.integers(2, 30),
    share=st.integers(1, 30),
    batch=st.sampled_from([8, 16, 24, 48]),
    slots=st.sampled_from([1, 2, 4, 8]),
)
def test_pools_do_not_depend_on_ranks(num_rows, pool_size, share, batch, slots):
    plan = {
        "pool_size": pool_size,
        "num_selected": min(share, pool_size),
        "pools_per_step": None,
        "samples_per_step": batch,
    }
    one = PoolSchedule(num_rows, plan_step(**plan, num_slots=1), pool_size=pool_size, seed=0)
    many_slots = PoolSchedule(num_rows, plan_step(**plan, num_slots=slots), pool_size=pool_size, seed=0)
    assert all_steps(one) == all_steps(many_slots)


def test_a_schedule_by_hand():
    shape = plan_step(pool_size=4, num_selected=3, pools_per_step=2, samples_per_step=6, num_slots=2)
    schedule = PoolSchedule(num_rows=17, shape=shape, pool_size=4, seed=0)
    # 17 rows: pools of 4, 4 | 4, 4 | 1, and the last one gives ceil(3 · 1 / 4).
    assert schedule.steps_per_epoch == 3 and schedule.samples_per_epoch == 13
    assert [step.budgets for step in all_steps(schedule)] == [(3, 3), (3, 3), (1,)]
    assert [[len(pool) for pool in step.pools] for step in all_steps(schedule)] == [[4, 4], [4, 4], [1]]


def example(num_rows=1000, seed=5, **options):
    shape = plan_step(pool_size=20, num_selected=4, pools_per_step=3, samples_per_step=12, num_slots=4)
    return PoolSchedule(num_rows, shape, pool_size=20, seed=seed, **options)


def test_order_of_calls_does_not_matter():
    schedule = example()
    calls = [(2, 3), (0, 0), (2, 3), (1, 16), (0, 0), (2, 2)]
    assert [schedule.pools(*call) for call in calls] == [example().pools(*call) for call in calls]


def test_epochs_and_seeds_give_other_orders():
    orders = [all_steps(example(seed=seed), epoch)[0].pools for seed in range(6) for epoch in range(6)]
    assert len(set(orders)) == 36  # seed + epoch would give 11
    assert orders[0][0] != tuple(range(20))


def test_order_is_pinned():
    """A resumed run must find the pools of the run that wrote the checkpoint."""
    schedule = PoolSchedule(
        8,
        plan_step(pool_size=4, num_selected=1, pools_per_step=1, samples_per_step=1, num_slots=1),
        pool_size=4,
        seed=42,
    )
    assert [schedule.pools(3, step).pools[0] for step in (0, 1)] == [(0, 4, 2, 1), (6, 7, 5, 3)]
    assert replay_epoch(range(8), num_steps=2, seed=42, epoch=3, num_slots=1, equal_slots=False) == (
        (1, 6, 4, 0),
        (5, 7, 2, 3),
    )


def test_every_row_is_equally_likely_anywhere():
    shape = plan_step(pool_size=5, num_selected=1, pools_per_step=1, samples_per_step=1, num_slots=1)
    counts = torch.zeros(20)
    for epoch in range(400):
        counts[list(PoolSchedule(20, shape, pool_size=5, seed=9).pools(epoch, 0).pools[0])] += 1
    assert counts.sum() == 2000
    assert counts.min() > 60 and counts.max() < 140  # 100 each, standard deviation 8.7


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    all_steps(example(), epoch=1)
    replay_epoch(range(50), num_steps=7, seed=0, epoch=2, num_slots=2, equal_slots=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert all_steps(example(), epoch=1) == all_steps(example(), epoch=1)
    first = example().pools(0, 0)
    torch.manual_seed(124)
    assert example().pools(0, 0) == first


def test_an_epoch_is_permuted_once(monkeypatch):
    calls = []
    real = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: calls.append(args) or real(*args, **options))
    schedule = example()
    all_steps(schedule, 0)
    all_steps(schedule, 1)
    assert len(calls) == 2
    # Neither by someone who looks ahead into the next epoch at every step.
    for step in range(schedule.steps_per_epoch):
        schedule.pools(1, step), schedule.pools(2, 0)
    assert len(calls) == 3


def schedule_error(num_rows, **changes):
    options = {key: changes.pop(key) for key in ("drop_last",) if key in changes}
    with pytest.raises(ValueError) as caught:
        PoolSchedule(num_rows, plan_step(**{**PLAN, **changes}), pool_size=120, seed=0, **options)
    return str(caught.value)


@pytest.mark.parametrize("num_rows", [0, -1])
def test_no_rows(num_rows):
    assert schedule_error(num_rows) == (
        f"The training dataset has {num_rows} rows, so there is nothing to select from. Check the filters and the "
        "split that made it."
    )


def test_drop_last_leaves_nothing():
    assert schedule_error(1199, drop_last=True) == (
        "The training dataset has 1199 rows, but a step draws 10 full pools of 120, 1200 rows, and "
        "dataloader_drop_last=True leaves out smaller steps, so no step remains. Set dataloader_drop_last=False, or "
        "lower pool_size or pools_per_step (the batch size where pools_per_step is not set)."
    )


def test_equal_slots_leave_nothing():
    assert schedule_error(70, equal_slots=True) == (
        "The training dataset has 70 rows, which give only 7 picks, but each of the 8 micro-batches of a step (number "
        "of processes × gradient_accumulation_steps) must hold the same number of them, so no step remains. Lower "
        "gradient_accumulation_steps until there are at most 7 micro-batches, raise num_selected, or use more rows."
    )
    PoolSchedule(71, plan_step(**PLAN, equal_slots=True), pool_size=120, seed=0)


def test_another_pool_size_than_planned():
    with pytest.raises(ValueError, match="A pool of pool_size=11 cannot give the 12 picks that the step's shape asks"):
        PoolSchedule(100, plan_step(**PLAN), pool_size=11, seed=0)


def test_steps_outside_the_epoch():
    schedule = example()
    for step in (-1, 17):
        with pytest.raises(
            ValueError, match=f"step_in_epoch={step} is outside this epoch of 17 steps, 0 to 16. Later"
        ):
            schedule.pools(0, step)
    with pytest.raises(ValueError, match="epoch=-1 must be at least 0"):
        schedule.pools(-1, 0)


# ---------------------------------------------------------------------------------------- deal and slot_index


@many
@given(indices=st.lists(st.integers(0, 10**6), max_size=80), num_slots=small)
def test_deal(indices, num_slots):
    slots = deal(indices, num_slots)
    sizes = [len(slot) for slot in slots]
    assert len(slots) == num_slots
    assert [index for slot in slots for index in slot] == indices
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert (0 in sizes) == (len(indices) < num_slots)
    assert all(type(slot) is tuple for slot in slots)


def test_deal_by_hand():
    assert deal([5, 6, 7, 8, 9], 3) == ((5, 6), (7, 8), (9,))
    assert deal([5], 3) == ((5,), (), ())
    with pytest.raises(ValueError, match="num_slots=0 must be at least 1"):
        deal([1], 0)


@many
@given(num_tokens=st.lists(st.integers(1, 50), min_size=1, max_size=80), num_slots=small)
def test_picks_are_packed_by_tokens(num_tokens, num_slots):
    indices = list(range(100, 100 + len(num_tokens)))
    tokens_of = dict(zip(indices, num_tokens, strict=True))
    slots = deal(indices, num_slots, num_tokens)
    assert len(slots) == num_slots and sorted(index for slot in slots for index in slot) == indices
    assert all(list(slot) == sorted(slot) for slot in slots)
    assert (() in slots) == (len(indices) < num_slots)
    # What came last into the fullest slot came when that was the emptiest.
    totals = [sum(tokens_of[index] for index in slot) for slot in slots]
    fullest = slots[totals.index(max(totals))]
    assert max(totals) - min(tokens_of[index] for index in fullest) <= min(totals)


@many
@given(num_tokens=st.lists(st.integers(1, 30), min_size=1, max_size=7), num_slots=st.integers(1, 3))
def test_packed_picks_are_near_the_best_packing(num_tokens, num_slots):
    def fullest(slots):
        return max(sum(slot) for slot in slots)

    best = min(
        fullest([[t for t, s in zip(num_tokens, where, strict=True) if s == slot] for slot in range(num_slots)])
        for where in product(range(num_slots), repeat=len(num_tokens))
    )
    assert 3 * fullest(deal(num_tokens, num_slots, num_tokens)) <= 4 * best


def test_packed_picks_by_hand():
    assert deal([5, 6, 7, 8, 9], 2, [1, 9, 2, 8, 4]) == ((5, 6, 7), (8, 9))
    assert deal([5, 6], 3, [1, 2]) == ((6,), (5,), ())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slot_index_is_how_accelerate_deals(world_size):
    from accelerate.data_loader import BatchSamplerShard

    batches = [[10 * slot] for slot in range(5 * world_size)]
    for rank in range(world_size):
        sampler = torch.utils.data.BatchSampler(range(len(batches)), batch_size=1, drop_last=False)
        dealt = list(BatchSamplerShard(sampler, num_processes=world_size, process_index=rank))
        assert dealt == [[slot_index(rank, micro_batch, world_size=world_size)] for micro_batch in range(5)]


@many
@given(world_size=small, accumulation=small)
def test_slots_are_a_bijection(world_size, accumulation):
    found = {slot_index(r, m, world_size=world_size) for r in range(world_size) for m in range(accumulation)}
    assert found == set(range(world_size * accumulation))


@pytest.mark.parametrize(("rank", "micro_batch", "world_size"), [(2, 0, 2), (-1, 0, 2), (0, -1, 2), (0, 0, 0)])
def test_slots_that_do_not_exist(rank, micro_batch, world_size):
    with pytest.raises(ValueError) as caught:
        slot_index(rank, micro_batch, world_size=world_size)
    assert str(caught.value) == (
        f"rank={rank}, micro_batch={micro_batch}, world_size={world_size}: rank must be from 0 to world_size - 1 and "
        "micro_batch at least 0."
    )


# -------------------------------------------------------------------------------------------------- replay_epoch


@many
@given(
    indices=st.lists(st.integers(0, 10**6), max_size=120),
    num_steps=small,
    num_slots=st.integers(1, 8),
    equal_slots=st.booleans(),
    seed=st.integers(0, 5),
    epoch=st.integers(1, 5),
)
def test_replay(indices, num_steps, num_slots, equal_slots, seed, epoch):
    options = {"num_steps": num_steps, "seed": seed, "epoch": epoch}
    steps = replay_epoch(indices, **options, num_slots=num_slots, equal_slots=equal_slots)
    sizes = [len(step) for step in steps]
    rest = list(indices)
    for step in steps:
        for index in step:
            rest.remove(index)  # fails on an index that was not picked, or too often
    assert len(steps) == num_steps
    assert sizes == sorted(sizes, reverse=True)
    if equal_slots:
        assert len(rest) == len(indices) % num_slots
        assert all(size % num_slots == 0 for size in sizes) and sizes[0] - sizes[-1] <= num_slots
    else:
        assert rest == [] and sizes[0] - sizes[-1] <= 1
        assert steps == replay_epoch(indices, **options, num_slots=1, equal_slots=False)
    assert steps == replay_epoch(indices, **options, num_slots=num_slots, equal_slots=equal_slots)


def test_replay_orders():
    def order(seed, epoch):
        steps = replay_epoch(range(60), num_steps=5, seed=seed, epoch=epoch, num_slots=1, equal_slots=False)
        return tuple(index for step in steps for index in step)

    orders = {order(seed, epoch) for seed in range(5) for epoch in range(1, 6)} | {tuple(range(60))}
    assert len(orders) == 26
    shape = plan_step(pool_size=60, num_selected=1, pools_per_step=1, samples_per_step=1, num_slots=1)
    assert PoolSchedule(60, shape, pool_size=60, seed=0).pools(1, 0).pools[0] != order(0, 1)  # not the pools' order


def test_replay_leaves_other_picks_out_each_epoch():
    left_out = set()
    for epoch in range(1, 40):
        steps = replay_epoch(range(9), num_steps=2, seed=0, epoch=epoch, num_slots=4, equal_slots=True)
        assert [len(step) for step in steps] == [4, 4]
        left_out |= set(range(9)) - {index for step in steps for index in step}
    assert left_out == set(range(9))


@pytest.mark.parametrize("name", ["num_steps", "num_slots"])
def test_replay_errors(name):
    options = {"num_steps": 2, "seed": 0, "epoch": 1, "num_slots": 2, "equal_slots": False, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        replay_epoch([1, 2], **options)


def test_steps_are_contiguous_in_the_permutation():
    """Neighbouring steps share no pool: the permutation is cut, not sampled anew."""
    rows = [row for step in all_steps(example(num_rows=240)) for pool in step.pools for row in pool]
    whole = PoolSchedule(
        240,
        plan_step(pool_size=240, num_selected=1, pools_per_step=1, samples_per_step=1, num_slots=1),
        pool_size=240,
        seed=5,
    )
    assert tuple(rows) == whole.pools(0, 0).pools[0]
    assert any(abs(a - b) > 1 for a, b in pairwise(rows))
