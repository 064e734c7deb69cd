"""Other people's code around a trainer with SPICE: each thing it does has one outcome, pinned here."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.trainer.objective import check_objective
from tests.support.models import tiny_lora_model
from tests.support.traces import trainer_state
from tests.support.trainers import (
    SETTINGS,
    collate,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

CONFIG = SpiceConfig(**SETTINGS)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("with_proxy", [False, True])
def test_a_trainer_is_copied_and_pickled_with_spice(how: str, with_proxy: bool, tmp_path: Path) -> None:
    """As without: a copy has a model, records and picks of its own, and the first one is left alone."""
    # A process in which something has trained cannot pickle any accelerator: this state holds the weak references.
    GradientState._shared_state.clear()
    trainer = make_trainer(tmp_path / "first", lora_dropout=0.3, max_steps=3)
    proxy = ProxyModel(tiny_lora_model(seed=3)) if with_proxy else None
    attach_spice(trainer, CONFIG, proxy=proxy, verify=False)
    before = trainable_weights(trainer.model)
    copied = copy.deepcopy(trainer) if how == "deepcopy" else pickle.loads(pickle.dumps(trainer))
    assert copied._spice is not trainer._spice and copied._spice.trainer is copied
    assert copied._spice.handle is not trainer._spice.handle and copied._spice.handle.sampler is copied._spice.sampler
    assert copied._spice.callback in copied.callback_handler.callbacks
    copied.args.output_dir = str(tmp_path / "copy")
    torch.manual_seed(1)
    copied.train()
    assert same_weights(trainable_weights(trainer.model), before)
    assert not (tmp_path / "first" / "spice").exists()
    torch.manual_seed(1)
    trainer.train()
    assert trained_indices(tmp_path / "copy") == trained_indices(tmp_path / "first")
    assert same_weights(trainable_weights(copied.model), trainable_weights(trainer.model))
    # Also a trainer that has trained, with everything a run left behind.
    again = copy.deepcopy(trainer)
    # What selects holds the first trainer's model; the copy is bound to its own when it trains.
    with pytest.raises(RuntimeError, match="has no model and dataset yet"):
        _ = again._spice.sampler.selector
    again.args.output_dir = str(tmp_path / "again")
    again.train()
    assert len(trained_indices(tmp_path / "again")) == 3


# The user's own loader, loss and callbacks


class InOrder(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        rows = tiny_rows(30, seed=5)
        return DataLoader(rows, batch_size=4, sampler=SequentialSampler(rows), collate_fn=self.data_collator)


class OwnSampler(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("case", ["loader", "sampler", "bound", "none"])
def test_a_sampler_of_the_users_is_replaced_with_a_warning(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = {"loader": InOrder, "sampler": OwnSampler}
    trainer = make_trainer(tmp_path, trainer_class=classes.get(case, Trainer))
    if case == "bound":
        trainer.get_train_dataloader = lambda: DataLoader(tiny_rows(30, seed=5), batch_size=4, collate_fn=collate)
    attach_spice(trainer, CONFIG, verify=False)
    names = {
        "loader": "InOrder.get_train_dataloader",
        "sampler": "OwnSampler._get_train_sampler",
        "bound": "trainer.get_train_dataloader",
    }
    said = f"SPICE: {names.get(case)} keeps its dataset and collator, but the order of its rows is replaced by"
    assert [text.startswith(said) for text in warnings_of(caplog)] == ([True] if case in names else [])
    assert trainer._spice.callback.dataset_fingerprint is None
    trainer.train()
    num_rows = 30 if case in ("loader", "bound") else 55
    candidates = [row for line in read_records(tmp_path, "pools") for row in line["candidates"]]
    assert sorted(candidates) == list(range(num_rows))


def test_a_loader_that_has_no_rows_by_number_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.get_train_dataloader = lambda: iter([collate(tiny_rows(4))])
    with pytest.raises(
        ValueError, match="get_train_dataloader gave a list_iterator over a NoneType, which has no rows"
    ):
        attach_spice(trainer, CONFIG)


class OwnStep(Trainer):
    """Overrides what people override."""

    steps = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps += 1
        return super().training_step(*args, **kwargs)


def test_a_loss_and_a_step_of_the_users_are_run_for_training_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=OwnStep, spice={}, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.steps == 2 * trainer.state.global_step == 2 * len(trained_indices(tmp_path))


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_callback_that_stops_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is scored for the step that does not come; the records and the summary are those of the steps done."""
    make_trainer(tmp_path / "whole", spice={}).train()
    trainer = make_trainer(
        tmp_path / "stopped", spice={}, callbacks=[StopAfter(2)], save_strategy="steps", save_steps=1
    )
    capsys.readouterr()
    trainer.train()
    assert trainer.state.global_step == 2
    for name in ("selections", "pools", "trained"):
        lines = read_records(tmp_path / "stopped", name)
        assert lines == [line for line in read_records(tmp_path / "whole", name) if line["step"] < 2]
    assert "SPICE summary" in capsys.readouterr().out
    resumed = make_trainer(tmp_path / "stopped", spice={})
    resumed.train(resume_from_checkpoint=True)
    assert trained_indices(tmp_path / "stopped") == trained_indices(tmp_path / "whole")


# Trainers that start over by themselves


class FailsWithLargeBatches(TrainerCallback):
    """Runs out of memory in the second step, as long as a step has more than three rows."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.attempts: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.attempts.append(self.trainer._train_batch_size)
            if self.trainer._train_batch_size > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("resumed", [False, True])
def test_records_of_an_attempt_with_too_large_a_batch_are_discarded(resumed: bool, tmp_path: Path) -> None:
    callback = FailsWithLargeBatches()
    trainer = make_trainer(
        tmp_path, callbacks=[callback], auto_find_batch_size=True, spice={}, save_strategy="steps", save_steps=1
    )
    callback.trainer = trainer
    if resumed:
        make_trainer(tmp_path, spice={}, max_steps=1).train()
    trainer.train()
    assert callback.attempts == [4, 3]
    trained = trained_indices(tmp_path)
    assert {len(indices) for indices in trained[:-1]} == {3} and len(trained) == trainer.state.global_step
    assert [line["step"] for line in read_records(tmp_path, "costs")] == list(range(len(trained)))
    # An earlier run's records are another matter: they are kept.
    assert [path.name for path in (tmp_path / "spice").glob("trained.*.jsonl")] == ["trained.1.jsonl"] * resumed
    assert not (tmp_path / "spice" / "trained.2.jsonl").exists()


def test_an_error_that_is_no_lack_of_memory_keeps_the_records(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        make_trainer(tmp_path, callbacks=[Fails()], auto_find_batch_size=True, spice={}).train()
    assert len(trained_indices(tmp_path)) == 1


@pytest.mark.parametrize("with_proxy", [False, True])
def test_every_trial_of_a_search_has_its_own_records(with_proxy: bool, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer = Trainer(
        model_init=lambda: tiny_lora_model(),
        args=make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=2).args,
        train_dataset=tiny_dataset(),
        eval_dataset=tiny_dataset(8),
        data_collator=collate,
    )
    proxy = ProxyModel(tiny_lora_model(seed=3), learning_rate=0.05) if with_proxy else None
    attach_spice(trainer, CONFIG, proxy=proxy, verify=False)
    rates = iter([1e-2, 3e-2, 1e-2])
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", *[next(rates)] * 2)},
        backend="optuna",
        n_trials=3,
        direction="minimize",
    )
    runs = [tmp_path / f"run-{number}" for number in range(3)]
    assert [len(trained_indices(run)) for run in runs] == [3, 3, 3]
    assert not (tmp_path / "spice").exists()
    for run in runs:
        assert (run / "checkpoint-2" / "spice" / "state.json").exists()
    # Equal trials are equal: neither the model nor a proxy remembers the trial before.
    first, other, again = ((run / "spice" / "selections.jsonl").read_bytes() for run in runs)
    assert first == again
    assert with_proxy or first != other


# Trainers of other objectives


@pytest.fixture
def trl_trainers() -> Iterator[list[type]]:
    trl = pytest.importorskip("trl")
    names = ("DPOTrainer", "RewardTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "GKDTrainer")
    yield [getattr(trl, name) for name in names if hasattr(trl, name)]


def test_trl_trainers_of_other_objectives_are_refused(trl_trainers: list[type], tmp_path: Path) -> None:
    assert len(trl_trainers) >= 4
    for trainer_class in trl_trainers:
        trainer = make_trainer(tmp_path)
        trainer.__class__ = type("Mine", (trainer_class,), {})
        before = trainer_state(trainer)
        with pytest.raises(ValueError, match=f"and {trainer_class.__name__} trains another objective .*SFTTrainer"):
            attach_spice(trainer, CONFIG)
        assert trainer_state(trainer) == before


def test_a_subclass_of_sft_trainer_with_a_loss_of_trls_own_is_refused() -> None:
    from trl import SFTTrainer

    class GKDTrainer(SFTTrainer):
        pass

    GKDTrainer.__module__ = "trl.experimental.gkd.gkd_trainer"
    with pytest.raises(ValueError, match="and GKDTrainer trains another objective"):
        check_objective(object.__new__(type("Mine", (GKDTrainer,), {})))
    check_objective(object.__new__(type("Mine", (SFTTrainer,), {"model": None})))


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="an encoder-decoder model. SPICE shifts labels by one.*decoder-only"):
        attach_spice(trainer, CONFIG)


def test_a_decoder_trains_under_seq2seq_trainer(tmp_path: Path) -> None:
    # The base class of other tools' trainers of decoder-only models.
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    runs = []
    for cls in (Trainer, Seq2SeqTrainer):
        trainer = make_trainer(tmp_path / cls.__name__)
        arguments = Seq2SeqTrainingArguments(**{**trainer.args.to_dict(), "use_cpu": True})
        trainer = cls(
            trainer.model, arguments, train_dataset=trainer.train_dataset, data_collator=trainer.data_collator
        )
        attach_spice(trainer, CONFIG)
        trainer.train()
        assert trainer.state.global_step == trainer.state.max_steps
        runs.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert runs[0] == runs[1] and runs[0]
