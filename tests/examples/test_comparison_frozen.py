"""The last layers on stored states against the whole model: losses, gradients, picks, training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.examples.comparisons import NUM_STEPS, tiny_comparison
from tests.support.models import VOCAB_SIZE, tiny_model

from comparison.evaluation import answer_losses  # isort: skip
from comparison.frozen import StoredStates, frozen_states, store_states  # isort: skip
from comparison.json_lines import read_lines  # isort: skip
from comparison.model import build_model, load_states, load_tokenizer  # isort: skip
from comparison.prepared import prepare_data  # isort: skip
from comparison.run import StepClock  # isort: skip
from comparison.settings import Settings, load_settings  # isort: skip
from comparison.trainers import build_trainer  # isort: skip


class Console:
    def print(self, *texts: Any) -> None:
        """Quiet."""


def some_rows(number: int, *, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randint(3, VOCAB_SIZE - 1) for _ in range(generator.randint(4, 20))] for _ in range(number)]


def lab(folder: Path, **overrides: Any) -> tuple[Settings, Any, StoredStates]:
    """A comparison of four layers, three of them frozen, its rows and their states."""
    model = folder / "model"
    if not model.exists():
        from tests.examples.comparisons import write_model

        write_model(model)
        tiny_model(max_position_embeddings=128, num_hidden_layers=4).save_pretrained(model)
    settings = load_settings(tiny_comparison(folder, frozen_states=True, **overrides))
    data = prepare_data(settings, load_tokenizer(settings.model))
    return settings, data, load_states(settings, settings.model, data.input_ids(), Console())


def randomize(model: nn.Module) -> nn.Module:
    """Weights of B that are not zero, so that A has a gradient."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def loss_and_gradients(model: nn.Module, rows: list[dict[str, list[int]]]) -> tuple[Tensor, list[Tensor]]:
    """The mean loss of a padded batch and the gradients of all that trains, in the order of layers."""
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    loss = model(**batch, use_cache=False).loss
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("last_layers", [1, 3, 4])
def test_losses_and_gradients_are_those_of_the_whole_model(last_layers: int, tmp_path: Path) -> None:
    settings, data, states = lab(tmp_path, adapter={"dropout": 0.0, "last_layers": last_layers})
    whole = randomize(build_model(settings, settings.model, 3))
    top = randomize(build_model(settings, settings.model, 3, states))
    assert len(top.get_base_model().model.layers) == last_layers
    expected = answer_losses(whole, data.test, tokens_per_batch=100)
    torch.testing.assert_close(answer_losses(top, data.test, tokens_per_batch=60), expected, rtol=1e-5, atol=1e-5)
    for start in range(0, 12, 3):
        rows = [row.features() for row in data.train[start : start + 3]]
        loss, gradients = loss_and_gradients(top, rows)
        right_loss, right_gradients = loss_and_gradients(whole, rows)
        assert loss.item() == pytest.approx(right_loss.item(), rel=1e-5)
        assert len(gradients) == len(right_gradients) == 14 * last_layers
        for found, right in zip(gradients, right_gradients, strict=True):
            assert (found - right).norm() <= 1e-5 * right.norm() and right.norm() > 0


def train(settings: Settings, data: Any, arm: str, folder: Path, states: StoredStates | None) -> dict[str, Tensor]:
    model = build_model(settings, settings.model, 0, states)
    trainer = build_trainer(
        settings,
        settings.arm(arm),
        model,
        load_tokenizer(settings.model),
        data,
        seed=0,
        learning_rate=0.05,
        num_steps=NUM_STEPS,
        save_steps=100,
        folder=folder,
        clock=StepClock(folder / "clock.jsonl"),
    )
    trainer.train()
    return {name.split(".layers.")[1].split(".", 1)[1]: w for name, w in model.named_parameters() if w.requires_grad}


ARMS = [
    {"name": "spice", "fields": {"gradient_normalization": "sqrt_tokens"}},
    {"name": "less", "fields": {"strategy": "less"}},
    {"name": "matching", "fields": {"strategy": "matching", "gradient_normalization": "unit"}},
    {"name": "hidden", "fields": {"strategy": "targeted_matching"}},
    {"name": "last layer", "fields": {"strategy": "targeted_matching", "hidden_layer": 4}},
    {"name": "targeted", "fields": {"strategy": "targeted_matching", "matching_features": "gradients"}},
    {"name": "lengths", "fields": {"strategy": "length_matched"}},
]
RULES = [arm["name"] for arm in ARMS]


@pytest.mark.parametrize("arm", RULES)
def test_the_same_picks_and_the_same_training(arm: str, tmp_path: Path) -> None:
    settings, data, states = lab(tmp_path, arms=ARMS, data={"target_rows": 6})
    weights = train(settings, data, arm, tmp_path / "top", states)
    expected = train(settings, data, arm, tmp_path / "whole", None)
    picks = [read_lines(tmp_path / name / "spice" / "selections.jsonl") for name in ("top", "whole")]
    assert [line["index"] for line in picks[0]] == [line["index"] for line in picks[1]] and len(picks[0]) == 16
    for one, other in zip(*picks, strict=True):
        if one["gain"] is not None:
            assert one["gain"] == pytest.approx(other["gain"], rel=1e-4, abs=1e-6)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


def test_hidden_states_of_a_layer_that_is_left_out(tmp_path: Path) -> None:
    arms = [{"name": "low", "fields": {"strategy": "targeted_matching", "hidden_layer": 2}}]
    settings, data, states = lab(tmp_path, arms=arms, data={"target_rows": 6})
    with pytest.raises(ValueError, match="hidden_layer=2 lies below the layers that are left of this model, 3 to 3"):
        train(settings, data, "low", tmp_path / "top", states)


def test_states_are_kept_once_and_found_by_content(tmp_path: Path) -> None:
    model, rows = tiny_model(num_hidden_layers=3), some_rows(300)
    states = StoredStates(tmp_path)
    assert states.missing([*rows, *rows[:9]]) == rows
    done = list(store_states(states, model, 1, rows, 64))
    assert done[-1] == (300, 300) and len(done) == 3
    # What was killed while it was written is none.
    (tmp_path / "torn.partial").write_bytes(b"{")
    again = StoredStates(tmp_path)
    assert not again.missing(rows) and len(list(tmp_path.glob("*.safetensors"))) == 3
    expected = frozen_states(tiny_model(num_hidden_layers=3), 2, rows[:5])
    for row, right in zip(rows, expected, strict=False):
        ids = torch.tensor(row).numpy()
        torch.testing.assert_close(again.find(ids), right, rtol=1e-5, atol=1e-6)
        # The beginning of a row, which is all that a shortened row is.
        torch.testing.assert_close(again.find(ids[:3]), right[:3], rtol=1e-5, atol=1e-6)
    more = some_rows(5, seed=1)
    assert again.missing([*rows, *more]) == more
    assert list(store_states(again, tiny_model(num_hidden_layers=3), 1, [*more, *rows], 64)) == [(5, 5)]


def test_a_row_that_was_never_stored_is_an_error(tmp_path: Path) -> None:
    model, rows = tiny_model(num_hidden_layers=3), some_rows(6)
    states = StoredStates(tmp_path)
    list(store_states(states, model, 1, rows, 64))
    row = next(row for row in rows if len(row) > 6)
    padded = torch.tensor([row, [*row[:5], *[0] * (len(row) - 5)]])
    mask = torch.tensor([[1] * len(row), [1] * 5 + [0] * (len(row) - 5)])
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    right = tiny_model(num_hidden_layers=3)(input_ids=padded[:1], use_cache=False).logits[0]
    torch.testing.assert_close(logits[0], right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, :5], right[:5], rtol=1e-4, atol=1e-4)
    # Its padding taken for tokens, or another last token: no such row.
    with pytest.raises(KeyError, match="never ran on a row of"):
        model(input_ids=padded, use_cache=False)
    other = padded[:1].clone()
    other[0, -1] = (other[0, -1] + 1) % VOCAB_SIZE
    with pytest.raises(KeyError, match="never ran on a row of"):
        model(input_ids=other, attention_mask=mask[:1], use_cache=False)
    with pytest.raises(ValueError, match="padded on the right"):
        model(input_ids=padded.flip(1), attention_mask=mask.flip(1), use_cache=False)


def test_a_model_that_changes_its_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny_model("granite", num_hidden_layers=3, embedding_multiplier=3.0)
    # Granite multiplies what its embedding gives, and would multiply stored states as well.
    with pytest.raises(ValueError, match="are .* .relative. from the whole model's. Set frozen_states: false"):
        list(store_states(StoredStates(tmp_path), model, 1, some_rows(3), 64))
    with pytest.raises(ValueError, match="no list of layers to cut"):
        list(store_states(StoredStates(tmp_path), tiny_model("gpt2"), 1, some_rows(3), 64))


def test_settings_of_frozen_layers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen_states needs adapter.last_layers"):
        load_settings(tiny_comparison(tmp_path, frozen_states=True, adapter={"last_layers": None}))
    with pytest.raises(ValueError, match="last_layers=9 needs a model of at least so many layers"):
        lab(tmp_path, adapter={"last_layers": 9})
    settings, _, states = lab(tmp_path)
    # Another depth has states of its own.
    deeper, _, others = lab(tmp_path, adapter={"last_layers": 2})
    assert states.folder.parent == others.folder.parent and states.folder != others.folder
    assert json.dumps(settings.shared()) != json.dumps(deeper.shared())
