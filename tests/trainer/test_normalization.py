"""Whether a loss is divided by the step's label tokens is tried on the trainer's own loss, which leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Trainer

from spice_trainer.data.rows import collate_row
from spice_trainer.trainer import normalization
from spice_trainer.trainer.normalization import is_token_normalized
from tests.bad_input.settings import OwnLoss, mean_loss_model
from tests.support.models import tiny_lora_model
from tests.support.traces import trainer_state
from tests.support.trainers import collate, make_sft_trainer, make_trainer, tiny_rows
from tests.support.versions import before

pytestmark = pytest.mark.oldest

ROWS = [collate_row(index, row, collate) for index, row in enumerate(tiny_rows(4))]


class PassesOn(Trainer):
    """As in LLaMA-Factory, ms-swift and DataFlex: something of its own around the Trainer's loss."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


class OfADecoder(Seq2SeqTrainer):
    def __init__(self, *, args: Any, **options: Any) -> None:
        args.generation_config = None
        super().__init__(args=args, **options)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs)


class TakesNoCount(Trainer):
    """It could not train either."""

    def compute_loss(self, model: Any, inputs: Any) -> Any:
        return super().compute_loss(model, inputs)


class WithAPenalty(Trainer):
    """The likelihood is divided, what comes beside it is not."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) + 0.5


class Counts(Trainer):
    """It counts and draws, and leaves the model in another mode, as nobody should."""

    num_calls = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        self.seen = inputs.pop("attention_mask")
        vars(self).setdefault("totals", {}).setdefault("train", []).append(float(torch.rand(1)))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        model.train()
        return loss


def _mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _total(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return _mean(outputs, labels) * (labels[:, 1:] != -100).sum() / num_items_in_batch


def _ignoring() -> Any:
    """A model that takes whatever it is given, and divides by its own tokens."""
    model = tiny_lora_model()
    base = model.get_base_model()
    base.loss_function = lambda logits, labels, vocab_size, **kwargs: _mean(SimpleNamespace(logits=logits), labels)
    return model


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "Trainer": ({}, True),
    "a model without loss arguments": ({"model": mean_loss_model}, False),
    "a model that ignores them": ({"model": _ignoring}, False),
    "a subclass that passes on": ({"trainer_class": PassesOn}, True),
    "a Seq2SeqTrainer's": ({"trainer_class": OfADecoder}, True),
    "a subclass that drops": ({"trainer_class": OwnLoss}, False),
    "a subclass that takes none": ({"trainer_class": TakesNoCount}, False),
    "a penalty beside": ({"trainer_class": WithAPenalty}, True),
    "a function that divides": ({"compute_loss_func": _total}, True),
    "a function that averages": ({"compute_loss_func": _mean}, False),
    "label smoothing": ({"label_smoothing_factor": 0.1}, not before("transformers", "5.15")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_tried(case: str, tmp_path: Path) -> None:
    options, expected = CASES[case]
    trainer = make_trainer(
        tmp_path, **{name: value() if name == "model" else value for name, value in options.items()}
    )
    state = trainer_state(trainer)
    assert is_token_normalized(trainer, ROWS) is expected
    assert trainer_state(trainer) == state
    # In mid-run there are no rows at hand, and the answer is known.
    assert is_token_normalized(trainer) is expected


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("tried in mid-run")


def test_a_loss_that_is_set_on_the_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    own = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: own(*args, **kwargs)
    assert is_token_normalized(trainer, ROWS)
    trainer.compute_loss = lambda model, inputs, num_items_in_batch=None: own(model, inputs)
    assert not is_token_normalized(trainer, ROWS), "another loss, and the old answer"


def test_sft_trainers_metrics_are_as_before(tmp_path: Path) -> None:
    trainer = make_sft_trainer(tmp_path)
    metrics = copy.deepcopy(trainer._metrics)
    tokens = getattr(trainer, "_total_train_tokens", None)
    state = trainer_state(trainer)
    assert is_token_normalized(trainer, ROWS)
    assert trainer._metrics == metrics and getattr(trainer, "_total_train_tokens", None) == tokens
    assert trainer_state(trainer) == state


def test_trying_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, trainer_class=Counts, lora_dropout=0.3)
    trainer.totals = {"train": [1.0]}
    trainer.model.eval()
    trainer.model.get_base_model().model.layers[0].train()
    state, attributes, gather = trainer_state(trainer), dict(vars(trainer)), trainer.accelerator.gather
    assert is_token_normalized(trainer, ROWS)
    assert trainer.totals == {"train": [1.0]} and vars(trainer) == attributes and trainer.num_calls == 0
    assert trainer_state(trainer) == state
    assert trainer.accelerator.gather == gather and "gather" not in vars(trainer.accelerator)
    # Once for a trainer.
    monkeypatch.setattr(normalization, "_try", _refuse)
    assert is_token_normalized(trainer, ROWS)


def test_what_the_trainer_says_is_believed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, trainer_class=OwnLoss)
    trainer.loss_is_scaled_for_ga = True
    assert is_token_normalized(trainer, ROWS)
    trainer.loss_is_scaled_for_ga = False
    assert not is_token_normalized(trainer, ROWS)


def test_processes_that_count_their_own_tokens_do_not_divide_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, average_tokens_across_devices=False)
    assert is_token_normalized(trainer, ROWS)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    assert not is_token_normalized(trainer, ROWS)


@pytest.mark.parametrize(("trainer_class", "expected"), [(Trainer, True), (PassesOn, False)])
def test_a_loss_that_cannot_be_tried_is_read(trainer_class: Any, expected: bool, tmp_path: Path) -> None:
    """Without a labelled row, or with sharded weights: what is known of the libraries' own classes."""
    trainer = make_trainer(tmp_path, trainer_class=trainer_class)
    assert is_token_normalized(trainer) is expected
