"""Memory that runs out while candidates are scored: halve the pass and go on, leave out what does not fit alone.

    2,048 tokens ─ out of memory ─ 1,024 + 1,024 ─ and at most 1,024 from here on

A row's gradient does not depend on its batch mates, so the picks stay what they were, but for rounding. A row that
does not fit even alone cannot be a candidate: it is left out of its pool, counted and named.

Axes: n rows of a pass, S tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from spice_trainer.utils.logging import logger

if TYPE_CHECKING:
    from spice_trainer.data.rows import CandidateRow

# Rows named in the log; all of them are in the records.
MAX_NAMED_ROWS = 10

# What `should_reduce_batch_size` does not know: libraries and the driver when nothing is left for them.
_OTHER_MESSAGES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the CPU, has no memory left for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(message in str(error) for message in _OTHER_MESSAGES)


def fits_in_memory(attempt: Callable[[], object]) -> bool:
    """Runs `attempt`. Returns `False`, with everything freed that it held, if memory ran out; other errors pass."""
    try:
        attempt()
        return True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Only out here is the error gone, whose traceback held every tensor of the attempt.
    clear_device_cache(garbage_collection=True)
    return False


@contextmanager
def explained(explanation: RuntimeError) -> Iterator[None]:
    """Raises `explanation` where memory runs out in the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explanation from error


class LeftOutRow(NamedTuple):
    """A row that does not fit into memory alone, of the dataset that `source` names."""

    row: int
    num_tokens: int
    source: str


@dataclass(frozen=True)
class MemoryNotice:
    """What a process found out about its memory since it was last asked."""

    failed: tuple[int, int] | None  # Rows and longest row of the smallest pass of several rows that did not fit.
    tokens_per_batch: int  # Of a pass from here on.
    left_out: tuple[LeftOutRow, ...]  # Rows that did not fit alone.


class TokenBudget:
    """The tokens of a pass, padding included, that are worth trying; passes are planned with the first such number."""

    def __init__(self, tokens_per_batch: int) -> None:
        self.tokens_per_batch = tokens_per_batch
        self._failed: tuple[int, int] | None = None
        self._left_out: list[LeftOutRow] = []

    def split(self, lengths: Sequence[int]) -> list[range]:
        """Halves a pass, longest row first, until its parts keep the budget; a row beyond it is a part of its own."""
        waiting, parts = [range(len(lengths))], []
        while waiting:
            part = waiting.pop()
            if len(part) == 1 or len(part) * max(lengths[position] for position in part) <= self.tokens_per_batch:
                parts.append(part)
            else:
                waiting += [part[_half(part) :], part[: _half(part)]]
        return parts

    def reduce(self, lengths: Sequence[int]) -> bool:
        """Halves the budget after a pass did not fit; returns whether it could be: a single row cannot be halved."""
        if len(lengths) == 1:
            return False
        self._failed = (len(lengths), max(lengths))
        self.tokens_per_batch = min(self.tokens_per_batch, _half(lengths) * max(lengths))
        return True

    def run(self, lengths: Sequence[int], attempt: Callable[[range], object]) -> list[int]:
        """Runs a pass, the longest row first, in parts where it does not fit; returns the rows that do not fit alone.

        `attempt` runs the rows at some positions, and may be called again for rows for which it failed.
        """
        waiting, alone = self.split(lengths)[::-1], []
        while waiting:
            part = waiting.pop()
            part_lengths = [lengths[position] for position in part]
            if fits_in_memory(partial(attempt, part)):
                continue
            if self.reduce(part_lengths):
                waiting += [part[halved.start : halved.stop] for halved in self.split(part_lengths)[::-1]]
            else:
                alone.append(part[0])
        return alone

    def leave_out(self, row: CandidateRow) -> None:
        """Notes a row that does not fit alone."""
        self._left_out.append(LeftOutRow(row.index, row.num_tokens, row.source))

    def take_notice(self) -> MemoryNotice | None:
        """What happened since the last call, or `None` if all did fit."""
        failed, left_out = self._failed, tuple(self._left_out)
        self._failed, self._left_out = None, []
        return MemoryNotice(failed, self.tokens_per_batch, left_out) if failed or left_out else None


class MemoryReport:
    """Tells the log of memory that ran out: once for every budget, and once for every row that does not fit."""

    def __init__(self) -> None:
        self._named: set[LeftOutRow] = set()

    def tell(self, notices: Sequence[MemoryNotice | None], *, doing: str = "scoring") -> None:
        """Logs what is new in the notices of every process, by rank."""
        for rank, notice in enumerate(notices):
            if notice is not None and notice.failed is not None:
                logger.warning(
                    "SPICE: memory ran out%s while %s %d rows of %s tokens. Going on with at most %s tokens a "
                    "pass; the picks don't change. Set scoring_tokens_per_batch=%d to start there.",
                    f" on process {rank}" if len(notices) > 1 else "", doing,
                    notice.failed[0], f"{notice.failed[1]:,}", f"{notice.tokens_per_batch:,}", notice.tokens_per_batch,
                )  # fmt: skip
        for one in (one for notice in notices if notice is not None for one in notice.left_out):
            if one in self._named or len(self._named) >= MAX_NAMED_ROWS:
                continue
            self._named.add(one)
            last = " Further such rows are not named here." if len(self._named) == MAX_NAMED_ROWS else ""
            logger.warning(
                "SPICE: row %d of the %s (%s tokens) does not fit into memory even alone, so it cannot be scored and "
                "is left out. Lower `max_length`, or score with a smaller proxy.%s",
                one.row, one.source, f"{one.num_tokens:,}", last,
            )  # fmt: skip


def lockstep_error(num_rows: int, num_tokens: int) -> RuntimeError:
    """The error where memory runs out with sharded weights: no process can repeat a forward by itself."""
    fitting = max(1, -(-num_rows // 2) * num_tokens)
    fix = (
        f"Set scoring_tokens_per_batch={fitting} (or less)"
        if num_rows > 1
        else f"One row of {num_tokens:,} tokens does not fit alone: lower `max_length`"
    )
    return RuntimeError(
        f"SPICE: memory ran out while scoring {num_rows} rows of {num_tokens:,} tokens. The weights are sharded "
        "(FSDP, ZeRO-3), so every forward needs all processes and this one cannot repeat it in halves. "
        f"{fix}, or score with a proxy."
    )


def learning_error(num_tokens: int) -> RuntimeError:
    """The error where a proxy cannot learn from a row of `num_tokens` tokens even alone."""
    return RuntimeError(
        f"SPICE: memory ran out while the proxy learned from one row of {num_tokens:,} tokens, too long even alone. "
        "Lower `max_length`, or set ProxyModel(..., learning_rate=0) to keep the proxy as it is."
    )


def features_error(num_rows: int, num_features: int) -> RuntimeError:
    """The error where there is no memory for the features, which no smaller pass would help."""
    return RuntimeError(
        f"SPICE: memory ran out for the gradient features of {num_rows} candidates, {num_features:,} numbers each "
        f"({num_rows * num_features * 4 / 1e9:.2g} GB). Set a smaller sketch_dim or pool_size, or free memory: a "
        "smaller per_device_train_batch_size with more gradient_accumulation_steps."
    )


def _half(rows: Sequence[int]) -> int:
    return (len(rows) + 1) // 2
