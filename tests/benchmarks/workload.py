"""What the benchmarks work on: a model that can be made anew, rows, pools of them, and the ways to run them.

The first `num_pools · pool_size` rows are candidates, pool by pool; rows behind them are for training in between.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer import SpiceConfig
from spice_trainer.data.rows import CandidateRow, collate_row, pad_rows
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.sharing import share_micro_batches
from spice_trainer.selection.scores import PoolScores
from tests.benchmarks.comparators import MicroBatch
from tests.benchmarks.real_model import Row, add_lora, load_model, read_rows
from tests.support.models import VOCAB_SIZE, tiny_model
from tests.support.scorers import make_scorer

TINY_LONGEST = 24


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded as a Trainer's collator does it."""
    length = max(len(row.input_ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (length - len(values))

    return {
        "input_ids": torch.tensor([pad(row.input_ids, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows]),
        "labels": torch.tensor([pad(row.labels, -100) for row in rows]),
    }


def tiny_rows(num_rows: int) -> list[Row]:
    """Rows of 4 to 24 random tokens, at least one of them prompt."""
    generator, rows = random.Random(0), []
    for index in range(num_rows):
        length = generator.randint(4, TINY_LONGEST)
        input_ids = [generator.randint(3, VOCAB_SIZE - 1) for _ in range(length)]
        num_prompt = generator.randint(1, length - 1)
        rows.append(Row(index, input_ids, [-100] * num_prompt + input_ids[num_prompt:]))
    return rows


def num_label_tokens(row: Row) -> int:
    """Labels after the causal shift."""
    return sum(label != -100 for label in row.labels[1:])


@dataclass
class Workload:
    """A model and rows, and how they are run.

    `make_base` makes the model without LoRA, `read` the first so many rows.
    """

    name: str
    make_base: Callable[[], nn.Module]
    read: Callable[[int], list[Row]]
    num_pools: int
    pool_size: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    tokens_per_batch: int = 2048
    batch_size: int = 8
    _rows: list[Row] = field(default_factory=list)

    @property
    def num_candidates(self) -> int:
        return self.num_pools * self.pool_size

    @property
    def num_selected(self) -> int:
        """K of a pool: a tenth of it."""
        return max(1, self.pool_size // 10)

    @property
    def pools(self) -> list[list[int]]:
        starts = range(0, self.num_candidates, self.pool_size)
        return [list(range(start, start + self.pool_size)) for start in starts]

    def rows(self, num_rows: int | None = None) -> list[Row]:
        """The first `num_rows`, by default the candidates."""
        number = self.num_candidates if num_rows is None else num_rows
        if len(self._rows) < number:
            self._rows = self.read(number)
        return self._rows[:number]

    def make_model(self, *, rank: int = 16, random_b: bool = False) -> nn.Module:
        """A fresh adapter on fresh base weights, in evaluation mode.

        `random_b`: B at random instead of zero, so that A's gradients are not zero and an error in them would show.
        """
        model = add_lora(self.make_base().to(self.device), seed=0, rank=rank).to(self.device).eval()
        if random_b:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    values = torch.randn(parameter.shape, generator=generator) * 0.01
                    parameter.data.copy_(values)
        return model

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the training precision."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def make_scorer(self, model: nn.Module, *, rows: Sequence[Row] | None = None, **spice: Any) -> GradientScorer:
        """Ours, with these fields of `SpiceConfig`."""
        settings = {"scoring_tokens_per_batch": self.tokens_per_batch, "pool_size": self.pool_size}
        # Raw gradients: other normalisations are made of their Gram matrix.
        settings |= {"num_selected": self.num_selected, "gradient_normalization": "none"}
        return make_scorer(
            model,
            SpiceConfig(**(settings | spice)),
            rows=self.rows() if rows is None else rows,
            collate=collate,
            seed=0,
            autocast=self.autocast,
        )

    def score(self, scorer: GradientScorer, pools: Sequence[Sequence[int]] | None = None) -> list[PoolScores]:
        """All pools' scores."""
        return list(scorer.score(self.pools if pools is None else pools))

    def to_device(self, batch: MicroBatch) -> MicroBatch:
        inputs, labels = batch
        return {key: value.to(self.device) for key, value in inputs.items()}, labels.to(self.device)

    def sorted_batches(
        self, rows: Sequence[Row], tokens_per_batch: int | None = None
    ) -> tuple[list[list[int]], list[MicroBatch]]:
        """Rows of like length together: positions, and the same padded, on the device."""
        candidates = [as_candidate(row) for row in rows]
        budget = tokens_per_batch or self.tokens_per_batch
        plan = share_micro_batches([row.shape for row in candidates], budget)[0]
        return plan, [self.to_device(pad_rows([candidates[position] for position in batch])) for batch in plan]

    def arrival_batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """What a Trainer makes of shuffled rows: `batch_size` in the order in which they come."""
        batches = []
        for start in range(0, len(rows), self.batch_size):
            inputs = collate(rows[start : start + self.batch_size])
            labels = inputs.pop("labels")
            batches.append(self.to_device((inputs, labels)))
        return batches

    def describe(self) -> dict[str, Any]:
        """Rows, tokens and padding of the candidates."""
        rows = self.rows()
        lengths = sorted(len(row.input_ids) for row in rows)
        return {
            "model": self.name,
            "rows": len(rows),
            "pools": self.num_pools,
            "pool_size": self.pool_size,
            "num_selected": self.num_selected,
            "tokens": sum(lengths),
            "label_tokens": sum(map(num_label_tokens, rows)),
            "median_length": lengths[len(lengths) // 2],
            "longest": lengths[-1],
            "tokens_per_batch": self.tokens_per_batch,
            "batch_size": self.batch_size,
            "padding_share_sorted": padding_share(self.sorted_batches(rows)[1]),
            "padding_share_arrival": padding_share(self.arrival_batches(rows)),
        }


def as_candidate(row: Row) -> CandidateRow:
    """The row as scoring sees it."""
    return collate_row(row.index, row, collate)


def padding_share(batches: Sequence[MicroBatch]) -> float:
    """Share of the positions of padded batches that hold no token."""
    total = sum(inputs["input_ids"].numel() for inputs, _ in batches)
    return 1 - sum(int(inputs["attention_mask"].sum()) for inputs, _ in batches) / total


def open_workload(arguments: argparse.Namespace) -> Workload:
    """The one that the command line asks for."""
    shared: dict[str, Any] = {
        "num_pools": arguments.pools,
        "pool_size": arguments.rows // arguments.pools,
        "device": torch.device(arguments.device),
        "dtype": getattr(torch, arguments.dtype),
        "tokens_per_batch": arguments.tokens_per_batch,
        "batch_size": arguments.batch_size,
    }
    dtype = shared["dtype"]
    if arguments.model == "tiny":
        # As in the tests: two layers of 32 features.
        return Workload("tiny", lambda: tiny_model("llama").to(dtype), tiny_rows, **shared)
    base, tokenizer = load_model(arguments.model)
    base = base.to(dtype)

    def read(num_rows: int) -> list[Row]:
        return read_rows(Path(arguments.data), tokenizer, seed=0, max_tokens=arguments.max_tokens, num_rows=num_rows)

    name = arguments.model if arguments.model == "smollm2" else Path(arguments.model).name
    return Workload(name, lambda: copy.deepcopy(base), read, **shared)
