"""`hyperparameter_search` over SPICE's settings: each trial's run has its own, and the trainer its own again after."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from spice_trainer import SpiceConfig, attach_spice, detach_spice
from tests.support.models import tiny_lora_model
from tests.support.trainers import collate, make_trainer, read_records, tiny_dataset, trained_indices

CONFIG = SpiceConfig(pool_size=10, num_selected=4, pools_per_step=1)


def _trainer(folder: Path, config: SpiceConfig = CONFIG) -> Trainer:
    trainer = Trainer(
        model_init=lambda: tiny_lora_model(),
        args=make_trainer(folder, max_steps=2).args,
        train_dataset=tiny_dataset(),
        eval_dataset=tiny_dataset(8),
        data_collator=collate,
    )
    attach_spice(trainer, config, verify=False)
    return trainer


def test_each_trial_has_its_own_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = _trainer(tmp_path / "search")
    values = [(2, 1.0, 1e-2), (3, 50.0, 3e-2)]
    draws = iter(values)

    def space(trial: Any) -> dict[str, Any]:
        number, alpha, rate = next(draws)
        return {
            "num_selected": trial.suggest_int("num_selected", number, number),
            "fisher_alpha": trial.suggest_float("fisher_alpha", alpha, alpha),
            "learning_rate": trial.suggest_float("learning_rate", rate, rate),
        }

    with caplog.at_level(logging.WARNING):
        best = trainer.hyperparameter_search(hp_space=space, backend="optuna", n_trials=2, direction="minimize")
    assert "no corresponding field" not in caplog.text
    assert set(best.hyperparameters) == {"num_selected", "fisher_alpha", "learning_rate"}
    for number, (num_selected, alpha, rate) in enumerate(values):
        run = tmp_path / "search" / f"run-{number}"
        assert [len(indices) for indices in trained_indices(run)] == [num_selected] * 2
        # The very run of one who attaches these settings.
        alone = _trainer(
            tmp_path / f"alone-{number}",
            SpiceConfig(**CONFIG.to_dict() | {"num_selected": num_selected, "fisher_alpha": alpha}),
        )
        alone.args.learning_rate = rate
        alone.train()
        assert read_records(run, "selections") == read_records(tmp_path / f"alone-{number}", "selections")
    trainer.train()
    assert trainer._spice.sampler.config == CONFIG
    assert [len(indices) for indices in trained_indices(tmp_path / "search")] == [4, 4]


@pytest.mark.oldest
@pytest.mark.parametrize("backend", [HPSearchBackend.RAY, HPSearchBackend.WANDB])
def test_values_that_a_backend_hands_over(backend: HPSearchBackend, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.hp_search_backend, trainer.hp_space = backend, None
    trial = {"num_selected": np.int64(2), "learning_rate": 0.5}
    trainer._hp_search_setup(trial)
    assert trainer._spice.sampler.config == SpiceConfig(**CONFIG.to_dict() | {"num_selected": 2})
    assert type(trainer._spice.sampler.config.num_selected) is int
    assert trainer.args.learning_rate == 0.5 and not hasattr(trainer.args, "num_selected")
    assert trial == {"num_selected": 2, "learning_rate": 0.5} and trainer._trial is trial
    # The next trial begins from what was attached.
    trainer._hp_search_setup({"fisher_alpha": 2.0})
    assert trainer._spice.sampler.config == SpiceConfig(**CONFIG.to_dict() | {"fisher_alpha": 2.0})
    trainer.hp_search_backend = None
    trainer._hp_search_setup(None)
    assert trainer._spice.sampler.config == CONFIG


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_selected": 11}, "num_selected=11"),
        ({"proxy_learning_rate": 0.1}, "varies proxy_learning_rate, and the proxy was made when SPICE was attached"),
    ],
)
def test_settings_that_no_trial_can_have(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.hp_search_backend, trainer.hp_space = HPSearchBackend.RAY, None
    with pytest.raises(ValueError, match=message):
        trainer._hp_search_setup(values)


@pytest.mark.oldest
def test_best_values_set_as_arguments_are_told_to_have_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path)
    for name, value in {"num_selected": 2, "pool_size": 10, "learning_rate": 0.1}.items():
        setattr(trainer.args, name, value)
    trainer.train()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message for message in told if "no effect" in message] == [
        "SPICE: args.num_selected=2 has no effect, num_selected stays 4. Settings are read when SPICE is attached. "
        "Fix: call detach_spice(trainer), then attach_spice(trainer, SpiceConfig(num_selected=2))."
    ]
    detach_spice(trainer)
