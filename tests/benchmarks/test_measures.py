"""The measures of the benchmark, each against something slow and obvious."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from spice_trainer import select
from tests.benchmarks import overhead
from tests.benchmarks.agreement import gradient_error, gram_error, gram_matrix, norm_error
from tests.benchmarks.clock import peak_memory, ratios, rotated, shown, spread, time_in_turn
from tests.benchmarks.direct_greedy import direct_greedy
from tests.benchmarks.fidelity import information, pick, random_subsets, retained
from tests.benchmarks.methods import always, gram_clock
from tests.benchmarks.module_grams import kept_candidates, measure_module_grams, picks_under
from tests.benchmarks.option_specs import GROUPS, ScoringOption, default_options, kept_modules, parse_option
from tests.benchmarks.tables import Table, bytes_shown, passed, plain_table, print_table
from tests.benchmarks.workload import Workload, collate, padding_share, tiny_rows
from tests.support.models import tiny_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def workload() -> Workload:
    return Workload("tiny", lambda: tiny_model("llama"), tiny_rows, num_pools=2, pool_size=10)


# --- times --------------------------------------------------------------------------------------------------------


def test_methods_take_turns_and_every_one_is_first_once() -> None:
    called: list[str] = []
    methods = {name: always(lambda name=name: called.append(name)) for name in "abc"}
    seconds = time_in_turn(methods, 3, CPU)
    assert called == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert all(len(values) == 3 for values in seconds.values())
    assert [rotated(["a", "b", "c", "d"], repeat, 2)[0] for repeat in range(2)] == ["a", "c"]


def test_seconds_are_of_the_call_alone() -> None:
    from contextlib import contextmanager

    @contextmanager
    def slow_to_open() -> Any:
        time.sleep(0.2)
        yield lambda: time.sleep(0.01)

    (seconds,) = time_in_turn({"m": slow_to_open}, 1, CPU)["m"]
    assert 0.01 <= seconds < 0.15


def test_ratios_are_repeat_by_repeat() -> None:
    found = ratios({"ours": [2.0, 9.0], "plain": [1.0, 3.0]}, [1.0, 3.0])
    assert found == {"ours": [2.0, 3.0], "plain": [1.0, 1.0]}
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert shown([3.0, 1.0, 2.0], 1) == "2.0 (1.0 to 3.0)" and shown([0.5]) == "0.500"


def test_peak_memory_is_of_the_call() -> None:
    held = torch.zeros(10**6)
    size = peak_memory(lambda: (torch.ones(5 * 10**5) + torch.ones(5 * 10**5)).sum(), CPU)
    assert size == pytest.approx(3 * 4 * 5 * 10**5, rel=0.01) and len(held)


def test_the_gram_products_are_timed_inside_scoring(workload: Workload) -> None:
    import spice_trainer.scoring.measure as module

    original = module.measure_rows
    scorer = workload.make_scorer(workload.make_model())
    with gram_clock(CPU) as seconds:
        plain = workload.score(scorer)
    assert len(seconds) == 2 and min(seconds) > 0 and module.measure_rows is original
    for mine, theirs in zip(plain, workload.score(scorer), strict=True):
        assert torch.equal(mine.gram, theirs.gram)


# --- gradients and what is picked by them -------------------------------------------------------------------------


def test_errors_are_relative_to_each_row() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.1]])
    found = expected.clone()
    found[1, 0] = 0.001
    assert gradient_error(found, expected) == pytest.approx(0.01)
    assert gradient_error(found[[1, 0]], expected, [1, 0]) == pytest.approx(0.01)
    torch.testing.assert_close(gram_matrix(expected), expected.double() @ expected.double().T)


def test_grams_and_norms_are_compared_pool_by_pool(workload: Workload) -> None:
    from tests.benchmarks.methods import Contestants

    model = workload.make_model(random_b=True)
    gradients = Contestants(workload, model).one_at_a_time()
    scores = workload.score(workload.make_scorer(model, sketch_dim=0))
    assert gram_error(scores, gradients) < 1e-5 and norm_error(scores, gradients) < 1e-5
    # Another pool's gradients are not these.
    assert gram_error(scores, gradients.roll(1, 0)) > 0.01 and norm_error(scores, gradients.roll(1, 0)) > 0.01


@pytest.mark.parametrize("conflict_penalty", [0.0, 0.1, 5.0])
def test_the_direct_greedy_picks_what_the_gram_picks(conflict_penalty: float) -> None:
    gradients = torch.randn(25, 40, generator=torch.Generator().manual_seed(3)).double()
    expected = select(gradients @ gradients.T, 8, conflict_penalty=conflict_penalty).indices
    assert direct_greedy(gradients, 8, conflict_penalty=conflict_penalty) == list(expected)


@pytest.mark.parametrize("tokens", [None, 3])
def test_any_part_of_the_modules_from_one_scoring(workload: Workload, tokens: int | None) -> None:
    """Against scoring itself, on its own path."""
    model = workload.make_model(random_b=True)
    found = measure_module_grams(workload, model, workload.pools[1], max_tokens=tokens)
    texts = ("", "layers=1", "modules=q_proj", "modules=mlp", "layers=1 modules=v_proj+down_proj", "prefilter=0.4",
             "layers=1 prefilter=0.7")  # fmt: skip
    for text in texts:
        option = parse_option(text)
        settings = option.settings | {"scoring_max_tokens": tokens, "sketch_dim": 0}
        for normalization in ("none", "sqrt_tokens", "tokens"):
            scorer = workload.make_scorer(model, gradient_normalization=normalization, **settings)
            (scores,) = scorer.score([workload.pools[1]])
            if option.prefilter is None and normalization == "none":
                np.testing.assert_allclose(found.gram(option), scores.gram.numpy(), rtol=1e-4, atol=1e-6)
            from spice_trainer import SpiceConfig
            from spice_trainer.selection.pool import select_pool

            expected = select_pool(scores, 3, SpiceConfig()).selection.indices
            assert picks_under(option, found, 3, normalization).tolist() == list(expected), (text, normalization)
    with pytest.raises(ValueError, match="No LoRA module is left by 'modules=nothing'"):
        found.gram(parse_option("modules=nothing"))


def test_the_filter_keeps_the_largest_losses() -> None:
    losses, tokens = np.array([1.0, 3.0, 2.0, 4.0]), np.array([100, 1, 4, 1])
    assert kept_candidates(losses, tokens, 0.5, "none").tolist() == [1, 3]
    assert kept_candidates(losses, tokens, 0.5, "sqrt_tokens").tolist() == [0, 2]  # 10, 3, 4, 4
    assert kept_candidates(losses, tokens, 0.01, "none").tolist() == [3]


def test_retained_is_1_for_the_best_and_0_for_chance() -> None:
    gradients = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).numpy()
    gram = gradients @ gradients.T
    best, subsets = pick(gram, 4), random_subsets(20, 4, seed=1)
    assert retained(gram, best, best, subsets) == 1.0
    assert np.mean([retained(gram, subset, best, subsets) for subset in subsets]) == pytest.approx(0.0, abs=1e-9)
    chance = np.mean([information(gram, subset) for subset in subsets])
    other = subsets[0]
    assert retained(gram, other, best, subsets) == pytest.approx(
        (information(gram, other) - chance) / (information(gram, best) - chance)
    )
    # One pick of length 1 is as good as any other.
    unit = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    assert retained(unit, np.array([3]), np.array([0]), random_subsets(20, 1, seed=1)) == 1.0


# --- options ------------------------------------------------------------------------------------------------------


def test_settings_are_read_and_named() -> None:
    option = parse_option("layers=10 modules=mlp+v_proj tokens=32 prefilter=0.5")
    assert option == ScoringOption(10, (*GROUPS["mlp"], "v_proj"), 32, 0.5)
    assert option.name == "layers=10 modules=mlp+v_proj tokens=32 prefilter=0.5" and ScoringOption().name == "full"
    assert parse_option(option.name) == option
    assert option.settings == {
        "scoring_layers": 10,
        "scoring_target_modules": ["gate_proj", "up_proj", "down_proj", "v_proj"],
        "scoring_max_tokens": 32,
        "scoring_prefilter": 0.5,
    }
    for text in ("layer=3", "layers=many", "tokens"):
        with pytest.raises(ValueError, match="cannot read"):
            parse_option(text)
    assert len(default_options(30)) == len({option.name for option in default_options(30)}) > 15


def test_modules_are_kept_by_layer_and_by_name() -> None:
    names = [
        f"base_model.model.model.layers.{layer}.{owner}.lora_{side}.default"
        for layer in (0, 1, 10)
        for owner in ("self_attn.q_proj", "self_attn.qq_proj")
        for side in "AB"
    ]

    def kept(**fields: Any) -> list[str]:
        flags = kept_modules(names, ScoringOption(**fields))
        return [name.removeprefix("base_model.model.model.layers.") for name, flag in zip(names, flags, strict=True)
                if flag]  # fmt: skip

    assert len(kept()) == 12
    assert {name.split(".")[0] for name in kept(layers=10)} == {"1", "10"}
    assert kept(layers=1, modules=("q_proj",)) == [f"10.self_attn.q_proj.lora_{side}.default" for side in "AB"]


# --- workload and tables ------------------------------------------------------------------------------------------


def test_the_floor_has_less_padding_than_the_order_of_arrival(workload: Workload) -> None:
    rows = workload.rows()
    plan, batches = workload.sorted_batches(rows, 60)
    assert sorted(position for batch in plan for position in batch) == list(range(20))
    assert all(inputs["input_ids"].numel() <= 60 for inputs, _ in batches)
    arrivals = workload.arrival_batches(rows)
    assert [len(labels) for _, labels in arrivals] == [8, 8, 4]
    assert padding_share(batches) < padding_share(arrivals)
    shortest = collate([rows[0], rows[1]])
    assert padding_share([(shortest, shortest["labels"])]) == pytest.approx(
        1 - sum(len(row.input_ids) for row in rows[:2]) / (2 * max(len(row.input_ids) for row in rows[:2]))
    )


@pytest.mark.parametrize("has_rich", [True, False])
def test_tables(has_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not has_rich:
        import sys

        monkeypatch.setitem(sys.modules, "rich.console", None)
    table = Table("A title", ["name", "a long name of a column"] * 3, notes=["a note with [brackets]"])
    table.add("x", 1.5, "y", 2, "z", "1.023 (0.998 to 1.041)")
    print_table(table)
    shown_text = capsys.readouterr().out
    for word in ("A title", "a long name of a column", "1.023 (0.998 to 1.041)", "a note with [brackets]"):
        assert word in shown_text
    assert len(plain_table(table).splitlines()) == 6
    with pytest.raises(ValueError, match="A title: 1 cells in a table of 6 columns"):
        table.add("x")
    assert [bytes_shown(value) for value in (3 * 2**30, 5 * 2**20, 2048)] == ["3.00 GiB", "5 MiB", "2 KiB"]
    assert passed(1.0, 1.05).endswith("reached") and passed(0.3, 0.4, at_most=False).endswith("MISSED")


def test_overhead_prints_both_sides_and_their_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main(["--rows", "2400", "24000", "--pool-size", "200", "--width", "64", "--normalizations", "unit"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[4].startswith("a replayed step: ") and printed[4].count(" ms") == 2
    assert printed[5].startswith("plan micro-batches of 10 and 100 pools: ")
    assert printed[6].startswith("20 of 200, unit: measuring ")
