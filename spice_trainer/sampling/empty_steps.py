"""Optimizer steps that nothing could be picked for, and the row that then stands in their micro-batches.

One such step trains on neutral fillers and is logged; more than `MAX_EMPTY_STEPS` in any `WINDOW` steps end the run:
it has diverged, or its rows have nothing to train on. Weights that are not finite end it at once, since every
checkpoint from there on would be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from spice_trainer.distributed import Processes
from spice_trainer.selection.results import PoolSelection, StepSelection
from spice_trainer.utils.logging import logger
from spice_trainer.utils.saved import saved_whole_number

MAX_EMPTY_STEPS = 2
WINDOW = 20


class EmptyStepWatch:
    """Counts steps without a pick among the last ones. A `min_gain` can leave a pool without one too."""

    def __init__(self, min_gain: float | None) -> None:
        self._min_gain = min_gain
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._last_sound: int | None = None

    def note(self, step: int, pools: Sequence[PoolSelection], *, broken_weight: Callable[[], str | None]) -> None:
        """Takes one scored step; raises a `RuntimeError` for too many of the last ones without a pick.

        `broken_weight` names a weight that is not finite; it is asked only where no candidate had a finite gradient.
        """
        is_empty = not any(pool.indices for pool in pools)
        self._recent.append(int(is_empty))
        if not is_empty:
            self._last_sound = step
            return
        if all(len(pool.nonfinite) == len(pool.candidates) for pool in pools):
            name = broken_weight()
            if name is not None:
                raise RuntimeError(self._diverged(step, name))
        num_nonfinite, num_zero = sum(len(pool.nonfinite) for pool in pools), sum(len(pool.zero) for pool in pools)
        num_out_of_memory = sum(len(pool.out_of_memory) for pool in pools)
        found = f"{num_nonfinite} candidates had a gradient that is not finite and {num_zero} a zero gradient"
        if num_out_of_memory:
            found += f", and {num_out_of_memory} did not fit into memory alone"
        num_unsound = num_nonfinite + num_zero + num_out_of_memory
        if self._min_gain is not None and num_unsound < sum(len(pool.candidates) for pool in pools):
            found += f", and no gain reached min_gain={self._min_gain}"
        if sum(self._recent) > MAX_EMPTY_STEPS:
            raise RuntimeError(
                f"SPICE could pick no sample in {sum(self._recent)} of the last {len(self._recent)} optimizer steps. "
                f"In step {step} {found}. Likely causes: the training diverged (look at the loss; lower the learning "
                "rate), rows without label tokens (prompts longer than `max_length`), or a `min_gain` above what this "
                "model's gradients give."
            )
        logger.warning("SPICE: no sample could be picked for step %d: %s. The step trains on nothing.", step, found)

    def _diverged(self, step: int, name: str) -> str:
        if self._last_sound is None:
            since = f"had been so before step {step}, the first that this run scored"
            fix = "Resume from an earlier checkpoint, or load another model"
        else:
            is_last = self._last_sound == step - 1
            updates = (
                f"the update of step {step - 1}"
                if is_last
                else f"the updates of steps {self._last_sound} to {step - 1}"
            )
            since = f"have been so since {updates}: training diverged"
            fix = f"Resume from checkpoint-{self._last_sound} (or the newest one before it), whose weights are sound"
        return (
            f"SPICE: no candidate of step {step} has a finite gradient, since weights of the model that scores are "
            f"not finite, such as {name!r}. They {since}. {fix}, with a lower learning rate or `max_grad_norm`."
        )

    def state_dict(self) -> list[int]:
        """The last steps, 1 where nothing was picked."""
        return list(self._recent)

    def load_state_dict(self, state: Sequence[int]) -> None:
        """Restores [`EmptyStepWatch.state_dict`]."""
        self._recent = deque(map(saved_whole_number, state), maxlen=WINDOW)


def find_broken_weight(model: nn.Module, processes: Processes) -> str | None:
    """Names a weight that is not finite, on any process, each of which may hold a part. A collective."""
    found = next((name for name, weight in model.named_parameters() if not _is_finite(weight)), None)
    return next((name for name in processes.gather(found) if name is not None), None)


def _is_finite(weight: Tensor) -> bool:
    # What is here of a weight that FSDP2 or ZeRO-3 shards.
    here = getattr(weight, "ds_tensor", weight)
    here = here.to_local() if hasattr(here, "to_local") else here
    # Quantised ones are no numbers by themselves.
    return here.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64) or bool(
        here.detach().isfinite().all()
    )


class FillerRow:
    """The row that stands in micro-batches without a pick: a pick wherever there is one, else a row known to be sound.

    All its labels are −100, so its loss is 0 and its gradient 0 · ∂logits/∂θ. That is zero only where the row's own
    forward is finite, for 0 · nan is nan: a filler from a pool whose rows all break the forward would break the
    weights.
    """

    def __init__(self) -> None:
        self.row: int | None = None

    def provide(self, selection: StepSelection) -> StepSelection:
        """Gives a step its filler, which is `None` while no row is known."""
        sound = _sound_row(selection)
        if sound is not None:
            self.row = sound
        return replace(selection, filler=self.row)

    def state_dict(self) -> int | None:
        """The row."""
        return self.row

    def load_state_dict(self, row: int | None, *, num_rows: int) -> None:
        """Restores [`FillerRow.state_dict`]; raises an `IndexError` if the dataset has no such row."""
        if row is not None and not 0 <= row < num_rows:
            raise IndexError(f"the filler is none of the {num_rows} rows")
        self.row = row


def _sound_row(selection: StepSelection) -> int | None:
    """A pick, or a candidate that a stopping rule left out."""
    if selection.indices:
        return selection.indices[0]
    for pool in selection.pools:
        unsound = {*pool.nonfinite, *pool.zero, *pool.out_of_memory}
        for candidate in pool.candidates:
            if candidate not in unsound:
                return candidate
    return None
