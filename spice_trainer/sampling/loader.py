"""The loader the Trainer trains from: batches of picked rows, selected on demand.

A plain `DataLoader` over a rank-aware batch sampler. It is not passed through `accelerator.prepare`, whose loader
fetches one batch ahead (accelerate 1.15: `DataLoaderShard`) and would score a step's pools before the previous update;
`num_workers=0` for the same reason. Every rank gets exactly `gradient_accumulation_steps` non-empty batches per step;
a slot that would be empty holds a neutral filler, a picked row with all labels −100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from spice_trainer.data.rows import fetch_rows
from spice_trainer.sampling.schedule import PoolSchedule, deal, slot_index
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


class SlotRows(list[Any]):
    """Rows of one micro-batch; `neutral` marks a filler that must not contribute to the loss."""

    def __init__(self, rows: Sequence[Any], *, neutral: bool = False) -> None:
        super().__init__(rows)
        self.neutral = neutral


class SpiceBatchSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches, scoring a step's pools when its first micro-batch is asked for.

    Args:
        sampler ([`SpiceSampler`]): Picks the rows.
        rank (`int`): This process.
        world_size (`int`): Number of processes.
        gradient_accumulation_steps (`int`): Micro-batches per optimizer step.
    """

    def __init__(self, sampler: PickSource, *, rank: int, world_size: int, gradient_accumulation_steps: int) -> None:
        self.sampler = sampler
        self.rank = rank
        self.world_size = world_size
        self.gradient_accumulation_steps = gradient_accumulation_steps

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same on every rank."""
        return self.sampler.schedule.steps_per_epoch * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the micro-batches of one epoch."""
        epoch, first_step = self.sampler.begin_epoch()
        # A resumed run's `skip_first_batches` walks these; nothing is scored for them.
        for _ in range(first_step * self.gradient_accumulation_steps):
            yield []
        for step_in_epoch in range(first_step, self.sampler.schedule.steps_per_epoch):
            # transformers (5.23) would train a run that is resumed at its last step one step further.
            if self.sampler.is_over:
                return
            selection = self.sampler.select_step(epoch, step_in_epoch)
            slots = deal(selection.indices, self.world_size * self.gradient_accumulation_steps)
            filler = selection.filler
            if filler is None:
                filler = selection.indices[0] if selection.indices else self._unknown_filler(epoch, step_in_epoch)
            for micro_batch in range(self.gradient_accumulation_steps):
                rows = slots[slot_index(self.rank, micro_batch, world_size=self.world_size)]
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
    """Collates a micro-batch with the user's collator, neutralises fillers, and moves it to the device.

    Args:
        collate (`Callable`): The user's collator.
        device (`torch.device`): Where batches go. Moved here because an unprepared loader's batches would otherwise
            reach models of older transformers versions (4.56) on the CPU.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Any]], device: torch.device) -> None:
        self.collate = collate
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
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def take_num_tokens(self) -> int:
        """Tokens collated for training since the last call, fillers left out."""
        taken, self.num_tokens = self.num_tokens, 0
        return taken


def build_dataloader(
    sampler: PickSource,
    dataset: Any,
    *,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    device: torch.device,
    rank: int,
    world_size: int,
    gradient_accumulation_steps: int,
) -> DataLoader[Any]:
    """Builds the loader described above.

    Args:
        sampler ([`SpiceSampler`]): A bound sampler.
        dataset (`Any`): Training rows.
        collate (`Callable`): The user's collator.
        device (`torch.device`): Where batches go.
        rank (`int`): This process.
        world_size (`int`): Number of processes.
        gradient_accumulation_steps (`int`): Micro-batches per optimizer step.

    Returns:
        `torch.utils.data.DataLoader`
    """
    batch_sampler = SpiceBatchSampler(
        sampler, rank=rank, world_size=world_size, gradient_accumulation_steps=gradient_accumulation_steps
    )
    return DataLoader(
        SelectedRows(dataset),
        batch_sampler=batch_sampler,
        collate_fn=SlotCollator(collate, device),
        num_workers=0,
        # Without its own generator an iteration would draw its base seed from the training run's random state.
        generator=torch.Generator(),
    )
