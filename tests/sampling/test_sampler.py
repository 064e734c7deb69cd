"""A sampler bound by hand: exactly the batches of each optimizer step, chosen when the step begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from spice_trainer import SpiceConfig, SpiceSampler
from spice_trainer.selection.results import StepSelection
from tests.support.models import tiny_lora_model
from tests.support.trainers import collate, tiny_rows

CONFIG = SpiceConfig(pool_size=10, num_selected=4)


def _bind(sampler: SpiceSampler, model: torch.nn.Module, **overrides: Any) -> DataLoader[Any]:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3} | overrides
    return sampler.bind(model, Dataset.from_list(tiny_rows()), data_collator=collate, **settings)


def test_a_rule_that_reads_the_learning_rate_needs_an_optimizer() -> None:
    model, validation = tiny_lora_model(), Dataset.from_list(tiny_rows(6, seed=3))
    config = SpiceConfig(strategy="greats", pool_size=12, num_selected=6)
    with pytest.raises(ValueError, match=r"reads the learning rate, and there is no optimizer. Fix: pass `optimizer="):
        _bind(SpiceSampler(config), model, validation_dataset=validation)
    # It is that of the moment.
    sampler = SpiceSampler(config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = _bind(sampler, model, validation_dataset=validation, optimizer=optimizer)
    for rate in (0.1, 0.3):
        optimizer.param_groups[0]["lr"] = rate
        scores = next(sampler.run.selector.gradient_scorer.score([range(12)]))
        assert scores.learning_rate == rate
    assert len(loader)


def test_a_sampler_bound_by_hand(tmp_path: Path) -> None:
    model, sampler = tiny_lora_model(), SpiceSampler(SpiceConfig(pool_size=12, num_selected=6))
    steps: list[StepSelection] = []
    sampler.add_listener(steps.append)
    loader = _bind(sampler, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rows = tiny_rows()
    num_steps = len(loader) // 3
    assert len(loader) == 15
    for epoch in range(2):
        batches = []
        for position, batch in enumerate(loader):
            # One selection a step, made when its first micro-batch is asked for.
            assert len(steps) == epoch * num_steps + position // 3 + 1
            batches.append(
                [row[m.bool()].tolist() for row, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
            )
            loss = model(**batch).loss
            loss.backward()
            if position % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
                picks = [rows[index]["input_ids"] for index in steps[-1].indices]
                assert sum(batches[-3:], []) == picks and all(batches[-3:])
    assert [(step.step, step.epoch) for step in steps] == [(i, i // num_steps) for i in range(2 * num_steps)]
    candidates = [pool.candidates for step in steps for pool in step.pools]
    assert len(set(candidates)) == len(candidates)
    assert sorted(sum(candidates[:num_steps], ())) == sorted(sum(candidates[num_steps:], ())) == list(range(55))


def test_a_sampler_is_a_sampler_of_rows() -> None:
    sampler, other = SpiceSampler(CONFIG), SpiceSampler(CONFIG)
    model = tiny_lora_model()
    assert isinstance(sampler, Sampler)
    _bind(sampler, model, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    steps: list[StepSelection] = []
    sampler.add_listener(steps.append)
    indices = list(sampler)
    assert all(type(index) is int for index in indices)
    assert indices == [index for step in steps for index in step.indices]
    assert len(indices) == len(sampler) == 22 == len(set(indices))
    # The same rows, batch by batch, from the loader.
    loader = _bind(other, model, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    found = [row[mask.bool()].tolist() for batch in loader
             for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
    assert found == [tiny_rows()[index]["input_ids"] for index in indices]


def test_bound_by_hand_to_a_loss_that_is_a_mean_per_micro_batch() -> None:
    sampler = SpiceSampler(SpiceConfig(pool_size=12, num_selected=5))
    loader = _bind(sampler, tiny_lora_model(), token_normalized=False)
    sizes = [len(batch["input_ids"]) for batch in loader]
    assert [set(sizes[start : start + 3]) for start in range(0, len(sizes), 3)] == [{2}] * 4 + [{1}]


def test_an_unbound_sampler_says_how_to_bind_it() -> None:
    sampler = SpiceSampler()
    for use in (len, list, lambda s: s.schedule, lambda s: s.scorer, lambda s: s.run.select_step()):
        with pytest.raises(RuntimeError, match="no model and dataset yet. Pass it to SpiceTrainer or attach_spice"):
            use(sampler)
