"""`GradientScorer` against one-sample autograd, exact and sketched, and the traces it must not leave."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spice_trainer.scoring.passes
import spice_trainer.scoring.scorer
from spice_trainer.config import SpiceConfig
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.scoring.scorer import FeatureBuffer, GradientScorer
from spice_trainer.selection.scores import PoolScores
from tests.support.gradient_loop import looped_gradients
from tests.support.models import VOCAB_SIZE, tiny_lora_model
from tests.support.scorers import make_scorer
from tests.support.traces import model_state, random_states
from tests.support.trainers import collate, tiny_dataset, tiny_rows

POOLS = [[3, 17, 5, 20, 9], [11, 0, 8], [30, 31, 7, 2]]
ROWS = tiny_rows(32)


def _scorer(
    model: nn.Module | None = None,
    dataset: Any = None,
    *,
    collator: Callable[..., Any] = collate,
    autocast: Any = None,
    **settings: Any,
) -> GradientScorer:
    model = tiny_lora_model() if model is None else model
    return make_scorer(
        model,
        SpiceConfig(**({"sketch_dim": 0} | settings)),
        rows=ROWS if dataset is None else dataset,
        collate=collator,
        autocast=autocast,
    )


def _autograd(model: nn.Module, pool: Sequence[int], rows: Sequence[Any] = ROWS) -> tuple[Tensor, Tensor]:
    """Losses and gradients `(N, D)` of a pool, in float64, one row at a time."""
    losses, modules = looped_gradients(model, [(rows[index]["input_ids"], rows[index]["labels"]) for index in pool])
    return losses, torch.cat(modules, dim=1).double()


def _multipliers(kind: str, gradients: Tensor, pool: Sequence[int]) -> Tensor:
    tokens = torch.tensor([sum(label != -100 for label in ROWS[index]["labels"][1:]) for index in pool]).double()
    return {
        "none": torch.ones_like(tokens),
        "sqrt_tokens": tokens.sqrt(),
        "tokens": tokens,
        "unit": 1 / gradients.norm(dim=1),
    }[kind]


@pytest.mark.parametrize("normalization", ["none", "sqrt_tokens", "tokens", "unit"])
@pytest.mark.parametrize(
    ("dataset", "tokens_per_batch"),
    [(ROWS, 1), (tiny_dataset(32), 64), (ROWS, 4096)],
    ids=["alone", "dataset", "together"],
)
def test_exact_scores_equal_autograd(dataset: Any, normalization: str, tokens_per_batch: int) -> None:
    model = tiny_lora_model(lora_dropout=0.3).train()
    scorer = _scorer(model, dataset, gradient_normalization=normalization, scoring_tokens_per_batch=tokens_per_batch)
    found = list(scorer.score(POOLS))
    assert [scores.candidates for scores in found] == [tuple(pool) for pool in POOLS]
    for pool, scores in zip(POOLS, found, strict=True):
        losses, gradients = _autograd(model, pool)
        norms = gradients.norm(dim=1)
        torch.testing.assert_close(scores.losses, losses.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores.gradient_norms, norms, rtol=1e-5, atol=0)
        rows = gradients * _multipliers(normalization, gradients, pool)[:, None]
        largest = float(rows.norm(dim=1).max() ** 2)
        torch.testing.assert_close(scores.gram, rows @ rows.T, rtol=1e-5, atol=2e-6 * largest)
        assert scores.gram.dtype == torch.float64 and torch.equal(scores.gram, scores.gram.T)
        assert scores.num_tokens == tuple(len(ROWS[index]["input_ids"]) for index in pool)
        assert scores.label_tokens == tuple(sum(x != -100 for x in ROWS[index]["labels"][1:]) for index in pool)
        assert scores.finite.all() and scores.sound.all() and scores.gradients is None
        if normalization == "unit":
            assert (scores.gram.diagonal() == 1).all()


@pytest.mark.parametrize("information", ["diagonal", "adafisher"])
def test_measures_of_coordinates_get_the_normalised_gradients(information: str) -> None:
    model = tiny_lora_model()
    scores = next(_scorer(model, information=information, gradient_normalization="tokens").score(POOLS))
    _, gradients = _autograd(model, POOLS[0])
    expected = gradients * _multipliers("tokens", gradients, POOLS[0])[:, None]
    found = scores.gradients.double() * scores.row_weights[:, None]
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-5


@pytest.mark.parametrize("normalization", ["none", "tokens", "unit"])
def test_a_sketch_keeps_norms_exactly_and_directions_nearly(normalization: str) -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, sketch_dim=512, gradient_normalization=normalization)
    assert scorer.num_features == 512 < scorer.dimension
    for pool, scores in zip(POOLS, scorer.score(POOLS), strict=True):
        _, gradients = _autograd(model, pool)
        norms = gradients.norm(dim=1)
        torch.testing.assert_close(scores.gradient_norms, norms, rtol=1e-5, atol=0)
        rows = gradients * _multipliers(normalization, gradients, pool)[:, None]
        lengths = rows.norm(dim=1)
        torch.testing.assert_close(scores.gram.diagonal(), lengths.square(), rtol=2e-5, atol=0)
        error = (scores.gram - rows @ rows.T) / torch.outer(lengths, lengths)
        # The standard deviation of a cosine is at most √(2/m) = 0.06.
        assert 1e-4 < float(error.abs().max()) < 0.25


def test_a_sketch_of_the_full_dimension_is_exact() -> None:
    scorer = _scorer()
    wide = _scorer(sketch_dim=scorer.dimension)
    assert wide.sketch_dim == 0 and wide.num_features == scorer.dimension
    pairs = zip(scorer.score(POOLS), wide.score(POOLS), strict=True)
    assert all(torch.equal(exact.gram, sketched.gram) for exact, sketched in pairs)


@pytest.mark.parametrize(("buffer_bytes", "groups"), [(0, [5, 3, 4]), (8, [8, 4]), (7, [5, 7]), (12, [12])])
def test_pools_are_scored_in_as_many_at_a_time_as_fit(
    buffer_bytes: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = _scorer()
    expected = list(_scorer().score(POOLS))
    held: list[int] = []

    class CountingBuffer(FeatureBuffer):
        def __init__(self, num_rows: int, *args: Any) -> None:
            held.append(num_rows)
            super().__init__(num_rows, *args)

    monkeypatch.setattr(spice_trainer.scoring.passes, "FeatureBuffer", CountingBuffer)
    monkeypatch.setattr(spice_trainer.scoring.scorer, "FEATURE_BUFFER_BYTES", buffer_bytes * scorer.num_features * 4)
    found = list(scorer.score(POOLS))
    assert held == groups
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.candidates == theirs.candidates and ours.label_tokens == theirs.label_tokens
        torch.testing.assert_close(ours.gram, theirs.gram, rtol=1e-4, atol=1e-5)


def test_rows_without_labels_and_rows_that_are_not_finite() -> None:
    poison = VOCAB_SIZE - 1
    rows = [{**row, "input_ids": [min(token, poison - 1) for token in row["input_ids"]]} for row in ROWS]
    rows[17] = {**rows[17], "labels": [-100] * len(rows[17]["labels"])}
    rows[20] = {**rows[20], "input_ids": [poison, *rows[20]["input_ids"][1:]]}
    model = tiny_lora_model()
    _, expected = _autograd(model, [3, 5, 9], rows)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("inf")
    # The model's head is looked at once.
    list(_scorer(model, rows).score(POOLS[1:2]))
    calls: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
    for settings in ({}, {"sketch_dim": 64}, {"gradient_normalization": "unit"}):
        scores = next(_scorer(model, rows, **settings).score(POOLS[:1]))
        assert scores.finite.tolist() == [True, True, True, False, True]
        assert scores.sound.tolist() == [True, False, True, False, True]
        assert scores.gradient_norms[1] == 0 and scores.losses[1] == 0 and scores.label_tokens[1] == 0
        torch.testing.assert_close(scores.gradient_norms[[0, 2, 4]], expected.norm(dim=1), rtol=1e-5, atol=0)
        assert (scores.gram[[1, 3]] == 0).all() and (scores.gram[:, [1, 3]] == 0).all()
    # The row without labels is not worth a forward.
    assert sum(len(batch) for batch in calls) == 3 * 4


@pytest.mark.parametrize("sketch_dim", [0, 64])
def test_a_pool_without_any_label_needs_no_forward(sketch_dim: int) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]
    reports: list[tuple[int, int]] = []
    found = list(_scorer(None, rows, sketch_dim=sketch_dim).score(POOLS, progress=lambda *x: reports.append(x)))
    assert [scores.sound.any().item() for scores in found] == [False] * 3
    assert all((scores.gram == 0).all() and scores.finite.all() for scores in found)


def test_a_user_that_draws_random_numbers_leaves_no_trace() -> None:
    def noisy(rows: list[Any]) -> dict[str, Tensor]:
        random.random(), np.random.rand(), torch.rand(3)
        return collate(rows)

    model = tiny_lora_model(lora_dropout=0.3).train()
    model.get_submodule("base_model.model.model.layers.0").training = False  # a mode of its own is kept too
    before, states = random_states(), model_state(model)
    scorer = _scorer(model, collator=noisy)
    for _ in scorer.score(POOLS):
        # Also between two pools, while the generator waits.
        assert random_states() == before
        assert model_state(model) == states
    assert random_states() == before and model_state(model) == states


def test_an_error_while_scoring_leaves_no_trace() -> None:
    def failing(rows: list[Any]) -> dict[str, Tensor]:
        random.random(), torch.rand(1)
        if rows[0] == ROWS[8]:
            raise OSError("no such file")
        return collate(rows)

    model = tiny_lora_model().train()
    before, states = random_states(), model_state(model)
    with pytest.raises(ValueError, match=r"\(failing\) failed on row 8 .*OSError: no such file"):
        list(_scorer(model, collator=failing).score(POOLS))
    assert random_states() == before and model_state(model) == states


@pytest.mark.parametrize("buffer_bytes", [0, 2**30])
def test_progress_counts_every_candidate(buffer_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_trainer.scoring.scorer, "FEATURE_BUFFER_BYTES", buffer_bytes)
    rows = [dict(row) for row in ROWS]
    rows[5]["labels"] = [-100] * len(rows[5]["labels"])
    reports: list[tuple[int, int]] = []
    list(_scorer(None, rows, scoring_tokens_per_batch=30).score(POOLS, progress=lambda *x: reports.append(x)))
    done = [count for count, _ in reports]
    assert len(done) > 3 and done == sorted(set(done)) and done[-1] == 12
    assert {total for _, total in reports} == {12}


def test_the_training_precision_is_used() -> None:
    model = tiny_lora_model()
    seen: set[torch.dtype] = set()
    layer = next(iter(find_trained_modules(model).values()))
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    half = next(_scorer(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).score(POOLS))
    assert seen == {torch.bfloat16}
    _, gradients = _autograd(model, POOLS[0])
    torch.testing.assert_close(half.gradient_norms, gradients.norm(dim=1), rtol=0.05, atol=0)
    assert half.gram.dtype == torch.float64


def test_pools_are_scored_with_the_weights_of_their_moment() -> None:
    model = tiny_lora_model()
    scorer = _scorer(model)

    def norms() -> PoolScores:
        return next(scorer.score(POOLS))

    before = norms()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    _, expected = _autograd(model, POOLS[0])
    after = norms().gradient_norms
    torch.testing.assert_close(after, expected.norm(dim=1), rtol=1e-5, atol=0)
    assert not torch.allclose(after, before.gradient_norms, rtol=0.05)
