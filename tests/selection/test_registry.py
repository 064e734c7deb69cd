"""Rules of a user's own: registered from outside, they are rules like any other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spice_trainer import PickOptions, Picks, PoolScores, SpiceConfig, Strategy, register_strategy
from spice_trainer.config import STRATEGIES
from spice_trainer.selection import Selection, pick_largest, select_by_strategy
from tests.support.trainers import (
    make_trainer,
    read_records,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)


def pick_longest(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    lengths = scores.values("label_tokens")
    return pick_largest(lengths, scores.eligible(lengths), num_selected, options.tie_tolerance)


def pick_hardest_of_the_long(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
    """Needs numbers of two kinds: gradients for the one, losses that come with them for the other."""
    values = scores.values("losses") * scores.values("gradient_norms")
    return pick_largest(values, scores.eligible(values), num_selected, options.tie_tolerance)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(STRATEGIES)
    register_strategy(Strategy("longest", ("label_tokens",), pick_longest))
    register_strategy(Strategy("hardest", ("gradient_norms", "losses"), pick_hardest_of_the_long))
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def longest_of(candidates: list[int], num_selected: int) -> list[int]:
    tokens = [sum(label != -100 for label in tiny_rows()[row]["labels"][1:]) for row in candidates]
    order = sorted(range(len(candidates)), key=lambda place: (-tokens[place], place))
    return [candidates[place] for place in order[:num_selected]]


def test_it_selects_in_a_run_and_resumes(tmp_path: Path) -> None:
    options = {"spice": {"strategy": "longest"}, "num_train_epochs": 2}
    whole = make_trainer(tmp_path / "whole", **options, save_strategy="steps", save_steps=2)
    whole.train()
    for pool, indices in zip(
        read_records(tmp_path / "whole", "pools"), trained_indices(tmp_path / "whole"), strict=True
    ):
        assert indices == longest_of(pool["candidates"], pool["num_selected"])
        assert pool["information"] is None and pool["gain_first"] > 0
    resumed = make_trainer(tmp_path / "whole", **options, save_strategy="steps", save_steps=2)
    before = read_records(tmp_path / "whole", "selections")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert read_records(tmp_path / "whole", "selections") == before
    ours, theirs = trainable_weights(resumed.model), trainable_weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_it_costs_follows_from_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SpiceConfig(strategy="longest")
    assert not config.takes_model and not config.takes_gradients
    monkeypatch.setattr("spice_trainer.scoring.passes.ScoringPasses.open", lambda self: pytest.fail("a pass was run"))
    make_trainer(tmp_path, spice={"strategy": "longest"}, max_steps=1).train()
    hard = SpiceConfig(strategy="hardest")
    assert hard.takes_gradients and not hard.takes_gram


def test_settings_that_mean_nothing_to_it_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_gain=0.5 with strategy='longest': it is a gain of information"):
        SpiceConfig(strategy="longest", min_gain=0.5, pools_per_step=1)
    with pytest.raises(ValueError, match=r"scoring_prefilter=0.5 with strategy='longest'.*'hardest'"):
        SpiceConfig(strategy="longest", scoring_prefilter=0.5)
    with pytest.raises(
        ValueError, match=r"strategy='shortest' is unknown. Fix: set .* to one of 'spice', .*'longest'"
    ):
        SpiceConfig(strategy="shortest")
    assert SpiceConfig(**SpiceConfig(strategy="longest").to_dict()).strategy == "longest"


def test_numbers_that_no_rule_of_the_package_asks_for_together(tmp_path: Path) -> None:
    make_trainer(tmp_path, spice={"strategy": "hardest", "scoring_prefilter": 0.6}, max_steps=2).train()
    assert all(len(pool["filtered"]) == 4 and pool["num_selected"] == 4 for pool in read_records(tmp_path, "pools"))
    needs = ("gram", "alignment", "reference_norm")
    seen = []

    def pick(scores: PoolScores, num_selected: int, options: PickOptions) -> Picks:
        seen.append(scores)
        return pick_largest(scores.values("alignment"), scores.eligible(), num_selected, options.tie_tolerance)

    register_strategy(Strategy("both", needs, pick))

    trainer = make_trainer(
        tmp_path / "both", spice={"strategy": "both"}, eval_dataset=tiny_dataset(5, seed=3), max_steps=1
    )
    trainer.train()
    alone = make_trainer(
        tmp_path / "less", spice={"strategy": "less"}, eval_dataset=tiny_dataset(5, seed=3), max_steps=1
    )
    alone.train()
    (scores,) = seen
    cosines = scores.values("alignment") / scores.values("gradient_norms") / scores.reference_norm
    gains = {line["index"]: line["gain"] for line in read_records(tmp_path / "less", "selections")}
    for row, gain in gains.items():
        assert float(cosines[scores.candidates.index(row)]) == pytest.approx(gain, abs=1e-6)


def test_its_name_may_be_taken_again_but_not_from_the_package() -> None:
    again = Strategy("longest", ("label_tokens",), pick_largest_first := pick_longest)
    assert register_strategy(again) is STRATEGIES["longest"] and pick_largest_first is again.pick
    with pytest.raises(
        ValueError, match="'spice' is the name of one of the package's own rules. Fix: give yours another"
    ):
        register_strategy(replace(again, name="spice"))
    with pytest.raises(TypeError, match="register_strategy needs a Strategy, got function"):
        register_strategy(pick_longest)  # type: ignore[arg-type]
    message = "Strategy 'odd' needs 'colour', which is not known of a pool. Fix: name fields among 'gram', "
    with pytest.raises(ValueError, match=re.escape(message)):
        Strategy("odd", ("colour",), pick_longest)
    with pytest.raises(
        ValueError, match=r'strategy="longest" needs the number of label tokens .* label_tokens is None'
    ):
        select_by_strategy("longest", PoolScores(sound=torch.ones(3, dtype=torch.bool)), 1)


def picks_of(picked: Any, num_selected: int = 3) -> Selection:
    """What becomes of what a user's rule returned, on six candidates the last of which cannot train."""
    register_strategy(Strategy("odd", ("label_tokens",), lambda scores, num_selected, options: picked))
    sound = torch.tensor([True, True, True, True, True, False])
    scores = PoolScores(sound=sound, gram=torch.eye(6, dtype=torch.float64), label_tokens=torch.ones(6))
    return select_by_strategy("odd", scores, num_selected)


def test_its_picks_may_be_any_kind_of_number() -> None:
    selection = picks_of(Picks(torch.tensor([4, 0]), torch.tensor([0.5, math.nan])))
    assert selection.indices == (4, 0) and selection.gains[0] == 0.5 and math.isnan(selection.gains[1])
    assert all(type(index) is int for index in selection.indices)
    assert picks_of(Picks([], [])).indices == ()


@pytest.mark.parametrize(
    ("picked", "problem"),
    [
        (Picks([0, 1, 2, 3], [1.0] * 4), "4 candidates, where at most 3 were asked for"),
        (Picks([0, 1], [1.0]), r"gains \[1.0\] for 2 candidates; each has one, finite or nan"),
        (Picks([0], [math.inf]), r"gains \[inf\] for 1 candidates"),
        (Picks([0, 0], [1.0, 1.0]), r"the positions \[0, 0\], which are not distinct ones of 6 candidates"),
        (Picks([-1], [1.0]), r"the positions \[-1\]"),
        (Picks([6], [1.0]), r"the positions \[6\]"),
        (Picks([0, 5], [1.0, 1.0]), "position 5, whose gradient or loss is zero or not finite, or which has no label"),
    ],
)
def test_picks_that_must_not_train_are_refused(picked: Picks, problem: str) -> None:
    with pytest.raises(ValueError, match=f'strategy="odd" picked {problem}.*Fix: pick among `scores.eligible'):
        picks_of(picked)


def test_a_selection_of_its_own_is_checked_too() -> None:
    selection = picks_of(Picks([0, 1], [1.0, 0.5]))
    assert picks_of(selection) is selection
    with pytest.raises(ValueError, match='strategy="odd" picked position 5'):
        picks_of(replace(selection, indices=(0, 5)))


@pytest.mark.parametrize("picked", [None, [0, 1], ([0, 1], [1.0, 1.0])])
def test_what_is_no_picks_is_refused(picked: Any) -> None:
    with pytest.raises(
        TypeError, match=rf'strategy="odd" picked a {type(picked).__name__}, where Picks or a Selection was expected'
    ):
        picks_of(picked)


def test_a_rule_of_information_returns_a_greedy_pass() -> None:
    register_strategy(Strategy("odd", ("gram",), lambda *given: Picks([0], [1.0]), maximizes_information=True))
    scores = PoolScores(sound=torch.ones(3, dtype=torch.bool), gram=torch.eye(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="picked a Picks, where the Selection of a greedy pass was expected"):
        select_by_strategy("odd", scores, 1)


def test_what_a_strategy_is_made_of_is_checked() -> None:
    with pytest.raises(TypeError, match=r"A Strategy's name is a text, got 3. Fix: Strategy\('name', needs, pick\)"):
        Strategy(3, (), pick_longest)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="needs is a tuple of names .* got 'label_tokens' .* a comma after a lone name"
    ):
        Strategy("odd", "label_tokens", pick_longest)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pick a function"):
        Strategy("odd", (), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'odd': maximizes_information=True needs 'gram'. Fix: add it to needs"):
        Strategy("odd", (), pick_longest, maximizes_information=True)
    with pytest.raises(ValueError, match="'odd': has_conflict_penalty=True is of a rule with maximizes_information"):
        Strategy("odd", ("gram",), pick_longest, has_conflict_penalty=True)
