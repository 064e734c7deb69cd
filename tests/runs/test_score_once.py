"""Every row scored once, after some steps on random rows: what is picked from then on, what is run, and resumes."""

import shutil

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from spice_trainer.gradients.hidden_states import HiddenStates
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.scoring import once
from spice_trainer.scoring.store import ScoreStore
from tests.subset.test_select import picks as subset_picks
from tests.subset.test_select import select
from tests.support.trainers import (
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

RULES = [
    {"strategy": "spice"},
    {"strategy": "matching", "gradient_normalization": "unit"},
    {"strategy": "less", "validation_rows": 4},
    {"strategy": "loss"},
    {"strategy": "ifd"},
    {"strategy": "targeted_matching"},
    {"strategy": "targeted_matching", "matching_features": "gradients"},
]
NAMES = [" ".join(rule.values() if "validation_rows" not in rule else ["less"]) for rule in RULES]


def run(folder, rule, *, after=0, resume=None, train_dataset=None, **options):
    rule = {"pools_per_step": 1, "pool_size": 10, "num_selected": 4} | rule
    rule |= {} if after is None else {"score_once_after": after}
    trainer = make_trainer(
        folder,
        spice=rule,
        train_dataset=tiny_dataset() if train_dataset is None else train_dataset,
        eval_dataset=tiny_dataset(6, seed=5) if rule["strategy"] == "less" else None,
        validation_dataset=tiny_rows(6, seed=5) if rule["strategy"] == "targeted_matching" else None,
        **({"save_strategy": "steps", "save_steps": 2} | options),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_first_step_picks_what_it_would_without(rule, tmp_path):
    """The weights are the same then; stored features have 11 bits."""
    run(tmp_path / "once", rule, max_steps=1)
    run(tmp_path / "online", rule, after=None, max_steps=1)
    assert trained_indices(tmp_path / "once") == trained_indices(tmp_path / "online")
    once, online = (read_records(tmp_path / name, "selections") for name in ("once", "online"))
    for first, second in zip(once, online, strict=True):
        assert first.keys() == second.keys()
        for key, value in second.items():
            assert first[key] == (pytest.approx(value, rel=2e-3, abs=1e-4) if isinstance(value, float) else value)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_later_steps_pick_by_the_weights_of_then(rule, tmp_path):
    """As a run without training does, whose weights stay those of the step that scored."""
    run(tmp_path / "once", rule, num_train_epochs=2)
    run(tmp_path / "still", rule, after=None, num_train_epochs=2, learning_rate=0.0)
    assert trained_indices(tmp_path / "once") == trained_indices(tmp_path / "still")


def test_the_steps_before_are_random(tmp_path):
    run(tmp_path / "once", RULES[0], after=3)
    run(tmp_path / "random", {"strategy": "random"}, after=None)
    once, random = (trained_indices(tmp_path / name) for name in ("once", "random"))
    assert once[:3] == random[:3] and once[3:] != random[3:]
    # The two runs had the same weights after three steps.
    first = next(line for line in read_records(tmp_path / "once", "pools") if line["step"] == 3)
    assert first["information"] is not None and read_records(tmp_path / "once", "pools")[0]["information"] is None


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_nothing_is_scored_afterwards(rule, tmp_path, monkeypatch):
    calls = []
    for owner, name in ((SampleGradients, "compute"), (SampleGradients, "losses"), (HiddenStates, "compute")):
        original = getattr(owner, name)

        def note(self, inputs, labels, *rest, original=original):
            calls.append(len(labels))
            return original(self, inputs, labels, *rest)

        monkeypatch.setattr(owner, name, note)
    trainer = run(tmp_path, rule, num_train_epochs=3)
    num_rows, per_row = len(trainer.train_dataset), 2 if rule["strategy"] == "ifd" else 1
    labelled = sum(any(label != -100 for label in row["labels"][1:]) for row in trainer.train_dataset)
    of_validation = {"less": 4, "targeted_matching": 6}.get(rule["strategy"], 0)
    assert labelled <= num_rows and sum(calls) == labelled * per_row + of_validation
    costs = read_records(tmp_path, "costs")
    assert costs[0]["tokens_scored"] > 0 and {line["tokens_scored"] for line in costs[1:]} == {0}


@pytest.mark.parametrize("checkpoint", [2, 4, 6])
@pytest.mark.parametrize("rule", [RULES[2], RULES[5], RULES[6]], ids=[NAMES[2], NAMES[5], NAMES[6]])
def test_resume_is_bit_identical(rule, checkpoint, tmp_path):
    options = {"after": 3, "num_train_epochs": 2, "lora_dropout": 0.3}
    whole = run(tmp_path / "run", rule, **options)
    records = {name: read_records(tmp_path / "run", name) for name in ("selections", "pools", "trained")}
    resumed = run(tmp_path / "run", rule, resume=str(tmp_path / "run" / f"checkpoint-{checkpoint}"), **options)
    assert same_weights(trainable_weights(whole.model), trainable_weights(resumed.model))
    assert records == {name: read_records(tmp_path / "run", name) for name in records}


def test_interrupted_scoring_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(once, "_ROWS_PER_WRITE", 10)
    whole = run(tmp_path / "whole", RULES[1], after=3)
    append, written = ScoreStore.append, []

    def interrupt(self, rows, hashes):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(len(hashes))
        append(self, rows, hashes)

    monkeypatch.setattr(ScoreStore, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", RULES[1], after=3)
    monkeypatch.setattr(ScoreStore, "append", lambda self, *args: (written.append(len(args[1])), append(self, *args)))
    resumed = run(tmp_path / "run", RULES[1], after=3, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert sum(written) == len(resumed.train_dataset)
    assert same_weights(trainable_weights(whole.model), trainable_weights(resumed.model))


def test_scores_that_are_gone(tmp_path):
    run(tmp_path / "run", RULES[0], after=1)
    shutil.rmtree(tmp_path / "run" / "spice" / "scores")
    with pytest.raises(FileNotFoundError, match=r"are not in .*scores.* any more, or not whole.*at most 1 steps"):
        run(tmp_path / "run", RULES[0], after=1, resume=str(tmp_path / "run" / "checkpoint-2"))


def test_a_dataset_that_changed(tmp_path):
    class Changing(torch.utils.data.Dataset):
        rows = tiny_rows()

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            return dict(self.rows[index])

    dataset = Changing()
    make = {"after": 1, "train_dataset": dataset}

    class Swap(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                dataset.rows = tiny_rows(seed=9)

    with pytest.raises(RuntimeError, match="Rows of the training dataset are others than when all rows were scored"):
        run(tmp_path, RULES[0], callbacks=[Swap()], **make)


def test_a_store_of_two_bytes_a_number(tmp_path):
    run(tmp_path, {"strategy": "spice", "sketch_dim": 512}, max_steps=2)
    folder = tmp_path / "spice" / "scores"
    num_rows = len(tiny_dataset())
    assert (folder / "features.f16").stat().st_size == num_rows * 512 * 2
    stored = np.fromfile(folder / "features.f16", dtype=np.float16).reshape(num_rows, 512)
    assert np.abs(stored).max(axis=1).tolist() == [1.0] * num_rows


def test_links_are_not_followed(tmp_path):
    folder, victim = tmp_path / "run" / "spice" / "scores", tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder.mkdir(parents=True)
    (folder / "numbers.f64").symlink_to(victim)
    run(tmp_path / "run", RULES[0], max_steps=1)
    assert victim.read_bytes() == b"precious"
    assert not (folder / "numbers.f64").is_symlink()


def test_a_subset_is_scored_once(tmp_path):
    """The selector learns nothing then, as with a learning rate of 0."""
    rule = {"strategy": "matching", "gradient_normalization": "unit"}
    select(tmp_path / "once", spice=rule | {"score_once_after": 0})
    select(tmp_path / "still", spice=rule | {"proxy_learning_rate": 0.0})
    assert subset_picks(tmp_path / "once") == subset_picks(tmp_path / "still")
    assert not (tmp_path / "once" / "spice" / "scores").exists()
    with pytest.raises(ValueError, match="score_once_after=2 begins with steps on random rows, which would be in the"):
        select(tmp_path / "later", spice=rule | {"score_once_after": 2})
