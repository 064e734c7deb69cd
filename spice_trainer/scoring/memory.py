"""What scoring takes at its peak beside the model, said before a run starts.

    peak = max( features scored + one micro-batch's forward and backward,
                features scored and owned + the Gram product )  + the sketch's signs

Features and the Gram product follow from shapes. The forward and backward are measured: two small passes of made-up
rows (with padding, and without where that occurs) show which tensors a pass of any shape makes (module `allocations`),
and the micro-batches that a step will have follow from some rows of the dataset.

Axes: N candidates of a pool, n rows of a micro-batch, S tokens, C columns with a label, P label tokens, D gradient
dimension, m features kept per candidate.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import CandidateRow, pad_rows
from spice_trainer.gradients.backends import rows_influence_each_other
from spice_trainer.scoring.allocations import AllocationTrace, LabelChunk, PassMemory, PassShape
from spice_trainer.scoring.micro_batches import share_micro_batches
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.utils.logging import logger
from spice_trainer.utils.random import preserved_random_state

# No two quantities of these grow alike from the one to the other, and token counts suit kernels that work in blocks.
PROBE_SHAPES = (PassShape(3, 32, 8, 14), PassShape(4, 48, 20, 63))

# Pools made of the sampled rows, of whose micro-batches the largest counts.
_NUM_DRAWS = 8

# Columns of the features that the Gram product converts at a time, and how many N×N matrices of float64 it makes.
_GRAM_CHUNK = 2**18
_GRAM_MATRICES = 8


@dataclass(frozen=True)
class MemoryPlan:
    """What scoring holds on each process, in bytes.

    Args:
        feature_bytes (`int`): Features of the pools scored together, those it measures for others included.
        pass_bytes (`int`, *optional*): A micro-batch at its peak, forward and backward. `None` if not measured.
        peak_bytes (`int`, *optional*): All of scoring at its peak, beside the model. `None` if not measured.
    """

    feature_bytes: int
    pass_bytes: int | None = None
    peak_bytes: int | None = None


def plan_memory(
    scorer: GradientScorer, rows: Sequence[CandidateRow], *, num_pools: int, pool_size: int, measure: bool = True
) -> MemoryPlan:
    """What scoring will take at its peak.

    Leaves no trace: random states, modes, hooks and gradients are as before.

    Args:
        scorer ([`GradientScorer`]): Scores the run. Its model is on its device.
        rows (`Sequence[CandidateRow]`): Some rows of the dataset as it reads them.
        num_pools (`int`): Pools of a step.
        pool_size (`int`): Candidates of a pool.
        measure (`bool`, *optional*, defaults to `True`): Whether to run the two small passes. They are not run with
            sharded weights either, where each would be a collective.

    Returns:
        [`MemoryPlan`]
    """
    rows = [scorer.shorten(row) for row in rows]
    num_pools = scorer.pools_at_once(num_pools, pool_size)
    num_rows = num_pools * pool_size
    feature_bytes = scorer.feature_bytes(num_pools, num_rows)
    if not measure or scorer.processes.lockstep:
        return MemoryPlan(feature_bytes)
    pass_bytes = 0
    for padded, shapes in _planned_passes(scorer, rows, num_rows).items():
        with preserved_random_state(scorer.device):
            pass_memory = _measure_passes(scorer, rows, padded=padded)
        if pass_memory is None:
            return MemoryPlan(feature_bytes)
        pass_bytes = max(pass_bytes, *(pass_memory.peak(shape) for shape in shapes))
    world_size = scorer.processes.world_size
    scored_bytes = -(-num_rows // world_size) * scorer.num_features * 4
    held = scorer.dimension if scorer.sketch_dim else 0
    if scorer.device.type == "cpu":
        # The collated rows, which otherwise wait beside the device.
        held += sum(_row_bytes(row) for row in rows) * num_rows // len(rows) // world_size
    peak = max(scored_bytes + pass_bytes, feature_bytes + _gram_bytes(scorer, pool_size))
    return MemoryPlan(feature_bytes, pass_bytes=pass_bytes, peak_bytes=peak + held)


def _measure_passes(scorer: GradientScorer, rows: Sequence[CandidateRow], *, padded: bool) -> PassMemory | None:
    """Traces two small passes; `None` where made-up rows cannot stand for the real ones, or don't fit.

    Without padding attention needs no mask, and often another kernel.
    """
    plain = [row for row in rows if row.can_be_padded or set(row.inputs) <= {"input_ids", "position_ids"}]
    limit = getattr(getattr(scorer.get_model(), "config", None), "max_position_embeddings", None)
    if not plain or (isinstance(limit, int) and limit < max(shape.num_tokens for shape in PROBE_SHAPES)):
        return None
    traces = []
    try:
        buffer = scorer.passes.new_buffer(max(shape.num_rows for shape in PROBE_SHAPES))
        with scorer.passes.open() as sample_gradients:
            head = sample_gradients.forward.head
            probes = [pad_rows(_make_up(plain, shape, padded=padded)) for shape in PROBE_SHAPES]
            if head is not None and head.is_plain is None:
                # The first pass of a model does more than others.
                scorer.passes.run_pass(sample_gradients, *probes[0], None, [])
            for shape, (inputs, labels) in zip(PROBE_SHAPES, probes, strict=True):
                with AllocationTrace(scorer.device.type) as trace:
                    scorer.passes.run_pass(sample_gradients, inputs, labels, buffer, range(shape.num_rows))
                traces.append(trace)
    except Exception as error:
        # The rows are made up, and the plan is a courtesy: what is wrong with the model shows on real rows.
        logger.debug("SPICE: what scoring takes could not be measured: %s", error)
        return None
    chunk = LabelChunk(*head.chunk) if head is not None and head.is_plain else None
    return PassMemory(PROBE_SHAPES, traces, chunk=chunk)


def _make_up(rows: Sequence[CandidateRow], shape: PassShape, *, padded: bool) -> list[CandidateRow]:
    """Rows of a pass of this shape, made of the tokens of some rows. With padding all but the first are shorter."""
    base = rows[0]
    others = shape.num_rows - 1
    made_up = []
    for number in range(shape.num_rows):
        length = shape.num_tokens - (4 * number if padded else 0)
        num_labels = shape.num_columns
        if number:
            num_labels = (shape.num_label_tokens - shape.num_columns + others - number) // others
        inputs = {key: _cycle(rows, key, length) for key in base.inputs if key != "position_ids"}
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, 1 : 1 + num_labels] = inputs["input_ids"][:, 1 : 1 + num_labels]
        made_up.append(CandidateRow(base.index, inputs, labels, length, num_labels, can_be_padded=True))
    return made_up


def _cycle(rows: Sequence[CandidateRow], key: str, length: int) -> Tensor:
    """An input of `length` tokens."""
    values: Any = torch.cat([row.inputs[key] for row in rows if key in row.inputs], dim=1)
    repeated: Tensor = values.repeat(1, -(-length // values.shape[1]))[:, :length]
    return repeated


def _planned_passes(scorer: GradientScorer, rows: Sequence[CandidateRow], num_rows: int) -> dict[bool, set[PassShape]]:
    """Shapes of the micro-batches of some made-up steps, by whether they hold padding."""
    scored = [row for row in rows if row.num_label_tokens > 0]
    if not scored:
        return {}
    generator = random.Random(0)
    tokens_per_batch = 1 if rows_influence_each_other(scorer.get_model()) else scorer.budget.tokens_per_batch
    labelled = [(row.labels[0, 1:] != -100).nonzero()[:, 0].tolist() for row in scored]
    shapes: dict[bool, set[PassShape]] = {}
    for _ in range(_NUM_DRAWS):
        # Each row as often as any other, as in an epoch.
        drawn = [place for _ in range(-(-num_rows // len(scored))) for place in _shuffled(len(scored), generator)]
        drawn = drawn[:num_rows]
        shares = share_micro_batches(
            [scored[place].shape for place in drawn], tokens_per_batch, num_shares=scorer.processes.world_size
        )
        for batch in (batch for share in shares for batch in share):
            places = [drawn[position] for position in batch]
            lengths = {scored[place].num_tokens for place in places}
            shapes.setdefault(len(lengths) > 1, set()).add(
                PassShape(
                    num_rows=len(places),
                    num_tokens=max(lengths),
                    num_columns=len(set().union(*(labelled[place] for place in places))),
                    num_label_tokens=sum(scored[place].num_label_tokens for place in places),
                )
            )
    return shapes


def _row_bytes(row: CandidateRow) -> int:
    return sum(value.nbytes for value in (*row.inputs.values(), row.labels) if isinstance(value, Tensor))


def _shuffled(number: int, generator: random.Random) -> list[int]:
    order = list(range(number))
    generator.shuffle(order)
    return order


def _gram_bytes(scorer: GradientScorer, pool_size: int) -> int:
    """What measuring one pool takes beside its features."""
    chunk = min(_GRAM_CHUNK, scorer.num_features)
    # On a CPU products are taken in float32, in place.
    converted = 0 if scorer.device.type == "cpu" else pool_size * chunk * 8
    # The coordinates' own measure has one denominator for each, and a chunk of them.
    denominators = 8 * (scorer.num_features + chunk) if scorer.keep_gradients else 0
    return max(converted, denominators) + _GRAM_MATRICES * pool_size * pool_size * 8


def check_memory(
    feature_bytes: int, num_rows: int, *, num_features: int, dimension: int, device: torch.device, config: SpiceConfig
) -> None:
    """Refuses exact or sketched features that cannot fit in free memory.

    Args:
        feature_bytes (`int`): What a process needs to score one pool.
        num_rows (`int`): Candidates of a pool.
        num_features (`int`): Numbers kept per candidate.
        dimension (`int`): D.
        device (`torch.device`): Where they would live.
        config ([`SpiceConfig`]): The settings, for the message.

    Raises:
        ValueError: If one pool's features exceed free memory; names the `sketch_dim` that fits.
    """
    free = free_memory(device)
    if feature_bytes <= free:
        return
    # A quarter of what is free: activations, the optimizer and the data need room too.
    fitting = int(free / 4 / num_rows / 4)
    power = 2 ** max(4, fitting.bit_length() - 1)
    if config.information == "exact":
        fix = f"set sketch_dim={min(power, dimension)}, which fits, or a smaller pool_size"
    else:
        fix = (
            f'set a pool_size of at most {max(2, int(free / 2 / num_features / 4))}, or information="exact", which '
            "can be sketched"
        )
    raise ValueError(
        f"Scoring a pool of {num_rows} candidates with {num_features:,} gradient numbers each needs "
        f"{feature_bytes / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free. To fix it, {fix}."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    # The processes of a machine share its memory.
    return int(psutil.virtual_memory().available) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
