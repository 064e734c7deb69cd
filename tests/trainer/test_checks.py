"""Where the refusals and warnings of the table of bad input (`tests/bad_input`) end: what is right beside them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import spice_trainer.scoring.memory
from spice_trainer import SpiceConfig, attach_spice
from spice_trainer.recording.summary import warn_of_share
from spice_trainer.sampling.schedule import build_schedule
from spice_trainer.trainer.inputs import build_trainer_schedule
from tests.bad_input.settings import ADAPTIVE, OwnLoss
from tests.support.trainers import make_sft_trainer, make_trainer, tiny_rows
from tests.support.versions import before

pytestmark = pytest.mark.oldest


def test_adaptive_stopping_is_taken_where_the_loss_counts_tokens(tmp_path: Path) -> None:
    """The refusals are about the loss alone: the same settings attach where it is normalised."""
    trainer = make_trainer(tmp_path / "plain", spice=ADAPTIVE)
    assert not build_trainer_schedule(trainer, trainer._spice.sampler.config, tiny_rows()).shape.equal_slots
    trainer = make_sft_trainer(tmp_path / "sft", spice=ADAPTIVE)
    assert not build_trainer_schedule(trainer, trainer._spice.sampler.config, tiny_rows()).shape.equal_slots
    # A trainer that says that it scales its loss is believed.
    OwnLoss.loss_is_scaled_for_ga = True
    try:
        make_trainer(tmp_path / "own", spice=ADAPTIVE, trainer_class=OwnLoss)
    finally:
        del OwnLoss.loss_is_scaled_for_ga


def test_the_sketch_that_is_said_to_fit_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spice_trainer.scoring.memory, "free_memory", lambda device: 100_000)
    attach_spice(make_trainer(tmp_path), SpiceConfig(pool_size=10, num_selected=4, sketch_dim=512))


def test_shares_of_a_run_and_unused_arguments_are_not_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(
        tmp_path,
        spice={},
        save_strategy="epoch",
        save_steps=500,
        eval_steps=500,
        logging_strategy="steps",
        logging_steps=0.5,
        **{"warmup_ratio" if before("transformers", "5") else "warmup_steps": 0.1},
        max_steps=6,
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("num_selected", "batch_size", "warned"), [(4, 5, False), (4, 6, True), (4, 2, True)])
def test_a_share_far_from_the_one_asked_for(
    num_selected: int, batch_size: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(
        tmp_path, spice={"num_selected": num_selected}, per_device_train_batch_size=batch_size, max_steps=1
    )
    trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = {
        6: "SPICE: a step of 6 samples picks 30.0% of 2 pool(s) of 10, where num_selected=4 asks for 40.0%. Set "
        "pool_size=8 with num_selected=3 for the share asked for, or a batch size that is a multiple of 4.",
        2: "SPICE: a step of 2 samples picks 20.0% of 1 pool(s) of 10, where num_selected=4 asks for 40.0%. Set "
        "pool_size=5 with num_selected=2 for the share asked for, or a batch size that is a multiple of 4.",
    }
    assert warnings == ([expected[batch_size]] if warned else [])


@pytest.mark.parametrize(
    ("settings", "warned"), [({}, False), ({"num_selected": 11}, True), ({"pool_size": 96}, True)]
)
def test_the_share_of_the_defaults_is_told_and_not_warned_about(settings: dict[str, int], warned: bool) -> None:
    """With 16 samples a step 12 of 120 are 16 of 120, and the user asked for neither."""
    config = SpiceConfig(**settings)
    schedule = build_schedule(
        config, 10_000, per_device_train_batch_size=16, num_slots=1, token_normalized=True, drop_last=False, seed=0
    )
    assert schedule.shape.effective_share > 1.25 * schedule.shape.requested_share
    assert (warn_of_share(schedule, config) is not None) is warned
