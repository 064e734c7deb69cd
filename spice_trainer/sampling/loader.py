"""The loader the Trainer trains from: batches of picked rows, selected on demand.

A plain `DataLoader` of the user's dataset over a rank-aware batch sampler. It is not passed through
`accelerator.prepare`, whose loader fetches one batch ahead (accelerate 1.15: `DataLoaderShard`) and would score a
step's pools before the previous update; `num_workers=0` for the same reason. Every rank gets exactly
`gradient_accumulation_steps` non-empty batches per step; a slot that would be empty holds a neutral filler, a picked
row with all labels −100.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapreplace
from itertools import count, takewhile
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler

from spice_trainer.data.rows import COLLATING, MAX_LISTED, DataCollator
from spice_trainer.gradients.forward import move_inputs
from spice_trainer.sampling.schedule import PoolSchedule, StepPools, cut, spread
from spice_trainer.selection.results import StepSelection


class PickSource(Protocol):
    """What the loader asks of a sampler."""

    @property
    def schedule(self) -> PoolSchedule:
        """Which rows are candidates when."""

    @property
    def is_drawing(self) -> bool:
        """Whether rows that are asked for now are trained on, so that they must be picked."""

    def take_steps_to_skip(self) -> int:
        """Steps that whoever trains is about to walk past."""

    def steps(self) -> Iterator[StepSelection]:
        """Yields the picks of the steps that are left of an epoch."""

    def preview(self) -> Iterator[StepSelection]:
        """Yields an epoch's steps without picking."""


def preview_step(plan: StepPools) -> StepSelection:
    """A step as if the first candidates of its pools were picked."""
    indices = tuple(row for pool, budget in zip(plan.pools, plan.budgets, strict=True) for row in pool[:budget])
    return StepSelection(step=plan.step_in_epoch, epoch=plan.epoch, indices=indices)


@dataclass(frozen=True)
class ScheduledEpoch:
    """The first epoch of a run that has not begun; nothing is ever picked for it."""

    schedule: PoolSchedule
    is_drawing: bool = False

    def take_steps_to_skip(self) -> int:
        """None."""
        return 0

    def steps(self) -> Iterator[StepSelection]:
        """Yields what a preview does."""
        return self.preview()

    def preview(self) -> Iterator[StepSelection]:
        """Yields the steps without picking."""
        schedule = self.schedule
        schedule.restart()
        for step in takewhile(partial(schedule.has_step, 0), count()):
            selection = preview_step(schedule.pools(0, step))
            yield selection
            schedule.finish_step(0, step, keep=selection.indices[0])


def deal(indices: Sequence[int], num_slots: int, num_tokens: Sequence[int] = ()) -> tuple[tuple[int, ...], ...]:
    """Cuts picks into contiguous slots whose sizes differ by at most one, the longer ones first.

    With `num_tokens` of each pick it packs them instead: the longest first, each into the slot that holds the fewest
    tokens, so that no slot holds more than 4/3 of the best packing's fullest. Within a slot they keep their order.
    """
    if num_slots < 1:
        raise ValueError(f"num_slots={num_slots} must be at least 1.")
    if not num_tokens:
        return cut(indices, spread(len(indices), num_slots))
    slots: list[list[int]] = [[] for _ in range(num_slots)]
    filled = [(0, slot) for slot in range(num_slots)]
    for place in sorted(range(len(indices)), key=lambda place: (-num_tokens[place], place)):
        tokens, slot = filled[0]
        slots[slot].append(place)
        heapreplace(filled, (tokens + num_tokens[place], slot))
    return tuple(tuple(indices[place] for place in sorted(slot)) for slot in slots)


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


@dataclass(frozen=True)
class MicroBatch:
    """What is known of the rows that were handed out last."""

    rows: tuple[int, ...] = ()
    is_neutral: bool = False  # A filler, which must not contribute to the loss.
    is_trained: bool = False  # Not a preview.


class SpiceBatchSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches of an epoch.

    To whoever trains it hands out picks, scoring a step's pools when its first micro-batch is asked for. To anyone
    else it is a preview, which moves nothing and scores nothing.
    """

    def __init__(self, source: PickSource, slots: Slots) -> None:
        self.source = source
        self.slots = slots
        self._latest: dict[int, MicroBatch] = {}

    @property
    def latest(self) -> MicroBatch:
        """What is known of the rows that this thread was handed last."""
        return self._latest.get(threading.get_ident(), MicroBatch())

    def __len__(self) -> int:
        """Micro-batches of an epoch, the same on every rank; a `TypeError` of a stream, as the Trainer expects."""
        if self.source.schedule.has_open_end:
            raise TypeError("a stream has no length")
        return self.source.schedule.steps_per_epoch * self.slots.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the micro-batches of one epoch."""
        self._latest.pop(threading.get_ident(), None)
        is_trained = self.source.is_drawing
        if is_trained:
            # A resumed run's `skip_first_batches` walks these; nothing is scored for them.
            for _ in range(self.source.take_steps_to_skip() * self.slots.gradient_accumulation_steps):
                yield []
        for selection in self.source.steps() if is_trained else self.source.preview():
            dealt = deal(selection.indices, self.slots.number, selection.num_tokens)
            filler = selection.indices[0] if selection.filler is None else selection.filler
            for micro_batch in range(self.slots.gradient_accumulation_steps):
                rows = dealt[slot_index(self.slots.rank, micro_batch, world_size=self.slots.world_size)]
                handed = rows or (filler,)
                self._latest[threading.get_ident()] = MicroBatch(handed, is_neutral=not rows, is_trained=is_trained)
                yield list(handed)
            # An error of what is picked next is not about these.
            self._latest.pop(threading.get_ident(), None)


class SlotCollator:
    """Collates a micro-batch with the user's collator, neutralises fillers, and moves it to the device."""

    def __init__(self, collate: DataCollator, device: torch.device, batch_sampler: SpiceBatchSampler) -> None:
        self.collate = collate
        # Rows are fetched and collated as soon as it has named them, with no worker in between.
        self.batch_sampler = batch_sampler
        # An unprepared loader's batches would reach models of older transformers (4.56) on the CPU.
        self.device = device
        self.num_tokens = 0

    def __call__(self, rows: list[Any]) -> Any:
        """Collates `rows`."""
        latest = self.batch_sampler.latest
        try:
            batch: Any = self.collate(rows)
        except Exception as error:
            error.add_note(f"{COLLATING} row(s) {', '.join(map(str, latest.rows[:MAX_LISTED]))} to train on.")
            raise
        mask = batch.get("attention_mask")
        tokens = batch["input_ids"].numel() if mask is None or mask.dim() != 2 else int(mask.sum())
        if latest.is_neutral:
            for key in ("labels", "shift_labels"):
                if key in batch:
                    batch[key] = torch.full_like(batch[key], -100)
        elif latest.is_trained:
            self.num_tokens += tokens
        if hasattr(batch, "to") and not isinstance(batch, dict):
            return batch.to(self.device)
        return move_inputs(batch, self.device)

    def take_num_tokens(self) -> int:
        """Tokens collated for training since the last call, fillers left out."""
        taken, self.num_tokens = self.num_tokens, 0
        return taken


def build_dataloader(
    source: PickSource, dataset: Any, *, collate: DataCollator, device: torch.device, slots: Slots
) -> DataLoader[Any]:
    """Builds the loader described above, of the training rows in `dataset` with the user's collator."""
    batch_sampler = SpiceBatchSampler(source, slots)
    loader = DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=SlotCollator(collate, device, batch_sampler),
        num_workers=0,
        # Without its own generator an iteration would draw its base seed from the training run's random state.
        generator=torch.Generator(),
    )
    # `accelerator.prepare` (1.15) gives back what has this as it is.
    loader._is_accelerate_prepared = True
    return loader
