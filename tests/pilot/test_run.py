"""Pilots on mixtures of two kinds of rows: what they say, and that the model is as before."""

import json

import pytest
import torch
from datasets import Dataset

from spice_trainer import SpiceConfig, run_pilot
from spice_trainer.cli.main import main
from tests.runs.test_targeted import kinds_of_rows
from tests.support.models import tiny_lora_model, tiny_model
from tests.support.traces import model_state, random_states
from tests.support.trainers import collate, same_weights, tiny_tokenizer, trainable_weights

SETTINGS = SpiceConfig(pool_size=32, num_selected=4)


def pilot(training, validation, model=None, **options):
    options = {"data_collator": collate, "num_rows": 96, "warmup_steps": 3, "learning_rate": 1e-2} | options
    return run_pilot(model or tiny_lora_model(), training, validation, SETTINGS, **options)


def long_rows(number, seed):
    """Rows of the same kinds, three times as long."""
    rows = kinds_of_rows(3 * number, seed=seed)
    joined = [rows[start : start + 3] for start in range(0, len(rows), 3)]
    return [{key: [value for part in parts for value in part[key]] for key in parts[0]} for parts in joined]


# Validation rows of a training set of which a quarter is of the first kind, and what there is to say of them.
MIXTURES = [
    ("the same, 1", lambda: kinds_of_rows(24, share=0.25, seed=21), {None}),
    ("the same, 2", lambda: kinds_of_rows(24, share=0.25, seed=22), {None}),
    ("the same, 3", lambda: kinds_of_rows(24, share=0.25, seed=23), {None}),
    ("the same, few", lambda: kinds_of_rows(12, share=0.25, seed=24), {None}),
    ("the first kind, 1", lambda: kinds_of_rows(24, share=1.0, seed=31), {"targeted_matching"}),
    ("the first kind, 2", lambda: kinds_of_rows(24, share=1.0, seed=32), {"targeted_matching"}),
    ("the first kind, few", lambda: kinds_of_rows(12, share=1.0, seed=33), {"targeted_matching"}),
    ("mostly the first kind", lambda: kinds_of_rows(24, share=0.75, seed=34), {"targeted_matching"}),
    ("longer", lambda: long_rows(24, 41), {"length_matched", "targeted_matching"}),
    ("longer, few", lambda: long_rows(12, 42), {"length_matched", "targeted_matching"}),
]


def test_it_says_the_right_thing_of_nine_mixtures_in_ten():
    training = kinds_of_rows(160, share=0.25, seed=20)
    said = {name: pilot(training, make(), seed=number).strategy for number, (name, make, _) in enumerate(MIXTURES)}
    right = {name: said[name] in wanted for name, _, wanted in MIXTURES}
    assert sum(right.values()) >= 9, said


def test_the_model_is_as_before():
    model = tiny_lora_model(lora_dropout=0.3).train()
    before, weights, states = str(model_state(model)), trainable_weights(model), str(random_states())
    pilot(kinds_of_rows(96), kinds_of_rows(12, seed=3), model)
    assert same_weights(weights, trainable_weights(model))
    assert str(model_state(model)) == before and str(random_states()) == states


def test_it_is_a_function_of_its_seed():
    training, validation = kinds_of_rows(128, share=0.25), kinds_of_rows(12, share=1.0, seed=3)
    first, again, other = (pilot(training, validation, seed=seed) for seed in (1, 1, 2))
    assert (first.shifts, first.pointing) == (again.shifts, again.pointing)
    assert first.pointing != other.pointing


def test_what_it_prints_and_keeps():
    report = pilot(kinds_of_rows(128, share=0.25), kinds_of_rows(24, share=1.0, seed=3))
    text = " ".join(str(report).split())
    assert report.recommendation in text and "96 training rows, 24 validation rows" in text
    assert "Select rows like the validation rows" in text and "its picks point where rows that it did not read" in text
    assert max(map(len, str(report).splitlines())) <= 100
    kept = json.loads(json.dumps(report.to_dict()))
    assert kept["strategy"] == "targeted_matching" and kept["recommendation"] == report.recommendation
    costs = report.costs
    assert min(costs.scoring_row, costs.hidden_row, costs.training_row) > 0 and costs.pilot > 0


def test_it_says_no():
    report = pilot(kinds_of_rows(128, share=0.25), kinds_of_rows(24, share=0.25, seed=21))
    assert report.recommendation.startswith(
        "Don't select: the training rows do not differ from the 24 validation rows"
    )


def test_raw_rows_and_several_sets():
    def raw(row):
        return {"text": " ".join(f"w{token}" for token in row["input_ids"])}

    training = Dataset.from_list([raw(row) for row in kinds_of_rows(96, share=0.25)])
    sets = {name: [raw(row) for row in kinds_of_rows(12, share=1.0, seed=seed)] for name, seed in (("a", 3), ("b", 4))}
    report = pilot(training, sets, data_collator=None, processing_class=tiny_tokenizer())
    assert report.num_validation == 24 and report.strategy == "targeted_matching"


@pytest.mark.parametrize(
    ("training", "validation", "options", "text"),
    [
        (lambda: kinds_of_rows(20), lambda: kinds_of_rows(12, seed=3), {}, "20 rows, fewer than a pool of 32"),
        (lambda: kinds_of_rows(64), lambda: kinds_of_rows(2, seed=3), {}, "2 validation rows have label tokens and"),
        (lambda: kinds_of_rows(64), lambda: [], {}, "validation_dataset .list. has no row"),
        (lambda: kinds_of_rows(64), lambda: kinds_of_rows(12, seed=3), {"num_rows": 0}, "num_rows=0 is below 1"),
    ],
)
def test_what_is_refused(training, validation, options, text):
    with pytest.raises(ValueError, match=text):
        pilot(training(), validation(), **options)


def test_copies_are_named_and_left_out(caplog):
    rows = kinds_of_rows(96)
    validation = [*kinds_of_rows(8, seed=3), *rows[:2]]
    report = pilot(Dataset.from_list(rows), validation)
    assert report.num_validation == 8 or "copies of training rows" in caplog.text
    assert torch.isfinite(torch.tensor(report.length_p_value))


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    for name, rows in (("rows", kinds_of_rows(96, share=0.25)), ("wanted", kinds_of_rows(24, share=1.0, seed=3))):
        lines = [json.dumps({"text": " ".join(f"w{token}" for token in row["input_ids"])}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    flags = {
        "model_name_or_path": folder,
        "dtype": "float32",
        "dataset_name": tmp_path / "rows.jsonl",
        "validation_dataset_name": tmp_path / "wanted.jsonl",
        "pool_size": 32,
        "num_selected": 4,
        "num_rows": 64,
        "num_warmup_steps": 2,
        "output_file": tmp_path / "report.json",
    }
    main(["pilot", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["strategy"] == "targeted_matching"
    printed = " ".join(capsys.readouterr().out.split())
    assert "64 training rows, 24 validation rows" in printed and kept["recommendation"] in printed
