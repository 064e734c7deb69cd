"""Losses and accuracies of the comparison against one row at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from tests.examples.comparisons import DOMAINS
from tests.support.models import VOCAB_SIZE, PlainLanguageModel, tiny_lora_model

from comparison.evaluation import answer_losses, choice_accuracy, held_out_losses  # isort: skip
from comparison.tokens import ChoiceTokens, TokenRow  # isort: skip


def random_tokens(generator: random.Random, number: int) -> list[int]:
    return [generator.randint(3, VOCAB_SIZE - 1) for _ in range(number)]


def make_rows(number: int, *, seed: int = 0, num_prompt: int | None = None) -> list[TokenRow]:
    generator = random.Random(seed)
    rows = []
    for position in range(number):
        length = generator.randint(5, 24)
        given = generator.randint(1, length - 1) if num_prompt is None else num_prompt
        rows.append(
            TokenRow([generator.randint(3, VOCAB_SIZE - 1) for _ in range(length)], given, DOMAINS[position % 3])
        )
    return rows


@torch.no_grad()
def slow_loss(model: nn.Module, row: TokenRow) -> float:
    """Token by token, from the whole row's logits."""
    model.eval()
    output = model(input_ids=torch.tensor([row.input_ids]))
    logits: Tensor = (output["logits"] if isinstance(output, dict) else output.logits)[0].double()
    return -sum(
        torch.log_softmax(logits[place - 1], -1)[row.input_ids[place]].item()
        for place in range(row.num_prompt, len(row.input_ids))
    )


@pytest.mark.parametrize("tokens_per_batch", [1, 60, 10**6])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_against_one_row_at_a_time(architecture: str, tokens_per_batch: int) -> None:
    model = tiny_lora_model(architecture, lora_dropout=0.5).train()
    rows = make_rows(13)
    expected = [slow_loss(model, row) for row in rows]
    model.train()
    losses = answer_losses(model, rows, tokens_per_batch=tokens_per_batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    # As training needs it, and without a random number drawn.
    assert model.training
    state = torch.get_rng_state()
    answer_losses(model, rows, tokens_per_batch=tokens_per_batch)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_hold_rows_of_like_length_and_no_more_tokens() -> None:
    model, rows, seen = tiny_lora_model(), make_rows(40, seed=4), []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]["attention_mask"]), with_kwargs=True)
    answer_losses(model, rows, tokens_per_batch=100)
    assert all(mask.numel() <= 100 for mask in seen) and len(seen) < 12
    assert sum(int(mask.sum()) for mask in seen) == sum(len(row.input_ids) for row in rows)
    assert sum(mask.numel() for mask in seen) < 1.15 * sum(len(row.input_ids) for row in rows)


def test_means_over_tokens_and_over_rows() -> None:
    model, rows = tiny_lora_model(), make_rows(11)
    found = held_out_losses(model, rows, tokens_per_batch=100)
    for name in (None, *DOMAINS):
        group = [row for row in rows if name in (None, row.domain)]
        losses = [slow_loss(model, row) for row in group]
        means = found["all"] if name is None else found["domains"][name]
        counts = [len(row.input_ids) - row.num_prompt for row in group]
        assert means["loss_per_token"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
        per_row = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(group)
        assert means["loss_per_row"] == pytest.approx(per_row, rel=1e-5)
        assert (means["rows"], means["tokens"]) == (len(group), sum(counts))
    assert found["all"]["loss_per_token"] != pytest.approx(found["all"]["loss_per_row"], rel=1e-3)


def test_accuracy_of_choices() -> None:
    model, rows = tiny_lora_model(), []
    generator = random.Random(5)
    for number in range(30):
        prompt = random_tokens(generator, 6)
        answers = [
            [generator.randint(3, VOCAB_SIZE - 1) for _ in range(generator.randint(1, 4))]
            for _ in range(2 + number % 3)
        ]
        kind = ("options", "contrast")[number % 2]
        rows.append(ChoiceTokens(kind, [TokenRow([*prompt, *answer], 6, "all") for answer in answers]))
    found = choice_accuracy(model, rows, tokens_per_batch=80)
    for kind in ("options", "contrast"):
        group = [row for row in rows if row.kind == kind]
        right = [
            min(
                range(len(row.answers)),
                key=lambda place: slow_loss(model, row.answers[place]) / row.answers[place].num_labels,
            )
            == 0
            for row in group
        ]
        assert found[kind]["accuracy"] == sum(right) / len(group) and 0 < sum(right) < len(group)
        assert found[kind]["chance"] == pytest.approx(sum(1 / len(row.answers) for row in group) / len(group))
    # Nothing is right by being first.
    tie = ChoiceTokens("options", [rows[0].answers[0]] * 2)
    assert choice_accuracy(model, [tie], tokens_per_batch=80)["options"]["accuracy"] == 0


def test_a_model_that_computes_every_logit() -> None:
    class Output(dict):
        __getattr__ = dict.__getitem__

    class Wrapped(PlainLanguageModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Output:
            return Output(super().forward(input_ids))

    model, rows = Wrapped(), make_rows(6)
    expected = []
    for row in rows:
        whole = TokenRow(row.input_ids, row.num_prompt, row.domain)
        expected += answer_losses(model, [whole], tokens_per_batch=1)
    torch.testing.assert_close(answer_losses(model, rows, tokens_per_batch=90), expected, rtol=1e-5, atol=1e-5)
    logits = model(torch.tensor([rows[0].input_ids]), torch.ones(1), False)["logits"][0]
    targets = torch.tensor(rows[0].input_ids)
    first = rows[0].num_prompt
    plain = nn.functional.cross_entropy(logits[first - 1 : -1], targets[first:], reduction="sum").item()
    assert expected[0] == pytest.approx(plain, rel=1e-5)
