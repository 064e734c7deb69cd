"""Attaching and detaching: what a trainer gets, and that it gets all of its own back."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from spice_trainer import (
    ProxyModel,
    SpiceCallback,
    SpiceConfig,
    SpiceHandle,
    SpiceSampler,
    SpiceTrainer,
    SpiceTrainerMixin,
    attach_spice,
    detach_spice,
)
from spice_trainer.trainer.hooks import HOOKED_METHODS
from tests.support.models import tiny_lora_model
from tests.support.traces import trainer_state
from tests.support.trainers import (
    attach,
    collate,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
    training_options,
)

pytestmark = pytest.mark.oldest

CONFIG = SpiceConfig(pool_size=10, num_selected=4)


def _history(trainer: Trainer) -> list[dict[str, float]]:
    clocks = ("runtime", "per_second", "seconds", "overhead")
    return [{k: v for k, v in row.items() if not k.endswith(clocks) and k != "spice/overhead" and "seconds" not in k}
            for row in trainer.state.log_history]  # fmt: skip


# Attaching and detaching


@pytest.mark.parametrize("verify", [True, False])
def test_detaching_restores_every_attribute(tmp_path: Path, verify: bool) -> None:
    def noisy(rows: list[Any]) -> dict[str, torch.Tensor]:
        random.random(), torch.rand(1)
        return collate(rows)

    trainer = make_trainer(tmp_path, lora_dropout=0.3, data_collator=noisy)
    before = trainer_state(trainer)
    attach_spice(trainer, CONFIG, verify=verify)
    assert {*HOOKED_METHODS, "_spice"} == set(vars(trainer)) - set(before["attributes"])
    assert any(isinstance(callback, SpiceCallback) for callback in trainer.callback_handler.callbacks)
    attached = trainer_state(trainer)
    assert attached["model"] == before["model"] and attached["random"] == before["random"]
    detach_spice(trainer)
    assert trainer_state(trainer) == before


def test_methods_bound_by_the_user_are_called_and_put_back(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=3)
    called: list[str] = []

    def watched(name: str) -> Any:
        original = getattr(trainer, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        return method

    bound = {name: watched(name) for name in HOOKED_METHODS}
    for name, method in bound.items():
        setattr(trainer, name, method)
    before = trainer_state(trainer)
    attach_spice(trainer, CONFIG, verify=False)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert set(called) == set(HOOKED_METHODS)
    detach_spice(trainer)
    assert all(vars(trainer)[name] is method for name, method in bound.items())
    assert trainer_state(trainer)["callbacks"] == before["callbacks"]


def test_training_after_detaching_is_the_stock_trainers(tmp_path: Path) -> None:
    stock = make_trainer(tmp_path / "stock", lora_dropout=0.3)
    stock.train()
    detached = make_trainer(tmp_path / "detached", lora_dropout=0.3, spice=CONFIG, verify=True)
    detach_spice(detached)
    detached.train()
    assert same_weights(trainable_weights(stock.model), trainable_weights(detached.model))
    assert _history(stock) == _history(detached) and len(_history(stock)) == 15
    assert not (tmp_path / "detached" / "spice").exists()


def test_attaching_again(tmp_path: Path) -> None:
    once = make_trainer(tmp_path / "once", lora_dropout=0.3, spice=CONFIG)
    once.train()
    again = make_trainer(tmp_path / "again", lora_dropout=0.3, spice={"num_selected": 2})
    detach_spice(again)
    attach_spice(again, CONFIG, verify=False)
    again.train()
    assert trained_indices(tmp_path / "once") == trained_indices(tmp_path / "again")
    assert same_weights(trainable_weights(once.model), trainable_weights(again.model))
    assert _history(once) == _history(again)


def test_a_trained_trainer_can_be_detached_and_trained_without(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice=CONFIG)
    callbacks = len(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.state.max_steps == 6
    detach_spice(trainer)
    assert len(trainer.callback_handler.callbacks) == callbacks - 1
    assert not set(vars(trainer)) & {*HOOKED_METHODS, "_spice"}
    trainer.train()
    assert trainer.state.max_steps == 14
    assert not any(key.startswith("spice/") for row in trainer.state.log_history for key in row)
    assert len(read_records(tmp_path, "trained")) == 6


def test_train_twice_on_one_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice=CONFIG)
    trainer.train()
    first = read_records(tmp_path, "pools")
    trainer.train()
    second = read_records(tmp_path, "pools")
    # The second run begins at step 0 of the same schedule, at the weights the first one left.
    assert [line["candidates"] for line in first] == [line["candidates"] for line in second]
    assert [line["step"] for line in second] == list(range(6))
    assert [line["information"] for line in first] != [line["information"] for line in second]
    renamed = {"selections.1.jsonl", "pools.1.jsonl", "trained.1.jsonl", "costs.1.jsonl"}
    renamed |= {"ledger.1.json", "run.1.json"}
    assert {path.name for path in (tmp_path / "spice").iterdir() if ".1." in path.name} == renamed
    assert len((tmp_path / "spice" / "pools.1.jsonl").read_text().splitlines()) == 6
    assert len([row for row in trainer.state.log_history if "spice/information" in row]) == 6


def test_attaching_twice_with_other_settings_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice=CONFIG)
    before = trainer_state(trainer)
    with pytest.raises(
        ValueError, match=r"already, with other settings: num_selected is 4 and would be 3. Call detach"
    ):
        attach_spice(trainer, replace(CONFIG, num_selected=3))
    with pytest.raises(ValueError, match="already, with other settings: the proxy would be another"):
        attach_spice(trainer, CONFIG, proxy=ProxyModel(tiny_lora_model(seed=1)))
    assert trainer_state(trainer) == before
    detach_spice(trainer)
    with pytest.raises(ValueError, match="SPICE is not attached to this trainer, so there is nothing to detach"):
        detach_spice(trainer)


def test_the_handle_knows_the_run_and_detaches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    handle = attach_spice(trainer, CONFIG, verify=False)
    # 55 rows are six steps of ten candidates, the last of five.
    assert isinstance(handle, SpiceHandle) and handle.sampler.config == CONFIG
    assert (handle.plan.num_rows, handle.plan.total_steps, handle.plan.num_processes) == (55, 6, 1)
    assert handle.plan.feature_bytes == 10 * handle.plan.num_features * 4 and handle.totals.num_steps == 0
    trainer.args.max_steps = 2
    trainer.train()
    assert handle.plan.total_steps == 2
    assert (handle.totals.num_steps, handle.totals.num_selected, handle.totals.num_candidates) == (2, 8, 20)
    handle.detach()
    assert not hasattr(trainer, "_spice")
    with pytest.raises(ValueError, match="SPICE is not attached to this trainer, so there is nothing to detach"):
        handle.detach()
    other = attach_spice(trainer, CONFIG, verify=False)
    assert other is not handle
    with pytest.raises(ValueError, match="nothing to detach"):
        handle.detach()
    assert trainer._spice.handle is other, "an old handle detached what came after it"
    other.detach()


def test_attaching_twice_with_the_same_settings_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, spice=CONFIG)
    hooks, before = trainer._spice, trainer_state(trainer)
    handles = [attach_spice(trainer, replace(CONFIG)), attach_spice(trainer, SpiceSampler(CONFIG))]
    assert handles == [hooks.handle, hooks.handle]
    assert trainer._spice is hooks and trainer_state(trainer) == before
    assert "attached to this trainer already, with the same settings" in caplog.text
    trainer.train()
    assert len(read_records(tmp_path, "trained")) == 6


class Interrupts(TrainerCallback):
    """Ends the first run as Ctrl-C would, and tries to detach in the first and last of the next one's events."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.refused: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            raise KeyboardInterrupt
        self._detach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        with pytest.raises(
            RuntimeError, match="cannot be detached while the trainer trains: its loader deals"
        ) as found:
            self.trainer._spice.handle.detach()
        self.refused.append(str(found.value))


def test_an_interrupted_run_is_no_run(tmp_path: Path) -> None:
    """The Trainer's own flag stays set then; in a notebook one attaches and detaches and goes on."""
    callback = Interrupts()
    trainer = make_trainer(tmp_path, callbacks=[callback])
    for spice in (None, CONFIG):
        with pytest.raises(KeyboardInterrupt):
            attach(trainer, spice)
            trainer.train()
    assert trainer.is_in_train
    detach_spice(trainer)
    attach_spice(trainer, CONFIG, verify=False)
    callback.trainer = trainer
    trainer.train()
    assert len(callback.refused) == 2 and len(trained_indices(tmp_path)) == 6
    detach_spice(trainer)


@pytest.mark.parametrize("wrong", ["paper", {"pool_size": 10}, SpiceConfig, 3])
def test_settings_of_a_wrong_type_are_refused(wrong: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = trainer_state(trainer)
    with pytest.raises(TypeError, match="needs a SpiceConfig or a SpiceSampler, got .*Write `attach_spice"):
        attach_spice(trainer, wrong)
    assert trainer_state(trainer) == before
    with pytest.raises(TypeError, match="config must be a SpiceConfig, got"):
        SpiceSampler(wrong)


@pytest.mark.parametrize("wrong", [None, "trainer", tiny_lora_model, SimpleNamespace(args=None)])
def test_what_is_no_trainer_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"needs a transformers.Trainer or a subclass.*SpiceSampler\(config\).bind"):
        attach_spice(wrong, CONFIG)


# Classes


class RowsOfItsOwn(Trainer):
    """A subclass that trains on the second half of its dataset."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        dataset = self.train_dataset
        self.train_dataset = dataset.select(range(len(dataset) // 2, len(dataset)))
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset


class SpiceRowsOfItsOwn(SpiceTrainerMixin, RowsOfItsOwn):
    pass


def _arguments(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "model": tiny_lora_model(),
        "args": TrainingArguments(**training_options(tmp_path, **overrides)),
        "train_dataset": tiny_dataset(),
        "data_collator": collate,
    }


@pytest.mark.parametrize("settings", [CONFIG, SpiceSampler(CONFIG)], ids=["config", "sampler"])
@pytest.mark.parametrize("how", ["attach", "class"])
def test_every_way_in_picks_the_same(settings: Any, how: str, tmp_path: Path) -> None:
    make_trainer(tmp_path / "expected", spice=CONFIG).train()
    if how == "class":
        trainer = SpiceTrainer(**_arguments(tmp_path / "found"), sampler=settings)
    else:
        trainer = make_trainer(tmp_path / "found")
        attach_spice(trainer, settings)
    trainer.train()
    assert trained_indices(tmp_path / "found") == trained_indices(tmp_path / "expected")
    detach_spice(trainer)


def test_the_default_settings_are_spice_configs(tmp_path: Path) -> None:
    trainer = SpiceTrainer(**_arguments(tmp_path, per_device_train_batch_size=12))
    assert trainer._spice.sampler.config == SpiceConfig()


def test_a_subclass_keeps_its_own_loader(tmp_path: Path) -> None:
    trainer = SpiceRowsOfItsOwn(**_arguments(tmp_path), sampler=CONFIG)
    seen: list[list[int]] = []
    training_step = trainer.training_step

    def watched(model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        seen.extend(row[kept].tolist() for row, kept in rows)
        return training_step(model, inputs, *args)

    trainer.training_step = watched
    trainer.train()
    assert trainer.state.max_steps == 3  # 28 rows
    own = [row["input_ids"] for row in tiny_rows()[27:]]
    assert seen == [own[index] for step in trained_indices(tmp_path) for index in step]


def test_spice_sft_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    from spice_trainer import SpiceSFTTrainer
    from tests.support.trainers import make_sft_trainer, tiny_tokenizer

    expected = make_sft_trainer(tmp_path / "expected", spice=CONFIG, max_steps=2)
    expected.train()
    trainer = SpiceSFTTrainer(
        model=tiny_lora_model(),
        args=SFTConfig(**training_options(tmp_path / "found", bf16=False, completion_only_loss=True, max_steps=2)),
        train_dataset=expected.train_dataset,
        processing_class=tiny_tokenizer(),
        sampler=SpiceSampler(CONFIG),
    )
    assert isinstance(trainer, SFTTrainer)
    trainer.train()
    assert trained_indices(tmp_path / "found") == trained_indices(tmp_path / "expected")
    assert trainer._spice.sampler.schedule.shape.equal_slots is False


def test_a_method_wrapped_after_attaching_is_left_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, spice=CONFIG)
    attached_log, seen = trainer.log, []

    def log(logs: dict[str, float], *args: Any) -> None:
        seen.append(dict(logs))
        attached_log(logs, *args)

    trainer.log = log
    with caplog.at_level("WARNING", logger="spice_trainer"):
        detach_spice(trainer)
    assert "trainer.log was replaced after attach_spice and is left as it is" in caplog.text
    assert trainer.log is log and "get_train_dataloader" not in vars(trainer)
    trainer.train()
    assert any("loss" in logs for logs in seen)
    assert not any(key.startswith("spice/") for row in trainer.state.log_history for key in row)


def test_a_sampler_of_another_trainer_is_refused(tmp_path: Path) -> None:
    sampler = SpiceSampler(CONFIG)
    first, second = make_trainer(tmp_path / "first"), make_trainer(tmp_path / "second")
    attach_spice(first, sampler)
    with pytest.raises(ValueError, match="This SpiceSampler is attached to another trainer"):
        attach_spice(second, sampler)
    detach_spice(first)
    attach_spice(second, sampler)
