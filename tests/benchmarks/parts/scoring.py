"""What scoring costs beside a plain forward and backward of the same rows, and beside other ways to the gradients.

Every method runs once before anything is timed: its gradients are compared with the loop's, and its peak memory is
taken. Then all are timed in turn. All ratios are to `plain, sorted by length`, repeat by repeat. The plain passes have
dropout off, as scoring has; a Trainer's own has it on, which takes longer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spice_trainer import SpiceConfig
from spice_trainer.selection.pool import select_pool
from spice_trainer.selection.scores import PoolScores
from tests.benchmarks.agreement import gradient_error, gram_error, norm_error
from tests.benchmarks.clock import peak_memory, ratios, shown, spread, time_in_turn, timed
from tests.benchmarks.comparators import Unavailable
from tests.benchmarks.flops import DecoderShape, peak_flops, scoring_flops, utilisation
from tests.benchmarks.methods import ARRIVAL, SORTED, Contestants, Method
from tests.benchmarks.option_specs import ScoringOption, kept_modules, parse_option
from tests.benchmarks.parts.gpu import profiled
from tests.benchmarks.real_model import Row
from tests.benchmarks.tables import Table, bytes_shown, passed
from tests.benchmarks.workload import Workload, num_label_tokens

EXACT, SKETCH = "ours, exact", "ours, sketch"
WITHOUT_GRAM = "{}, without its Gram product"
# Above these a method computes something else.
ERROR_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.2}


def scoring_options(workload: Workload, arguments: argparse.Namespace, num_layers: int) -> list[ScoringOption]:
    """Those asked for, or one of each kind."""
    if arguments.scoring_options:
        return [parse_option(text) for text in arguments.scoring_options]
    half = max(1, num_layers // 2)
    texts = (f"layers={half}", "modules=down_proj", "tokens=32", "prefilter=0.5")
    return [parse_option(text) for text in texts]


def truncated(row: Row, num_labels: int) -> Row:
    """The row up to its label of this number."""
    places = [place for place, label in enumerate(row.labels) if place > 0 and label != -100]
    if len(places) <= num_labels:
        return row
    stop = places[num_labels - 1] + 1
    return Row(row.index, row.input_ids[:stop], row.labels[:stop])


def run(workload: Workload, arguments: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """Checks, measures memory, and times."""
    model = workload.make_model(random_b=True)
    contestants = Contestants(workload, model, vmap_chunk=arguments.vmap_chunk)
    shape = DecoderShape.from_config(model.config)
    options = scoring_options(workload, arguments, shape.num_layers)
    ours = {EXACT: contestants.ours(EXACT, sketch_dim=0), SKETCH: contestants.ours(SKETCH, exact=False)}
    by_option = {f"{SKETCH}, {option.name}": option for option in options}
    for name, option in by_option.items():
        ours[name] = contestants.ours(name, exact=False, **option.settings)
    methods = [*contestants.plain_methods(), *ours.values(), *contestants.others()]
    methods = [method for method in methods if not any(word in method.name for word in arguments.skip)]

    found, scores = check(contestants, methods, by_option, report, with_memory=not arguments.skip_memory)
    for seconds in contestants.gram_seconds.values():
        seconds.clear()
    runnable = {method.name: method.open for method in methods if "unavailable" not in found[method.name]}
    for name, values in time_in_turn(runnable, arguments.repeats, workload.device, report=report).items():
        found[name]["seconds"] = values
    for name, values in contestants.gram_seconds.items():
        if name in runnable:
            found[name]["gram_seconds"] = values
    for name, pools in scores.items():
        seconds = [timed(workload.device, select_all, pools, workload)[0] for _ in range(arguments.repeats)]
        found[name]["select_seconds"] = seconds
    add_ratios(found)
    rows = workload.rows()
    flops = scoring_flops(shape, [len(row.input_ids) for row in rows], [num_label_tokens(row) for row in rows])
    result = {
        "methods": found,
        "tokens": sum(len(row.input_ids) for row in rows),
        "flops": flops,
        "peak_flops": peak_flops(torch.cuda.get_device_name()) if workload.device.type == "cuda" else None,
        "dimension": sum(parameter.numel() for parameter in contestants.parameters),
        "feature_bytes": {
            name: feature_bytes(workload, model, **settings)
            for name, settings in ((EXACT, {"sketch_dim": 0}), (SKETCH, {})) if name in found
        },
    }  # fmt: skip
    result["memory_ratios"] = {
        name: found[name]["peak_bytes"] / (found[SORTED]["peak_bytes"] + size)
        for name, size in result["feature_bytes"].items()
        if "peak_bytes" in found.get(SORTED, {}) and "peak_bytes" in found[name]
    }
    if arguments.profile:
        result["profile"] = profiled(workload, model)
    return result


def check(
    contestants: Contestants,
    methods: Sequence[Method],
    by_option: dict[str, ScoringOption],
    report: Callable[[str], None],
    *,
    with_memory: bool = True,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[PoolScores]]]:
    """Runs every method once: its error against the loop and its peak memory; and what ours found out of the pools."""
    found: dict[str, dict[str, Any]] = {method.name: {} for method in methods}
    scores: dict[str, list[PoolScores]] = {}
    reference = contestants.one_at_a_time()
    for method in methods:
        entry = found[method.name]
        try:
            result, size = first_run(method, contestants.workload, with_memory=with_memory)
        except Unavailable as reason:
            entry["unavailable"] = str(reason)
        except Exception as error:
            if method.name in (SORTED, EXACT, SKETCH):
                raise
            # Another library's limit on this model, or too little memory, is a line of the table.
            entry["unavailable"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            if size is not None:
                entry["peak_bytes"] = size
            if isinstance(result, list):
                scores[method.name] = result
                option = by_option.get(method.name, ScoringOption())
                entry["error"] = our_error(contestants, reference, result, option, exact=method.exact)
            elif result is not None:
                entry["error"] = gradient_error(result, reference, method.order)
            del result
        report(f"  {method.name}: {describe_check(entry)}")
    check_errors(found, ERROR_LIMITS[contestants.workload.dtype])
    return found, scores


def select_all(pools: Sequence[PoolScores], workload: Workload) -> None:
    """Picks from every pool, with all that a step's records tell of it."""
    for pool in pools:
        select_pool(pool, workload.num_selected, SpiceConfig())


def first_run(method: Method, workload: Workload, *, with_memory: bool) -> tuple[Any, int | None]:
    """A method's result, and the memory that it took."""
    results: list[Any] = []
    with method.open() as call:
        if not with_memory:
            return call(), None
        size = peak_memory(lambda: results.append(call()), workload.device)
    return results[0], size


def our_error(
    contestants: Contestants, reference: Tensor, scores: Sequence[PoolScores], option: ScoringOption, *, exact: bool
) -> float:
    """Error of the Gram matrices, or of the gradient norms where a sketch keeps only these exactly."""
    if option.tokens is not None:
        reference = contestants.one_at_a_time([truncated(row, option.tokens) for row in contestants.rows])
    if option.layers is not None or option.modules is not None:
        kept = kept_modules(contestants.modules, option)
        parts = zip(kept, reference.split([p.numel() for p in contestants.parameters], dim=1), strict=True)
        reference = torch.cat([part for is_kept, part in parts if is_kept], dim=1)
    if exact:
        return gram_error(scores, reference)
    if option.prefilter is None:
        return norm_error(scores, reference)
    # The filter must leave as many rows as it says.
    number = math.ceil(option.prefilter * contestants.workload.pool_size)
    if any(len(pool.candidates) != number for pool in scores):
        return math.inf
    return norm_error(scores, reference)


def check_errors(found: dict[str, dict[str, Any]], limit: float) -> None:
    """Takes out what is not the gradient it should be; ends the run if that is our own full scoring."""
    wrong = {name: entry["error"] for name, entry in found.items() if "error" in entry and not entry["error"] <= limit}
    if {EXACT, SKETCH} & wrong.keys():
        raise SystemExit(f"Not the loop's gradients, so there is nothing to time: {wrong} (limit {limit:g}).")
    for name, error in wrong.items():
        found[name]["unavailable"] = f"WRONG: not the loop's gradients, relative error {error:.1e}"


def describe_check(entry: dict[str, Any]) -> str:
    if "unavailable" in entry:
        return f"does not run: {entry['unavailable']}"
    error = f", error {entry['error']:.1e}" if "error" in entry else ""
    return f"peak {bytes_shown(entry['peak_bytes'])}{error}" if "peak_bytes" in entry else f"runs{error}"


def feature_bytes(workload: Workload, model: torch.nn.Module, **spice: Any) -> int:
    """Bytes of the features that are held at a time."""
    scorer = workload.make_scorer(model, **spice)
    held = scorer.pools_at_once(workload.num_pools, workload.pool_size)
    return scorer.feature_bytes(held, held * workload.pool_size)


def add_ratios(found: dict[str, dict[str, Any]]) -> None:
    """Ratios to both plain passes, with and without the Gram products."""
    seconds = {name: entry["seconds"] for name, entry in found.items() if "seconds" in entry}
    for name in list(seconds):
        if "gram_seconds" in found[name]:
            pairs = zip(seconds[name], found[name]["gram_seconds"], strict=True)
            seconds[WITHOUT_GRAM.format(name)] = [whole - gram for whole, gram in pairs]
    for reference, key in ((SORTED, "ratios"), (ARRIVAL, "ratios_to_arrival")):
        if reference in seconds:
            for name, values in ratios(seconds, seconds[reference]).items():
                found.setdefault(name, {})[key] = values


def tables(result: dict[str, Any]) -> list[Table]:
    """One line a method; the targets below."""
    methods, tokens = result["methods"], result["tokens"]
    columns = ["scoring", "seconds", "ratio", "to arrival order", "tokens/s", "peak memory", "error"]
    if result["peak_flops"]:
        columns.append("utilisation")
    table = Table("Scoring, as ratios to the plain forward and backward in length-sorted batches", columns)
    for name, entry in methods.items():
        if "unavailable" in entry:
            reason = entry["unavailable"]
            table.notes.append(f"{name}: not measured. {reason}")
            continue
        if "ratios" not in entry:
            continue
        seconds = spread(entry["seconds"])["median"] if "seconds" in entry else None
        cells = [
            name,
            "" if seconds is None else f"{seconds:.3g}",
            shown(entry["ratios"]),
            shown(entry["ratios_to_arrival"]) if "ratios_to_arrival" in entry else "",
            "" if seconds is None else f"{tokens / seconds:,.0f}",
            bytes_shown(entry["peak_bytes"]) if "peak_bytes" in entry else "",
            f"{entry['error']:.1e}" if "error" in entry else "",
        ]
        if result["peak_flops"]:
            share = None if seconds is None else utilisation(result["flops"], seconds, result["peak_flops"])
            cells.append("" if share is None else f"{share:.1%}")
        table.add(*cells)
    for name in (EXACT, SKETCH):
        entry = methods.get(name, {})
        if "ratios" not in entry:
            continue
        middle = spread(entry["ratios"])["median"]
        table.notes.append(f"{name}: {middle:.3f} times the floor; {passed(middle, 1.05)}")
        if "ratios_to_arrival" in entry:
            middle = spread(entry["ratios_to_arrival"])["median"]
            table.notes.append(f"{name}: {middle:.3f} times the order of arrival; {passed(middle, 0.75)}")
        if name in result["memory_ratios"]:
            value = result["memory_ratios"][name]
            table.notes.append(
                f"{name}: peak memory {value:.2f} times a plain pass and {bytes_shown(result['feature_bytes'][name])} "
                f"of features; {passed(value, 1.1)}"
            )
        gram = [part / whole for part, whole in zip(entry["gram_seconds"], entry["seconds"], strict=True)]
        select = [part / whole for part, whole in zip(entry["select_seconds"], entry["seconds"], strict=True)]
        table.notes.append(f"{name}: Gram products {shown(gram, 4)} of scoring")
        table.notes.append(
            f"{name}: selecting {shown(select, 4)} of scoring; {passed(spread(select)['median'], 0.005)}"
        )
    if "profile" in result:
        table.notes.append(result["profile"])
    return [table]
