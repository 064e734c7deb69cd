"""The loader the Trainer trains from: batches of picked rows, selected on demand.

A plain `DataLoader` over a rank-aware batch sampler. It is not passed through `accelerator.prepare`, whose loader
fetches one batch ahead (accelerate 1.15: `DataLoaderShard`) and would score a step's pools before the previous update;
`num_workers=0` for the same reason. Every rank gets exactly `gradient_accumulation_steps` non-empty batches per step;
a slot that would be empty holds a neutral filler, a picked row with all labels −100.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from spice_trainer.data.rows import DataCollator, fetch_rows
from spice_trainer.gradients.forward import move_inputs
from spice_trainer.sampling.schedule import PoolSchedule, cut, spread
from spice_trainer.selection.results import StepSelection


class PickSource(Protocol):
    """What the loader asks of a sampler."""

    @property
    def schedule(self) -> PoolSchedule:
        """Which rows are candidates when."""

    @property
    def is_over(self) -> bool:
        """Whether the run has done all its steps."""

    def begin_epoch(self) -> tuple[int, int]:
        """Epoch to run next, and its first step that is not done yet."""

    def select_step(self, epoch: int, step_in_epoch: int) -> StepSelection:
        """Picks the rows of a step at the current weights."""


def deal(indices: Sequence[int], num_slots: int) -> tuple[tuple[int, ...], ...]:
    """Cuts picks into contiguous slots whose sizes differ by at most one, the longer ones first."""
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots} must be at least 1.")
    return cut(indices, spread(len(indices), num_slots))


def slot_index(rank: int, micro_batch: int, *, world_size: int) -> int:
    """The slot that a rank trains on in a micro-batch: micro_batch · world_size + rank, as Accelerate deals."""
    if not 0 <= rank < world_size or micro_batch < 0:
        raise ValueError(
            f"rank={rank}, micro_batch={micro_batch}, world_size={world_size}: rank must be from 0 to world_size - 1 "
            "and micro_batch at least 0."
        )
    return micro_batch * world_size + rank


@dataclass(frozen=True)
class Slots:
    """Where this process's micro-batches stand among all of a step."""

    rank: int
    world_size: int
    gradient_accumulation_steps: int

    @property
    def number(self) -> int:
        """Micro-batches of a step, over all processes."""
        return self.world_size * self.gradient_accumulation_steps


class SlotRows(list[Any]):
    """Rows of one micro-batch; `neutral` marks a filler that must not contribute to the loss."""

    def __init__(self, rows: Sequence[Any], *, neutral: bool = False) -> None:
        super().__init__(rows)
        self.neutral = neutral


class SpiceBatchSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches, scoring a step's pools when its first micro-batch is asked for."""

    def __init__(self, sampler: PickSource, slots: Slots) -> None:
        self.sampler = sampler
        self.slots = slots

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same on every rank."""
        return self.sampler.schedule.steps_per_epoch * self.slots.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the micro-batches of one epoch."""
        epoch, first_step = self.sampler.begin_epoch()
        # A resumed run's `skip_first_batches` walks these; nothing is scored for them.
        for _ in range(first_step * self.slots.gradient_accumulation_steps):
            yield []
        for step_in_epoch in range(first_step, self.sampler.schedule.steps_per_epoch):
            # transformers (5.23) would train a run that is resumed at its last step one step further.
            if self.sampler.is_over:
                return
            selection = self.sampler.select_step(epoch, step_in_epoch)
            dealt = deal(selection.indices, self.slots.number)
            filler = selection.filler
            if filler is None:
                filler = selection.indices[0] if selection.indices else self._unknown_filler(epoch, step_in_epoch)
            for micro_batch in range(self.slots.gradient_accumulation_steps):
                rows = dealt[slot_index(self.slots.rank, micro_batch, world_size=self.slots.world_size)]
                yield SlotRows(rows) if rows else SlotRows([filler], neutral=True)

    def _unknown_filler(self, epoch: int, step_in_epoch: int) -> int:
        """A candidate of the step after a run's first that has no pick: that step's own rows broke the forward."""
        next_step = (step_in_epoch + 1) % self.sampler.schedule.steps_per_epoch
        return self.sampler.schedule.pools(epoch, next_step).pools[0][0]


class SelectedRows(Dataset[Any]):
    """The training dataset, fetched by micro-batch, keeping the mark of neutral fillers."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> SlotRows:
        return SlotRows(fetch_rows(self.dataset, indices), neutral=getattr(indices, "neutral", False))


class SlotCollator:
    """Collates a micro-batch with the user's collator, neutralises fillers, and moves it to the device."""

    def __init__(self, collate: DataCollator, device: torch.device) -> None:
        self.collate = collate
        # An unprepared loader's batches would reach models of older transformers (4.56) on the CPU.
        self.device = device
        self.num_tokens = 0

    def __call__(self, rows: list[Any]) -> Any:
        """Collates `rows`."""
        batch: Any = self.collate(list(rows))
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None or mask.dim() != 2 else int(mask.sum())
        if getattr(rows, "neutral", False):
            for key in ("labels", "shift_labels"):
                if key in batch:
                    batch[key] = torch.full_like(batch[key], -100)
        else:
            self.num_tokens += tokens
        if hasattr(batch, "to") and not isinstance(batch, dict):
            return batch.to(self.device)
        return move_inputs(batch, self.device)

    def take_num_tokens(self) -> int:
        """Tokens collated for training since the last call, fillers left out."""
        taken, self.num_tokens = self.num_tokens, 0
        return taken


def build_dataloader(
    sampler: PickSource,
    dataset: Any,
    *,
    collate: DataCollator,
    device: torch.device,
    slots: Slots,
) -> DataLoader[Any]:
    """Builds the loader described above, of the training rows in `dataset` with the user's collator."""
    return DataLoader(
        SelectedRows(dataset),
        batch_sampler=SpiceBatchSampler(sampler, slots),
        collate_fn=SlotCollator(collate, device),
        num_workers=0,
        # Without its own generator an iteration would draw its base seed from the training run's random state.
        generator=torch.Generator(),
    )
