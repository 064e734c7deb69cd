"""SPICE written a second time, slowly, from its formulas: one-sample autograd, `slogdet`, a greedy loop in float64.

Nothing of the package is used. Axes: N candidates of a pool, K picked, D trainable LoRA numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

Row = Mapping[str, Sequence[int]]


class Witness(TrainerCallback):
    """Sees a run from outside: the LoRA weights when each step begins, and the rows of every micro-batch.

    Args:
        trainer: The trainer to watch.
        model: A model of its own with the same frozen weights, by default a copy of the trainer's.
    """

    def __init__(self, trainer: Trainer, model: nn.Module | None = None) -> None:
        self.model = (copy.deepcopy(trainer.model) if model is None else model).eval()
        self.weights: list[dict[str, Tensor]] = []
        self.micro_batches: list[list[list[list[int]]]] = []
        self.num_fillers = 0
        self._gradients: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        training_step = trainer.training_step

        def watched(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
            rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
            # A neutral filler stands where there are fewer picks than micro-batches.
            is_filler = bool((inputs["labels"] == -100).all())
            self.num_fillers += is_filler
            self.micro_batches[-1].append([] if is_filler else rows)
            return training_step(model, inputs, *args, **kwargs)

        trainer.training_step = watched
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        assert state.global_step == len(self.weights)
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        self.micro_batches.append([])

    def gradients(self, step: int, rows: Sequence[Row]) -> Tensor:
        """Sample gradients `(N, D)` at the weights of a step's beginning, one row at a time, unpadded."""
        key = (step, tuple(map(id, rows)))
        if key not in self._gradients:
            self._gradients[key] = self._compute(step, rows)
        return self._gradients[key]

    def _compute(self, step: int, rows: Sequence[Row]) -> Tensor:
        parameters = dict(self.model.named_parameters())
        trained = [parameters[name] for name in self.weights[step]]
        with torch.no_grad():
            for name, value in self.weights[step].items():
                parameters[name].copy_(value)
        gradients = []
        for row in rows:
            logits = self.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            losses = [
                -logits[position].log_softmax(-1)[label]
                for position, label in enumerate(row["labels"][1:])
                if label != -100
            ]
            if losses:
                flat = torch.autograd.grad(sum(losses) / len(losses), trained)
                gradients.append(torch.cat([g.flatten() for g in flat]).double())
            else:
                gradients.append(torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64))
        return torch.stack(gradients)


def num_label_tokens(row: Row) -> int:
    """Labels that a position before them predicts."""
    return sum(label != -100 for label in row["labels"][1:])


@dataclass
class Pick:
    """One pick of the greedy loop."""

    position: int
    gain: float
    conflict: float
    score: float


@dataclass
class Expected:
    """What a pool's record lines must say."""

    picks: list[Pick]
    stopped_early: bool
    information: float
    information_top_norm: float
    overlap_top_norm: float | None
    changed_by_conflict: int
    alpha: float
    norms: list[float]
    nonfinite: list[int]
    zero: list[int]


def expect_pool(gradients: Tensor, tokens: Sequence[int], num_selected: int, config: Any) -> Expected:
    """Everything a pool's record must say, from its raw sample gradients `(N, D)`."""
    finite = gradients.isfinite().all(1)
    raw_norms = gradients.norm(dim=1)
    zero = finite & (raw_norms == 0)
    sound = [position for position in range(len(gradients)) if finite[position] and not zero[position]]
    rows = _normalize(gradients, tokens, config.gradient_normalization)
    alpha = config.fisher_alpha
    if config.alpha_scaling == "pool":
        alpha /= float(rows[finite].square().sum(1).mean())
    picks, stopped = _greedy(rows, sound, num_selected, config, alpha, config.conflict_penalty)
    without, _ = _greedy(rows, sound, num_selected, config, alpha, 0.0)
    picked = [pick.position for pick in picks]
    largest = sorted(sound, key=lambda position: -float(raw_norms[position]))[: len(picked)]
    return Expected(
        picks=picks,
        stopped_early=stopped,
        information=_information(rows, picked, config.information, alpha),
        information_top_norm=_information(rows, largest, config.information, alpha),
        overlap_top_norm=len(set(picked) & set(largest)) / len(picked) if picked else None,
        changed_by_conflict=len(set(picked) - {pick.position for pick in without}),
        alpha=alpha,
        norms=[float(raw_norms[position]) for position in picked],
        nonfinite=[position for position in range(len(gradients)) if not finite[position]],
        zero=[position for position in range(len(gradients)) if zero[position]],
    )


def _normalize(gradients: Tensor, tokens: Sequence[int], kind: str) -> Tensor:
    count = torch.tensor(tokens, dtype=torch.float64)[:, None]
    if kind == "unit":
        norms = gradients.norm(dim=1, keepdim=True)
        return gradients / torch.where(norms > 0, norms, 1.0)
    return gradients * {"none": torch.ones_like(count), "sqrt_tokens": count.sqrt(), "tokens": count}[kind]


def _greedy(
    rows: Tensor, sound: Sequence[int], num_selected: int, config: Any, alpha: float, penalty: float
) -> tuple[list[Pick], bool]:
    picks: list[Pick] = []
    while len(picks) < num_selected and len(picks) < len(sound):
        picked = [pick.position for pick in picks]
        left = [position for position in sound if position not in picked]
        reference = picked if config.conflict_reference == "selected" else left
        before = _information(rows, picked, config.information, alpha)
        options = []
        for position in left:
            gain = _information(rows, [*picked, position], config.information, alpha) - before
            conflict = _conflict(rows[position], rows[reference])
            options.append(Pick(position, gain, conflict, gain - penalty * conflict))
        best = max(options, key=lambda option: option.score)
        first_gain = picks[0].gain if picks else best.gain
        margin = config.tie_tolerance * max(abs(best.score), first_gain)
        chosen = next(option for option in options if option.score >= best.score - margin)
        if config.min_gain is not None and chosen.gain < config.min_gain:
            return picks, True
        if config.stop_ratio is not None and picks and chosen.gain <= config.stop_ratio * first_gain:
            return picks, True
        picks.append(chosen)
    return picks, False


def _conflict(row: Tensor, reference: Tensor) -> float:
    if not len(reference):
        return 0.0
    mean = reference.mean(0)
    return max(0.0, -float(row @ mean / (row.norm() * mean.norm() + 1e-8)))


def _information(rows: Tensor, picked: Sequence[int], kind: str, alpha: float) -> float:
    measures: dict[str, Callable[[Tensor, float], float]] = {
        "exact": _log_determinant,
        "diagonal": lambda chosen, alpha: float(torch.log1p(alpha * chosen.square().sum(0)).sum()),
        "adafisher": _adafisher,
    }
    return measures[kind](rows[list(picked)], alpha) if picked else 0.0


def _log_determinant(chosen: Tensor, alpha: float) -> float:
    """log det(I + α Σ g gᵀ), in D dimensions where that is affordable, else the same with K dimensions."""
    matrix = chosen.T @ chosen if chosen.shape[1] <= 150 else chosen @ chosen.T
    sign, value = torch.linalg.slogdet(torch.eye(len(matrix), dtype=torch.float64) + alpha * matrix)
    assert sign > 0
    return float(value)


def _adafisher(chosen: Tensor, alpha: float) -> float:
    """The released code's gains, summed in the order of adding."""
    denominators, total = torch.ones(chosen.shape[1], dtype=torch.float64), 0.0
    for row in chosen:
        total += math.log1p(alpha * float((row.square() / denominators).sum()))
        denominators += alpha * row.pow(4)
    return total
