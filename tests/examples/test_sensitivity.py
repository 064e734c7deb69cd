"""`examples/sensitivity.py` on a tiny model: what it says of picks is what their gradients say."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace

import pytest
import torch

from spice_trainer import SpiceConfig, select
from spice_trainer.data.rows import RowShape
from spice_trainer.scoring.scorer import GradientScorer
from tests.examples.test_theory import CHAT, EXAMPLES, write_rows
from tests.support.models import tiny_model
from tests.support.scorers import measured_pool
from tests.support.trainers import read_records, tiny_tokenizer

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("sensitivity")
    for name in ("sensitivity", "theory", "theory_report", "data"):
        sys.modules.pop(name, None)


def scored(gradients, tokens):
    return measured_pool(
        gradients,
        [RowShape(number + 2, number, True, ()) for number in tokens],
        SpiceConfig(gradient_normalization="sqrt_tokens"),
        candidates=range(len(tokens)),
        losses=torch.ones(len(tokens)),
    )


def test_cosines_are_of_the_steps_gradient_and_the_rows_that_no_rule_saw(example):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(12, 30, generator=generator, dtype=torch.float64) + 0.5
    gradients[4] = gradients[9] = 0.0
    tokens = [3, 9, 1, 30, 5, 7, 2, 60, 4, 4, 11, 6]
    scores = scored(gradients, tokens)
    counts = torch.tensor(tokens, dtype=torch.float64)[:, None]
    step = (counts * gradients)[[5, 2, 0]].sum(dim=0)
    answer_tokens, per_token, per_row = example.look(scores, [5, 2, 0])
    assert answer_tokens == pytest.approx((7 + 1 + 3) / 3)
    cosine = torch.nn.functional.cosine_similarity
    assert per_token == pytest.approx(float(cosine(step, (counts * gradients)[6:].sum(dim=0), dim=0)))
    assert per_row == pytest.approx(float(cosine(step, gradients[6:].sum(dim=0), dim=0)))
    assert example.look(scores, [4]) == (5.0, 0.0, 0.0)


def test_settings_are_what_they_say(example):
    generator = torch.Generator().manual_seed(1)
    pools = []
    for _ in range(2):
        gradients = torch.randn(40, 8, generator=generator, dtype=torch.float64)
        gradients[3] = 0.0
        pools.append(scored(gradients, torch.randint(1, 40, (40,), generator=generator).tolist()))
    options = Namespace(fisher_alphas=[1e-4, 1.0], conflict_penalties=[0.0, 50.0], num_selected=6, seed=0)
    found = {(one.normalization, one.setting): one for one in example.compare(pools, options)}
    usual, shifted = [], []
    for scores in pools:
        gram = example.renormalized(scores, "tokens")[:20, :20]
        usual.append(select(gram, 6).indices)
        shifted.append(set(select(gram, 6, conflict_penalty=50.0, conflict_reference="pool").indices))
    line = found["tokens", "spice, α 1, λ 0.1"]
    seen = [example.look(scores, picks) for scores, picks in zip(pools, usual, strict=True)]
    assert (line.answer_tokens, line.per_token, line.per_row) == pytest.approx(torch.tensor(seen).mean(dim=0).tolist())
    assert line.num_other == found["tokens", "α 1"].num_other == 0.0
    expected = sum(len(theirs - set(ours)) for ours, theirs in zip(usual, shifted, strict=True)) / 2
    assert found["tokens", "λ 50, with pool"].num_other == expected > 0
    top = [scores.gradient_norms[:20].argsort(descending=True)[:6].tolist() for scores in pools]
    means = [sum(scores.label_tokens[place] for place in picks) / 6 for scores, picks in zip(pools, top, strict=True)]
    assert found["", "top_norm"].answer_tokens == pytest.approx(sum(means) / 2)
    chance = found["", "random rows"]
    everyone = [count for scores in pools for place, count in enumerate(scores.label_tokens[:20]) if place != 3]
    assert chance.answer_tokens == pytest.approx(sum(everyone) / 38, rel=0.05) and chance.num_other is None


def test_a_run(example, tmp_path, capsys, monkeypatch):
    seen = []
    original = GradientScorer.score

    def noted(scorer, pools, **options):
        seen.append(scorer)
        return original(scorer, pools, **options)

    monkeypatch.setattr(GradientScorer, "score", noted)
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl")
    flags = {"model": tmp_path / "model", "data": tmp_path / "rows.jsonl", "output-dir": tmp_path / "out", "steps": 3}
    flags |= {"every": 2, "pool-size": 9, "num-selected": 3}
    example.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    printed = capsys.readouterr().out
    assert "What each setting picks" in printed and "random rows" in printed
    written = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert written["steps"] == [0, 2] and str(tmp_path) not in json.dumps(written)
    assert written["command"].startswith("python examples/sensitivity.py --model model --data rows.jsonl --steps 3")
    assert "--conflict-penalties 0.0 1.0 10.0" in written["command"]
    assert {one["normalization"] for one in written["picks"]} == {"", "none", "sqrt_tokens", "tokens", "unit"}
    markdown = (tmp_path / "out" / "sensitivity.md").read_text()
    assert written["command"] in markdown and markdown.count("\n| ") == len(written["picks"]) + 1
    assert all(len(pool["candidates"]) == 18 for pool in read_records(tmp_path / "out" / "run", "pools"))
    # Looked at by whole gradients, though rows to train on are drawn at random.
    looking = [scorer for scorer in seen if scorer.config.takes_gram]
    assert len(looking) == 2 and all(scorer.num_features == scorer.dimension for scorer in looking)
    assert all(pool["information"] is None for pool in read_records(tmp_path / "out" / "run", "pools"))


def test_more_picks_than_candidates_are_refused(example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(["--num-selected", "121"])
    assert "--num-selected must be at most --pool-size" in capsys.readouterr().err
