"""A row, or a copy of it, is picked no more often than the limit lets it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spice_trainer.selection.repeats import RepeatLimit


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6), min_size=1, max_size=3), max_size=6),
    st.integers(0, 2),
    st.randoms(use_true_random=False),
)
def test_no_text_is_picked_more_often(steps, max_repeats, random):
    """Steps of pools of texts; whatever is picked of what is allowed."""
    limit, picked, row = RepeatLimit(max_repeats), {}, 0
    for pools in steps:
        limit.begin_step()
        chosen = []
        for texts in pools:
            rows = range(row, row + len(texts))
            row = rows.stop
            hashes = [f"{text:016x}" for text in texts]
            allowed = limit.allow(rows, hashes)
            assert torch.equal(limit.allow(rows, hashes), allowed)
            chosen += [(r, h) for r, h, ok in zip(rows, hashes, allowed, strict=True) if ok and random.random() < 0.7]
        limit.count(chosen)
        for _, text in chosen:
            picked[text] = picked.get(text, 0) + 1
    assert all(count <= 1 + max_repeats for count in picked.values())


def test_what_is_left_may_be_picked():
    limit = RepeatLimit(1)
    hashes = ["f" * 16, "0" * 16, None]
    assert limit.allow([4, 5, 6], hashes).tolist() == [True] * 3
    limit.count([(4, hashes[0]), (6, None)])
    limit.begin_step()
    # The first of three copies is the second time, a row without a hash counts by itself.
    assert limit.allow([7, 8, 9, 6], ["f" * 16, "f" * 16, "0" * 16, None]).tolist() == [True, False, True, True]
    other = RepeatLimit(1)
    other.load(limit.tensors())
    other.count([(6, None), (9, "0" * 16)])
    other.begin_step()
    assert other.allow([7, 6, 9], ["f" * 16, None, "0" * 16]).tolist() == [True, False, True]


def test_a_checkpoint_without_counts():
    with pytest.raises(ValueError, match="does not say how often rows were picked"):
        RepeatLimit(1).load({})
