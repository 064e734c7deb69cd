"""Memory on a GPU: the measured peak, and scoring with a real lack of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spice_trainer import SpiceConfig
from spice_trainer.scoring.memory import memory_use
from tests.support.models import add_lora, tiny_model
from tests.support.scorers import make_scorer
from tests.support.trainers import collate, make_trainer

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


def _peak_of_scoring(scorer: Any, pools: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for scores in scorer.score(pools):
        del scores
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _larger_scorer(**config: Any) -> tuple[Any, Any]:
    """A model whose passes take far more than the allocator's rounding, and rows of up to 400 tokens."""

    sizes = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512, "vocab_size": 2048}
    model = add_lora(tiny_model(**sizes)).cuda()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(96):
        length = int(torch.randint(40, 400, (1,), generator=generator))
        input_ids = torch.randint(3, 2000, (length,), generator=generator).tolist()
        labels = [-100] * (length // 2) + input_ids[length // 2 :]
        rows.append({"input_ids": input_ids, "attention_mask": [1] * length, "labels": labels})
    scorer = make_scorer(model, SpiceConfig(**config), rows=rows, collate=collate)
    return scorer, rows


def test_the_measured_peak_is_the_allocators(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As told after a run's first scored step, without a reset of the peak that the user's script may watch."""
    scorer, rows = _larger_scorer()
    model = scorer.get_model()
    trainer = make_trainer(tmp_path, model=model, train_dataset=rows, max_steps=1, spice={}, use_cpu=False)
    torch.cuda.reset_peak_memory_stats()
    before = memory_use(torch.device("cuda"))
    trainer.train()
    assert before is not None and torch.cuda.max_memory_allocated() > before.peak
    [line] = [record.getMessage() for record in caplog.records if "peak memory" in record.getMessage()]
    assert "of it for scoring" in line


def test_scoring_goes_on_when_memory_runs_out() -> None:
    """A real lack of memory: the same scores in smaller passes, and nothing of the failed ones stays."""
    scorer, _ = _larger_scorer(sketch_dim=4096, scoring_tokens_per_batch=8192)
    pools = [range(48), range(48, 96)]
    expected = list(scorer.score(pools))
    peak = _peak_of_scoring(scorer, pools)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    # Half of what scoring takes, beside what is held. A row alone takes far less.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + peak * 0.5) / total)
    try:
        found = list(scorer.score(pools))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    notice = scorer.budget.take_notice()
    assert notice is not None and notice.failed is not None and not notice.left_out
    assert scorer.budget.tokens_per_batch < 8192
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.gradient_norms, theirs.gradient_norms, rtol=1e-4, atol=0)
        assert not ours.out_of_memory.any() and ours.sound.all()
    del ours, theirs, found
    assert torch.cuda.memory_allocated() <= before + 2**16


def test_a_row_too_long_for_the_memory_is_left_out() -> None:
    scorer, rows = _larger_scorer(sketch_dim=4096, scoring_tokens_per_batch=8192)
    rows[:] = [{key: value[:40] for key, value in row.items()} for row in rows]
    rows[5] = {key: (value * 10)[:512] for key, value in rows[5].items()}
    rows[5]["labels"] = list(rows[5]["input_ids"])
    alone, pool = _peak_of_scoring(scorer, [[5, 6]]), range(4, 8)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + alone * 0.5) / total)
    try:
        [found] = scorer.score([pool])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.out_of_memory.tolist() == [False, True, False, False]
    assert found.sound.tolist() == [True, False, True, True]
    notice = scorer.budget.take_notice()
    assert notice is not None and notice.left_out == ((5, 512, "training dataset"),)
