"""The row that stands in micro-batches without a pick.

All its labels are −100, so its loss is 0 and its gradient 0 · ∂logits/∂θ. That is zero only where the row's own
forward is finite, for 0 · nan is nan: a filler from a pool whose rows all break the forward would break the weights.
So it is a pick wherever there is one, and in a step without any a row that is known to be sound.
"""

from __future__ import annotations

from dataclasses import replace

from spice_trainer.selection.results import StepSelection


class FillerRow:
    """Remembers a sound row of the run."""

    def __init__(self) -> None:
        self._row: int | None = None

    def provide(self, selection: StepSelection) -> StepSelection:
        """Gives a step its filler.

        Args:
            selection ([`StepSelection`]): What the step trains on.

        Returns:
            [`StepSelection`]: With `filler`, which is `None` while no row is known.
        """
        sound = _sound_row(selection)
        if sound is not None:
            self._row = sound
        return replace(selection, filler=self._row)

    def state_dict(self) -> int | None:
        """The row."""
        return self._row

    def load_state_dict(self, row: int | None, *, num_rows: int) -> None:
        """Restores [`FillerRow.state_dict`].

        Raises:
            IndexError: If the dataset has no such row.
        """
        if row is not None and not 0 <= row < num_rows:
            raise IndexError(f"the filler is none of the {num_rows} rows")
        self._row = row


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
