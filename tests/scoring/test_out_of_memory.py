"""Memory that runs out while scoring: halves, the same scores and picks, and rows that don't fit alone left out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spice_trainer import ProxyModel, SpiceConfig
from spice_trainer.data.rows import collate_row
from spice_trainer.distributed import Processes
from spice_trainer.scoring.out_of_memory import MAX_NAMED_ROWS, TokenBudget, is_out_of_memory
from spice_trainer.scoring.scorer import GradientScorer
from tests.proxy.test_proxy import LEARNING_RATE, make_proxied
from tests.support.models import tiny_lora_model
from tests.support.scorers import make_learner, make_scorer
from tests.support.short_memory import CPU, CUDA, ShortMemory
from tests.support.traces import model_state, random_states
from tests.support.trainers import (
    collate,
    make_trainer,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

ROWS = tiny_rows(30)
POOLS = [list(range(12)), list(range(12, 24))]
# A row of 40 tokens, where the others have at most 20.
LONG_ROW = {"input_ids": list(range(3, 43)), "attention_mask": [1] * 40, "labels": [-100] * 20 + list(range(23, 43))}


def _scorer(
    model: nn.Module, rows: Any = ROWS, *, processes: Processes | None = None, **config: Any
) -> GradientScorer:
    return make_scorer(
        model,
        SpiceConfig(**({"sketch_dim": 0, "scoring_tokens_per_batch": 256} | config)),
        rows=rows,
        collate=collate,
        processes=processes,
    )


def _messages(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("config", [{}, {"sketch_dim": 256}, {"information": "diagonal"}], ids=str)
def test_scores_are_those_of_enough_memory(config: dict[str, Any], in_backward: bool) -> None:
    model = tiny_lora_model()
    expected = list(_scorer(model, **config).score(POOLS))
    short = ShortMemory(model, 70, in_backward=in_backward)
    scorer = _scorer(model, **config)
    num_raised = []
    for _ in range(2):
        found = list(scorer.score(POOLS))
        for ours, theirs in zip(found, expected, strict=True):
            # Squared norms that are added up twice would be √2 off.
            torch.testing.assert_close(ours.gradient_norms, theirs.gradient_norms, rtol=1e-5, atol=0)
            torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-5, atol=1e-6)
            scale = float(theirs.gram.diagonal().max())
            torch.testing.assert_close(ours.gram, theirs.gram, rtol=0, atol=1e-5 * scale)
            assert ours.sound.all() and not ours.out_of_memory.any()
        num_raised.append(short.num_raised)
    # The smaller budget is remembered: nothing fails in the second round.
    assert num_raised[0] == num_raised[1] > 0
    assert 0 < scorer.budget.tokens_per_batch <= 70
    notice = scorer.budget.take_notice()
    assert notice is not None and notice.tokens_per_batch == scorer.budget.tokens_per_batch and not notice.left_out
    assert scorer.budget.take_notice() is None


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_a_row_that_does_not_fit_alone_is_marked(error: Exception, in_backward: bool) -> None:
    rows = [*ROWS[:5], LONG_ROW, *ROWS[6:]]
    model = tiny_lora_model()
    expected = next(_scorer(model, rows).score(POOLS))
    ShortMemory(model, 39, in_backward=in_backward, error=error)
    scorer = _scorer(model, rows)
    found = next(scorer.score(POOLS))
    assert found.out_of_memory.tolist() == [position == 5 for position in range(12)]
    assert not found.finite[5] and not found.sound[5] and found.gradient_norms[5] == 0
    assert (found.gram[5] == 0).all() and (found.gram[:, 5] == 0).all()
    others = [position for position in range(12) if position != 5]
    torch.testing.assert_close(found.gradient_norms[others], expected.gradient_norms[others], rtol=1e-5, atol=0)
    notice = scorer.budget.take_notice()
    assert notice is not None and notice.left_out == ((5, 40, "training dataset"),)


def test_other_errors_pass_and_leave_no_trace() -> None:
    model = tiny_lora_model().train()
    states, before = random_states(), model_state(model)
    short = ShortMemory(model, 70, in_backward=True, error=RuntimeError("something else"))
    model.training = True
    scorer = _scorer(model)
    with pytest.raises(RuntimeError, match="something else"):
        list(scorer.score(POOLS))
    assert short.num_raised == 1 and scorer.budget.tokens_per_batch == 256
    short.remove()
    assert random_states() == states and model_state(model) == before


def test_what_is_a_lack_of_memory() -> None:
    assert all(map(is_out_of_memory, (CUDA, CPU, RuntimeError("CUDA error: out of memory\nCUDA kernel errors ..."))))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes differ"), ValueError("out of memory."), KeyError(1))))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30).map(lambda values: sorted(values, reverse=True)),
    budget=st.integers(1, 400),
    limit=st.integers(1, 400),
)
def test_every_row_is_run_once_in_passes_that_fit(lengths: list[int], budget: int, limit: int) -> None:
    tokens, done = TokenBudget(budget), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spice_trainer.scoring.out_of_memory.clear_device_cache", lambda **kwargs: None)
        _check_budget(tokens, done, lengths, budget, limit)


def _check_budget(tokens: TokenBudget, done: list[int], lengths: list[int], budget: int, limit: int) -> None:

    def attempt(part: range) -> None:
        cost = len(part) * max(lengths[position] for position in part)
        assert len(part) == 1 or cost <= budget
        if cost > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        done.extend(part)

    alone = tokens.run(lengths, attempt)
    assert sorted([*done, *alone]) == list(range(len(lengths)))
    assert alone == [position for position, length in enumerate(lengths) if length > limit]
    # Whatever fits a known budget was not given up too early: the last pass that failed had several rows.
    notice = tokens.take_notice()
    if notice is not None and notice.failed is not None:
        assert notice.failed[0] > 1 and notice.failed[0] * notice.failed[1] > limit
        assert tokens.tokens_per_batch < notice.failed[0] * notice.failed[1]
    else:
        assert tokens.tokens_per_batch == budget


# In a Trainer


def test_a_run_goes_on_and_trains_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = make_trainer(tmp_path / "plain", spice={}, num_train_epochs=2, lora_dropout=0.3)
    plain.train()
    caplog.clear()
    trainer = make_trainer(tmp_path / "short", spice={}, num_train_epochs=2, lora_dropout=0.3)
    short = ShortMemory(trainer.model, 100, in_backward=True)
    trainer.train()
    assert short.num_raised > 0 and len(trained_indices(tmp_path / "short")) == 12
    assert trained_indices(tmp_path / "short") == trained_indices(tmp_path / "plain")
    assert same_weights(trainable_weights(trainer.model), trainable_weights(plain.model))
    [message] = _messages(caplog, "memory ran out")
    budget = trainer._spice.sampler.scorer.budget.tokens_per_batch
    assert "SPICE: memory ran out while scoring 10 rows of 19 tokens." in message
    assert f"at most {budget} tokens a pass; the picks don't change. Set scoring_tokens_per_batch={budget}" in message


def test_a_row_that_does_not_fit_is_named_and_never_picked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*tiny_rows(40)[:7], LONG_ROW, *tiny_rows(40)[8:]]
    # As a raw gradient of one label token it is the first that would be picked.
    rows[7] = LONG_ROW | {"labels": [-100] * 39 + [42]}
    options: dict[str, Any] = {"num_train_epochs": 2, "spice": {"gradient_normalization": "none"}}
    dataset = tiny_dataset(40).from_list(rows)
    make_trainer(tmp_path / "plain", train_dataset=dataset, **options).train()
    assert sum(7 in step for step in trained_indices(tmp_path / "plain")) == 2
    trainer = make_trainer(tmp_path / "short", train_dataset=dataset, **options)
    ShortMemory(trainer.model, 39)
    seen = []
    trainer._spice.sampler.add_listener(seen.append)
    trainer.train()
    assert not any(7 in step for step in trained_indices(tmp_path / "short"))
    found = [pool.out_of_memory for selection in seen for pool in selection.pools]
    assert sorted(found, reverse=True)[:3] == [(7,), (7,), ()]
    assert not any(pool.nonfinite or pool.zero for selection in seen for pool in selection.pools)
    assert all(len(step) == 4 for step in trained_indices(tmp_path / "short"))
    [message] = _messages(caplog, "does not fit")
    assert "row 7 of the training dataset (40 tokens) does not fit into memory even alone" in message
    assert trainer._spice.callback.totals.num_out_of_memory == 2


def test_few_rows_are_named(caplog: pytest.LogCaptureFixture) -> None:
    from spice_trainer.scoring.out_of_memory import LeftOutRow, MemoryNotice, MemoryReport

    report = MemoryReport()
    left_out = tuple(LeftOutRow(row, 100, "training dataset") for row in range(MAX_NAMED_ROWS + 5))
    for _ in range(3):
        report.tell([None, MemoryNotice(None, 10, left_out)])
    messages = _messages(caplog, "does not fit")
    assert len(messages) == MAX_NAMED_ROWS and messages[-1].endswith("Further such rows are not named here.")


def test_a_step_without_any_row_that_fits_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spice_trainer.scoring.out_of_memory.clear_device_cache", lambda **kwargs: None)
    trainer = make_trainer(tmp_path, spice={})
    ShortMemory(trainer.model, 1)
    with pytest.raises(RuntimeError, match=r"could pick no sample .* 10 did not fit into memory alone"):
        trainer.train()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_proxy_runs_out_of_memory(tmp_path: Path, overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In its scoring, also beside the training, and in its learning."""
    weights = []
    for name in ("plain", "short"):
        proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)
        trainer = make_proxied(tmp_path / name, proxy, spice={"overlap_scoring": overlap})
        if name == "short":
            scoring = ShortMemory(proxy.model, 100, in_backward=True)
            learning = ShortMemory(proxy.model, 40, in_backward=True, training=True)
        trainer.train()
        weights.append(trainable_weights(proxy.model))
    assert scoring.num_raised > 0 and learning.num_raised > 0
    assert trained_indices(tmp_path / "plain") == trained_indices(tmp_path / "short")
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)
    assert len(_messages(caplog, "memory ran out while scoring")) == 1
    assert len(_messages(caplog, "memory ran out while letting the proxy learn from")) >= 1


def test_a_proxy_cannot_learn_from_a_row_that_does_not_fit() -> None:
    model = tiny_lora_model(lora_dropout=0.3)
    before, states = model_state(model), random_states()
    short = ShortMemory(model, 15, in_backward=True, training=True)
    rows = [collate_row(index, ROWS[index], collate) for index in range(6)]
    learner = make_learner(model, tokens_per_batch=256)
    with pytest.raises(
        RuntimeError, match=r"the proxy learned from one row of \d+ tokens, too long even alone.*Lower"
    ):
        learner.learn(rows)
    short.remove()
    assert model_state(model) == before and random_states() == states


def test_with_sharded_weights_the_error_names_the_setting() -> None:
    model = tiny_lora_model()
    ShortMemory(model, 70)
    sharded = Processes(rank=0, world_size=2, device=torch.device("cpu"), lockstep=True)
    scorer = _scorer(model)
    shared = scorer.share(dict(enumerate(map(tuple, POOLS))))
    scorer.passes.processes = sharded
    with pytest.raises(RuntimeError, match=r"weights are sharded \(FSDP, ZeRO-3\).*Set scoring_tokens_per_batch=\d+ "):
        scorer.compute(shared)
    # A Trainer that lowers its batch size when memory runs out must not take this for a reason to.
    from accelerate.utils.memory import should_reduce_batch_size

    with pytest.raises(RuntimeError) as caught:
        scorer.compute(shared)
    assert not should_reduce_batch_size(caught.value) and is_out_of_memory(caught.value.__cause__)


def test_no_memory_for_the_features_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise CUDA

    monkeypatch.setattr("spice_trainer.scoring.passes.FeatureBuffer", fail)
    with pytest.raises(
        RuntimeError, match=r"gradient features of 24 candidates, [\d,]+ numbers each .*smaller sketch"
    ):
        list(_scorer(tiny_lora_model()).score(POOLS))


# Nothing stays


def _live_storages() -> set[int]:
    gc.collect()
    return {value.untyped_storage()._cdata for value in gc.get_objects() if issubclass(type(value), Tensor)}


class _Watch:
    """Weak references to all that the scoring's forwards and features make."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[weakref.ref[Any]] = []
        for module in model.modules():
            module.register_forward_hook(self._note)
        from spice_trainer.scoring.features import FeatureBuffer

        original: Callable[..., None] = FeatureBuffer.__init__

        def noted(buffer: FeatureBuffer, *args: Any) -> None:
            original(buffer, *args)
            self.seen.append(weakref.ref(buffer.features.untyped_storage()))

        monkeypatch.setattr(FeatureBuffer, "__init__", noted)

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.seen.append(weakref.ref(output.untyped_storage()))

    def num_alive(self) -> int:
        return sum(reference() is not None for reference in self.seen)


@pytest.fixture
def collector() -> Iterator[None]:
    """Python's garbage collector works again after the test."""
    yield
    gc.enable()


@pytest.mark.usefixtures("collector")
@pytest.mark.parametrize("information", ["exact", "diagonal"])
@pytest.mark.parametrize("what", ["plenty", "short", "left out", "error"])
def test_no_tensor_of_the_scoring_outlives_it(
    tmp_path: Path, information: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_ = {"information": information, "pools_per_step": 2, "num_selected": 2}
    trainer = make_trainer(tmp_path, spice=settings_, train_dataset=tiny_dataset(40))
    trainer._spice.begin_run()
    sampler = trainer._spice.sampler
    sampler.run.select_step()
    sampler.run.finish_step()
    before = _live_storages()
    watch = _Watch(trainer.model, monkeypatch)
    # Without the garbage collector: a step's memory must be there for the training right away.
    monkeypatch.setattr("spice_trainer.scoring.out_of_memory.clear_device_cache", lambda **kwargs: None)
    gc.collect()
    gc.disable()
    if what == "error":
        ShortMemory(trainer.model, 60, in_backward=True, error=ValueError("the user's own"))
        with pytest.raises(ValueError, match="the user's own"):
            sampler.run.select_step()
    else:
        short = ShortMemory(trainer.model, {"plenty": 10_000, "short": 60, "left out": 15}[what], in_backward=True)
        selection = sampler.run.select_step()
        assert (short.num_raised > 0) == (what != "plenty") and selection.indices
        assert any(pool.out_of_memory for pool in selection.pools) == (what == "left out")
    assert len(watch.seen) > 10
    if what != "error":
        assert watch.num_alive() == 0
    gc.enable()
    gc.collect()
    assert watch.num_alive() == 0
    assert _live_storages() <= before


def test_groups_of_pools_are_not_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit at once is scored one group after the other, and each one's features go before the next's."""
    import spice_trainer.scoring.scorer
    from spice_trainer.sampling.schedule import StepPools, plan_step
    from spice_trainer.sampling.step_selector import StepSelector
    from spice_trainer.scoring.features import FeatureBuffer
    from spice_trainer.scoring.step_scorer import StepScorer

    monkeypatch.setattr(spice_trainer.scoring.scorer, "FEATURE_BUFFER_BYTES", 0)
    alive: list[weakref.ref[Any]] = []
    numbers: list[int] = []
    original: Callable[..., None] = FeatureBuffer.__init__

    def noted(buffer: FeatureBuffer, *args: Any) -> None:
        numbers.append(sum(reference() is not None for reference in alive))
        original(buffer, *args)
        alive.append(weakref.ref(buffer.features.untyped_storage()))

    monkeypatch.setattr(FeatureBuffer, "__init__", noted)
    config = SpiceConfig(information="diagonal")
    shape = plan_step(pool_size=8, num_selected=2, pools_per_step=3, samples_per_step=6, num_slots=1)
    plan = StepPools(0, 0, tuple(tuple(range(start, start + 8)) for start in (0, 8, 16)), (2, 2, 2))
    model = tiny_lora_model()
    selector = StepSelector(StepScorer(_scorer(model, information="diagonal")), config, shape=shape)
    assert len(selector.select(plan, step=0).indices) == 6
    assert numbers == [0, 0, 0]
