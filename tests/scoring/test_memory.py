"""What scoring is said to take is what it takes: the plan against the CPU allocator's own account."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import spice_trainer.gradients.label_head
import spice_trainer.scoring.memory
from spice_trainer import SpiceConfig
from spice_trainer.data.rows import CandidateRow, pad_rows, sample_rows
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import find_lora_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.scoring.allocations import AllocationTrace, PassMemory, PassShape
from spice_trainer.scoring.memory import PROBE_SHAPES, plan_memory
from spice_trainer.scoring.scorer import GradientScorer
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.peak_memory import peak_bytes
from tests.support.traces import model_state, random_states
from tests.support.trainers import collate, make_trainer, tiny_rows

ROWS = tiny_rows(60)
POOL_SIZE = 12


def _scorer(model: nn.Module, rows: Any = ROWS, autocast: Any = None, **config: Any) -> GradientScorer:
    return GradientScorer(
        lambda: model,
        find_lora_modules(model),
        dataset=rows,
        collate=collate,
        config=SpiceConfig(**config),
        seed=1,
        autocast=autocast,
    )


def _sample(rows: Any = ROWS) -> list[CandidateRow]:
    return sample_rows(rows, collate, device=torch.device("cpu"))


def _measured(scorer: GradientScorer, num_pools: int) -> int:
    def score(first: int) -> None:
        pools = [range(start, start + POOL_SIZE) for start in range(first, first + num_pools * POOL_SIZE, POOL_SIZE)]
        for scores in scorer.score(pools):
            del scores

    starts = range(0, len(ROWS) - num_pools * POOL_SIZE + 1, POOL_SIZE)
    return max(peak_bytes(lambda first=first: score(first)) for first in starts)


CONFIGS = [{"sketch_dim": 0}, {"sketch_dim": 256}, {"information": "diagonal"}]


@pytest.mark.parametrize("tokens_per_batch", [20, 64, 200, 2048])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_plan_is_what_is_measured(architecture: str, tokens_per_batch: int) -> None:
    model = tiny_lora_model(architecture)
    for config in CONFIGS:
        for num_pools in (1, 4):
            scorer = _scorer(model, scoring_tokens_per_batch=tokens_per_batch, **config)
            plan = plan_memory(scorer, _sample(), num_pools=num_pools, pool_size=POOL_SIZE)
            measured = _measured(scorer, num_pools)
            assert plan.peak_bytes is not None and plan.pass_bytes is not None
            assert 0.85 < plan.peak_bytes / measured < 1.2, (config, num_pools, plan, measured)


def test_pools_that_are_scored_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spice_trainer.scoring.scorer.FEATURE_BUFFER_BYTES", 0)
    for config in CONFIGS:
        scorer = _scorer(tiny_lora_model(), scoring_tokens_per_batch=64, **config)
        plan = plan_memory(scorer, _sample(), num_pools=4, pool_size=POOL_SIZE)
        assert plan.feature_bytes == POOL_SIZE * scorer.num_features * 4
        assert plan.peak_bytes is not None and 0.85 < plan.peak_bytes / _measured(scorer, 4) < 1.15


def _made_up_pass(scorer: GradientScorer, shape: PassShape, *, padded: bool) -> int:
    rows = spice_trainer.scoring.memory._make_up(_sample(), shape, padded=padded)
    inputs, labels = pad_rows(rows)
    columns = (labels[:, 1:] != -100).any(0).sum()
    assert (len(labels), labels.shape[1], columns) == (shape.num_rows, shape.num_tokens, shape.num_columns)
    assert (labels[:, 1:] != -100).sum() == shape.num_label_tokens
    buffer = scorer.passes.new_buffer(shape.num_rows)
    with SampleGradients(scorer.get_model(), scorer.modules) as gradients:
        return peak_bytes(lambda: scorer.passes.run_pass(gradients, inputs, labels, buffer, range(shape.num_rows)))


SHAPES = [PassShape(2, 24, 5, 8), PassShape(8, 48, 19, 100), PassShape(3, 60, 50, 140), PassShape(6, 50, 4, 20)]


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "qwen3"])
def test_a_pass_of_any_shape_is_predicted(architecture: str, precision: str, padded: bool) -> None:
    """Where logits, attention scores or gradients of many rows dominate; in half precision; far from the probes."""
    model = tiny_lora_model(architecture)
    if precision == "eager":
        model.get_base_model().set_attn_implementation("eager")
    autocast = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "bf16" else None
    scorer = _scorer(model, autocast=autocast)
    memory = spice_trainer.scoring.memory._measure_passes(scorer, _sample(), padded=padded)
    assert memory is not None
    for shape in SHAPES:
        assert memory.peak(shape) == pytest.approx(_made_up_pass(scorer, shape, padded=padded), rel=0.1), shape


def test_logits_of_a_chunk_alone_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary so large that the logits of 64 label tokens are most of what a pass holds."""
    model = add_lora(tiny_model(vocab_size=4096))
    monkeypatch.setattr(spice_trainer.gradients.label_head, "CHUNK_NUMBERS", 64 * 4096)
    scorer = _scorer(model)
    memory = spice_trainer.scoring.memory._measure_passes(scorer, _sample(), padded=True)
    assert memory is not None
    shapes = [PassShape(3, 60, 50, 140), PassShape(8, 60, 30, 200)]
    found = [_made_up_pass(scorer, shape, padded=True) for shape in shapes]
    for shape, measured in zip(shapes, found, strict=True):
        assert memory.peak(shape) == pytest.approx(measured, rel=0.1), shape
    monkeypatch.undo()
    together = [_made_up_pass(_scorer(model), shape, padded=True) for shape in shapes]
    assert all(in_chunks < 0.7 * whole for in_chunks, whole in zip(found, together, strict=True))


def test_the_probes_tell_every_quantity_apart() -> None:
    small, large = (shape.quantities() for shape in PROBE_SHAPES)
    growths = sorted(math.log(b / a) for a, b in zip(small, large, strict=True))
    assert min(b - a for a, b in itertools.pairwise(growths)) > 0.1


def test_what_a_trace_sees() -> None:
    weight = torch.ones(100)
    with AllocationTrace("cpu") as trace:
        first = weight * 2
        view = first[:50].view(5, 10)
        del first
        second = view + 1
        view.add_(1)
        del view
        third = second.clone()
        del second, third
        weight.view(10, 10).t()
    assert trace.sizes == [400, 200, 200]
    assert trace.events == [(0, True), (1, True), (0, False), (2, True), (1, False), (2, False)]
    assert trace.peak() == 600 and trace.peak([400, 1000, 400]) == 1400


@settings(max_examples=50, deadline=None)
@given(names=st.lists(st.sampled_from("ab"), max_size=6), extra=st.lists(st.sampled_from("cd"), max_size=3))
def test_what_two_passes_have_in_common(names: list[str], extra: list[str]) -> None:
    middle = len(names) // 2
    longer = names[:middle] + extra + names[middle:]
    pairs = spice_trainer.scoring.allocations._common_ends(names, longer)
    assert all(names[here] == longer[there] for here, there in pairs)
    assert sorted(here for here, _ in pairs) == list(range(len(names)))
    assert len({there for _, there in pairs}) == len(pairs)


def test_a_model_that_takes_another_path_is_predicted_by_tokens() -> None:
    """The first and last operations agree; what is between them counts as so much a token."""
    shapes = PassShape(1, 10, 2, 2), PassShape(2, 15, 9, 10)
    traces = AllocationTrace("cpu"), AllocationTrace("cpu")
    traces[0].names, traces[0].sizes = ["weight", "x", "end"], [100, 10, 8]
    traces[1].names, traces[1].sizes = ["weight", "x", "expert", "end"], [100, 30, 60, 16]
    traces[1].events = [(number, True) for number in range(4)]
    memory = PassMemory(shapes, traces)
    assert memory.peak(PassShape(4, 15, 9, 10)) == 100 + 60 + 120 + 32


def test_planning_leaves_no_trace() -> None:
    model = tiny_lora_model(lora_dropout=0.3).train()
    model.get_submodule("base_model.model.model.layers.0").training = False
    states, before = random_states(), model_state(model)
    assert plan_memory(_scorer(model), _sample(), num_pools=1, pool_size=POOL_SIZE).peak_bytes is not None
    assert random_states() == states and model_state(model) == before


@pytest.mark.parametrize("why", ["not wanted", "sharded", "few positions", "other inputs", "an error"])
def test_what_cannot_be_measured_is_left_out(why: str) -> None:
    model = tiny_lora_model()
    scorer, rows = _scorer(model), _sample()
    if why == "sharded":
        scorer.processes = Processes(0, 2, torch.device("cpu"), lockstep=True)
    if why == "few positions":
        model.config.max_position_embeddings = 40
    if why == "other inputs":
        images = {"pixel_values": torch.zeros(1, 3)}
        rows = [CandidateRow(0, row.inputs | images, row.labels, 4, 2, can_be_padded=False) for row in rows]
    if why == "an error":
        model.register_forward_hook(lambda *args: 1 / 0)
    plan = plan_memory(scorer, rows, num_pools=1, pool_size=POOL_SIZE, measure=why != "not wanted")
    assert plan.feature_bytes > 0 and plan.pass_bytes is None and plan.peak_bytes is None


@pytest.mark.parametrize("verify", [True, False])
def test_the_first_line_says_it(verify: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, spice={"scoring_tokens_per_batch": 64}, verify=verify, max_steps=1)
    trainer.train()
    line = next(record.getMessage() for record in caplog.records if "optimizer steps" in record.getMessage())
    if not verify:
        assert "; scoring holds 148 KB of gradient features. " in line
        return
    memory = trainer._spice.callback.plan.memory
    assert 3e5 < memory.peak_bytes < 7e5
    peak, passes = f"{memory.peak_bytes / 1e3:.3g}", f"{memory.pass_bytes / 1e3:.3g}"
    assert f"; beside the model, scoring takes up to {peak} KB: 148 KB of gradient features, and {passes} KB " in line
    assert "for a forward and backward of at most 64 tokens. " in line
