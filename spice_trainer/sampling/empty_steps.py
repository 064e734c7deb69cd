"""Watches for optimizer steps that nothing could be picked for.

One such step trains on neutral fillers and is logged; more than `MAX_EMPTY_STEPS` in any `WINDOW` steps end the run:
it has diverged, or its rows have nothing to train on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from spice_trainer.selection.results import PoolSelection
from spice_trainer.utils.logging import logger
from spice_trainer.utils.saved import saved_whole_number

MAX_EMPTY_STEPS = 2
WINDOW = 20


class EmptyStepWatch:
    """Counts steps without a pick among the last ones.

    Args:
        min_gain (`float`, *optional*): The configured stopping rule, which can leave a pool without a pick too.
    """

    def __init__(self, min_gain: float | None) -> None:
        self._min_gain = min_gain
        self._recent: deque[int] = deque(maxlen=WINDOW)

    def note(self, step: int, pools: Sequence[PoolSelection]) -> None:
        """Takes one scored step.

        Args:
            step (`int`): Optimizer updates done before it.
            pools (`Sequence[PoolSelection]`): Its pools.

        Raises:
            RuntimeError: If more than `MAX_EMPTY_STEPS` of the last `WINDOW` steps had no pick.
        """
        is_empty = not any(pool.indices for pool in pools)
        self._recent.append(int(is_empty))
        if not is_empty:
            return
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

    def state_dict(self) -> list[int]:
        """The last steps, 1 where nothing was picked."""
        return list(self._recent)

    def load_state_dict(self, state: Sequence[int]) -> None:
        """Restores [`EmptyStepWatch.state_dict`]."""
        self._recent = deque(map(saved_whole_number, state), maxlen=WINDOW)
