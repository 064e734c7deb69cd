"""Scores pools by what a strategy reads, and computes no more than that.

    spice, fisher, dpp, matching, facility_location   forward, backward, Gram matrix (module `scoring`)
    less                                              forward, backward, products with a validation set's gradient
    top_norm                                          forward, backward, norms
    ifd                                               a forward of the row, another of its answer alone
    loss, perplexity                                  a forward
    random                                            nothing: rows are collated, to know which have labels

Each is a collective of the scorer's processes, and each pool comes out on the process that owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from spice_trainer.config import SpiceConfig
from spice_trainer.data.answers import bos_tokens, split_answer
from spice_trainer.data.rows import CandidateRow, RowShape
from spice_trainer.scoring.measure import PoolScores
from spice_trainer.scoring.row_scores import RowScores, from_gradients, from_losses, from_shapes
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.sharing import SharedCandidates, read_shapes
from spice_trainer.scoring.validation import ValidationRows, align
from spice_trainer.utils.random import preserved_random_state

_Progress = Callable[[int, int], None]


def score_for_strategy(
    scorer: GradientScorer,
    config: SpiceConfig,
    pools: Sequence[Sequence[int]],
    *,
    validation: ValidationRows | None = None,
    progress: _Progress | None = None,
) -> Iterator[PoolScores | RowScores]:
    """Scores pools at the current weights, in order. All processes must call it and exhaust it.

    Args:
        scorer ([`GradientScorer`]): Has the model, the rows and the processes.
        config ([`SpiceConfig`]): Names the strategy.
        pools (`Sequence[Sequence[int]]`): Dataset rows of each pool.
        validation ([`ValidationRows`], *optional*): For `less`.
        progress (`Callable[[int, int], None]`, *optional*): Told how many candidates are done, of how many.

    Returns:
        `Iterator`: One of them per pool that this process owns.
    """
    if config.takes_gram:
        return scorer.score(pools, progress=progress)
    if config.takes_gradients:
        return _score_gradients(scorer, pools, validation, progress)
    if config.strategy == "random":
        return _read_rows(scorer, pools)
    return _score_losses(scorer, pools, progress, with_answers_alone=config.strategy == "ifd")


def _score_gradients(
    scorer: GradientScorer,
    pools: Sequence[Sequence[int]],
    validation: ValidationRows | None,
    progress: _Progress | None,
) -> Iterator[RowScores]:
    reference = None if validation is None else validation.mean_gradient(scorer)
    reference_norm = None if reference is None else float(reference.norm())
    for whole, shared, buffer in scorer.compute_groups(pools, progress=progress):
        for pool, shapes, found in scorer.send(shared, buffer):
            yield from_gradients(
                pool,
                shared.pools[pool],
                shapes,
                found,
                whole=whole.get(pool),
                alignment=None if reference is None else align(found.features, found.norms, reference),
                reference_norm=reference_norm,
            )
        del shared, buffer


def _score_losses(
    scorer: GradientScorer, pools: Sequence[Sequence[int]], progress: _Progress | None, *, with_answers_alone: bool
) -> Iterator[RowScores]:
    total = sum(map(len, pools))

    def report(share: float) -> None:
        if progress is not None:
            progress(int(share * total), total)

    with preserved_random_state(scorer.device):
        shared = scorer.share({number: tuple(pool) for number, pool in enumerate(pools)})
        alone: Mapping[int, float | None] | None = None
        if with_answers_alone:
            losses, alone = _losses_of_answers(scorer, shared, report)
        else:
            losses = scorer.compute_losses(shared, report)
    for pool, candidates, shapes, positions in _owned(scorer, shared.pools, shared.shapes):
        yield from_losses(
            pool,
            candidates,
            shapes,
            [losses.get(position, 0.0) for position in positions],
            None if alone is None else [alone.get(position, 0.0) for position in positions],
        )


def _losses_of_answers(
    scorer: GradientScorer, shared: SharedCandidates, report: Callable[[float], None]
) -> tuple[dict[int, float | None], dict[int, float | None]]:
    """Losses of the candidates' answers with and without what precedes them; nan where nothing is left of one."""
    bos = bos_tokens(scorer.get_model())
    whole: dict[int, CandidateRow] = {}
    alone: dict[int, CandidateRow] = {}
    with scorer.failing_together():
        halves = {position: split_answer(row, bos) for position, row in shared.rows.items()}
        for position, row in shared.rows.items():
            # One of which nothing is left runs as it is: with sharded weights all processes run the same batches.
            whole[position], alone[position] = halves[position] or (row, row)
        losses = scorer.passes.compute_losses(replace(shared, rows=whole), lambda share: report(share / 2))
        without = scorer.passes.compute_losses(replace(shared, rows=alone), lambda share: report((1 + share) / 2))
        for position in without:
            if halves[position] is None:
                without[position] = float("nan")
    return scorer.gather(losses), scorer.gather(without)


def _read_rows(scorer: GradientScorer, pools: Sequence[Sequence[int]]) -> Iterator[RowScores]:
    indices = [index for pool in pools for index in pool]
    with preserved_random_state(scorer.device):
        _, shapes = read_shapes(indices, scorer.collate_rows, scorer.processes)
    numbered = {number: tuple(pool) for number, pool in enumerate(pools)}
    for pool, candidates, of_pool, _ in _owned(scorer, numbered, shapes):
        yield from_shapes(pool, candidates, of_pool)


def _owned(
    scorer: GradientScorer, pools: Mapping[int, tuple[int, ...]], shapes: Sequence[RowShape]
) -> Iterator[tuple[int, tuple[int, ...], Sequence[RowShape], range]]:
    """Pools that this process owns, with their rows' lengths and their positions among all candidates."""
    start = 0
    for pool, candidates in pools.items():
        positions = range(start, start + len(candidates))
        start = positions.stop
        if scorer.processes.owner(pool) == scorer.processes.rank:
            yield pool, candidates, shapes[positions.start : positions.stop], positions
