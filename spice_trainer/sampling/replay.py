"""Epochs that select nothing: the picks of the last selecting epoch, shuffled anew and dealt evenly over the steps.

Under `selection_epochs=m` epochs 0 to m−1 select and later ones replay epoch m−1 (the paper: m = 1).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spice_trainer.sampling.schedule import EpochReplay, PoolSchedule
from spice_trainer.selection.pool import too_few_picks
from spice_trainer.selection.results import StepSelection
from spice_trainer.utils.saved import saved_whole_number


class PickReplay:
    """Remembers the last selecting epoch's picks, and hands them out again; `selection_epochs=None` never does."""

    def __init__(self, selection_epochs: int | None) -> None:
        self._selection_epochs = selection_epochs
        self._picks, self._tokens = array("q"), array("q")
        self._epoch = -1
        self._dealt: tuple[int, list[EpochReplay]] | None = None

    def replays(self, epoch: int) -> bool:
        """Whether an epoch replays earlier picks."""
        return self._selection_epochs is not None and epoch >= self._selection_epochs

    def remember(self, epoch: int, step_in_epoch: int, indices: Sequence[int], num_tokens: Sequence[int] = ()) -> None:
        """Takes a step's picks, with the tokens of each where they are packed."""
        # An epoch begins anew when a run is resumed with `ignore_data_skip`; its earlier picks don't count then.
        if self._epoch != epoch or step_in_epoch == 0:
            self._epoch, self._picks, self._tokens, self._dealt = epoch, array("q"), array("q"), None
        if self._selection_epochs is not None and epoch == self._selection_epochs - 1:
            self._picks.extend(indices)
            self._tokens.extend(num_tokens)

    def step(self, schedule: PoolSchedule, epoch: int, step_in_epoch: int, *, global_step: int) -> StepSelection:
        """A step of a replayed epoch; a `RuntimeError` if micro-batches must be equal and there are too few picks."""
        shape = schedule.shape
        if self._dealt is None or self._dealt[0] != epoch:
            dealt = [
                EpochReplay(
                    values,
                    num_steps=schedule.steps_per_epoch,
                    seed=schedule.seed,
                    epoch=epoch,
                    num_slots=shape.num_slots,
                    equal_slots=shape.equal_slots,
                )
                for values in self.tensors().values()
            ]
            self._dealt = epoch, dealt
        indices, *num_tokens = (dealt.step(step_in_epoch) for dealt in self._dealt[1])
        if not indices and shape.equal_slots:
            raise too_few_picks(global_step, shape.num_slots)
        num_fillers = max(0, shape.num_slots - len(indices))
        return StepSelection(
            step=global_step,
            epoch=epoch,
            indices=indices,
            num_fillers=num_fillers,
            num_tokens=num_tokens[0] if num_tokens else (),
        )

    def state_dict(self) -> dict[str, Any]:
        """The epoch of the remembered picks."""
        return {"epoch": self._epoch}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The remembered picks, and the tokens of each where they are packed."""
        # Through numpy, which copies an array as a whole.
        remembered = {"picks_of_epoch": self._picks} | ({"tokens_of_epoch": self._tokens} if self._tokens else {})
        return {name: torch.from_numpy(np.array(values, dtype=np.int64)) for name, values in remembered.items()}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, num_rows: int) -> None:
        """Restores [`PickReplay.state_dict`] and [`PickReplay.tensors`]."""
        self._epoch = saved_whole_number(state["epoch"])
        picks = tensors["picks_of_epoch"]
        tokens = tensors.get("tokens_of_epoch", picks.new_zeros(0))
        for values in (picks, tokens):
            if values.dtype != torch.int64 or values.dim() != 1:
                raise TypeError(
                    f"replayed picks are {values.dtype} of shape {tuple(values.shape)}, no whole numbers in a row"
                )
        if len(tokens) not in (0, len(picks)):
            raise IndexError(f"{len(picks)} replayed picks have the tokens of {len(tokens)}")
        if picks.numel() and not 0 <= int(picks.min()) <= int(picks.max()) < num_rows:
            raise IndexError(f"a replayed pick is none of the {num_rows} rows")
        self._picks, self._tokens = (array("q", values.numpy().tobytes()) for values in (picks, tokens))
        self._dealt = None
