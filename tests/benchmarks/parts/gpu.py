"""Scoring on a GPU: Qwen2 shapes with random weights, bf16, LoRA r 16 on all linear layers, the paper's row lengths.

For each shape and micro-batch size: tokens a second, model FLOP utilisation (module `flops`), peak memory, the hours
that the paper's 97,500 rows would take. Beside them the plain forward and backward of the same rows and micro-batches,
and a loop of single rows on a part of them, all in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.clock import peak_memory, shown, spread, time_in_turn, timed
from tests.benchmarks.flops import DecoderShape, peak_flops, scoring_flops, utilisation
from tests.benchmarks.methods import Contestants, always
from tests.benchmarks.synthetic import build_model, draw_rows, qwen2_config
from tests.benchmarks.tables import Table, bytes_shown, passed
from tests.benchmarks.workload import Workload, num_label_tokens

PAPER_ROWS = 97_500
# Hours of an H100 for the paper's rows.
TARGET_HOURS = {"7B": 1.0, "0.5B": 8 / 60}
LOOP = "one row at a time"


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Every shape, one after the other."""
    if workload.device.type != "cuda":
        return {"skipped": "This part needs a CUDA device: --device cuda."}
    found = {}
    for size in arguments.gpu_shapes:
        report(f"  {size}")
        found[size] = measure_shape(
            qwen2_config(size), workload.device, arguments, report, loop_rows=arguments.gpu_loop_rows[size]
        )
        torch.cuda.empty_cache()
    return {"shapes": found}


def measure_shape(
    config: Any,
    device: torch.device,
    arguments: argparse.Namespace,
    report: Callable[[str], None],
    *,
    loop_rows: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """One shape at every micro-batch size. What does not fit is noted, not fatal."""
    num_rows = arguments.gpu_pools * arguments.gpu_pool_size
    rows = draw_rows(num_rows, seed=0, vocab_size=config.vocab_size)

    def make_workload(tokens_per_batch: int) -> Workload:
        return Workload(
            "synthetic", lambda: build_model(config, device=device, dtype=dtype), lambda number: rows[:number],
            num_pools=arguments.gpu_pools, pool_size=arguments.gpu_pool_size, device=device, dtype=dtype,
            tokens_per_batch=tokens_per_batch,
        )  # fmt: skip

    model = make_workload(1).make_model(random_b=True)
    shape = DecoderShape.from_config(model.config)
    calls: dict[str, Callable[[], Any]] = {}
    counts: dict[str, int] = {}
    for tokens in arguments.gpu_tokens_per_batch:
        workload = make_workload(tokens)
        contestants = Contestants(workload, model)
        scorer = workload.make_scorer(model)
        calls[f"ours, sketch, {tokens:,} tokens"] = lambda w=workload, s=scorer: w.score(s)
        calls[f"plain, sorted, {tokens:,} tokens"] = lambda c=contestants: c.plain(c.batches)
        calls[f"plain, label columns, {tokens:,} tokens"] = lambda c=contestants: c.plain(
            c.batches, label_columns=True
        )
    if arguments.gpu_exact:
        tokens = arguments.gpu_tokens_per_batch[0]
        workload = make_workload(tokens)
        exact = workload.make_scorer(model, sketch_dim=0)
        calls[f"ours, exact, {tokens:,} tokens"] = lambda w=workload, s=exact: w.score(s)
    counts |= dict.fromkeys(calls, num_rows)
    if loop_rows:
        # Spread over all lengths, as the rows themselves are.
        chosen = sorted(rows, key=lambda row: len(row.input_ids))[:: max(1, num_rows // loop_rows)]
        calls[LOOP] = lambda c=contestants: c.one_at_a_time(chosen)
        counts[LOOP] = len(chosen)

    entries: dict[str, dict[str, Any]] = {}
    methods = {}
    for name, call in calls.items():
        entries[name] = {"rows": counts[name]}
        try:
            entries[name]["peak_bytes"] = peak_memory(call, device)
            methods[name] = always(call)
        except torch.OutOfMemoryError as error:
            entries[name]["unavailable"] = f"out of memory: {str(error).splitlines()[0][:120]}"
            for parameter in model.parameters():
                parameter.grad = None
            torch.cuda.empty_cache()
        report(f"    {name}: {entries[name].get('unavailable') or bytes_shown(entries[name]['peak_bytes'])}")
    seconds = time_in_turn(methods, arguments.repeats, device, report=lambda line: report(f"  {line}"))
    used = {LOOP: chosen} if loop_rows else {}
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    for name, values in seconds.items():
        entries[name] |= describe(values, used.get(name, rows), shape, peak)
    result = {"entries": entries, "rows": num_rows, "tokens": sum(len(row.input_ids) for row in rows)}
    if arguments.profile:
        result["profile"] = profiled(make_workload(arguments.gpu_tokens_per_batch[0]), model)
    return result


def describe(seconds: list[float], rows: list[Any], shape: DecoderShape, peak: float | None) -> dict[str, Any]:
    """Speed, utilisation and projected hours of some rows' scoring."""
    lengths, labels = [len(row.input_ids) for row in rows], [num_label_tokens(row) for row in rows]
    flops, middle = scoring_flops(shape, lengths, labels), spread(seconds)["median"]
    return {
        "seconds": seconds,
        "tokens_per_second": [sum(lengths) / value for value in seconds],
        "utilisation": None if peak is None else utilisation(flops, middle, peak),
        # As 4 P: the head counted at every position.
        "utilisation_all_positions": None if peak is None else utilisation(
            scoring_flops(shape, lengths, labels, all_positions=True), middle, peak
        ),
        "hours_for_the_paper": middle / len(rows) * PAPER_ROWS / 3600,
    }  # fmt: skip


def profiled(workload: Workload, model: Any) -> str:
    """Where one pool's scoring spends its time, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    scorer, is_cuda = workload.make_scorer(model), workload.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    workload.score(scorer, workload.pools[:1])
    with profile(activities=activities) as profiler:
        timed(workload.device, workload.score, scorer, workload.pools[:1])
    key = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=70))


def tables(result: dict[str, Any]) -> list[Table]:
    """One table a shape."""
    if "skipped" in result:
        return [Table("GPU", ["not measured"], notes=[result["skipped"]])]
    found = []
    for size, shape in result["shapes"].items():
        entries = shape["entries"]
        table = Table(
            f"Qwen2 {size}, {shape['rows']:,} rows of {shape['tokens']:,} tokens",
            ["method", "tokens/s", "utilisation", "head at all positions", "peak memory", "hours for 97,500 rows"],
        )
        for name, entry in entries.items():
            if "unavailable" in entry:
                table.notes.append(f"{name}: not measured, {entry['unavailable']}")
                continue
            shares = [entry[key] for key in ("utilisation", "utilisation_all_positions")]
            table.add(
                name, shown(entry["tokens_per_second"], 0),
                *("" if share is None else f"{share:.1%}" for share in shares),
                bytes_shown(entry["peak_bytes"]), f"{entry['hours_for_the_paper']:.3f}",
            )  # fmt: skip
        table.notes += targets(size, entries)
        found.append(table)
        if "profile" in shape:
            table.notes.append(shape["profile"])
    return found


def targets(size: str, entries: dict[str, dict[str, Any]]) -> list[str]:
    """What the fastest of ours reaches."""
    ours = {name: entry for name, entry in entries.items() if name.startswith("ours") and "seconds" in entry}
    if not ours:
        return ["ours was not measured; every target MISSED"]
    name, best = min(ours.items(), key=lambda item: item[1]["hours_for_the_paper"])
    hours = best["hours_for_the_paper"]
    notes = [f"{name}: {hours:.3f} hours for the paper's rows"]
    if size in TARGET_HOURS:
        notes[0] += f"; {passed(hours, TARGET_HOURS[size])}"
    if size == "7B" and best["utilisation_all_positions"] is not None:
        notes.append(
            f"{name}: utilisation {best['utilisation']:.1%}; {passed(best['utilisation'], 0.4, at_most=False)}"
        )
    if "seconds" in entries.get(LOOP, {}):
        faster = spread(best["tokens_per_second"])["median"] / spread(entries[LOOP]["tokens_per_second"])["median"]
        notes.append(f"{name}: {faster:.1f} times the loop's tokens a second")
        if size == "0.5B":
            notes[-1] += f"; {passed(faster, 15, at_most=False)}"
    return notes
