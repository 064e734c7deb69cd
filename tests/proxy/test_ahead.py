"""Scoring beside the training: the same picks, the same training, errors where they belong, nothing left running."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spice_trainer.proxy.ahead
from spice_trainer import ProxyModel
from spice_trainer.proxy.ahead import ScoringAhead
from spice_trainer.scoring.scorer import GradientScorer
from tests.proxy.test_proxy import LEARNING_RATE, make_proxied
from tests.support.models import tiny_lora_model
from tests.support.replays import logged_losses
from tests.support.trainers import read_records, same_weights, trainable_weights, trained_indices


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ScoringAhead]:
    """Everything that was scored beside the training."""
    everything: list[ScoringAhead] = []
    original = ScoringAhead.__init__

    def watched(self: ScoringAhead, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        everything.append(self)

    monkeypatch.setattr(ScoringAhead, "__init__", watched)
    return everything


def train(output_dir: Path, *, overlap: bool, spice: dict[str, Any] | None = None, **options: Any) -> Any:
    proxy = ProxyModel(tiny_lora_model(lora_dropout=0.3), learning_rate=LEARNING_RATE)
    settings = {"overlap_scoring": overlap} | (spice or {})
    trainer = make_proxied(output_dir, proxy, spice=settings, lora_dropout=0.3, **options)
    trainer.train()
    return trainer


def test_picks_and_training_are_the_same(tmp_path: Path, started: list[ScoringAhead]) -> None:
    options: dict[str, Any] = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    plain = train(tmp_path / "plain", overlap=False, **options)
    assert not started
    beside = train(tmp_path / "beside", overlap=True, **options)
    picks = trained_indices(tmp_path / "plain")
    # All steps but the first were scored ahead, over the epoch's end too, and none beyond the last.
    assert len(started) == len(picks) - 1 == 5
    assert trained_indices(tmp_path / "beside") == picks
    for name in ("selections", "pools"):
        assert read_records(tmp_path / "beside", name) == read_records(tmp_path / "plain", name)
    assert same_weights(trainable_weights(beside.model), trainable_weights(plain.model))
    assert logged_losses(beside) == logged_losses(plain)
    ahead = [line["seconds_ahead"] for line in read_records(tmp_path / "beside", "costs")]
    assert ahead[0] == 0 and all(seconds > 0 for seconds in ahead[1:])


def test_scoring_runs_while_the_target_trains(
    tmp_path: Path, started: list[ScoringAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held back until the target has trained: without a thread of its own this would never end."""
    trained, scored = threading.Event(), []
    compute = GradientScorer.compute

    def held(self: GradientScorer, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert trained.wait(60), "the target did not train while the next step was scored"
            scored.append(threading.current_thread().name)
        return compute(self, *args, **kwargs)

    def make(output_dir: Path) -> Any:
        proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)
        return make_proxied(output_dir, proxy, spice={"overlap_scoring": True}, max_steps=2)

    monkeypatch.setattr(GradientScorer, "compute", held)
    trainer = make(tmp_path)
    training_step = trainer.training_step

    def note(*args: Any, **kwargs: Any) -> Any:
        result = training_step(*args, **kwargs)
        trained.set()
        return result

    trainer.training_step = note
    trainer.train()
    assert scored == ["spice-scoring-ahead"]


def test_resuming_scores_anew(tmp_path: Path, started: list[ScoringAhead]) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    whole = train(tmp_path / "whole", overlap=True, **options)
    proxy = ProxyModel(tiny_lora_model(lora_dropout=0.3), learning_rate=LEARNING_RATE)
    resumed = make_proxied(tmp_path / "resumed", proxy, spice={"overlap_scoring": True}, lora_dropout=0.3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert trained_indices(tmp_path / "resumed") == trained_indices(tmp_path / "whole")
    assert same_weights(trainable_weights(resumed.model), trainable_weights(whole.model))
    weights = [trainable_weights(trainer._spice.sampler.proxy.model) for trainer in (whole, resumed)]
    assert same_weights(*weights)


def test_replayed_epochs_are_not_scored_ahead(tmp_path: Path, started: list[ScoringAhead]) -> None:
    train(tmp_path, overlap=True, spice={"selection_epochs": 1}, num_train_epochs=3)
    assert len(started) == 5


def test_a_run_that_stops_early_leaves_nothing_running(
    tmp_path: Path, started: list[ScoringAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    train(tmp_path, overlap=True, callbacks=[Stop()])
    [ahead] = started
    assert not ahead._thread.is_alive()


@pytest.mark.parametrize("where", ["thread", "rows"])
def test_an_error_is_raised_in_the_run(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute: Callable[..., Any] = GradientScorer.compute
    share: Callable[..., Any] = GradientScorer.share
    calls = {"compute": 0, "share": 0}

    def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: GradientScorer, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            if calls[name] == 2:
                raise ValueError("the user's own error")
            return original(self, *args, **kwargs)

        return call

    name, original = ("compute", compute) if where == "thread" else ("share", share)
    monkeypatch.setattr(GradientScorer, name, failing(name, original))
    with pytest.raises(ValueError, match="the user's own error"):
        train(tmp_path, overlap=True)
    # The first step has trained if the error comes of the thread, and has not begun if it comes before that starts.
    assert (tmp_path / "spice" / "trained.jsonl").exists() == (where == "thread")
    assert not any(thread.name == "spice-scoring-ahead" for thread in threading.enumerate())


def test_features_of_a_step_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spice_trainer.scoring.scorer

    monkeypatch.setattr(spice_trainer.scoring.scorer, "FEATURE_BUFFER_BYTES", 10_000)
    proxy = ProxyModel(tiny_lora_model())
    settings = {"overlap_scoring": True, "sketch_dim": 0, "pools_per_step": 2, "num_selected": 2}
    with pytest.raises(ValueError, match=r"overlap_scoring=True needs the gradient features of all 2 pools .*Fix: "):
        make_proxied(tmp_path, proxy, spice=settings)


def test_another_steps_scores_are_not_taken(tmp_path: Path) -> None:
    """Pools decide: what was scored ahead for other rows is waited for and dropped."""
    proxy = ProxyModel(tiny_lora_model(), learning_rate=0.0)
    trainer = make_proxied(tmp_path, proxy, spice={"overlap_scoring": True})
    trainer._spice.begin_run()
    sampler = trainer._spice.sampler
    selector, schedule = sampler.selector, sampler.schedule
    first, second, third = (schedule.pools(0, step) for step in range(3))
    expected = selector.select(third, step=0)
    selector.select(first, step=0, next_plan=second)
    assert isinstance(selector.scorer._ahead, spice_trainer.proxy.ahead.ScoringAhead)
    assert selector.select(third, step=1).indices == expected.indices
    assert selector.scorer._ahead is None
