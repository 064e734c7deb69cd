"""Strategies where rows are broken, too long for the memory, filtered or packed, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from spice_trainer import SpiceConfig, attach_spice
from spice_trainer.config import STRATEGIES
from spice_trainer.data.answers import bos_tokens, split_answer
from spice_trainer.data.rows import CandidateRow, TargetRows, collate_row
from spice_trainer.scoring.measure import align, unit_rows
from spice_trainer.scoring.out_of_memory import MemoryReport
from spice_trainer.scoring.validation import ValidationRows
from spice_trainer.selection.pool import select_pool
from tests.runs.test_unsound_rows import break_row, fragile_model, sound_rows
from tests.support.models import tiny_lora_model
from tests.support.scorers import make_scorer
from tests.support.short_memory import ShortMemory
from tests.support.trainers import collate, make_trainer, tiny_dataset, tiny_rows

POOL = [3, 17, 5, 20, 9, 1, 11, 8]
ON_HIDDEN_STATES = ("targeted_matching", "rds", "tsds")
ON_LENGTHS = ("random", "length_matched")
WITHOUT_GRAM = (
    "top_norm",
    "loss",
    "perplexity",
    "ifd",
    "less",
    "greats",
    "opus",
    "uds",
    *ON_HIDDEN_STATES,
    *ON_LENGTHS,
)


def scored(model: Any, rows: Any, strategy: str, pool: list[int] = POOL, **settings: Any) -> Any:
    config = SpiceConfig(**({"sketch_dim": 0, "pool_size": 8, "num_selected": 2, "strategy": strategy} | settings))
    validation = ValidationRows({"validation": TargetRows(rows, collate)}, 32) if config.takes_validation else None
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scorer = make_scorer(
        model, config, rows=rows, collate=collate, validation=validation, get_optimizer=lambda: optimizer
    )
    (scores,) = scorer.score([pool])
    return scores, select_pool(scores, 8, config, seed=1, step=0)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_broken_rows_are_picked_by_nobody_who_looks(strategy: str) -> None:
    """Their validation rows are broken too, and do not count."""
    rows = sound_rows(32)
    nan, infinite, masked, zero = POOL[:4]
    for index, kind in ((nan, "nan"), (infinite, "infinite"), (masked, "masked_label"), (zero, "zero")):
        break_row(rows[index], kind)
    scores, found = scored(fragile_model(), rows, strategy)
    assert (scores.gram is None) == (strategy in WITHOUT_GRAM)
    assert found.zero == (zero,)
    if strategy in (*ON_HIDDEN_STATES, "uds"):
        # Which have no loss that could be infinite.
        assert set(found.indices) == {masked, *POOL[4:]} and set(found.nonfinite) == {nan, infinite}
    elif strategy in ON_LENGTHS:
        assert set(found.indices) == set(POOL) - {zero} and found.nonfinite == ()
    else:
        assert set(found.indices) == set(POOL[4:]) and set(found.nonfinite) == {nan, infinite, masked}
        assert all(map(math.isfinite, found.selection.gains))


@pytest.mark.parametrize("strategy", ["loss", "ifd", "top_norm", "less", "rds", "greats", "uds"])
def test_a_row_that_does_not_fit_is_left_out(strategy: str) -> None:
    rows = tiny_rows(32)
    rows[9] = {"input_ids": [5] * 40, "attention_mask": [1] * 40, "labels": [-100] * 20 + [5] * 20}
    model = tiny_lora_model()
    short = ShortMemory(model, 39, in_backward=strategy in ("top_norm", "less", "greats"))
    _, found = scored(model, rows, strategy)
    short.remove()
    assert found.out_of_memory == (9,) and found.nonfinite == () and set(found.indices) == {*POOL} - {9}


@pytest.mark.parametrize("strategy", ["top_norm", "less", "matching"])
def test_a_filtered_pool_is_picked_from_as_far_as_it_is_scored(strategy: str) -> None:
    rows = tiny_rows(32)
    _, found = scored(tiny_lora_model(), rows, strategy, scoring_prefilter=0.5)
    assert found.candidates == tuple(POOL) and len(found.filtered) == 4
    assert set(found.indices) == {*POOL} - {*found.filtered}


def test_the_mean_over_tokens_scored_in_part_is_of_those() -> None:
    """`scoring_max_tokens` shortens what forwards read too."""
    rows = tiny_rows(32)
    whole, _ = scored(tiny_lora_model(), rows, "loss")
    part, _ = scored(tiny_lora_model(), rows, "loss", scoring_max_tokens=1)
    first = []
    for index in POOL:
        row = rows[index]
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        with torch.no_grad():
            logits = tiny_lora_model().eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        first.append(-float(logits[start - 1, row["labels"][start]]))
    assert part.losses.tolist() == pytest.approx(first, rel=1e-5) and whole.losses.tolist() != part.losses.tolist()


# The answer alone


def row_of(ids: list[int], labels: list[int]) -> CandidateRow:
    return collate_row(4, {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, collate)


@pytest.mark.parametrize(
    ("ids", "labels", "whole", "alone"),
    [
        # With a bos it stands before the answer, and every label counts.
        ([1, 5, 6, 7, 8], [-100, -100, -100, 7, 8], [-100, -100, -100, 7, 8], ([1, 7, 8], [-100, 7, 8])),
        # Without, the first label counts in neither.
        ([4, 5, 6, 7, 8], [-100, -100, -100, 7, 8], [-100, -100, -100, -100, 8], ([7, 8], [-100, 8])),
        # A second turn stays with its question.
        ([4, 5, 6, 7, 8, 9], [-100, 5, 6, -100, -100, 9], [-100, -100, 6, -100, -100, 9],
         ([5, 6, 7, 8, 9], [-100, 6, -100, -100, 9])),
        # Nothing but an answer.
        ([1, 5, 6], [1, 5, 6], [-100, 5, 6], ([1, 5, 6], [-100, 5, 6])),
    ],
)  # fmt: skip
def test_answers_with_and_without_their_instruction(
    ids: list[int], labels: list[int], whole: list[int], alone: tuple[list[int], list[int]]
) -> None:
    row = row_of(ids, labels)
    first, second = split_answer(row, frozenset({1})) or (None, None)
    assert first is not None and second is not None
    assert first.inputs["input_ids"].tolist() == [ids] and first.labels.tolist() == [whole]
    assert (second.inputs["input_ids"].tolist(), second.labels.tolist()) == ([alone[0]], [alone[1]])
    assert second.inputs["attention_mask"].shape[1] == second.num_tokens == len(alone[0])
    assert row.labels.tolist() == [labels], "the row itself was changed"


@pytest.mark.parametrize("strategy", ["loss", "ifd", "spice", "targeted_matching"])
def test_what_was_scored_once_says_of_broken_rows_what_scoring_them_does(strategy: str) -> None:
    rows = sound_rows(32)
    for index, kind in zip(POOL[:4], ("nan", "infinite", "masked_label", "zero"), strict=True):
        break_row(rows[index], kind)
    config = SpiceConfig(sketch_dim=0, pool_size=8, num_selected=2, strategy=strategy)
    scorer = make_scorer(fragile_model(), config, rows=rows, collate=collate)
    (online,) = scorer.score([POOL])
    found, _ = scorer.score_rows(tuple(POOL))
    (known,) = scorer.read_lengths({0: tuple(POOL)})
    again = scorer.put_together(known, found, None)
    for name in ("sound", "finite", "out_of_memory"):
        assert torch.equal(getattr(again, name), getattr(online, name)), name
    assert not again.out_of_memory.any()


def test_an_answer_of_one_token_without_bos_has_no_loss_alone() -> None:
    assert split_answer(row_of([4, 5, 6], [-100, -100, 6]), frozenset({1})) is None
    assert split_answer(row_of([1, 5, 6], [-100, -100, 6]), frozenset({1})) is not None
    assert split_answer(row_of([1, 5, 6], [-100, -100, 6]), frozenset()) is None
    assert bos_tokens(tiny_lora_model()) == {1} and bos_tokens(None) == frozenset()


def test_packed_rows_have_no_answer_alone() -> None:
    packed = collate_row(7, None, lambda rows: {
        "input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, -100, 8]]),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
    })  # fmt: skip
    with pytest.raises(ValueError) as caught:
        split_answer(packed, frozenset())
    assert str(caught.value) == (
        "strategy='ifd' compares an answer's loss with that of the answer alone, and row 7 of the training dataset "
        "cannot be cut: several texts are packed into it, or it has inputs other than token sequences. Fix: switch "
        "packing off, or choose another strategy."
    )


# The validation set


def attach(tmp_path: Path, eval_dataset: Any, **spice: Any) -> Any:
    trainer = make_trainer(tmp_path, eval_dataset=eval_dataset)
    attach_spice(trainer, SpiceConfig(strategy="less", pool_size=10, num_selected=4, **spice), verify=False)
    return trainer


def test_less_without_validation_rows_is_refused_when_attached(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        attach(tmp_path, None)
    assert str(caught.value) == (
        "SpiceConfig: strategy='less' compares candidates with a validation set, and there is none. Fix: pass "
        "`validation_dataset=` to attach_spice, select_subset or SpiceSampler.bind, with rows like those that the "
        "model shall do well on, or choose another."
    )
    attach(tmp_path, {"math": tiny_dataset(3), "code": tiny_dataset(4)})
    with pytest.raises(ValueError, match="compares candidates with the validation set, which has no row"):
        attach(tmp_path, tiny_dataset(4).select([]))
    attach(tmp_path, Dataset.from_list(tiny_rows(4)).to_iterable_dataset())


def test_messages_name_the_validation_set(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the training set, whose row of that number is sound."""
    monkeypatch.setattr("spice_trainer.scoring.out_of_memory.clear_device_cache", lambda **kwargs: None)
    model, rows = tiny_lora_model(), tiny_rows(32)
    config = SpiceConfig(sketch_dim=0, strategy="less")
    broken = [dict(row) for row in tiny_rows(5)]
    validation = ValidationRows({"validation": TargetRows(broken, collate)}, 32)
    scorer = make_scorer(model, config, rows=rows, collate=collate, validation=validation)
    broken[3] = {"input_ids": [1, 2]}
    with pytest.raises(ValueError, match="failed on row 3 of the validation dataset"):
        scorer.reference_gradient()
    broken[3] = {**broken[4], "input_ids": [999] * len(broken[4]["input_ids"])}
    with pytest.raises(ValueError, match="Row 3 of the validation dataset has 999 in its input_ids"):
        scorer.reference_gradient()
    broken[3] = {"input_ids": [5] * 60, "attention_mask": [1] * 60, "labels": [5] * 60}
    ShortMemory(model, 30)
    scorer.reference_gradient()
    report = MemoryReport()
    report.tell([scorer.budget.take_notice()])
    messages = [record.getMessage() for record in caplog.records]
    assert any("row 3 of the validation dataset (60 tokens) does not fit into memory" in text for text in messages)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        scorer.reference_gradient()
    assert "of the validation dataset, the longest of" in caught.value.__notes__[0]


def test_validation_rows_without_a_gradient_are_an_error(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in tiny_rows(4)]
    with pytest.raises(RuntimeError) as caught:
        attach(tmp_path, Dataset.from_list(rows)).train()
    assert str(caught.value) == (
        "strategy='less' found no gradient among the 4 validation rows: each is zero or not finite. Likely causes: "
        "rows without label tokens (prompts longer than `max_length`), or a training that diverged."
    )


def test_attaching_for_less_leaves_no_trace_of_the_evaluation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=tiny_dataset(4))
    before = list(trainer.accelerator._dataloaders), trainer._signature_columns
    attach_spice(trainer, SpiceConfig(strategy="less", pool_size=10, num_selected=4), verify=False)
    assert before == (list(trainer.accelerator._dataloaders), trainer._signature_columns)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_alignment_of_numbers_of_any_size(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 50, generator=generator)
    rows[4] = 0.0
    reference = torch.randn(50, generator=generator).double()
    norms = rows.double().norm(dim=1) * scale
    found = align(rows * scale, norms, reference)
    torch.testing.assert_close(found / scale, rows.double() @ reference, rtol=1e-5, atol=1e-6)
    units, lengths = unit_rows(rows * scale)
    torch.testing.assert_close(lengths, norms, rtol=1e-6, atol=0)
    assert not bool(units[4].any()) and unit_rows(rows[:0])[1].shape == (0,)
