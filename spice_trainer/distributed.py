"""The processes of a run: who this one is, and what scoring sends between them.

Scoring is shared: each process computes the gradients of some candidates, and every pool's features are brought
together on the one process that measures the pool (its owner). Objects (picks, row lengths, errors) go through
Accelerate; features through one `all_to_all`, so that a candidate's features are sent at most once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from accelerate import Accelerator

# How long a process waits for the others before it says so, and after that before it gives up.
SECONDS_TO_NOTICE, SECONDS_TO_COME = 30.0, 570.0
_num_waits: Counter[str] = Counter()

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that score together; by default a single one.

    Every method but [`Processes.owner`] is a collective: all processes must call it, in the same order. `device` is
    where tensors that are sent must be: the CPU for gloo, this process's GPU for NCCL. `lockstep` says that the
    model's weights are sharded (FSDP, ZeRO-3), so that every forward gathers them from all processes and each must run
    equally many.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    lockstep: bool = False

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        """The processes of an accelerator, prepared or not; refused if they do not train on data of their own."""
        check_parallelism(accelerator)
        plugin = accelerator.state.deepspeed_plugin
        return cls(
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=accelerator.device,
            lockstep=accelerator.distributed_type == DistributedType.FSDP
            or (plugin is not None and plugin.zero_stage == 3),
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def owner(self, pool: int) -> int:
        """The process that measures a pool of a step: they take turns."""
        return pool % self.world_size

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank, on every process."""
        return gather_object([value]) if self.world_size > 1 else [value]

    def broadcast(self, value: T) -> T:
        """The value of process 0."""
        if self.world_size == 1:
            return value
        values = [value]
        broadcast_object_list(values, from_process=0)
        return values[0]

    def exchange(
        self, rows: Shaped[Tensor, "n *features"], send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Shaped[Tensor, "m *features"]:
        """Sends rows to their owners and returns what was sent to this process, both in the order of the processes.

        n rows in all are sent, and m received.
        """
        if self.world_size == 1:
            return rows
        received = torch.empty(sum(receive_counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        torch.distributed.all_to_all_single(
            received, rows.to(self.device).contiguous(), list(receive_counts), list(send_counts)
        )
        return received

    @contextmanager
    def failing_together(self, doing: str) -> Iterator[None]:
        """Ends the block, which does what `doing` says, on every process with an error if it failed on one.

        Without this the others would wait in their next collective for a process that does not come.
        """
        if self.world_size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failures = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RuntimeError(
                    f"SPICE: process {rank} of {self.world_size} failed while {doing}, so this one stops too. The "
                    f"error there, with its traceback in that process's output: {failure}"
                )


def wait_for_all(processes: Processes, to_do: str, done: str, fix: str) -> None:
    """Waits until every process does what `to_do` says, for minutes at most; a RuntimeError names those that do not.

    Through the process group's store: a collective would wait for a process that never comes until the group's own
    time-out, and that one for this in a collective of the training.
    """
    world_size = processes.world_size
    if world_size == 1 or not torch.distributed.is_initialized():
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    number = _num_waits[to_do]
    _num_waits[to_do] += 1
    keys = [f"spice_trainer/{to_do}/{number}/{other}" for other in range(world_size)]
    store.set(keys[processes.rank], "")
    missing: list[int] = []
    for seconds in (SECONDS_TO_NOTICE, SECONDS_TO_COME):
        try:
            store.wait(keys, timedelta(seconds=seconds))
            return
        except RuntimeError:
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
            logging.getLogger("spice_trainer").warning(
                "SPICE: waiting for process %s to %s too.", ", ".join(map(str, missing)), to_do
            )
    here = [other for other in range(world_size) if other not in missing]
    raise RuntimeError(
        f"{done} on process {', '.join(map(str, here))} of {world_size}, and within "
        f"{SECONDS_TO_NOTICE + SECONDS_TO_COME:.0f} seconds not on process {', '.join(map(str, missing))}. {fix}"
    )


def check_agreement(processes: Processes, seen: Mapping[str, Any]) -> None:
    """Refuses processes that see different data or settings: they would pick, and wait for, different things."""
    everyones = processes.gather(dict(seen))
    differing = [
        f"{name} is {everyones[0][name]!r} on process 0 and {other[name]!r} on process {rank}"
        for rank, other in enumerate(everyones)
        for name in seen
        if other[name] != everyones[0][name]
    ]
    if differing:
        raise ValueError(
            f"The processes of this run don't see the same: {'; '.join(differing)}. They must build the same dataset "
            "and the same settings: give random filters and shuffles a seed, and let every process load the whole "
            "dataset rather than a part of it."
        )


def check_parallelism(accelerator: Accelerator) -> None:
    """Refuses processes that share one batch, which are not SPICE's to deal picks to."""
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(
            "This run uses Megatron-LM, whose pipeline and tensor parallel processes share a batch. SPICE deals its "
            "picks to processes that each train on their own: use DDP, FSDP or DeepSpeed ZeRO."
        )
    if accelerator.distributed_type == DistributedType.XLA:
        raise ValueError(
            "This run uses TPUs (torch_xla), whose processes cannot send each other what scoring shares through "
            "torch.distributed. Run on GPUs or CPUs."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name, kind in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        size = getattr(parallelism, name, 1) or 1
        if size > 1:
            raise ValueError(
                f"This run uses {kind} parallelism ({name}={size}), whose processes share a batch. SPICE deals its "
                f"picks to processes that each train on their own. Set {name}=1 and shard the model with FSDP or "
                "DeepSpeed ZeRO-3 instead."
            )


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model inside DDP's or DeepSpeed's wrapper, whose forwards count and scale what belongs to training.

    FSDP's stays: sharded weights are gathered by it alone.
    """
    if isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine":
        inner: nn.Module = model.module  # type: ignore[assignment]
        return inner
    return model
