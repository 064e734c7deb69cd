"""Scoring by less than whole gradients: against autograd of what is left, and what is left out costs no backward."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import collate_row, keep_first_labels, spread_positions
from spice_trainer.data.sample import SAMPLE_ROWS
from spice_trainer.gradients.lora import choose_modules, find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.pool import select_pool
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients
from tests.support.gradient_loop import collate as collate_pairs
from tests.support.models import tiny_lora_model
from tests.support.scorers import make_scorer
from tests.support.trainers import collate, make_trainer, read_records, tiny_rows, trainable_weights, trained_indices

pytestmark = pytest.mark.oldest

ROWS = tiny_rows(32)
POOLS = [[3, 17, 5, 20, 9, 1], [11, 0, 8, 2, 6, 7]]


def scorer_of(model: nn.Module, rows: Any = ROWS, **settings: Any) -> GradientScorer:
    config = SpiceConfig(**({"sketch_dim": 0, "pool_size": 6, "num_selected": 1} | settings))
    modules = find_trained_modules(model)
    return make_scorer(model, config, modules=modules, rows=rows, collate=collate)


# Layers and modules


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [{"layers": 1}, {"layers": 2}, {"layers": 9}, {"target_modules": ["q_proj", "c_fc"]}, {"names": "lora_B"}],
)
def test_gradients_of_some_modules_are_autograds(architecture: str, options: dict[str, Any]) -> None:
    model = tiny_lora_model(architecture)
    every = find_trained_modules(model)
    if "names" in options:
        modules = {name: module for name, module in every.items() if options["names"] in name}
    elif "target_modules" in options:
        names = {adapted.split(".")[-1] for adapted in (name.split(".lora_")[0] for name in every)}
        modules = choose_modules(every, target_modules=sorted(names & set(options["target_modules"])))
        assert 0 < len(modules) < len(every)
    else:
        modules = choose_modules(every, **options)
    assert (len(modules) == len(every)) == (options.get("layers", 1) >= 2)
    expected = [
        part for name, part in zip(every, looped_gradients(model, example_rows())[1], strict=True) if name in modules
    ]
    for ours, theirs in zip(batched_gradients(model, example_rows(), modules=modules)[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_chosen_modules() -> None:
    every = find_trained_modules(tiny_lora_model())
    assert list(choose_modules(every)) == list(every)
    last = choose_modules(every, layers=1)
    assert len(last) == len(every) // 2 and all(".layers.1." in name for name in last)
    both = choose_modules(every, layers=1, target_modules=["self_attn.q_proj", "down_proj"])
    assert [name.split(".layers.1.")[1].split(".lora")[0] for name in both] == [
        *["self_attn.q_proj"] * 2, *["mlp.down_proj"] * 2,
    ]  # fmt: skip
    assert len(choose_modules(every, target_modules=["base_model.model.model.layers.0.mlp.up_proj"])) == 2


def test_layers_are_counted_by_the_first_number_of_a_name() -> None:
    names = ["model.h.10.experts.0.w.lora_A.default", "model.h.9.experts.3.w.lora_A.default"]
    modules = {name: nn.Linear(2, 2) for name in names}
    assert list(choose_modules(modules, layers=1)) == names[:1]
    # One that shares its weight with a chosen one goes with it.
    modules[names[1]].weight = modules[names[0]].weight
    assert list(choose_modules(modules, layers=1)) == names


def test_names_that_fit_nothing_are_refused() -> None:
    every = find_trained_modules(tiny_lora_model())
    with pytest.raises(
        ValueError,
        match=r"scoring_target_modules has 'proj', which is the name of none of the modules that train\. Fix: "
        r"use names among 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'\.",
    ):
        choose_modules(every, target_modules=["q_proj", "proj"])
    with pytest.raises(ValueError, match=r"\['q_proj'\] with scoring_layers=1: no module of these names"):
        of_first = {name: m for name, m in every.items() if "layers.1" not in name or "mlp" in name}
        choose_modules(of_first, layers=1, target_modules=["q_proj"])
    plain = {"encoder.lora_A.default": nn.Linear(2, 2)}
    with pytest.raises(ValueError, match=r"scoring_layers=3 cannot be told.*'encoder\.lora_A\.default' has no"):
        choose_modules(plain, layers=3)


def test_what_lies_below_has_no_graph() -> None:
    """The backward ends at the lowest scored modules: hidden states require no gradient before them."""
    model = tiny_lora_model()
    model.enable_input_require_grads()
    layers = model.base_model.model.model.layers
    requires: dict[str, bool] = {}
    for name, module in [("below", layers[0]), ("attention", layers[1].self_attn), ("above", layers[1])]:
        module.register_forward_hook(
            lambda module, args, output, name=name: requires.update(
                {name: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
    every = find_trained_modules(model)
    batched_gradients(model, example_rows(), modules=choose_modules(every, layers=1))
    assert requires == {"below": False, "attention": True, "above": True}
    mlp = choose_modules(every, layers=1, target_modules=["down_proj"])
    batched_gradients(model, example_rows(), modules=mlp)
    assert requires == {"below": False, "attention": False, "above": True}
    batched_gradients(model, example_rows())
    assert requires == {"below": True, "attention": True, "above": True}


def test_a_run_of_the_trainer_scores_by_the_chosen_modules(tmp_path: Path) -> None:
    settings = {"scoring_layers": 1, "scoring_target_modules": ["q_proj", "down_proj"]}
    trainer = make_trainer(tmp_path, spice=settings, verify=True)
    trainer.train()
    lines = read_records(tmp_path, "selections")
    # At the first step the weights are those of a fresh model.
    model = tiny_lora_model()
    every = find_trained_modules(model)
    names = choose_modules(every, layers=1, target_modules=["q_proj", "down_proj"])
    rows = tiny_rows()
    first = [line for line in lines if line["step"] == 0]
    pairs = [(rows[line["index"]]["input_ids"], rows[line["index"]]["labels"]) for line in first]
    parts = [part for name, part in zip(every, looped_gradients(model, pairs)[1], strict=True) if name in names]
    norms = torch.cat(parts, dim=1).double().norm(dim=1)
    torch.testing.assert_close(
        torch.tensor([line["gradient_norm"] for line in first]).double(), norms, rtol=1e-4, atol=0
    )


# Label tokens


def test_a_row_is_cut_behind_its_first_labels() -> None:
    row = collate_row(4, {"input_ids": [5, 6, 7, 8, 9, 10], "attention_mask": [1] * 6,
                          "labels": [-100, 6, -100, 8, 9, -100]}, collate)  # fmt: skip
    assert row.num_label_tokens == 3
    cut = keep_first_labels(row, 2)
    assert cut.inputs["input_ids"].tolist() == [[5, 6, 7, 8]] and cut.labels.tolist() == [[-100, 6, -100, 8]]
    assert (cut.num_tokens, cut.num_dropped_tokens, cut.num_label_tokens, cut.index) == (4, 2, 3, 4)
    assert keep_first_labels(row, 3) is row and keep_first_labels(row, 9) is row
    # What predicts nothing is no label: the first token.
    first = collate_row(4, {"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [5, 6, 7]}, collate)
    assert keep_first_labels(first, 1).inputs["input_ids"].tolist() == [[5, 6]]


@pytest.mark.parametrize("strategy", ["spice", "top_norm", "loss"])
def test_the_ledger_counts_what_was_scored_and_what_was_trained(tmp_path: Path, strategy: str) -> None:
    trainer = make_trainer(tmp_path, spice={"scoring_max_tokens": 2, "strategy": strategy})
    trainer.train()
    rows = [collate_row(index, row, collate) for index, row in enumerate(tiny_rows())]
    ledger = json.loads((tmp_path / "spice" / "ledger.json").read_text())
    assert ledger["tokens_scored"] == sum(keep_first_labels(row, 2).num_tokens for row in rows)
    assert ledger["tokens_trained"] == sum(
        rows[index].num_tokens for step in trained_indices(tmp_path) for index in step
    )
    per_token = ledger["seconds_training"] / ledger["tokens_trained"]
    # From the rows that were looked at before, whole.
    mean = sum(rows[position].num_tokens for position in spread_positions(55, SAMPLE_ROWS)) / SAMPLE_ROWS
    assert ledger["estimated_seconds_on_all_data"] == pytest.approx(per_token * 55 * mean)


def test_packed_rows_lose_labels_alone() -> None:
    packed = collate_row(0, None, lambda rows: {
        "input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[-100, 6, -100, 8]]),
        "position_ids": torch.tensor([[0, 1, 0, 1]]),
    })  # fmt: skip
    cut = keep_first_labels(packed, 1)
    assert cut.inputs["input_ids"].shape == (1, 4) and cut.labels.tolist() == [[-100, 6, -100, -100]]


@pytest.mark.parametrize("normalization", ["none", "tokens"])
def test_gradients_of_the_first_labels_are_autograds(normalization: str) -> None:
    """Of the whole row, later labels masked; weighted by the whole row's number of labels."""
    model = tiny_lora_model()
    found = list(scorer_of(model, scoring_max_tokens=3, gradient_normalization=normalization).score(POOLS))
    shortened = 0
    for pool, scores in zip(POOLS, found, strict=True):
        pairs, counts = [], []
        for index in pool:
            labels, left = [], 3
            for place, label in enumerate(ROWS[index]["labels"]):
                kept = label if label != -100 and place > 0 and left > 0 else -100
                left -= kept != -100
                labels.append(kept)
            pairs.append((ROWS[index]["input_ids"], labels))
            counts.append(sum(label != -100 for label in ROWS[index]["labels"][1:]))
            shortened += counts[-1] > 3
        gradients = torch.cat(looped_gradients(model, pairs)[1], dim=1).double()
        torch.testing.assert_close(scores.gradient_norms, gradients.norm(dim=1), rtol=1e-5, atol=0)
        if normalization == "tokens":
            gradients *= torch.tensor(counts)[:, None]
        expected = gradients @ gradients.T
        torch.testing.assert_close(scores.gram, expected, rtol=1e-4, atol=1e-6 * float(expected.diagonal().max()))
        assert scores.label_tokens == tuple(counts)
    assert shortened > 3


# Loss first


def loss_weights(losses: Tensor, counts: Sequence[int], normalization: str) -> list[float]:
    factors = {"none": lambda n: 1.0, "unit": lambda n: 1.0, "sqrt_tokens": math.sqrt, "tokens": float}[normalization]
    return [float(loss) * factors(count) for loss, count in zip(losses, counts, strict=True)]


@pytest.mark.parametrize("normalization", ["none", "sqrt_tokens", "tokens", "unit"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_filtered_pool_picks_among_the_largest_losses(share: float, normalization: str) -> None:
    model = tiny_lora_model()
    settings = {"gradient_normalization": normalization, "num_selected": 2}
    scorer = scorer_of(model, scoring_prefilter=share, **(settings | {"num_selected": 1}))
    config = SpiceConfig(sketch_dim=0, pool_size=6, **settings)
    for pool, scores in zip(POOLS, scorer.score(POOLS), strict=True):
        pairs = [(ROWS[index]["input_ids"], ROWS[index]["labels"]) for index in pool]
        counts = [sum(label != -100 for label in labels[1:]) for _, labels in pairs]
        weights = loss_weights(looped_gradients(model, pairs)[0], counts, normalization)
        kept = sorted(sorted(range(6), key=lambda place: -weights[place])[: math.ceil(share * 6)])
        found = select_pool(scores, 2, config)
        # The same as a pool of these alone.
        (alone,) = scorer_of(model, **(settings | {"num_selected": 1})).score([[pool[place] for place in kept]])
        expected = select_pool(alone, 2, config)
        assert found.indices == expected.indices
        assert found.selection.gains == pytest.approx(expected.selection.gains, rel=1e-5)
        assert [pool[place] for place in found.selection.indices] == list(expected.indices)
        assert found.candidates == tuple(pool)
        assert found.filtered == tuple(index for place, index in enumerate(pool) if place not in kept)
        assert [pool[place] for place in found.top_norm] == [kept_row(pool, kept, p) for p in expected.top_norm]
        assert found.tokens_pool == sum(counts) / 6


def kept_row(pool: Sequence[int], kept: Sequence[int], position: int) -> int:
    return pool[kept[position]]


def test_unsound_rows_are_told_from_filtered_ones() -> None:
    from tests.runs.test_unsound_rows import break_row, fragile_model, sound_rows

    rows = sound_rows(32)
    for index, kind in zip(POOLS[0][:3], ("nan", "zero", "masked_label"), strict=True):
        break_row(rows[index], kind)
    for index in POOLS[1]:
        break_row(rows[index], "zero")
    scorer = scorer_of(fragile_model(), rows, scoring_prefilter=0.34)
    config = SpiceConfig(sketch_dim=0, pool_size=6, num_selected=2)
    first, second = (select_pool(scores, 2, config) for scores in scorer.score(POOLS))
    nan, zero, masked, *sound = POOLS[0]
    # A share of all candidates, of which the sound alone can fill it.
    assert set(first.nonfinite) == {nan, masked} and first.zero == (zero,)
    assert len(first.filtered) == 0 and set(first.indices) <= set(sound) and len(first.indices) == 2
    assert second.indices == () and second.zero == tuple(POOLS[1]) and second.filtered == ()


def test_a_filtered_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"scoring_prefilter": 0.5, "scoring_layers": 1, "scoring_max_tokens": 4}
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", spice=settings, lora_dropout=0.3, **options)
    whole.train()
    lines = read_records(tmp_path / "whole", "pools")
    assert all(len(line["filtered"]) == len(line["candidates"]) - -(-len(line["candidates"]) // 2) for line in lines)
    assert all(
        not set(line["filtered"]) & set(picks)
        for line, picks in zip(lines, trained_indices(tmp_path / "whole"), strict=True)
    )
    resumed = make_trainer(tmp_path / "resumed", spice=settings, lora_dropout=0.3, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in trainable_weights(whole.model).items():
        assert torch.equal(weight, trainable_weights(resumed.model)[name])
    for name in ("pools", "selections"):
        files = [tmp_path / run / "spice" / f"{name}.jsonl" for run in ("whole", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()
    json.loads((tmp_path / "resumed" / "spice" / "ledger.json").read_text())


def test_losses_alone_are_those_of_the_backward() -> None:
    model = tiny_lora_model()
    inputs, labels = collate_pairs(example_rows())
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        found = sample_gradients.losses(inputs, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, batched_gradients(model, example_rows())[0])
