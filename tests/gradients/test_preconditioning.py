"""Gradients as Adam would apply them, held against steps of PyTorch's own Adam without momentum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from spice_trainer import SpiceConfig, SpiceSampler, attach_spice
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.optimizer_state import AdamMoments, SecondMoment, precondition_
from spice_trainer.selection.results import StepSelection
from tests.runs.test_strategies import dual_gain
from tests.support.gradient_loop import looped_gradients
from tests.support.greedy_oracle import greedy_oracle
from tests.support.models import tiny_lora_model
from tests.support.strategy_oracles import ranked
from tests.support.trainers import (
    SETTINGS,
    collate,
    make_trainer,
    read_records,
    tiny_dataset,
    tiny_rows,
    trained_indices,
)

ADAM = {"gradient_preconditioning": "adam"}
# A run whose optimizer is far from its defaults, so that β₂ and ε count.
OPTIONS = {"adam_beta2": 0.9, "adam_epsilon": 1e-3}
ROWS = tiny_rows()
NUM_VALIDATION = 5


def adam_step(gradient: Tensor, optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """What Adam's step without momentum would take off a parameter, at a learning rate of 1."""
    group = next(group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
    alone = torch.zeros_like(parameter, dtype=torch.float64).requires_grad_()
    adam = torch.optim.AdamW([alone], lr=1.0, betas=(0.0, group["betas"][1]), eps=group["eps"], weight_decay=0.0)
    state = optimizer.state.get(parameter)
    if state:
        adam.state[alone] = {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": torch.zeros_like(alone),
            "exp_avg_sq": state["exp_avg_sq"].detach().double().clone(),
        }
    alone.grad = gradient.double().clone().view_as(alone)
    adam.step()
    return -alone.detach().flatten()


def preconditioned(model: nn.Module, optimizer: Any, gradients: list[Tensor]) -> Tensor:
    """Every row's gradient, module by module, through [`adam_step`]."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parts = []
    for module, of_module in zip(find_trained_modules(model).values(), gradients, strict=True):
        parts.append(torch.stack([adam_step(one, optimizer, module.weight) for one in of_module]))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("epsilon", [1e-8, 0.1, 0.0])
@pytest.mark.parametrize("num_updates", [0, 1, 5, 200])
def test_it_is_a_step_of_adam_without_momentum(num_updates: int, epsilon: float) -> None:
    torch.manual_seed(num_updates)
    weight = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.99), eps=epsilon)
    for _ in range(num_updates):
        weight.grad = torch.randn(6, 4) * torch.logspace(-6, 3, 24).view(6, 4)
        optimizer.step()
    gradients = torch.randn(5, 24) * torch.logspace(-6, 3, 24)
    gradients[3, :7] = 0.0
    expected = torch.stack([adam_step(one, optimizer, weight) for one in gradients])
    if epsilon == 0.0:
        expected[gradients == 0] = 0.0  # 0/0 in Adam, where no gradient has come yet
    values = optimizer.state[weight]["exp_avg_sq"].flatten() if num_updates else None
    moment = SecondMoment(values, num_updates, decay=0.99, epsilon=epsilon)
    found = precondition_(gradients, moment)
    assert found is gradients
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_extreme_gradients_neither_vanish_nor_overflow() -> None:
    gradients = torch.tensor([[1e-30, -1e-30, 1e30, -1e30, 0.0], [1.0, float("inf"), float("nan"), 2.0, 0.0]])
    values = torch.tensor([0.0, 1e-38, 0.0, 1e30, 0.0])
    found = precondition_(gradients.clone(), SecondMoment(values, 1, decay=0.999, epsilon=0.0))
    # With t = 1 the sample counts nearly as much as the update before: v = 0 leaves its sign, times √2.
    assert found[0, [0, 2]].tolist() == pytest.approx([1.41386, 1.41386], rel=1e-4)
    assert -1e-9 < float(found[0, 1]) < 0 and float(found[0, 3]) == pytest.approx(-1.41386, rel=1e-4)
    assert float(found[0, 4]) == 0.0
    # A row that is not finite stays so.
    assert not bool(found[1].isfinite().all())


def test_moments_come_in_the_layers_order(tmp_path: Path) -> None:
    """With biases, several groups, and within Accelerate's wrapper; what the optimizer holds, not what it was."""
    model = tiny_lora_model("gpt_neox", lora_bias=True)
    modules = find_trained_modules(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": weights[::2], "betas": (0.9, 0.95)}, {"params": weights[1::2], "eps": 1e-4}]
    optimizer = torch.optim.AdamW(groups)
    moments = AdamMoments(lambda: Accelerator(cpu=True).prepare(optimizer), modules)
    assert {moment.values for moment in moments.read()} == {None}
    for number, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, float(number + 1))
    optimizer.step()
    numbers = {id(weight): number + 1 for number, weight in enumerate(weights)}
    biased = 0
    for module, moment in zip(modules.values(), moments.read(), strict=True):
        is_even = numbers[id(module.weight)] % 2 == 1
        decay, epsilon = (0.95, 1e-8) if is_even else (0.999, 1e-4)
        assert (moment.decay, moment.epsilon, moment.num_updates) == (decay, epsilon, 1)
        assert moment.values is not None
        expected = [torch.full((module.weight.numel(),), numbers[id(module.weight)] ** 2 * (1 - decay))]
        if module.bias is not None and module.bias.requires_grad:
            biased += 1
            of_bias = 0.95 if numbers[id(module.bias)] % 2 == 1 else 0.999
            expected.append(torch.full((module.bias.numel(),), numbers[id(module.bias)] ** 2 * (1 - of_bias)))
        torch.testing.assert_close(moment.values, torch.cat(expected), rtol=1e-5, atol=0)
    assert biased


def gradients_of(model: nn.Module, rows: list[dict[str, list[int]]]) -> list[Tensor]:
    return looped_gradients(model, [(row["input_ids"], row["labels"]) for row in rows])[1]


@pytest.mark.parametrize("normalization", ["sqrt_tokens", "tokens", "unit"])
def test_picks_of_a_run_are_the_oracles_in_every_step(normalization: str, tmp_path: Path) -> None:
    """At the weights and the optimizer's state of the moment; norms in the records stay those of raw gradients."""
    spice = {**SETTINGS, **ADAM, "gradient_normalization": normalization, "alpha_scaling": "pool"}
    trainer = make_trainer(tmp_path, spice=spice, max_steps=4, **OPTIONS)
    steps: list[StepSelection] = []

    def compare(selection: StepSelection) -> None:
        (pool,) = selection.pools
        rows = [ROWS[index] for index in pool.candidates]
        raw = gradients_of(trainer.model, rows)
        gradients = preconditioned(trainer.model, trainer.optimizer, raw)
        counts = torch.tensor([[sum(label != -100 for label in row["labels"][1:])] for row in rows]).double()
        norms = gradients.norm(dim=1, keepdim=True)
        gradients = gradients * {"sqrt_tokens": counts.sqrt(), "tokens": counts, "unit": 1 / norms}[normalization]
        alpha = 1.0 / float(gradients.square().sum(dim=1).mean())
        assert pool.alpha == pytest.approx(alpha, rel=1e-4)
        found, _ = greedy_oracle(
            gradients, 4, gain_of=dual_gain, fisher_alpha=alpha, conflict_penalty=0.1, tie_tolerance=1e-6
        )
        assert list(pool.selection.indices) == [one[0] for one in found]
        assert pool.selection.gains == pytest.approx([one[1] for one in found], rel=1e-3)
        picked = [float(torch.cat(raw, dim=1)[place].norm()) for place in pool.selection.indices]
        assert [pick.gradient_norm for pick in pool.picks] == pytest.approx(picked, rel=1e-4)
        steps.append(selection)

    trainer._spice.sampler.add_listener(compare)
    trainer.train()
    assert len(steps) == 4
    make_trainer(tmp_path / "raw", spice=spice | {"gradient_preconditioning": "none"}, max_steps=4, **OPTIONS).train()
    assert trained_indices(tmp_path / "raw") != trained_indices(tmp_path)


def test_less_compares_adams_steps_with_raw_validation_gradients(tmp_path: Path) -> None:
    validation = tiny_rows(9, seed=5)
    trainer = make_trainer(
        tmp_path,
        spice={**SETTINGS, **ADAM, "strategy": "less", "validation_rows": NUM_VALIDATION},
        eval_dataset=Dataset.from_list(validation),
        max_steps=3,
        **OPTIONS,
    )
    orders: list[tuple[int, ...]] = []

    def compare(selection: StepSelection) -> None:
        (pool,) = selection.pools
        rows = [ROWS[index] for index in pool.candidates]
        gradients = preconditioned(trainer.model, trainer.optimizer, gradients_of(trainer.model, rows))
        of_validation = torch.cat(gradients_of(trainer.model, validation[:NUM_VALIDATION]), dim=1).double()
        mean = (of_validation / of_validation.norm(dim=1, keepdim=True)).mean(dim=0)
        cosines = gradients @ mean / (gradients.norm(dim=1) * mean.norm())
        places, gains = ranked(cosines.tolist(), list(range(len(rows))), 4, smallest_scale=1.0)
        assert list(pool.selection.indices) == places
        assert pool.selection.gains == pytest.approx(gains, rel=1e-3, abs=1e-6)
        orders.append(pool.selection.indices)

    trainer._spice.sampler.add_listener(compare)
    trainer.train()
    assert len(orders) == 3


def test_a_sketch_keeps_exact_lengths(tmp_path: Path) -> None:
    found = {}
    for sketch_dim in (0, 256):
        folder = tmp_path / str(sketch_dim)
        spice = {**SETTINGS, **ADAM, "sketch_dim": sketch_dim, "alpha_scaling": "pool"}
        make_trainer(folder, spice=spice, max_steps=1, **OPTIONS).train()
        found[sketch_dim] = read_records(folder, "pools")[0]["alpha"]
    assert found[256] == pytest.approx(found[0], rel=1e-6)


def test_a_loop_of_ones_own_gives_its_optimizer() -> None:
    model, sampler = tiny_lora_model(), SpiceSampler(SpiceConfig(**SETTINGS, **ADAM))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    options = {"data_collator": collate, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match=r"there is no optimizer. Fix: pass `optimizer=` to SpiceSampler.bind"):
        sampler.bind(model, tiny_dataset(), **options)
    with pytest.raises(ValueError, match=r"SGD is not PyTorch's Adam or AdamW.*adamw_torch"):
        sampler.bind(model, tiny_dataset(), **options, optimizer=torch.optim.SGD(weights))
    steps: list[StepSelection] = []
    sampler.add_listener(steps.append)
    for batch in sampler.bind(model, tiny_dataset(), **options, optimizer=optimizer):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(steps) == 6
    raw = SpiceSampler(SpiceConfig(**SETTINGS))
    raw.bind(tiny_lora_model(), tiny_dataset(), **options)
    assert steps[0].indices != raw.run.select_step().indices


# What is refused


@pytest.mark.parametrize("strategy", ["top_norm", "loss", "perplexity", "ifd", "random"])
def test_strategies_without_comparisons(strategy: str) -> None:
    with pytest.raises(ValueError, match="this strategy compares no gradients with each other"):
        SpiceConfig(strategy=strategy, **ADAM)


def refuse(folder: Path, *says: str, optimizer: Any = None, **options: Any) -> None:
    trainer = make_trainer(folder, **options)
    trainer.optimizer = optimizer
    with pytest.raises(ValueError) as caught:
        attach_spice(trainer, SpiceConfig(**SETTINGS, **ADAM))
    text = str(caught.value)
    assert all(part in text for part in ("gradient_preconditioning='adam'", "Fix: ", *says)), text


def test_other_optimizers_are_refused_when_attached(tmp_path: Path) -> None:
    refuse(tmp_path, "TrainingArguments has optim='adafactor'", "optim='adamw_torch_fused'", optim="adafactor")
    model = tiny_lora_model()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for optimizer, says in (
        (torch.optim.SGD(weights, lr=0.1), "SGD is not PyTorch's Adam or AdamW"),
        (torch.optim.AdamW(weights, amsgrad=True), "amsgrad=True"),
    ):
        refuse(tmp_path, says, model=model, optimizer=optimizer)


def test_the_setting_is_json(tmp_path: Path) -> None:
    config = SpiceConfig(**ADAM)
    assert SpiceConfig(**json.loads(json.dumps(config.to_dict()))) == config
