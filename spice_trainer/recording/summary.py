"""What SPICE says of a run: before it starts, after its first pools, and at its end."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spice_trainer.config import SpiceConfig
from spice_trainer.recording.ledger import CostLedger, cost_rows
from spice_trainer.recording.metrics import RunTotals
from spice_trainer.sampling.schedule import PoolSchedule
from spice_trainer.scoring.memory import MemoryUse
from spice_trainer.utils.logging import printable

WARN_AFTER_POOLS = 5
_ROWS_OF_TRAINING = ("Optimizer steps", "Samples trained", "Training")
SHARE_TOLERANCE = 0.25


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before it starts.

    D is `dimension`, of which `num_features` numbers are kept per candidate, `feature_bytes` on each process. Tokens
    of a row are means of a sample, as it is trained on and as it is scored: a proxy may have another tokenizer.
    `token_normalized` is whether the loss is normalised by `num_items_in_batch`; `aim` says what picks aim at.
    """

    num_rows: int
    total_steps: int
    dimension: int
    num_features: int
    feature_bytes: int
    num_processes: int
    mean_row_tokens: float
    mean_candidate_tokens: float
    num_proxy_parameters: int | None
    token_normalized: bool
    aim: str = ""


def describe_run(plan: RunPlan, schedule: PoolSchedule, config: SpiceConfig) -> str:
    """The first log line: what is going to happen."""
    shape = schedule.shape
    picks, candidates = sum(shape.budgets), min(shape.pools_per_step * schedule.pool_size, plan.num_rows)
    epochs = plan.total_steps / schedule.steps_per_epoch
    kept = (
        f"all {plan.dimension:,} gradient numbers a sample (exact)"
        if plan.num_features == plan.dimension
        else f"{plan.num_features:,} numbers a sample, a sketch of {plan.dimension:,}"
    )
    on_each = " on each" if plan.num_processes > 1 else ""
    features = f"scoring holds {_bytes(plan.feature_bytes)} of gradient features{on_each}"
    forwards = "a forward" if config.rule.num_forwards == 1 else "two forwards"
    if not config.takes_gradients:
        how = f"{forwards} a row and no backward"
    elif config.rule.compares_gradients:
        how = f"{kept}; {features}"
    else:
        how = f"the norms of {plan.dimension:,} gradient numbers a sample; {features}"
    num_scored = candidates if config.takes_model else 0
    shared = f"shared by {plan.num_processes} processes, " if plan.num_processes > 1 else ""
    at_most = "at most " if config.is_adaptive else ""
    scorer = (
        "The model itself"
        if plan.num_proxy_parameters is None
        else f"A proxy of {plan.num_proxy_parameters:,} parameters"
    )
    rows = f"{plan.num_rows:,} samples, {plan.total_steps:,} optimizer steps ({epochs:.3g} epochs of "
    rows += f"{schedule.steps_per_epoch:,})."
    if schedule.has_open_end:
        rows = f"{plan.total_steps:,} optimizer steps on a stream, of which they read {plan.num_rows:,} rows at most."
    lines = [
        f"SPICE: {rows}",
        f"Each step {'scores' if config.takes_model else 'reads'} {shape.pools_per_step} "
        f"pool{'s' if shape.pools_per_step > 1 else ''} of "
        f"{schedule.pool_size} and trains on {at_most}{picks} picks: {shape.effective_share:.1%} of the candidates "
        f"(asked for: {shape.requested_share:.1%}).",
        f'Rows are picked by strategy="{config.strategy}".',
        *([plan.aim] if plan.aim else []),
        *([f"{scorer} scores, {shared}with {how}.", *_describe_part(config)] if config.takes_model else []),
        f"Per step about {num_scored * plan.mean_candidate_tokens:,.0f} tokens are scored and "
        f"{at_most}{picks * plan.mean_row_tokens:,.0f} trained.",
    ]
    if config.selection_epochs is not None:
        lines.append(f"After {config.selection_epochs} epoch(s) the picks are replayed without scoring.")
    if not plan.token_normalized:
        lines.append(
            "This loss is a mean per micro-batch, so a step's picks are rounded down to a multiple of the "
            f"{shape.num_slots} micro-batches of a step."
        )
    return " ".join(lines)


def _describe_part(config: SpiceConfig) -> list[str]:
    """What of a gradient is computed, where that is not all of it."""
    parts = []
    if config.scoring_layers is not None:
        last = "layer" if config.scoring_layers == 1 else f"{config.scoring_layers} layers"
        parts.append(f"by the last {last}")
    if config.scoring_target_modules is not None:
        parts.append(f"by {', '.join(config.scoring_target_modules)}")
    if config.scoring_max_tokens is not None:
        parts.append(f"on the first {config.scoring_max_tokens:,} label tokens of a row")
    if config.scoring_prefilter is not None:
        parts.append(f"among the {config.scoring_prefilter:.3g} of a pool with the largest loss")
    return [f"Rows are scored {', '.join(parts)} alone."] if parts else []


def describe_peak(before: MemoryUse, after: MemoryUse) -> str:
    """The measured peak of what was scored in between, or that it stayed below an earlier one."""
    if after.peak <= before.peak:
        return f"less than {_bytes(before.peak)} (an earlier peak)"
    return f"{_bytes(after.peak)}, {_bytes(after.peak - before.held)} of it for scoring"


def warn_of_share(schedule: PoolSchedule, config: SpiceConfig) -> str | None:
    """A warning where the batch size makes the share of picks differ from the one asked for, if one was."""
    shape = schedule.shape
    if (config.pool_size, config.num_selected) == (SpiceConfig.pool_size, SpiceConfig.num_selected):
        # The defaults ask for nothing; the first log line has the share.
        return None
    if abs(shape.effective_share / shape.requested_share - 1) <= SHARE_TOLERANCE:
        return None
    fitting = max(1, round(shape.samples_per_step / shape.pools_per_step / shape.requested_share))
    return (
        f"SPICE: a step of {shape.samples_per_step} samples picks {shape.effective_share:.1%} of "
        f"{shape.pools_per_step} pool(s) of {schedule.pool_size}, where num_selected={config.num_selected} asks for "
        f"{shape.requested_share:.1%}. Set pool_size={fitting} with "
        f"num_selected={max(1, shape.samples_per_step // shape.pools_per_step)} for the share asked for, or a batch "
        f"size that is a multiple of {config.num_selected}."
    )


def warn_of_first_pools(totals: RunTotals, config: SpiceConfig) -> list[str]:
    """Warnings after the first pools, naming the setting that changes what was seen."""
    warnings: list[str] = []
    if not config.rule.maximizes_information:
        # The settings that they name change nothing for the others.
        return warnings
    advice = (
        f'Set gradient_normalization="sqrt_tokens" (now "{config.gradient_normalization}")'
        if config.gradient_normalization != "sqrt_tokens"
        else 'Compare with strategy="matching" and gradient_normalization="unit", or with strategy="random", which '
        "trained better models where it was measured (docs/results.md),"
    )
    if totals.overlap_top_norm >= 0.9 and config.gradient_normalization != "unit":
        warnings.append(
            f"SPICE: {totals.overlap_top_norm:.0%} of the picks of the first {totals.num_pools} pools are simply the "
            f"largest gradient norms of their pool, so neither information nor conflict decides. {advice} if "
            "directions should."
        )
    if config.length_quotas in ("pool", "validation"):
        # Answers are as long as was asked for.
        return warnings
    if totals.mean_label_tokens_selected < 0.5 * totals.mean_label_tokens_pool:
        warnings.append(
            f"SPICE: the picks of the first {totals.num_pools} pools are short: "
            f"{totals.mean_label_tokens_selected:.1f} "
            f"label tokens against {totals.mean_label_tokens_pool:.1f} in the pool. The gradient of a mean over few "
            f"tokens is large. {advice} if short answers are not what you want."
        )
    if totals.mean_label_tokens_selected > 2.0 * totals.mean_label_tokens_pool:
        warnings.append(
            f"SPICE: the picks of the first {totals.num_pools} pools are long: "
            f"{totals.mean_label_tokens_selected:.1f} label tokens against {totals.mean_label_tokens_pool:.1f} in the "
            f"pool, so that short answers are hardly trained on. {advice} if they matter to you."
        )
    return warnings


def summarize_run(
    totals: RunTotals, ledger: CostLedger | None = None, *, peak: str | None = None, trains: bool = True
) -> list[tuple[str, str]]:
    """Rows of the end-of-run table: what was picked and what it cost; without those of training if nothing trains."""

    def share(part: float, whole: float) -> str:
        return f"{part / whole:.1%}" if whole else "-"

    rows = [
        ("Optimizer steps", f"{totals.num_steps:,}"),
        (
            "Candidates scored",
            f"{totals.num_candidates:,} in {totals.num_pools:,} pools, {totals.tokens_scored:,} tokens",
        ),
        (
            "Samples picked",
            f"{totals.num_selected:,} ({share(totals.num_selected, totals.num_candidates)} of the candidates)",
        ),
        ("Samples trained", f"{totals.num_trained:,}, {totals.tokens_trained:,} tokens"),
        *_describe_gradients(totals, share),
        (
            "Label tokens of a pick / of a candidate",
            f"{totals.mean_label_tokens_selected:.1f} / {totals.mean_label_tokens_pool:.1f}",
        ),
        *_describe_shift(totals),
        *_describe_information(totals),
        *cost_rows(totals, ledger),
    ]
    if peak is not None:
        rows.append(("Peak memory of the first scoring", peak))
    if totals.num_replayed_steps:
        rows.insert(1, ("Steps that replayed earlier picks", f"{totals.num_replayed_steps:,}"))
    if totals.num_stopped_early:
        rows.append(("Pools stopped early", f"{totals.num_stopped_early:,} of {totals.num_pools:,}"))
    if totals.num_nonfinite or totals.num_zero or totals.num_out_of_memory:
        left_out = f"{totals.num_nonfinite:,} not finite, {totals.num_zero:,} with zero gradient"
        if totals.num_out_of_memory:
            left_out += f", {totals.num_out_of_memory:,} too long for the memory"
        rows.append(("Candidates left out", left_out))
    if totals.num_fillers:
        rows.append(("Micro-batches with a neutral filler", f"{totals.num_fillers:,}"))
    if not trains:
        rows = [("Steps", f"{totals.num_steps:,}"), *(row for row in rows if row[0] not in _ROWS_OF_TRAINING)]
    return rows


def _describe_gradients(totals: RunTotals, share: Callable[[float, float], str]) -> Iterator[tuple[str, str]]:
    """Rows on the picks' norms and conflicts, as far as the strategy computed them."""
    with_norms = totals.num_selected - totals.num_without_norms
    if with_norms or not totals.num_selected:
        value = share(with_norms - totals.num_in_top_norm, with_norms)
        yield ("Picks that are not of the largest norms", value)
    with_conflict = totals.num_selected - totals.num_without_conflict
    if with_conflict or not totals.num_selected:
        changed = totals.num_changed_by_conflict
        yield ("Picks changed by the conflict penalty", f"{changed:,} ({share(changed, with_conflict)})")


def _describe_shift(totals: RunTotals) -> Iterator[tuple[str, str]]:
    """A row on the difference between pools and validation rows, where the strategy looked for one."""
    if not totals.num_pools_aimed:
        return
    shifted = f"{totals.num_pools_shifted:,} of {totals.num_pools_aimed:,} pools"
    if not totals.num_pools_shifted:
        value = f"{shifted}: nothing was aimed at, so picks are like random rows of their pool's answer lengths"
    elif totals.shift_shrinkage:
        distance, shrinkage = (
            total / totals.num_pools_shifted for total in (totals.shift_distance, totals.shift_shrinkage)
        )
        value = f"{shifted}, there by {distance:.2g} of a row's length, of which picks aim at {shrinkage:.0%}"
    else:
        value = f"{shifted}, in their answer lengths"
    yield ("Pools that differ from the validation rows", value)


def _describe_information(totals: RunTotals) -> Iterator[tuple[str, str]]:
    num_pools = totals.num_pools - totals.num_pools_without_information
    if num_pools or not totals.num_pools:
        information, of_top_norm = (
            value / max(num_pools, 1) for value in (totals.information, totals.information_top_norm)
        )
        yield ("Information, picks / largest norms", f"{information:.4g} / {of_top_norm:.4g} a pool")


def print_summary(
    totals: RunTotals,
    directory: str,
    ledger: CostLedger | None = None,
    *,
    peak: str | None = None,
    trains: bool = True,
) -> None:
    """Prints the end-of-run table on stdout, with rich where it is installed, and what it cost beside all the data."""
    rows = [(name, _encodable(value)) for name, value in summarize_run(totals, ledger, peak=peak, trains=trains)]
    below = [*([_encodable(ledger.describe())] if ledger is not None else []), _encodable(f"Records: {directory}")]
    # Rich draws an id for every style, some on import, from Python's random state, which belongs to the user's script.
    state = random.getstate()
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {value}" for name, value in rows]
        print("\n".join(["", "SPICE summary", *lines, *below]), file=sys.stdout)
        return
    table = Table(title="SPICE summary", show_header=False, title_justify="left")
    # What a number means stays whole beside a long value.
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    console = Console()
    try:
        console.print()
        console.print(table)
        for line in below:
            # A folder's name may look like markup.
            console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    finally:
        random.setstate(state)


def _encodable(text: str) -> str:
    """What stdout can write of a text: a folder's name, or the µ of µs, is in few encodings but UTF-8."""
    text, encoding = printable(text), getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("µ", "u").encode(encoding, "backslashreplace").decode(encoding)
    return text


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
