"""Conflict with the optimizer's momentum, held against gradients of single rows and the optimizer's own state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spice_trainer import SpiceConfig, SpiceSampler, attach_spice
from spice_trainer.data.rows import RowShape
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.optimizer_state import AdamMoments, OptimizerMomentum
from spice_trainer.gradients.sketch import GradientSketch
from spice_trainer.scoring.features import FeatureBuffer
from spice_trainer.selection.gram import cosines_with, measure_rows
from spice_trainer.selection.results import StepSelection
from tests.gradients.test_optimizer_state import OwnOptimizer
from tests.gradients.test_preconditioning import OPTIONS, ROWS, gradients_of, preconditioned
from tests.runs.test_strategies import dual_gain
from tests.support.models import tiny_lora_model
from tests.support.scorers import measured_pool
from tests.support.strategy_oracles import against_reference
from tests.support.trainers import (
    SETTINGS,
    collate,
    make_trainer,
    read_records,
    tiny_dataset,
    trained_indices,
)

MOMENTUM = {"conflict_reference": "momentum", "conflict_penalty": 3.0}


class SgdTrainer(OwnOptimizer):
    """Trains with SGD with a momentum."""

    made = staticmethod(lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.8))


def momentum_of(model: nn.Module, optimizer: Any, *, applied: bool) -> Tensor:
    """The momentum of all LoRA weights as the optimizer holds it, or as it would apply it; 0 before the first step."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parts = []
    for module in find_trained_modules(model).values():
        weight, state = module.weight, optimizer.state.get(module.weight)
        if not state:
            parts.append(torch.zeros(weight.numel(), dtype=torch.float64))
            continue
        momentum = state["momentum_buffer" if "momentum_buffer" in state else "exp_avg"].double()
        if applied:
            # A step of Adam on its state alone: no gradient comes in, and both moments are as they are.
            group = next(group for group in optimizer.param_groups if any(one is weight for one in group["params"]))
            unbiased = state["exp_avg_sq"].double() / (1.0 - group["betas"][1] ** float(state["step"]))
            momentum = momentum / (unbiased.sqrt() + group["eps"])
        parts.append(momentum.flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adam, applied"])
@pytest.mark.parametrize("normalization", ["sqrt_tokens", "tokens"])
def test_picks_of_a_run_are_the_oracles_in_every_step(normalization: str, optimizer: str, tmp_path: Path) -> None:
    applied = optimizer == "adam, applied"
    spice = {**SETTINGS, **MOMENTUM, "gradient_normalization": normalization, "alpha_scaling": "pool"}
    if applied:
        spice["gradient_preconditioning"] = "adam"
    options: dict[str, Any] = {"trainer_class": SgdTrainer} if optimizer == "sgd" else dict(OPTIONS)
    trainer = make_trainer(tmp_path, spice=spice, max_steps=5, **options)
    conflicts: list[tuple[float, ...]] = []

    def compare(selection: StepSelection) -> None:
        (pool,) = selection.pools
        rows = [ROWS[index] for index in pool.candidates]
        raw = gradients_of(trainer.model, rows)
        gradients = torch.cat(raw, dim=1).double()
        if applied:
            gradients = preconditioned(trainer.model, trainer.optimizer, raw)
        counts = torch.tensor([[sum(label != -100 for label in row["labels"][1:])] for row in rows]).double()
        gradients = gradients * {"sqrt_tokens": counts.sqrt(), "tokens": counts}[normalization]
        momentum = momentum_of(trainer.model, trainer.optimizer, applied=applied)
        assert bool(momentum.any()) == (selection.step > 0)
        # Of a length at which the oracle's 1e-8 in the denominator does not count.
        momentum = momentum / momentum.norm().clamp(min=1e-30)
        picked = against_reference(
            gradients, momentum, 4, fisher_alpha=pool.alpha, conflict_penalty=3.0, gain_of=dual_gain
        )
        assert list(pool.selection.indices) == [option[0] for option in picked]
        assert pool.selection.gains == pytest.approx([option[1] for option in picked], rel=1e-3)
        assert pool.selection.conflicts == pytest.approx([option[2] for option in picked], abs=1e-4)
        conflicts.append(pool.selection.conflicts)

    trainer._spice.sampler.add_listener(compare)
    trainer.train()
    assert len(conflicts) == 5 and conflicts[0] == (0.0,) * 4
    # The penalty decides, and the momentum is another reference than the picks.
    assert any(pool["changed_by_conflict"] for pool in read_records(tmp_path, "pools"))
    make_trainer(tmp_path / "picks", spice=spice | {"conflict_reference": "selected"}, max_steps=5, **options).train()
    assert trained_indices(tmp_path / "picks") != trained_indices(tmp_path)


def test_it_is_seen_through_the_sketch_of_the_gradients() -> None:
    """The features of a momentum are those of a candidate that has it for a gradient."""
    torch.manual_seed(0)
    sizes = [24, 40, 16]
    parts = [torch.randn(3, size) for size in sizes]
    for sketch in (None, GradientSketch(sizes, 32, seed=3, device=torch.device("cpu"))):
        buffer = FeatureBuffer(3, sizes, sketch, torch.device("cpu"), momentum=[part[1] for part in parts])
        buffer.begin([0, 1, 2])
        for number, part in enumerate(parts):
            buffer.add(number, part.clone())
        buffer.finish(torch.zeros(3))
        assert buffer.momentum is not None
        torch.testing.assert_close(buffer.momentum, buffer.features[1])
        cosines = measure_rows(buffer.features).cosines
        torch.testing.assert_close(cosines_with(buffer.features, buffer.momentum), cosines[1], rtol=0, atol=1e-6)
        # A layer without a momentum yet.
        buffer = FeatureBuffer(1, sizes, sketch, torch.device("cpu"), momentum=[parts[0][1], None, None])
        other = FeatureBuffer(1, sizes, sketch, torch.device("cpu"))
        other.begin([0])
        other.add(0, parts[0][1:2].clone())
        other.finish(torch.zeros(1))
        assert buffer.momentum is not None
        torch.testing.assert_close(buffer.momentum, other.features[0])


@pytest.mark.parametrize("gradient_centering", [False, True])
def test_cosines_are_of_gradients_that_are_not_centred(gradient_centering: bool) -> None:
    torch.manual_seed(2)
    features, momentum = torch.randn(5, 30) + 1.0, torch.randn(30)
    expected = torch.nn.functional.cosine_similarity(features.double(), momentum.double()[None])
    found = measured_pool(
        features,
        [RowShape(4, 3, True, ())] * 5,
        SpiceConfig(gradient_normalization="tokens", gradient_centering=gradient_centering),
        candidates=range(5),
        losses=torch.ones(5),
        momentum=momentum,
    )
    assert found.momentum_cosines is not None
    torch.testing.assert_close(found.momentum_cosines, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosines_with_a_vector_of_any_length(scale: float) -> None:
    torch.manual_seed(1)
    rows, reference = torch.randn(6, 50), torch.randn(50)
    rows[4] = 0.0
    expected = torch.nn.functional.cosine_similarity(rows.double(), reference.double()[None])
    for chunk_size in (7, 2**18):
        found = cosines_with(rows, reference * scale, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert bool((cosines_with(rows, torch.zeros(50)) == 0).all())
    assert bool((cosines_with(rows, torch.full((50,), float("nan"))) == 0).all())


def test_it_is_read_in_the_layers_order_with_biases() -> None:
    model = tiny_lora_model("gpt_neox", lora_bias=True)
    modules = find_trained_modules(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW([{"params": weights[::2]}, {"params": weights[1::2], "betas": (0.5, 0.9)}])
    momentum, moments = (
        OptimizerMomentum(lambda: optimizer, modules), AdamMoments(lambda: optimizer, modules)
    )  # fmt: skip
    assert set(momentum.read()) == {None} == set(momentum.read(moments.read()))
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, float(number + 1))
    optimizer.step()
    numbers = {id(weight): number + 1 for number, weight in enumerate(weights)}
    applied = momentum.read(moments.read())
    for module, found, of_step in zip(modules.values(), momentum.read(), applied, strict=True):
        assert found is not None and of_step is not None
        share = 0.1 if numbers[id(module.weight)] % 2 == 1 else 0.5
        expected = [torch.full((module.weight.numel(),), share * numbers[id(module.weight)])]
        if module.bias is not None and module.bias.requires_grad:
            of_bias = 0.1 if numbers[id(module.bias)] % 2 == 1 else 0.5
            expected.append(torch.full((module.bias.numel(),), of_bias * numbers[id(module.bias)]))
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=0)
        # After one update m / √v̂ is (1 − β₁) times the gradient's sign.
        assert float(of_step[0]) == pytest.approx(share, rel=1e-4)


def test_a_loop_of_ones_own_gives_its_optimizer() -> None:
    model, sampler = tiny_lora_model(), SpiceSampler(SpiceConfig(**SETTINGS, **MOMENTUM))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    options = {"data_collator": collate, "per_device_train_batch_size": 4}
    for optimizer, says in (
        (None, r"there is no optimizer. Fix: pass `optimizer=` to SpiceSampler.bind"),
        (torch.optim.SGD(weights), r"SGD with momentum=0 keeps none. Fix: give it a momentum"),
        (torch.optim.RMSprop(weights), r"RMSprop is not PyTorch's Adam, AdamW or SGD.*adamw_torch"),
    ):
        with pytest.raises(ValueError, match=says):
            sampler.bind(model, tiny_dataset(), **options, optimizer=optimizer)
    optimizer = torch.optim.SGD(weights, lr=1e-2, momentum=0.9)
    steps: list[StepSelection] = []
    sampler.add_listener(steps.append)
    for batch in sampler.bind(model, tiny_dataset(), **options, optimizer=optimizer):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    conflicts = [max(step.pools[0].selection.conflicts) for step in steps]
    assert len(steps) == 6 and conflicts[0] == 0.0 < max(conflicts)


def test_only_strategies_with_conflicts_look_at_the_optimizer(tmp_path: Path) -> None:
    for strategy in ("dpp", "matching", "random"):
        trainer = make_trainer(tmp_path / strategy, optim="adafactor")
        attach_spice(trainer, SpiceConfig(**SETTINGS, **MOMENTUM, strategy=strategy), verify=False)
    trainer = make_trainer(tmp_path / "fisher", spice={**SETTINGS, **MOMENTUM, "strategy": "fisher"})
    trainer.train()
    # It shows the conflicts that it does not go by.
    assert any(pick["conflict"] for pick in read_records(tmp_path / "fisher", "selections"))


# What is refused


def test_other_optimizers_are_refused_when_attached(tmp_path: Path) -> None:
    weights = [nn.Parameter(torch.zeros(2))]
    for given, says in (
        ({"optim": "adafactor"}, "TrainingArguments has optim='adafactor'"),
        # The Trainer's own SGD has no momentum.
        ({"optim": "sgd"}, "TrainingArguments has optim='sgd'"),
        ({"optimizer": torch.optim.SGD(weights)}, "SGD with momentum=0 keeps none"),
        ({"optimizer": torch.optim.RMSprop(weights, momentum=0.9)}, "RMSprop is not PyTorch's Adam"),
    ):
        trainer = make_trainer(tmp_path, **{key: value for key, value in given.items() if key == "optim"})
        trainer.optimizer = given.get("optimizer")
        with pytest.raises(ValueError) as caught:
            attach_spice(trainer, SpiceConfig(**SETTINGS, **MOMENTUM))
        text = str(caught.value)
        assert all(part in text for part in ("SpiceConfig: conflict_reference='momentum'", "Fix: ", says)), text
