"""`examples/theory.py` on a tiny model: the Gram matrices are those of the run, and tables and figures come out."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from spice_trainer import select
from spice_trainer.selection.gram import normalization_weights
from tests.support.models import tiny_model
from tests.support.trainers import read_records, tiny_tokenizer

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def write_rows(path):
    generator = random.Random(0)

    def words(most):
        return " ".join(f"w{generator.randint(3, 60)}" for _ in range(generator.randint(2, most)))

    rows = [{"instruction": words(8), "response": words(20)} for _ in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("theory")
    for name in ("theory", "theory_report", "data"):
        sys.modules.pop(name, None)


@pytest.fixture
def arguments(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    flags = {"model": tmp_path / "model", "data": tmp_path / "rows.jsonl", "output-dir": tmp_path / "out", "steps": 3}
    flags |= {"every": 2, "pool-size": 9, "num-selected": 3, "learning-rate": 1e-2, "gradient-normalization": "tokens"}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_tables_and_figures(example, arguments, tmp_path, capsys):
    example.main([*arguments, "--normalizations", "none", "tokens", "unit"])
    printed = capsys.readouterr().out
    for title in ("Decomposition, bounds and guarantees", "Spearman correlations", "Conflict groups"):
        assert title in printed

    written = json.loads((tmp_path / "out" / "theory.json").read_text())
    assert "--normalizations none tokens unit" in written["command"]
    assert str(tmp_path) not in json.dumps(written)
    assert list(written["pools"]) == ["none", "tokens", "unit"]
    for pools in written["pools"].values():
        assert [pool["step"] for pool in pools] == [0, 2]
        for pool in pools:
            assert pool["num_pairs"] == 8 + 7
            assert pool["identity_residual"] < 1e-10
            assert pool["bound/overlap/violation_rate"] == pool["bound/mean_floor/violation_rate"] == 0.0
    mean = sum(pool["information"] for pool in written["pools"]["none"]) / 2
    assert written["summary"]["none"]["information"]["mean"] == pytest.approx(mean)

    # The run's own picks, made at the same weights under the same normalisation, have the same information.
    recorded = read_records(tmp_path / "out" / "run", "pools")
    for step, pool in zip((0, 2), written["pools"]["tokens"], strict=True):
        assert pool["information"] == pytest.approx(recorded[step]["information"], rel=1e-6)

    markdown = (tmp_path / "out" / "theory.md").read_text()
    assert written["command"] in markdown
    assert "| total curvature c |" in markdown
    for name in ("gain_against_conflict", "epsilon_against_conflict", "gain_decay", "curvature_and_conflict"):
        image = (tmp_path / "out" / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 5_000


def test_looking_changes_nothing_and_normalisations_are_right(example, arguments, tmp_path):
    options = example.parse_arguments(arguments)
    pools = example.record(options, example.config_of(options))
    assert [step for step, _ in pools] == [0, 2]
    trained = read_records(tmp_path / "out" / "run", "trained")
    for step, scores in pools:
        norms, tokens = scores.gradient_norms, torch.tensor(scores.label_tokens)
        raw = example.renormalized(scores, "none")
        assert torch.allclose(raw.diagonal().sqrt(), norms)
        assert torch.allclose(example.renormalized(scores, "tokens"), scores.gram, rtol=1e-12)
        weights = normalization_weights(norms, tokens, "sqrt_tokens")
        assert torch.allclose(example.renormalized(scores, "sqrt_tokens"), raw * torch.outer(weights, weights))
        assert bool((example.renormalized(scores, "unit").diagonal() == 1.0).all())
        # Recorded at the weights that picked: the same picks come out.
        picks = [scores.candidates[place] for place in select(scores.gram, 3).indices]
        assert picks == trained[step]["indices"]
    # Never looking on the way trains the same rows.
    plain = example.parse_arguments([*arguments, "--every", "1000", "--output-dir", str(tmp_path / "plain")])
    assert len(example.record(plain, example.config_of(plain))) == 1
    assert read_records(tmp_path / "plain" / "run", "trained") == trained


def test_one_pick_is_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(["--num-selected", "1"])
    assert "at least 2: after a single pick there is nothing to decompose" in capsys.readouterr().err
