"""What the settings that look into the optimizer have in common: resuming, proxies, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from spice_trainer import ProxyModel, SpiceConfig, SpiceSampler, attach_spice
from tests.gradients.test_preconditioning import OPTIONS
from tests.support.models import tiny_lora_model, tiny_model
from tests.support.trainers import (
    SETTINGS,
    collate,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_tokenizer,
    trainable_weights,
    trained_indices,
)

SPICE: dict[str, dict[str, Any]] = {
    "gradient_preconditioning": {**SETTINGS, "gradient_preconditioning": "adam"},
    "conflict_reference": {**SETTINGS, "conflict_reference": "momentum", "conflict_penalty": 3.0},
}


class OwnOptimizer(Trainer):
    """Makes an optimizer of its own when training begins."""

    made: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = self.made(weights)
        return self.optimizer


@pytest.mark.parametrize("setting", SPICE)
def test_resuming_is_bit_identical(setting: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.3, **OPTIONS}
    whole = make_trainer(tmp_path / "whole", spice=SPICE[setting], **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", spice=SPICE[setting], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_weights(trainable_weights(whole.model), trainable_weights(resumed.model))
    for name in ("pools", "selections", "trained"):
        files = [tmp_path / run / "spice" / f"{name}.jsonl" for run in ("whole", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("overlap_scoring", [False, True])
@pytest.mark.parametrize("setting", SPICE)
def test_a_proxy_has_the_state_of_its_own_optimizer(setting: str, overlap_scoring: bool, tmp_path: Path) -> None:
    """A copy of the target with the target's optimizer picks what the target picks, whatever the target's is."""
    rate = {"learning_rate": 1e-2, "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    make_trainer(tmp_path / "alone", spice=SPICE[setting], model=tiny_lora_model(), **rate).train()
    proxy = ProxyModel(tiny_lora_model(), learning_rate=1e-2, weight_decay=0.0, max_grad_norm=1.0)
    trainer = make_trainer(tmp_path / "proxy", optim="sgd", **(rate | {"learning_rate": 0.0}))
    config = SpiceConfig(**SPICE[setting], overlap_scoring=overlap_scoring)
    attach_spice(trainer, config, proxy=proxy, verify=False)
    trainer.train()
    assert trained_indices(tmp_path / "proxy") == trained_indices(tmp_path / "alone")
    conflicts, alone = (
        [pick["conflict"] for pick in read_records(tmp_path / run, "selections")] for run in ("proxy", "alone")
    )
    assert conflicts == pytest.approx(alone, abs=1e-4) and any(alone)


# What is refused


@pytest.mark.parametrize("setting", SPICE)
def test_partitioned_optimizers_are_refused(setting: str, tmp_path: Path) -> None:
    for name, enabled in (("FSDP", "is_fsdp_enabled"), ("DeepSpeed", "is_deepspeed_enabled")):
        trainer = make_trainer(tmp_path)
        setattr(trainer, enabled, True)
        with pytest.raises(ValueError, match=rf"{name} partitions it. Fix: leave {setting} out, use DDP"):
            attach_spice(trainer, SpiceConfig(**SPICE[setting]))
        attach_spice(trainer, SpiceConfig(**SPICE[setting]), proxy=ProxyModel(tiny_lora_model()), verify=False)


@pytest.mark.parametrize("setting", SPICE)
def test_an_optimizer_that_is_made_later_is_looked_at_before_the_first_step(setting: str, tmp_path: Path) -> None:
    for made, says in (
        (lambda weights: torch.optim.RMSprop(weights, lr=0.1), "RMSprop is not PyTorch's Adam"),
        # Whose first layer is warned of, and does not score.
        (lambda weights: torch.optim.AdamW(weights[1:]), None),
        (torch.optim.Adam, None),
    ):
        trainer_class = type("OwnOptimizer", (OwnOptimizer,), {"made": staticmethod(made)})
        model = tiny_lora_model()
        before = copy.deepcopy(trainable_weights(model))
        trainer = make_trainer(tmp_path, spice=SPICE[setting], model=model, trainer_class=trainer_class)
        if says is None:
            trainer.train()
            assert not same_weights(before, trainable_weights(model))
            continue
        with pytest.raises(ValueError, match=says):
            trainer.train()
        assert same_weights(before, trainable_weights(model))


def test_a_loop_of_ones_own_with_a_named_proxy_needs_no_optimizer(tmp_path: Path) -> None:
    """The proxy has one; only a comparison with the target looks into the loop's."""
    tiny_model().save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    options = {"data_collator": collate, "per_device_train_batch_size": 4}
    for setting, spice in SPICE.items():
        named = {**spice, "proxy_model_name_or_path": str(tmp_path / "small")}
        sampler = SpiceSampler(SpiceConfig(**named))
        sampler.bind(tiny_lora_model(), tiny_dataset(), **options)
        assert len(sampler.run.select_step().indices) == 4
        compared = SpiceSampler(SpiceConfig(**named, proxy_check_pools=1))
        with pytest.raises(ValueError, match=rf"SpiceConfig: {setting}=.* there is no optimizer. Fix: pass `optim"):
            compared.bind(tiny_lora_model(), tiny_dataset(), **options)
