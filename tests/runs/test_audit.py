"""An outside audit: whole runs of stock trainers with SPICE, every recorded pick recomputed from the weights.

The witness sees nothing but the weights at the beginning of each step, the training rows and the record files. LoRA
dropout is 0.3, gradients accumulate over 2 micro-batches and the learning rate is high, so scoring with dropout on, or
one step early or late, gives other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from spice_trainer import SpiceConfig, attach_spice
from tests.runs.audit_oracle import Expected, Row, Witness, expect_pool, num_label_tokens
from tests.support.models import VOCAB_SIZE, tiny_lora_model
from tests.support.trainers import make_sft_trainer, make_trainer, read_records, tiny_rows

NUM_ROWS, POOL_SIZE = 53, 12
ARGUMENTS = {"gradient_accumulation_steps": 2, "learning_rate": 3e-2}


def _close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-5)


def _budgets(config: SpiceConfig, samples_per_step: int, num_pools: int) -> list[int]:
    """Picks of each pool of a step: K where the number of pools is given, else the batch spread over them."""
    if config.pools_per_step is not None:
        return [config.num_selected] * num_pools
    pools = max(1, math.floor(samples_per_step / config.num_selected + 0.5))
    return [samples_per_step // pools + (pool < samples_per_step % pools) for pool in range(pools)]


def _audit(
    directory: Path, rows: Sequence[Row], witness: Witness, config: SpiceConfig, *, samples_per_step: int
) -> list[Expected]:
    """Recomputes every line of `selections.jsonl` and `pools.jsonl`; returns what was expected of each pool."""
    pools, selections = read_records(directory, "pools"), read_records(directory, "selections")
    trained = read_records(directory, "trained")
    assert len(trained) == len(witness.weights) >= 3
    lines = iter(selections)
    expectations = []
    for line in pools:
        candidates = [rows[index] for index in line["candidates"]]
        tokens = [num_label_tokens(row) for row in candidates]
        in_step = [other for other in pools if other["step"] == line["step"]]
        assert [other["pool"] for other in in_step] == list(range(len(in_step)))
        budget = _budgets(config, samples_per_step, len(in_step))[line["pool"]]
        budget = math.ceil(budget * len(candidates) / config.pool_size)
        expected = expect_pool(witness.gradients(line["step"], candidates), tokens, budget, config)
        expectations.append(expected)

        where = {key: line[key] for key in ("step", "epoch", "pool")}
        for order, (pick, norm) in enumerate(zip(expected.picks, expected.norms, strict=True)):
            found = next(lines)
            assert found | where | {"order": order} == found
            assert found["index"] == line["candidates"][pick.position], where
            assert found["label_tokens"] == tokens[pick.position]
            assert _close(found["gain"], pick.gain), (found, pick)
            assert math.isclose(found["conflict"], pick.conflict, abs_tol=2e-5), (found, pick)
            penalty = config.conflict_penalty
            assert math.isclose(found["score"], pick.score, rel_tol=1e-4, abs_tol=1e-5 + 2e-5 * penalty), (found, pick)
            assert _close(found["gradient_norm"], norm)

        picked = [pick.position for pick in expected.picks]
        assert line["num_selected"] == len(picked)
        assert line["stopped_early"] == expected.stopped_early
        assert line["changed_by_conflict"] == expected.changed_by_conflict
        assert line["overlap_top_norm"] == expected.overlap_top_norm
        assert line["nonfinite"] == [line["candidates"][position] for position in expected.nonfinite]
        assert line["zero"] == [line["candidates"][position] for position in expected.zero]
        for key in ("information", "information_top_norm", "alpha"):
            assert _close(line[key], getattr(expected, key)), (key, line[key], expected)
        assert _close(line["gain_first"], expected.picks[0].gain) and _close(
            line["gain_last"], expected.picks[-1].gain
        )
        assert math.isclose(line["tokens_pool"], sum(tokens) / len(tokens))
        assert math.isclose(line["tokens_selected"], sum(tokens[position] for position in picked) / len(picked))
    assert next(lines, None) is None
    _audit_schedule(pools, selections, trained, rows, witness, config)
    return expectations


def _audit_schedule(
    pools: Sequence[Mapping[str, Any]],
    selections: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    witness: Witness,
    config: SpiceConfig,
) -> None:
    """Epochs are permutations cut into pools, and each step trained on its picks alone, in order, dealt evenly."""
    steps_of_epoch = [[line["step"] for line in trained if line["epoch"] == epoch] for epoch in (0, 1, 2)]
    whole = [epoch for epoch, steps in enumerate(steps_of_epoch) if len(steps) == len(steps_of_epoch[0]) and steps]
    for epoch in whole if config.selection_epochs is None else whole[: config.selection_epochs]:
        of_epoch = [line["candidates"] for line in pools if line["epoch"] == epoch]
        assert sorted(sum(of_epoch, [])) == list(range(len(rows)))
        assert {len(candidates) for candidates in of_epoch[:-1]} == {config.pool_size}
    assert len({tuple(line["candidates"]) for line in pools}) == len(pools)
    assert witness.num_fillers == sum(max(0, 2 - len(line["indices"])) for line in trained)
    for step, (line, micro_batches) in enumerate(zip(trained, witness.micro_batches, strict=True)):
        assert line["step"] == step
        if any(pool["step"] == step for pool in pools):
            assert line["indices"] == [pick["index"] for pick in selections if pick["step"] == step]
        assert sum(micro_batches, []) == [list(rows[index]["input_ids"]) for index in line["indices"]]
        assert len(micro_batches) == 2 and abs(len(micro_batches[0]) - len(micro_batches[1])) <= 1


# Settings, samples of a micro-batch, and settings under which the same weights must give other picks: were they
# silently ignored, the audit would fail.
CASES: dict[str, tuple[dict[str, Any], int, list[dict[str, Any]]]] = {
    "paper": ({}, 2, []),
    "no_conflict": ({"conflict_penalty": 0.0}, 2, [{"conflict_penalty": 50.0}]),
    "high_conflict": ({"conflict_penalty": 50.0}, 2, [{"conflict_penalty": 0.0}]),
    "sqrt_tokens": ({"gradient_normalization": "sqrt_tokens"}, 2, [{"gradient_normalization": "none"}]),
    "tokens": ({"gradient_normalization": "tokens"}, 2, [{"gradient_normalization": "sqrt_tokens"}]),
    "unit": (
        {"gradient_normalization": "unit", "conflict_penalty": 1.0},
        2,
        [{"gradient_normalization": "none"}, {"conflict_penalty": 0.0}],
    ),
    "pool_alpha": (
        {"alpha_scaling": "pool", "fisher_alpha": 20.0, "gradient_normalization": "sqrt_tokens"},
        3,
        [{"alpha_scaling": "fixed", "fisher_alpha": 1e-3}],
    ),
    "diagonal": ({"information": "diagonal", "fisher_alpha": 1e3}, 3, [{"information": "exact"}]),
    "diagonal_tokens": (
        {"information": "diagonal", "gradient_normalization": "tokens", "alpha_scaling": "pool", "fisher_alpha": 1e4},
        3,
        [{"information": "exact"}, {"gradient_normalization": "none"}],
    ),
    "adafisher": (
        {"information": "adafisher", "fisher_alpha": 1e3, "gradient_normalization": "tokens", "num_selected": 8},
        4,
        [{"information": "exact"}, {"information": "diagonal"}],
    ),
    "stop_ratio": (
        {"gradient_normalization": "none", "stop_ratio": 0.6, "pools_per_step": 2, "num_selected": 6},
        6,
        [{"stop_ratio": None}],
    ),
    "min_gain": (
        {"gradient_normalization": "none", "min_gain": 3.0, "pools_per_step": 2, "num_selected": 6},
        6,
        [{"min_gain": None}],
    ),
    "explicit_pools": ({"pool_size": 7, "num_selected": 2, "pools_per_step": 2}, 3, []),
    "uneven_budgets": ({"pool_size": 6, "num_selected": 3}, 4, []),
    "strict_ties": ({"tie_tolerance": 0.0}, 2, []),
    "loose_ties": ({"tie_tolerance": 0.3}, 2, [{"tie_tolerance": 0.0}]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_pick_can_be_recomputed(case: str, tmp_path: Path) -> None:
    settings, batch_size, mutants = CASES[case]
    config = SpiceConfig(**({"pool_size": POOL_SIZE, "num_selected": 4, "sketch_dim": 0} | settings))
    expected = _audit_run(tmp_path, config, tiny_rows(NUM_ROWS), batch_size=batch_size, mutants=mutants)
    if config.is_adaptive:
        assert {pool.stopped_early for pool in expected} == {True, False}


def test_conflict_with_the_open_candidates(tmp_path: Path) -> None:
    """Rows of random tokens hardly oppose their mean; two answers to one question whose logits are opposite do."""
    model = tiny_lora_model(lora_dropout=0.3)
    with torch.no_grad():
        model.get_output_embeddings().weight[11] = -model.get_output_embeddings().weight[10]
    rows = []
    for number, row in enumerate(tiny_rows(NUM_ROWS)):
        ids = [5, 6, 7, row["input_ids"][0], 11 if number % 3 == 0 else 10]
        rows.append({"input_ids": ids, "attention_mask": [1] * 5, "labels": [-100] * 4 + ids[4:]})
    config = SpiceConfig(
        pool_size=POOL_SIZE, num_selected=10, sketch_dim=0, conflict_penalty=0.5, conflict_reference="candidates"
    )
    mutants: list[dict[str, Any]] = [{"conflict_reference": "selected"}, {"conflict_penalty": 0.0}]
    expected = _audit_run(tmp_path, config, rows, batch_size=5, mutants=mutants, model=model)
    assert any(pick.conflict > 0 for pool in expected for pick in pool.picks)


def _audit_run(
    directory: Path,
    config: SpiceConfig,
    rows: Sequence[Row],
    *,
    batch_size: int,
    mutants: Sequence[Mapping[str, Any]] = (),
    model: nn.Module | None = None,
    verify: bool = True,
    **arguments: Any,
) -> list[Expected]:
    """Trains a stock Trainer with SPICE and audits it."""
    trainer = make_trainer(
        directory,
        model=model,
        train_dataset=Dataset.from_list(list(rows)),
        lora_dropout=0.3,
        per_device_train_batch_size=batch_size,
        **(ARGUMENTS | arguments),
    )
    witness = Witness(trainer)
    attach_spice(trainer, config, verify=verify)
    trainer.train()
    expected = _audit(directory, rows, witness, config, samples_per_step=2 * batch_size)
    for mutant in mutants:
        other = SpiceConfig(**(config.to_dict() | dict(mutant)))
        assert _picks_under(other, directory, rows, witness) != [
            [pick.position for pick in pool.picks] for pool in expected
        ], f"{mutant} would pass unnoticed"
    return expected


def _picks_under(config: SpiceConfig, directory: Path, rows: Sequence[Row], witness: Witness) -> list[list[int]]:
    """What other settings would have picked at the same weights, as many as were picked (all, if adaptive)."""
    picks = []
    for line in read_records(directory, "pools"):
        candidates = [rows[index] for index in line["candidates"]]
        budget = line["num_selected"] + (config.pools_per_step is not None)
        gradients = witness.gradients(line["step"], candidates)
        pool = expect_pool(gradients, [num_label_tokens(row) for row in candidates], budget, config)
        picks.append([pick.position for pick in pool.picks])
    return picks


def test_the_audit_in_full_dimension_and_over_epochs(tmp_path: Path) -> None:
    """A small adapter affords `slogdet` of D×D matrices; the second epoch selects anew, the third replays it."""
    rows = tiny_rows(40)
    model = tiny_lora_model(lora_dropout=0.3, r=1, target_modules=["q_proj"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= 150
    config = SpiceConfig(pool_size=12, num_selected=4, conflict_penalty=20.0, selection_epochs=2, fisher_alpha=5.0)
    expected = _audit_run(tmp_path, config, rows, batch_size=2, model=model, num_train_epochs=3)
    assert {line["epoch"] for line in read_records(tmp_path, "pools")} == {0, 1}
    assert [line["epoch"] for line in read_records(tmp_path, "trained")] == [0] * 4 + [1] * 4 + [2] * 4
    assert any(pool.changed_by_conflict for pool in expected)


def test_rows_that_cannot_be_picked_are_recorded_and_never_trained(tmp_path: Path) -> None:
    rows = tiny_rows(NUM_ROWS)
    poison = VOCAB_SIZE - 1
    rows = [{**row, "input_ids": [min(token, poison - 1) for token in row["input_ids"]]} for row in rows]
    for index in (5, 21, 33):
        rows[index] = {**rows[index], "input_ids": [poison, *rows[index]["input_ids"][1:]]}
    for index in (8, 30):
        rows[index] = {**rows[index], "labels": [-100] * len(rows[index]["labels"])}
    model = tiny_lora_model(lora_dropout=0.3)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    # More than the sound rows of some pools, which then give what they have.
    config = SpiceConfig(pool_size=POOL_SIZE, num_selected=12, gradient_normalization="sqrt_tokens")
    expected = _audit_run(tmp_path, config, rows, batch_size=6, model=model, verify=False)
    assert sum(len(pool.nonfinite) for pool in expected) == 3 and sum(len(pool.zero) for pool in expected) == 2
    trained = set(sum((line["indices"] for line in read_records(tmp_path, "trained")), []))
    assert not trained & {5, 21, 33, 8, 30}


def test_a_plain_sft_trainer(tmp_path: Path) -> None:
    rows = tiny_rows()
    trainer = make_sft_trainer(tmp_path, lora_dropout=0.3, per_device_train_batch_size=2, **ARGUMENTS)
    # SFTTrainer replaces the model's forward, so the oracle has a model of its own.
    witness = Witness(trainer, tiny_lora_model(lora_dropout=0.3))
    config = SpiceConfig(pool_size=POOL_SIZE, num_selected=4)
    attach_spice(trainer, config)
    trainer.train()
    assert type(trainer).__name__ == "SFTTrainer" and isinstance(trainer, Trainer)
    _audit(tmp_path, rows, witness, config, samples_per_step=4)


def test_the_audit_sees_weights_of_another_step(tmp_path: Path) -> None:
    """The oracle at the weights before or after the right ones is off by far more than the audit's tolerance."""
    rows = tiny_rows(NUM_ROWS)
    trainer = make_trainer(
        tmp_path, train_dataset=Dataset.from_list(rows), lora_dropout=0.3, per_device_train_batch_size=2, **ARGUMENTS
    )
    witness = Witness(trainer)
    attach_spice(trainer, SpiceConfig(pool_size=POOL_SIZE, num_selected=4))
    trainer.train()
    for line in read_records(tmp_path, "selections")[::4]:
        norms = {step: float(witness.gradients(step, [rows[line["index"]]]).norm()) for step in range(4)}
        assert _close(norms.pop(line["step"], line["gradient_norm"]), line["gradient_norm"])
        assert not any(_close(norm, line["gradient_norm"]) for norm in norms.values())
