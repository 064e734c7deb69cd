"""Held-out losses and multiple-choice accuracy: forward passes alone, rows of like length together.

    loss per token   Σ_x Σ_t ℓ_xt / Σ_x T_x        loss per row   mean over x of (Σ_t ℓ_xt / T_x)
    right            log p(right answer) / T  above that of every wrong answer

with ℓ the negative log-likelihood of an answer's tokens (the token that ends it included) and T their number.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comparison.tokens import ChoiceTokens, TokenRow


@torch.no_grad()
def answer_losses(model: nn.Module, rows: Sequence[TokenRow], *, tokens_per_batch: int) -> list[float]:
    """Summed negative log-likelihood of each row's answer.

    Args:
        model (`torch.nn.Module`): A causal language model; its mode is as before afterwards.
        rows (`Sequence[TokenRow]`): Rows.
        tokens_per_batch (`int`): Tokens of a forward pass, padding included; a longer row has one to itself.

    Returns:
        `list[float]`: One number a row, in their order.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(base.forward).parameters
    found: list[tuple[list[int], Tensor]] = []
    try:
        for batch in _batches(rows, tokens_per_batch):
            found.append((batch, _batch_losses(model, [rows[position] for position in batch], device, keeps=keeps)))
    finally:
        model.train(was_training)
    losses = [0.0] * len(rows)
    for batch, values in found:
        for position, value in zip(batch, values.tolist(), strict=True):
            losses[position] = value
    return losses


def _batches(rows: Sequence[TokenRow], tokens_per_batch: int) -> Iterator[list[int]]:
    """Positions of rows of like length, the longest first, so that a lack of memory shows at once."""
    batch: list[int] = []
    for position in sorted(range(len(rows)), key=lambda position: -len(rows[position].input_ids)):
        longest = len(rows[batch[0] if batch else position].input_ids)
        if batch and (len(batch) + 1) * longest > tokens_per_batch:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def _batch_losses(model: nn.Module, rows: Sequence[TokenRow], device: torch.device, *, keeps: bool) -> Tensor:
    length = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
    attention_mask, is_label = torch.zeros_like(input_ids), torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        input_ids[number, : len(row.input_ids)] = torch.tensor(row.input_ids)
        attention_mask[number, : len(row.input_ids)] = 1
        is_label[number, max(1, row.num_prompt) : len(row.input_ids)] = True
    input_ids, attention_mask, is_label = (one.to(device) for one in (input_ids, attention_mask, is_label))
    # The head, a fifth of a small model's work, where some row has a label next.
    first = int(is_label.any(0).nonzero()[0]) - 1
    # As an index: of the view that a number gives, torch copies a frozen head for each row (bfloat16, CPU, 2.13).
    options: dict[str, Any] = {"logits_to_keep": torch.arange(first, length)} if keeps else {}
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
    logits = output.logits if keeps else output.logits[:, first:]
    targets, mask = input_ids[:, first + 1 :], is_label[:, first + 1 :]
    losses = nn.functional.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    return losses.new_zeros(len(rows), dtype=torch.float64).index_add(0, mask.nonzero()[:, 0], losses.double())


def held_out_losses(model: nn.Module, rows: Sequence[TokenRow], *, tokens_per_batch: int) -> dict[str, Any]:
    """Losses of held-out rows, over all and by domain.

    Returns:
        `dict[str, Any]`: `{"all": {"loss_per_token", "loss_per_row", "rows", "tokens"}, "domains": {name: the same}}`
    """
    return mean_losses(rows, answer_losses(model, rows, tokens_per_batch=tokens_per_batch))


def mean_losses(rows: Sequence[TokenRow], losses: Sequence[float]) -> dict[str, Any]:
    """The same of losses that are known."""
    groups: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for row, loss in zip(rows, losses, strict=True):
        groups[row.domain].append((loss, row.num_labels))
    every = [pair for name in sorted(groups) for pair in groups[name]]
    return {"all": _means(every), "domains": {name: _means(groups[name]) for name in sorted(groups)}}


def _means(pairs: Sequence[tuple[float, int]]) -> dict[str, float]:
    tokens = sum(count for _, count in pairs)
    return {
        "loss_per_token": sum(loss for loss, _ in pairs) / tokens,
        "loss_per_row": sum(loss / count for loss, count in pairs) / len(pairs),
        "rows": len(pairs),
        "tokens": tokens,
    }


def choice_accuracy(model: nn.Module, rows: Sequence[ChoiceTokens], *, tokens_per_batch: int) -> dict[str, Any]:
    """Share of multiple-choice rows whose right answer is the likeliest, by kind; a tie is no success.

    Returns:
        `dict[str, Any]`: `{kind: {"accuracy", "chance", "rows"}}`, chance being the mean of 1 / answers.
    """
    answers = [answer for row in rows for answer in row.answers]
    losses = iter(answer_losses(model, answers, tokens_per_batch=tokens_per_batch))
    groups: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for row in rows:
        right, *wrong = (next(losses) / answer.num_labels for answer in row.answers)
        groups[row.kind].append((right < min(wrong), 1 / len(row.answers)))
    return {
        kind: {
            "accuracy": sum(is_right for is_right, _ in group) / len(group),
            "chance": sum(chance for _, chance in group) / len(group),
            "rows": len(group),
        }
        for kind, group in sorted(groups.items())
    }
