"""Several processes score together: the same scores and picks as one, forwards in step, errors that reach all.

Every process compares what it gets with what it computes by itself; the first difference ends them all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

import spice_trainer.scoring.scorer
from spice_trainer import SpiceConfig
from spice_trainer.distributed import Processes
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.sampling.schedule import StepPools, plan_step
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.step_scorer import StepScorer
from spice_trainer.selection.scores import PoolScores
from tests.support.forks import fork, process_environments
from tests.support.models import tiny_lora_model
from tests.support.scorers import make_scorer
from tests.support.short_memory import ShortMemory
from tests.support.trainers import collate, tiny_rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROWS = tiny_rows(60)
# One row is much longer than all others, one has no labels.
ROWS[7] = {"input_ids": [5] * 60, "attention_mask": [1] * 60, "labels": [5] * 60}
ROWS[11] = {**ROWS[11], "labels": [-100] * len(ROWS[11]["labels"])}
# Uneven pools, fewer candidates than processes, a pool of one, a pool without labels.
STEPS = [
    [range(10), range(10, 20), range(20, 27)],
    [range(5)],
    [[7], [11], [3, 4]],
    [[11]],
    [[3], [11]],
    [range(start, start + 6) for start in range(0, 30, 6)],
]
CONFIGS = {
    "exact": SpiceConfig(sketch_dim=0, scoring_tokens_per_batch=64),
    "sketch": SpiceConfig(sketch_dim=256, scoring_tokens_per_batch=40),
    "diagonal": SpiceConfig(information="diagonal", gradient_normalization="tokens", scoring_tokens_per_batch=128),
    "unit": SpiceConfig(sketch_dim=0, gradient_normalization="unit", scoring_tokens_per_batch=4096),
    "adam": SpiceConfig(
        sketch_dim=256, gradient_preconditioning="adam", alpha_scaling="pool", scoring_tokens_per_batch=128
    ),
    "momentum": SpiceConfig(
        sketch_dim=256, conflict_reference="momentum", conflict_penalty=3.0, scoring_tokens_per_batch=128
    ),
}


def build_scorer(model: nn.Module, config: SpiceConfig, processes: Processes, **overrides: Any) -> GradientScorer:
    settings = {"rows": ROWS, "collate": collate} | overrides
    if config.gradient_preconditioning == "adam" or config.takes_momentum:
        settings["get_optimizer"] = lambda: adam_of(model)
    return make_scorer(model, config, processes=processes, **settings)


def adam_of(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer as one step of random gradients leaves it, alike on every process."""
    generator = torch.Generator().manual_seed(0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.0, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def compare(found: PoolScores, expected: PoolScores) -> None:
    assert (found.pool, found.candidates, found.label_tokens, found.num_tokens) == (
        expected.pool, expected.candidates, expected.label_tokens, expected.num_tokens,
    )  # fmt: skip
    assert torch.equal(found.finite, expected.finite) and torch.equal(found.sound, expected.sound)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gradient_norms, expected.gradient_norms, rtol=1e-5, atol=0)
    scale = float(expected.gram.diagonal().max())
    torch.testing.assert_close(found.gram, expected.gram, rtol=0, atol=1e-5 * max(scale, 1e-30))
    assert (found.momentum_cosines is None) == (expected.momentum_cosines is None)
    if expected.momentum_cosines is not None:
        torch.testing.assert_close(found.momentum_cosines, expected.momentum_cosines, rtol=0, atol=1e-5)
    if expected.gradients is not None:
        assert found.gradients is not None and found.row_weights is not None and expected.row_weights is not None
        ours = found.gradients.double() * found.row_weights[:, None]
        theirs = expected.gradients.double() * expected.row_weights[:, None]
        norms = theirs.norm(dim=1).clamp(min=1e-30)
        assert float(((ours - theirs).norm(dim=1) / norms).max()) < 1e-5


def share_scores(processes: Processes) -> None:
    """Each pool comes to its owner with the scores of a single process, whatever fits in memory at a time."""
    model = tiny_lora_model(lora_dropout=0.3).train()
    for name, config in CONFIGS.items():
        for buffer_bytes in (0, 2**30) if name == "exact" else (2**30,):
            spice_trainer.scoring.scorer.FEATURE_BUFFER_BYTES = buffer_bytes
            for pools in STEPS:
                expected = list(build_scorer(model, config, Processes()).score(pools))
                reports: list[tuple[int, int]] = []
                scorer = build_scorer(model, config, processes)
                found = list(scorer.score(pools, progress=lambda *x, reports=reports: reports.append(x)))
                mine = [scores for scores in expected if scores.pool % processes.world_size == processes.rank]
                for ours, theirs in zip(found, mine, strict=True):
                    compare(ours, theirs)
                assert reports[-1] == (sum(map(len, pools)),) * 2, (name, reports)


def share_picks(processes: Processes) -> None:
    """A step's picks are those of a single process, and process 0's to the last bit."""
    model = tiny_lora_model()
    for name, config in CONFIGS.items():
        for pools in STEPS:
            budgets = tuple(min(4, len(pool)) for pool in pools)
            plan = StepPools(epoch=0, step_in_epoch=0, pools=tuple(map(tuple, pools)), budgets=budgets)
            shape = plan_step(
                pool_size=10, num_selected=4, pools_per_step=None, samples_per_step=8, num_slots=processes.world_size
            )
            alone, shared = (
                StepSelector(StepScorer(build_scorer(model, config, those)), config, shape=shape).select(plan, step=3)
                for those in (Processes(), processes)
            )
            assert shared.indices == alone.indices, (name, shared.indices, alone.indices)
            assert [pool.candidates for pool in shared.pools] == [pool.candidates for pool in alone.pools]
            everyones = processes.gather(shared)
            assert all(other == everyones[0] for other in everyones)


def break_one(processes: Processes) -> None:
    """All rows that one process scores have gradients that are not finite: all know, and pick from the others."""
    model, broken_token, last = tiny_lora_model(), 60, processes.world_size - 1
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill((args[0] == broken_token)[..., None], float("nan"))
    )
    sound = [{**row, "input_ids": [min(token, 59) for token in row["input_ids"]]} for row in ROWS]
    for name in ("exact", "sketch"):
        config = CONFIGS[name]
        for pools in (STEPS[0], STEPS[2], STEPS[4]):
            shared = build_scorer(model, config, processes).share({n: tuple(pool) for n, pool in enumerate(pools)})
            indices = [index for pool in pools for index in pool]
            scored = [indices[position] for batch in shared.batches[: shared.num_kept] for position in batch]
            broken = set(processes.gather(scored)[last])
            rows: list[Any] = [
                {**row, "input_ids": [broken_token, *row["input_ids"][1:]]} if index in broken else row
                for index, row in enumerate(sound)
            ]
            budgets = tuple(min(4, len(pool)) for pool in pools)
            plan = StepPools(epoch=0, step_in_epoch=0, pools=tuple(map(tuple, pools)), budgets=budgets)
            shape = plan_step(
                pool_size=10, num_selected=4, pools_per_step=None, samples_per_step=8, num_slots=processes.world_size
            )
            alone, together = (
                StepSelector(StepScorer(build_scorer(model, config, those, rows=rows)), config, shape=shape).select(
                    plan, step=3
                )
                for those in (Processes(), processes)
            )
            assert together.indices == alone.indices and not broken & {*together.indices}, (name, together.indices)
            for pool in together.pools:
                assert pool.nonfinite == tuple(index for index in pool.candidates if index in broken)
                num_sound = len(pool.candidates) - len(pool.nonfinite) - len(pool.zero)
                assert len(pool.indices) == min(4, num_sound)


def keep_step(processes: Processes) -> None:
    """With sharded weights every process runs as many forwards as the others, also one with nothing to score."""
    processes = Processes(processes.rank, processes.world_size, processes.device, lockstep=True)
    model = tiny_lora_model()
    calls: list[int] = []
    compute = SampleGradients.compute

    def count(self: SampleGradients, inputs: Any, *args: Any) -> Any:
        calls.append(len(inputs["input_ids"]))
        return compute(self, inputs, *args)

    had_spare_forwards = False
    SampleGradients.compute = count  # type: ignore[method-assign]
    for config in CONFIGS.values():
        for pools in STEPS:
            expected = list(build_scorer(model, config, Processes()).score(pools))
            calls.clear()
            found = list(build_scorer(model, config, processes).score(pools))
            everyones = processes.gather(list(calls))
            assert len({len(other) for other in everyones}) == 1, everyones
            labelled = sum(any(label != -100 for label in ROWS[row]["labels"][1:]) for pool in pools for row in pool)
            had_spare_forwards |= sum(map(sum, everyones)) > labelled
            for ours in found:
                compare(ours, expected[ours.pool])
    SampleGradients.compute = compute  # type: ignore[method-assign]
    assert had_spare_forwards, "no process ever had less to do than another, so nothing is tested"


def fail_together(processes: Processes) -> None:
    """An error of one process reaches all, wherever it comes from, and the next step works."""
    model = tiny_lora_model()
    last = processes.world_size - 1
    config, pools = CONFIGS["exact"], STEPS[0]

    def failing_collate(rows: Sequence[Any]) -> Any:
        if processes.rank == last:
            raise OSError("no such file")
        return collate(rows)

    def failing_forward(*args: Any, **kwargs: Any) -> Any:
        if processes.rank == last:
            raise MemoryError("out of memory")
        return forward(*args, **kwargs)

    def expect(kind: type[Exception], text: str, doing: str, run: Callable[[], Any]) -> None:
        try:
            run()
        except Exception as error:
            if processes.rank == last:
                assert type(error) is kind and text in str(error), repr(error)
            else:
                expected = f"SPICE: process {last} of {processes.world_size} failed while {doing}"
                assert type(error) is RuntimeError and str(error).startswith(expected), repr(error)
                assert f"{kind.__name__}: " in str(error) and text in str(error)
        else:
            raise AssertionError("no error")

    scorer = build_scorer(model, config, processes, collate=failing_collate)
    expect(ValueError, "(OSError: no such file)", "reading candidates", lambda: list(scorer.score(pools)))
    layer = model.base_model.model.model.layers[1]
    forward = layer.forward
    layer.forward = failing_forward
    scorer = build_scorer(model, config, processes)
    expect(MemoryError, "out of memory", "scoring candidates", lambda: list(scorer.score(pools)))
    layer.forward = forward
    assert sum(len(part) for part in processes.gather(list(scorer.score(pools)))) == 3


def run_short(processes: Processes) -> None:
    """One process runs out of memory and the others don't: the same scores, and all know what does not fit."""
    model, last = tiny_lora_model(), processes.world_size - 1
    config, pools = CONFIGS["unit"], [range(20), range(20, 40), range(40, 60)]
    expected = list(build_scorer(model, config, Processes()).score(pools))
    short = ShortMemory(model, 60 if processes.rank == last else 10_000, in_backward=True)
    scorer = build_scorer(model, config, processes)
    for ours in scorer.score(pools):
        compare(ours, expected[ours.pool])
        assert not ours.out_of_memory.any()
    everyones = processes.gather((short.num_raised, scorer.budget.take_notice()))
    assert [raised > 0 for raised, _ in everyones] == [rank == last for rank in range(processes.world_size)], everyones
    assert everyones[last][1].tokens_per_batch <= 60

    # The row of 60 tokens fits on no process.
    short.max_tokens = 59
    scorer = build_scorer(model, config, processes)
    for ours in scorer.score(pools):
        assert [row for row, is_out in zip(ours.candidates, ours.out_of_memory, strict=True) if is_out] == [
            row for row in ours.candidates if row == 7
        ]
    notices = processes.gather(scorer.budget.take_notice())
    left_out = [row for notice in notices if notice is not None for row in notice.left_out]
    assert left_out == [(7, 60, "training dataset")], left_out
    shape = plan_step(
        pool_size=20, num_selected=4, pools_per_step=3, samples_per_step=12, num_slots=processes.world_size
    )
    plan = StepPools(epoch=0, step_in_epoch=0, pools=tuple(map(tuple, pools)), budgets=(4, 4, 4))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("spice_trainer").addHandler(handler)
    selector = StepSelector(StepScorer(build_scorer(model, config, processes)), config, shape=shape)
    for step in range(2):
        selection = selector.select(plan, step=step)
        assert [pool.out_of_memory for pool in selection.pools] == [(7,), (), ()]
        assert 7 not in selection.indices and not any(pool.nonfinite for pool in selection.pools)
    logging.getLogger("spice_trainer").removeHandler(handler)
    short.remove()
    # Every process hears of both: which process it was, and which row.
    assert sum(f"memory ran out on process {last} while" in message for message in messages) == 1, messages
    assert sum("row 7 of the training dataset (60 tokens) does not fit" in message for message in messages) == 1


def run_cases(rank: int, num_processes: int) -> None:
    state = PartialState(cpu=True)
    assert (state.num_processes, state.process_index) == (num_processes, rank)
    for case in (share_scores, share_picks, break_one, keep_step, fail_together, run_short):
        case(Processes(rank, num_processes, torch.device("cpu")))
        dist.barrier()


@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_score_together(num_processes: int, tmp_path: Path) -> None:
    ranks = [(rank, num_processes) for rank in range(num_processes)]
    ended = fork(run_cases, ranks, tmp_path, environments=process_environments(num_processes))
    assert set(ended.codes) == {0} and not ended.timed_out, ended.stderr[-4000:]
