"""The count sketch against a coordinate-by-coordinate loop and against its theory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spice_trainer.gradients.sketch import GradientSketch


def _fold(sizes: list[int], sketch_dim: int, gradients: Tensor, *, seed: int = 0) -> Tensor:
    """Sketch of whole gradients `(N, D)`, module by module."""
    sketch = GradientSketch(sizes, sketch_dim, seed=seed)
    sketches = torch.zeros(len(gradients), sketch_dim, dtype=gradients.dtype)
    for index, block in enumerate(gradients.clone().split(sizes, dim=1)):
        sketch.fold_(sketches, index, block)
    return sketches


def _matrix(sizes: list[int], sketch_dim: int, *, seed: int = 0) -> Tensor:
    """S as a D x m matrix: the sketch of every unit vector."""
    return _fold(sizes, sketch_dim, torch.eye(sum(sizes), dtype=torch.float64), seed=seed)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sketch_dim=st.integers(1, 30),
    seed=st.integers(0, 2**31),
)
def test_each_coordinate_has_one_bucket_and_one_sign(sizes: list[int], sketch_dim: int, seed: int) -> None:
    matrix = _matrix(sizes, sketch_dim, seed=seed)
    assert matrix.shape == (sum(sizes), sketch_dim)
    assert torch.equal(matrix.abs().sum(1), torch.ones(sum(sizes), dtype=torch.float64))
    assert set(matrix.unique().tolist()) <= {-1.0, 0.0, 1.0}
    # Within a block of m coordinates buckets follow each other around the circle.
    buckets = matrix.abs().argmax(1)
    start = 0
    for size in sizes:
        for position in range(1, size):
            if position % sketch_dim:
                assert buckets[start + position] == (buckets[start + position - 1] + 1) % sketch_dim
        start += size


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    sketch_dim=st.integers(1, 30),
    num_rows=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_folding_equals_a_loop_over_coordinates(sizes: list[int], sketch_dim: int, num_rows: int, seed: int) -> None:
    gradients = torch.randn(num_rows, sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = _matrix(sizes, sketch_dim, seed=seed)
    expected = torch.zeros(num_rows, sketch_dim, dtype=torch.float64)
    for row in range(num_rows):
        for coordinate in range(sum(sizes)):
            bucket = int(matrix[coordinate].abs().argmax())
            expected[row, bucket] += matrix[coordinate, bucket] * gradients[row, coordinate]
    torch.testing.assert_close(_fold(sizes, sketch_dim, gradients, seed=seed), expected)


def _estimates(g: Tensor, h: Tensor, sizes: list[int], sketch_dim: int, num_seeds: int) -> Tensor:
    """⟨Sg, Sh⟩ for many seeds."""
    pair = torch.stack([g, h])
    sketches = [_fold(sizes, sketch_dim, pair, seed=seed) for seed in range(num_seeds)]
    return torch.stack([sketch[0] @ sketch[1] for sketch in sketches])


@pytest.mark.parametrize("sketch_dim", [16, 64, 256])
@pytest.mark.parametrize("sizes", [[400], [100] * 4, [7, 300, 90, 3]])
def test_inner_products_are_unbiased_with_the_variance_of_theory(sizes: list[int], sketch_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(400, dtype=torch.float64, generator=generator)
    h = 0.3 * g + torch.randn(400, dtype=torch.float64, generator=generator)
    num_seeds = 600
    estimates = _estimates(g, h, sizes, sketch_dim, num_seeds)
    bound = float(g @ g * (h @ h) + (g @ h) ** 2) / sketch_dim
    deviation = math.sqrt(bound / num_seeds)
    assert abs(float(estimates.mean() - g @ h)) < 4.5 * deviation
    # Coordinates of one block never collide, so the variance is the bound less the share of such pairs.
    blocks = [sum(min(sketch_dim, size - start) ** 2 for start in range(0, size, sketch_dim)) for size in sizes]
    expected = bound * (1 - sum(blocks) / 400**2)
    assert 0.7 * expected < float(estimates.var()) < 1.3 * bound


def test_the_error_falls_with_the_square_root_of_the_dimension() -> None:
    generator = torch.Generator().manual_seed(4)
    g, h = torch.randn(2, 3000, dtype=torch.float64, generator=generator)
    deviations = [
        float((_estimates(g, h, [500] * 6, dim, 200) - g @ h).square().mean().sqrt()) for dim in (64, 256, 1024)
    ]
    assert 1.6 < deviations[0] / deviations[1] < 2.5
    assert 1.6 < deviations[1] / deviations[2] < 2.5


@pytest.mark.parametrize("stride", [64, 128, 32])
def test_an_outlier_feature_that_recurs_at_a_fixed_stride_does_not_collide(stride: int) -> None:
    # A LoRA matrix of 16 rows whose column 5 carries everything, in modules of one shape: were the fold a plain
    # `j mod m`, m a multiple of the width, all rows of the column would share one bucket.
    num_modules, rank, sketch_dim = 2, 8, 64
    g = torch.zeros(num_modules, rank, stride, dtype=torch.float64)
    h = g.clone()
    generator = torch.Generator().manual_seed(5)
    g[:, :, 5], h[:, :, 5] = torch.randn(2, num_modules, rank, dtype=torch.float64, generator=generator)
    g, h = g.flatten(), h.flatten()
    estimates = _estimates(g, h, [rank * stride] * num_modules, sketch_dim, 200)
    bound = float(g @ g * (h @ h) + (g @ h) ** 2) / sketch_dim
    assert float((estimates - g @ h).square().mean()) < 1.6 * bound


def test_a_sketch_as_wide_as_a_lone_module_is_exact() -> None:
    gradients = torch.randn(3, 20, dtype=torch.float64)
    for sketch_dim in (20, 31):
        sketches = _fold([20], sketch_dim, gradients)
        torch.testing.assert_close(sketches @ sketches.T, gradients @ gradients.T)


def test_a_module_larger_than_the_sketch_wraps_around() -> None:
    # 50 coordinates into 7 buckets: every bucket gets one of each whole block.
    matrix = _matrix([50], 7)
    assert torch.equal(matrix[:49].abs().sum(0), torch.full((7,), 7.0, dtype=torch.float64))
    # Blocks are rotated independently, not one after another.
    buckets = matrix.abs().argmax(1)
    assert len({int(buckets[7 * block]) for block in range(7)}) > 1


def test_modules_of_equal_shape_differ_in_signs_and_rotation() -> None:
    matrix = _matrix([30] * 6, 64)
    blocks = [block for block in matrix.split(30)]
    assert len({int(block[0].abs().argmax()) for block in blocks}) > 1
    assert not torch.equal(blocks[0].sum(1), blocks[1].sum(1))


def test_the_same_seed_gives_the_same_sketch_and_another_another() -> None:
    gradients = torch.randn(2, 60)
    first = _fold([25, 35], 16, gradients, seed=7)
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(_fold([25, 35], 16, gradients, seed=7), first)
    assert not torch.equal(_fold([25, 35], 16, gradients, seed=8), first)


def test_signs_and_rotations_are_those_of_the_first_release() -> None:
    # Ranks, restarts and releases must fold alike: a changed draw order breaks the resume of a sketched run.
    matrix = _matrix([5, 3], 4, seed=0)
    assert [int(row.sum()) * (int(row.abs().argmax()) + 1) for row in matrix] == PINNED


PINNED = [-1, 2, 3, 4, 4, 2, 3, 4]


def test_drawing_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    GradientSketch([10, 20], 8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_every_device_folds_alike() -> None:
    gradients = torch.randn(3, 70)
    sketch = GradientSketch([50, 20], 16, seed=2, device="cuda")
    sketches = torch.zeros(3, 16, device="cuda")
    for index, block in enumerate(gradients.cuda().split([50, 20], dim=1)):
        sketch.fold_(sketches, index, block.contiguous())
    torch.testing.assert_close(sketches.cpu(), _fold([50, 20], 16, gradients, seed=2))


def test_folding_accumulates_in_place() -> None:
    sketch = GradientSketch([6, 4], 5, seed=0)
    store = torch.ones(4, 5)
    rows = store[1:3]
    gradients = torch.randn(2, 6)
    expected = 1 + _fold([6, 4], 5, torch.cat([gradients, torch.zeros(2, 4)], dim=1))
    returned = sketch.fold_(rows, 0, gradients)
    assert returned is rows
    torch.testing.assert_close(store[1:3], expected)
    assert torch.equal(store[[0, 3]], torch.ones(2, 5))


def test_folding_overwrites_the_gradients_with_the_signed_ones() -> None:
    gradients = torch.rand(1, 6) + 1
    before = gradients.clone()
    GradientSketch([6], 3, seed=0).fold_(torch.zeros(1, 3), 0, gradients)
    assert torch.equal(gradients.abs(), before)
    assert not torch.equal(gradients, before)


def test_rows_are_sketched_independently() -> None:
    gradients = torch.randn(3, 40)
    together = _fold([25, 15], 8, gradients)
    for row in range(3):
        assert torch.equal(_fold([25, 15], 8, gradients[row : row + 1])[0], together[row])


@pytest.mark.parametrize("sketch_dim", [0, -3])
def test_a_dimension_below_one_is_refused(sketch_dim: int) -> None:
    with pytest.raises(ValueError, match=f"sketch_dim must be at least 1, got {sketch_dim}"):
        GradientSketch([4], sketch_dim, seed=0)


def test_an_empty_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least one coordinate, got sizes \[4, 0\]"):
        GradientSketch([4, 0], 8, seed=0)


def test_gradients_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="module 0 has 4 coordinates, got 6"):
        GradientSketch([4, 6], 8, seed=0).fold_(torch.zeros(2, 8), 0, torch.zeros(2, 6))


# Modules of layers that train in full: one rotation, blocks of a prime number of coordinates


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is large from four blocks on."""
    monkeypatch.setattr("spice_trainer.gradients.sketch._MAX_ROTATIONS", 4)


@pytest.fixture(params=[2**26, 97])
def num_signs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A table of signs for all coordinates, and one that goes around."""
    monkeypatch.setattr("spice_trainer.gradients.sketch._MAX_SIGNS", request.param)
    return request.param


@pytest.mark.usefixtures("large", "num_signs")
@pytest.mark.parametrize("sizes", [[400], [100, 7, 300], [64, 65]])
def test_pieces_and_scattered_coordinates_are_folded_as_the_whole_is(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    sketch = GradientSketch(sizes, 16, seed=3)
    for index, size in enumerate(sizes):
        gradients = torch.randn(3, size, dtype=torch.float64, generator=generator)
        whole = sketch.fold_(torch.zeros(3, 16, dtype=torch.float64), index, gradients.clone())
        for width in (1, 5, 16, 37, size):
            found = torch.zeros_like(whole)
            for start in range(0, size, width):
                sketch.fold_(found, index, gradients[:, start : start + width].clone(), start)
            torch.testing.assert_close(found, whole)
        order = torch.randperm(size, generator=generator)
        scattered = sketch.fold_sparse_(
            torch.zeros(16, dtype=torch.float64), index, order, gradients[1, order].clone()
        )
        torch.testing.assert_close(scattered, whole[1])


@pytest.mark.usefixtures("large", "num_signs")
@pytest.mark.parametrize("sketch_dim", [16, 64])
def test_large_modules_are_unbiased_with_the_variance_of_theory(sketch_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [600, 500]
    g = torch.randn(1100, dtype=torch.float64, generator=generator)
    h = 0.3 * g + torch.randn(1100, dtype=torch.float64, generator=generator)
    estimates = _estimates(g, h, sizes, sketch_dim, 600)
    bound = float(g @ g * (h @ h) + (g @ h) ** 2) / sketch_dim
    assert abs(float(estimates.mean() - g @ h)) < 4.5 * math.sqrt(bound / 600)
    assert float(estimates.var()) < 1.4 * bound


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("stride", [64, 32, 48, 63])
def test_no_column_of_a_large_module_falls_into_one_bucket(stride: int) -> None:
    num_rows = 60
    sketch = GradientSketch([num_rows * stride], 64, seed=0)
    column = torch.arange(num_rows) * stride + 5
    buckets = torch.stack(
        [
            sketch.fold_sparse_(torch.zeros(64), 0, coordinate[None], torch.ones(1)).abs().argmax()
            for coordinate in column
        ]
    )
    assert len(buckets.unique()) == num_rows


def test_as_many_signs_as_coordinates_are_those_of_before() -> None:
    # Only models of more coordinates than the table has share signs.
    sketch = GradientSketch([10, 20], 8, seed=1)
    assert sketch._places == [0, 10] and sketch._flips == [1, 1]
