"""Pools of gradients that no sane run has: not finite, zero, equal, opposite, dependent, from 1e-45 to 3e+38.

Hypothesis draws them, for the pure algorithm and along the way of a real pool (features, Gram matrix, picks, records).
Whatever is drawn: nothing raises, no unsound row is picked, what is picked is what the definition says (`slogdet` in D
dimensions where α‖g‖² is within [1e-4, 1e8], K-dimensional determinants in mpmath beyond), and the records are JSON.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from spice_trainer import SpiceConfig
from spice_trainer.data.rows import RowShape
from spice_trainer.distributed import Processes
from spice_trainer.gradients.sketch import GradientSketch
from spice_trainer.proxy.transfer import compare_pools
from spice_trainer.recording.metrics import RunTotals, step_metrics
from spice_trainer.recording.records import RecordWriter
from spice_trainer.recording.summary import summarize_run, warn_of_first_pools
from spice_trainer.scoring.features import FeatureBuffer, order_for_owners, send_to_owners
from spice_trainer.selection.gram import measure_rows, normalized_gram
from spice_trainer.selection.greedy import select, select_from_gradients
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.results import PoolSelection, StepSelection
from spice_trainer.selection.scores import PoolScores
from tests.selection.greedy_certificate import check_selection, coordinate_gains, gram_gains, log_det_gains
from tests.support.scorers import measured_pool

# For a longer search by hand: EXAMPLES=5000 python -m pytest tests/selection/test_extreme_numbers.py
EXAMPLES = int(os.environ.get("EXAMPLES", "150"))
search = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

FLOAT32_MAX = torch.finfo(torch.float32).max
SCALES = (1.0, 1e-2, 30.0, 1e4, 1e-30, 1e30, 1e-42)
BROKEN = ("zero", "nan", "inf", "-inf")
# What rows a pool mixes.
MIXES = {
    "sound": ("own",),
    "parallel": ("own", "copy", "copy", "negated", "multiple"),
    "dependent": ("own", "own", "near", "nearer", "sum"),
    "broken": ("own", "copy", *BROKEN),
    "all": ("own", "own", "own", "copy", "negated", "multiple", "near", "sum", *BROKEN),
}

# α itself, or what α·max‖g‖² shall be.
alphas = st.sampled_from(
    [("is", alpha) for alpha in (1.0, 1e-12, 1e-3, 7.3, 1e3, 1e12)]
    + [("reaches", size) for size in (1e-4, 1.0, 1e4, 9e7, 9e7, 9e7, 1.1e8, 1e12, 1e30, 1e60)]
)
rules = st.fixed_dictionaries(
    {
        "conflict_penalty": st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        "conflict_reference": st.sampled_from(["selected", "candidates"]),
        "stop_ratio": st.sampled_from([None, None, None, 0.01, 0.5, 0.99]),
        "min_gain": st.sampled_from([None, None, None, 0.0, 1e-9, 0.5, 100.0]),
        "tie_tolerance": st.sampled_from([1e-6, 1e-6, 0.0, 1e-3, 0.5]),
    }
)
budgets = st.sampled_from([9, 9, 5, 3, 2, 1])


def sound_rows(rows: Tensor) -> list[int]:
    return [index for index, row in enumerate(rows) if bool(row.isfinite().all()) and bool(row.any())]


def resolve_alpha(alpha: tuple[str, float], rows: Tensor) -> float:
    """α between 1e-12 and 1e12."""
    kind, value = alpha
    largest = max((float(row.double().square().sum()) for row in rows[sound_rows(rows)]), default=1.0)
    return value if kind == "is" else min(max(value / largest, 1e-12), 1e12)


@st.composite
def float_pools(draw: Any) -> Tensor:
    """Rows of shape (N, D), float32: N from 1 to 9, D from 1 to 24."""
    dimension = draw(st.sampled_from([3, 1, 2, 8, 24]))
    kinds = MIXES[draw(st.sampled_from(list(MIXES)))]
    scale = draw(st.sampled_from([1.0, 1.0, 1.0, 30.0, 1e4, 1e-30, 1e30, 1e-42, "largest"]))
    spread = draw(st.sampled_from(["none", "some", "wild"]))
    seed = draw(st.integers(0, 2**32))
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = torch.randn(chance.randint(1, 9), dimension, generator=generator)
    for index, row in enumerate(rows):
        other = rows[chance.randrange(max(index, 1))].clone()
        match kind := chance.choice(kinds):
            case "copy":
                row.copy_(other)
            case "negated":
                row.copy_(-other)
            case "multiple":
                row.copy_(other * 0.25)
            case "near" | "nearer":
                row.copy_(other * (1 + row * (1e-3 if kind == "near" else 1e-6)))
            case "sum":
                row.copy_(rows[:index].nan_to_num(0.0, 0.0, 0.0).mean(dim=0) if index else row)
            case "zero":
                row.zero_()
            case "nan" | "inf" | "-inf":
                row[chance.randrange(dimension)] = float(kind)
        if kind in ("own", "multiple"):
            factor = {"none": 1.0, "some": 10 ** chance.uniform(-2, 2), "wild": chance.choice(SCALES)}[spread]
            row.mul_(factor)
    if scale != "largest":
        return rows * scale
    largest = float(rows[rows.isfinite().all(dim=1)].abs().max()) if bool(rows.isfinite().all(dim=1).any()) else 0
    return rows if not 0 < largest < 1e30 else (rows / largest).clamp(-1, 1) * FLOAT32_MAX


@st.composite
def integer_pools(draw: Any) -> Tensor:
    """Rows of small integers times powers of two, float64: every inner product is exact, so K is a Gram matrix."""
    dimension = draw(st.sampled_from([2, 1, 3, 6]))
    exponents = draw(
        st.sampled_from([(0,), (0, 1, -3, 7, 13), (14, 15, 16), (100, -100, 0), (126, -149), (500, -500, 0)])
    )
    kinds = draw(st.sampled_from([("own",), ("own", "copy", "negated"), ("own", "nan", "inf", "-inf", "zero")]))
    seed = draw(st.integers(0, 2**32))
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = torch.randint(-2, 3, (chance.randint(1, 9), dimension), generator=generator).double()
    for index, row in enumerate(rows):
        row.mul_(2.0 ** chance.choice(exponents))
        other = rows[chance.randrange(max(index, 1))].clone()
        match kind := chance.choice(kinds):
            case "copy" | "negated":
                row.copy_(other if kind == "copy" else -other)
            case "zero":
                row.zero_()
            case "nan" | "inf" | "-inf":
                row[0] = float(kind)
    return rows


def exact_gains(rows: Tensor, gram: Tensor, sound: list[int], alpha: float, *, within: float = 1e8) -> Any:
    """The oracle that invariant 8 asks for; `rows` are the gradients, `gram` what the selection was made from.

    In float32 rows are rounded once when they are divided by their largest entry, so that above `within` nearly equal
    ones part from the D-dimensional formula by more than rounding in float64 does.
    """
    sizes = alpha * rows[sound].square().sum(dim=1)
    if bool(((sizes >= 1e-4) & (sizes <= within)).all()):
        return log_det_gains(rows.where(rows.isfinite(), 0.0), alpha)
    return gram_gains(gram, alpha)


@search
@given(integer_pools(), budgets, alphas, rules)
def test_select_is_greedy_on_any_gram_matrix(rows: Tensor, num_selected: int, alpha: Any, options: Any) -> None:
    gram, sound = rows @ rows.T, sound_rows(rows)
    alpha = resolve_alpha(alpha, rows)
    selection = select(gram, num_selected, fisher_alpha=alpha, **options)
    check_selection(selection, exact_gains(rows, gram, sound, alpha), gram, sound, num_selected, **options)
    if options["conflict_penalty"] == 0:
        slack = options["tie_tolerance"] * max(selection.gains, default=0.0) + 1e-9
        assert all(b <= a + slack for a, b in zip(selection.gains, selection.gains[1:], strict=False))
    # Rows that cannot be picked change nothing, to the last bit.
    if sound:
        alone = select(gram[sound][:, sound], num_selected, fisher_alpha=alpha, **options)
        assert tuple(sound[index] for index in alone.indices) == selection.indices
        assert (alone.gains, alone.scores) == (selection.gains, selection.scores)


@search
@given(
    float_pools(),
    st.booleans(),
    budgets,
    st.sampled_from(["exact", "exact", "diagonal", "adafisher"]),
    alphas,
    rules,
)
def test_select_from_gradients_is_greedy(
    rows: Tensor, double: bool, num_selected: int, information: Any, alpha: Any, options: Any
) -> None:
    rows = rows.double() if double else rows
    alpha = resolve_alpha(alpha, rows)
    kept = rows.clone()
    selection = select_from_gradients(rows, num_selected, information=information, fisher_alpha=alpha, **options)
    assert torch.equal(rows.nan_to_num(1.5), kept.nan_to_num(1.5))
    sound = sound_rows(rows)
    geometry = measure_rows(kept, product_dtype=torch.float64)
    gram = normalized_gram(geometry.cosines, geometry.norms, torch.ones_like(geometry.norms), unit=False)
    rows = rows.double()
    check_gram_of(gram, rows, sound, 1e-14 if double else 3e-7)
    if information == "exact":
        gains = exact_gains(rows, gram, sound, alpha, within=1e8 if double else 1e2)
    else:
        gains = loosened(coordinate_gains(rows, alpha, information))
    check_selection(selection, gains, gram, sound, num_selected, **options)


def check_gram_of(gram: Tensor, rows: Tensor, sound: list[int], tolerance: float) -> None:
    """K_ij is ⟨g_i, g_j⟩ but for `tolerance` of the lengths, and zero for unsound rows."""
    chosen, lengths = rows[sound], rows[sound].norm(dim=1)
    units = chosen / lengths[:, None]
    found = gram[sound][:, sound] / lengths[:, None] / lengths
    assert not sound or float((found - units @ units.T).abs().max()) <= tolerance
    unsound = [index for index in range(len(rows)) if index not in sound]
    assert not gram[unsound].any() and not gram[:, unsound].any()


@dataclass
class Pool:
    """What scoring hands over of one pool, and its oracle."""

    scores: PoolScores
    rows: Tensor  # Normalised gradients (N, D), float64
    sound: list[int]


def score(
    rows: Tensor, losses: Tensor, tokens: list[int], normalization: Any, *, sketch_dim: int = 0, keep: bool = False
) -> Pool:
    """Takes rows the way of a pool: by modules and micro-batches into a buffer, to their owner, and measured."""
    dimension, number = rows.shape[1], rows.shape[0]
    sizes = [dimension] if dimension < 3 else [1, dimension - 2, 1]
    sketch = GradientSketch(sizes, sketch_dim, seed=3) if 0 < sketch_dim < dimension else None
    buffer = FeatureBuffer(number, sizes, sketch, torch.device("cpu"))
    order = [*range(1, number, 2), *range(0, number, 2)]
    for start in range(0, number, 4):
        batch = order[start : start + 4]
        buffer.begin(batch)
        for module, gradients in reversed(list(enumerate(rows[batch].split(sizes, dim=1)))):
            buffer.add(module, gradients.clone())
        buffer.finish(losses[batch])
    owners = [0] * number
    owned = send_to_owners(buffer, owners, owners, Processes())
    assert order_for_owners(range(number), owners) == list(range(number))
    taken = owned.take(range(number))
    scores = measured_pool(
        taken.features,
        [RowShape(count + 3, count, True, ("input_ids",)) for count in tokens],
        SpiceConfig(gradient_normalization=normalization, information="diagonal" if keep else "exact"),
        norms=taken.norms,
        candidates=[100 + index for index in range(number)],
        losses=taken.losses,
    )
    raw = rows.double()
    count = torch.tensor(tokens).double()[:, None]
    norms = raw.norm(dim=1, keepdim=True)
    factors = {"none": torch.ones_like(count), "sqrt_tokens": count.sqrt(), "tokens": count, "unit": 1 / norms}
    sound = [index for index in sound_rows(rows) if bool(losses[index].isfinite())]
    return Pool(scores, raw * factors[normalization], sound)


pool_settings = st.fixed_dictionaries(
    {
        "information": st.sampled_from(["exact", "exact", "exact", "exact", "diagonal", "adafisher"]),
        "gradient_normalization": st.sampled_from(["none", "none", "sqrt_tokens", "tokens", "unit"]),
        "fisher_alpha": alphas,
        "alpha_scaling": st.sampled_from(["fixed", "fixed", "pool"]),
    }
)


def make_config(rows: Tensor, num_selected: int, options: Any, choice: Any) -> SpiceConfig:
    """Settings of a pool of these normalised gradients."""
    alpha = resolve_alpha(options["fisher_alpha"], rows)
    options = options | choice | {"fisher_alpha": alpha}
    return SpiceConfig(pool_size=10, num_selected=num_selected, pools_per_step=1, sketch_dim=0, **options)


@st.composite
def candidates(draw: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Gradients, losses and label tokens of a pool."""
    rows = draw(float_pools())
    values = draw(st.sampled_from([(2.5,), (0.0, 1.0, FLOAT32_MAX), (1.0, 1.0, math.nan, math.inf, -math.inf)]))
    lengths = draw(st.sampled_from([(1,), (3, 50), (1, 4000)]))
    chance = random.Random(draw(st.integers(0, 2**32)))
    losses = torch.tensor([chance.choice(values) for _ in rows])
    return rows, losses, [chance.choice(lengths) for _ in rows]


@search
@given(candidates(), budgets, pool_settings, rules)
def test_a_pool_from_features_to_records(
    drawn: tuple[Tensor, Tensor, list[int]], num_selected: int, options: Any, choice: Any
) -> None:
    is_exact = options["information"] == "exact"
    pool = score(*drawn, options["gradient_normalization"], keep=not is_exact)
    config = make_config(pool.rows, num_selected, options, choice)
    found = select_pool(pool.scores, num_selected, config)
    gram = mask(pool.scores)
    # float32 products of rows that were divided by their largest entry.
    check_gram_of(gram, pool.rows, pool.sound, 6e-7)
    check_unsound(found, drawn[0], drawn[1])
    if config.alpha_scaling == "pool" and pool.sound:
        finite = drawn[0].isfinite().all(dim=1) & drawn[1].isfinite()
        mean = float(pool.rows[finite].nan_to_num(0.0).square().sum(dim=1).mean())
        assert math.isclose(found.alpha, config.fisher_alpha / mean, rel_tol=1e-5)
    gains = gram_gains(gram, found.alpha)
    if not is_exact:
        gains = loosened(coordinate_gains(pool.rows, found.alpha, config.information))
    check_selection(found.selection, gains, gram, pool.sound, num_selected, **choice)
    check_records(found)


def loosened(gains: Any) -> Any:
    """For features in float32: rows are divided by their largest entry there, and that rounds."""
    return lambda *where: [(gain, tolerance + 1e-6 * gain) for gain, tolerance in gains(*where)]


def mask(scores: PoolScores) -> Tensor:
    """The Gram matrix that the picks are made from."""
    keep = scores.sound[:, None] & scores.sound
    return torch.where(keep, scores.gram, 0.0)


def check_unsound(found: PoolSelection, rows: Tensor, losses: Tensor) -> None:
    """Rows that cannot be picked are reported, each once and for what it is."""
    finite = rows.isfinite().all(dim=1) & losses.isfinite()
    assert found.nonfinite == tuple(100 + index for index in (~finite).nonzero().flatten().tolist())
    zero = finite & ~rows.any(dim=1)
    assert found.zero == tuple(100 + index for index in zero.nonzero().flatten().tolist())
    assert not {*found.nonfinite, *found.zero} & {*found.indices}
    assert not {*found.nonfinite, *found.zero} & {found.candidates[position] for position in found.top_norm}


def check_records(*pools: PoolSelection) -> None:
    """Records, the log and the summary hold finite numbers alone."""
    indices = tuple(index for pool in pools for index in pool.indices)
    step = StepSelection(step=0, epoch=0, indices=indices, pools=tuple(pools), num_fillers=0)
    with tempfile.TemporaryDirectory() as directory:
        writer = RecordWriter(directory)
        writer.write_selection(step)
        writer.close()
        lines = [
            json.loads(line) for file in Path(directory).glob("*.jsonl") for line in file.read_text().splitlines()
        ]
    assert len([line for line in lines if "gain" in line]) == len(indices)
    metrics = step_metrics(step)
    assert all(math.isfinite(value) for value in metrics.values())
    assert ("spice/gain_first" in metrics) == bool(indices)
    totals = RunTotals()
    totals.add_selection(step)
    json.dumps(totals.state_dict(), allow_nan=False)
    warn_of_first_pools(totals, SpiceConfig())
    assert not any("nan" in value or "inf " in value for _, value in summarize_run(totals))


@search
@given(candidates(), budgets, pool_settings, rules)
def test_a_sketched_pool(
    drawn: tuple[Tensor, Tensor, list[int]], num_selected: int, options: Any, choice: Any
) -> None:
    rows, losses, tokens = drawn
    # So few numbers make rows collide, cancel and overflow in the sketch, which a pool must survive too.
    rows = rows.repeat(1, 5)
    pool = score(rows, losses, tokens, options["gradient_normalization"], sketch_dim=4)
    config = make_config(pool.rows, num_selected, options | {"information": "exact"}, choice)
    found = select_pool(pool.scores, num_selected, config)
    sound = pool.scores.sound.nonzero().flatten().tolist()
    assert set(sound) <= set(pool.sound)
    lost = [index for index in pool.sound if index not in sound]
    assert {100 + index for index in lost} <= {*found.nonfinite, *found.zero}
    if float(rows[pool.sound].abs().max() if pool.sound else 0) < 1e30 * 10:
        assert not {100 + index for index in lost} & {*found.nonfinite}
    gram = mask(pool.scores)
    # Norms are exact: only directions are sketched.
    lengths = pool.rows[sound].norm(dim=1)
    torch.testing.assert_close(gram.diagonal()[sound], lengths.square(), rtol=1e-6, atol=0)
    check_selection(found.selection, gram_gains(gram, found.alpha), gram, sound, num_selected, **choice)
    check_records(found)


@search
@given(candidates(), candidates(), budgets, pool_settings, rules)
def test_a_proxy_beside_a_target(first: Any, second: Any, budget: int, options: Any, choice: Any) -> None:
    number = min(len(first[0]), len(second[0]))
    pools = [
        score(*(part[:number] for part in drawn), options["gradient_normalization"], keep=True)
        for drawn in (first, second)
    ]
    config = make_config(pools[0].rows, budget, options, choice)
    transfer = compare_pools(pools[0].scores, pools[1].scores, budget, config, num_random_subsets=4)
    values = (transfer.rank_correlation, transfer.retained, transfer.retained_by_length, transfer.overlap)
    assert all(value is None or math.isfinite(value) for value in values)


@pytest.mark.parametrize("normalization", ["none", "unit"])
@pytest.mark.parametrize("information", ["exact", "diagonal", "adafisher"])
def test_a_pool_of_nothing_but_unsound_rows_gives_none(information: str, normalization: str) -> None:
    rows = torch.randn(5, 6)
    rows[0] = math.nan
    rows[1, 2], rows[2, 0] = math.inf, -math.inf
    rows[3] = 0
    losses = torch.tensor([1.0, math.nan, 1.0, 0.0, math.inf])
    config = SpiceConfig(
        pool_size=10, num_selected=2, information=information, gradient_normalization=normalization, sketch_dim=0
    )
    pool = score(rows, losses, [3] * 5, normalization, keep=information != "exact")
    found = select_pool(pool.scores, 2, config)
    assert found.indices == () and not found.selection.stopped_early
    assert found.nonfinite == (100, 101, 102, 104) and found.zero == (103,)
    assert found.overlap_top_norm is found.tokens_selected is None and found.information_top_norm == 0
    check_records(found)


def test_a_row_whose_loss_is_not_finite_is_not_picked_whatever_its_gradient() -> None:
    pool = score(torch.eye(4) * 3, torch.tensor([1.0, math.inf, math.nan, 1.0]), [2] * 4, "none")
    found = select_pool(pool.scores, 4, SpiceConfig(pool_size=10, num_selected=4))
    assert found.indices == (100, 103) and found.nonfinite == (101, 102) and found.zero == ()
