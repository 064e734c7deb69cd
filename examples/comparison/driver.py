"""Carries a comparison out: whatever is missing of its results, one run after the other.

<output_dir>/settings.json   what all results share     <output_dir>/base.json   the model before training
<output_dir>/results.jsonl   one line a finished run    <output_dir>/runs/       one folder a run
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from comparison.evaluation import choice_accuracy, held_out_losses
from comparison.frozen import StoredStates
from comparison.json_lines import append_line, read_lines, write_json
from comparison.model import build_model, load_states, load_tokenizer, model_fingerprint, model_path
from comparison.plan import Run, missing_runs
from comparison.prepared import PreparedData, RowFile, prepare_data
from comparison.run import clean_up, now, train_run
from comparison.settings import Settings
from comparison.trainers import check_arms
from spice_trainer import __version__

console = Console()
LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def run_comparison(
    settings: Settings,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    regimes: Sequence[str] | None = None,
) -> None:
    """Do every run that has no result yet. Interrupted at any time, it goes on when called again.

    Processes may share an output directory while none has runs of another's: split by arms or seeds, once the grid
    of learning rates is done.

    Args:
        settings ([`Settings`]): The comparison.
        arms (`Sequence[str]`, *optional*): Only these arms, and the grids that they need.
        seeds (`Sequence[int]`, *optional*): Only these seeds.
        regimes (`Sequence[str]`, *optional*): Only these regimes.

    Raises:
        ValueError: If an arm, seed or regime is unknown, or the output directory holds results of another comparison.
    """
    unknown = sorted(set(arms or ()) - {arm.name for arm in settings.arms})
    if unknown:
        raise ValueError(f"No arm is named {unknown[0]!r}. There are {', '.join(arm.name for arm in settings.arms)}.")
    if strangers := sorted(set(seeds or ()) - set(settings.seeds)):
        raise ValueError(f"{strangers[0]} is not among the seeds {list(settings.seeds)}.")
    path = model_path(settings)
    tokenizer = load_tokenizer(path)
    file = RowFile(settings.data, tokenizer)
    for one in settings.by_regime(regimes):
        if one.regime is not None:
            console.print(f"[bold]Regime {one.regime.name}[/bold]")
        _run_regime(one, prepare_data(one, tokenizer, file), path, tokenizer, arms, seeds)


def _run_regime(
    settings: Settings,
    data: PreparedData,
    path: str,
    tokenizer: Any,
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
) -> None:
    """Do the missing runs of one comparison."""
    output_dir = Path(settings.output_dir)
    shared = settings.shared() | {"model_fingerprint": model_fingerprint(path), "prepared": data.report}
    check_shared(output_dir, shared)
    num_steps = data.report["num_steps"]
    check_arms(settings, len(data.train), num_steps)
    console.print(describe_data(data))
    states = load_states(settings, path, data.input_ids(), console) if settings.frozen_states else None
    base = output_dir / "base.json"
    if not base.exists():
        write_json(base, _measure_base(settings, data, path, states))
    results = output_dir / "results.jsonl"
    for line in read_lines(results):
        clean_up(output_dir / "runs" / Run.of(line).folder)
        check_fields(settings, line)
    while (run := next(missing_runs(settings, read_lines(results), num_steps, arms, seeds), None)) is not None:
        console.print(f"[bold]{run}[/bold]")
        started = now()
        folder = output_dir / "runs" / run.folder
        line = train_run(
            settings,
            data,
            run,
            path=path,
            tokenizer=tokenizer,
            folder=folder,
            states=states,
            finished=read_lines(results),
        )
        append_line(results, line | {"where": where()})
        clean_up(folder)
        loss = line["validation"]["all"]["loss_per_token"]
        console.print(f"  validation loss {loss:.4f} a token; {now() - started:.0f} s")
    console.print(f"Results: {results}")


def check_shared(output_dir: Path, shared: dict[str, Any]) -> None:
    """Keep what all results share, and refuse to add results of another comparison to them.

    Raises:
        ValueError: Naming the settings that differ.
    """
    path = output_dir / "settings.json"
    shared = json.loads(json.dumps(shared))
    if not path.exists():
        write_json(path, shared)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [
        f"{name} was {before.get(name)} and is {shared.get(name)}"
        for name in sorted(before.keys() | shared.keys())
        if before.get(name) != shared.get(name)
    ]
    if differing:
        raise ValueError(
            f"{output_dir} holds results of another comparison: {'; '.join(differing)}. Set another output_dir (or "
            "--output_dir), or remove this one."
        )


def check_fields(settings: Settings, line: dict[str, Any]) -> None:
    """Refuse results of an arm of the same name that was another arm.

    Raises:
        ValueError: Naming the arm and both.
    """
    for arm in settings.arms:
        if arm.name == line["arm"] and arm.identity != line["fields"]:
            raise ValueError(
                f"The results of the arm {arm.name!r} are of {line['fields']}, and it is {arm.identity} now. Rename "
                "the arm, or remove its lines from results.jsonl."
            )


def describe_data(data: PreparedData) -> str:
    """The splits, and what was dropped."""
    report = data.report
    before = report["before_limits"]
    rows = ", ".join(
        f"{name} {count:,}" + (f" of {before[name]:,}" if name in before else "")
        for name, count in report["rows"].items()
    )
    dropped = ", ".join(f"{name} {count:,}" for name, count in report["dropped"].items())
    return f"Rows: {rows}. Dropped: {dropped}. Multiple choice: {report['choice_rows']}. {report['num_steps']} steps."


def where() -> dict[str, str]:
    """Device and versions of a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"device": device, "spice_trainer": __version__, **{name: version(name) for name in LIBRARIES}}


def _measure_base(settings: Settings, data: PreparedData, path: str, states: StoredStates | None) -> dict[str, Any]:
    model = build_model(settings, path, settings.seeds[0], states)
    if torch.cuda.is_available() and not settings.training.get("use_cpu"):
        model = model.to("cuda")
    per_batch = settings.evaluation.tokens_per_batch
    return {
        "validation": held_out_losses(model, data.validation, tokens_per_batch=per_batch),
        "test": held_out_losses(model, data.test, tokens_per_batch=per_batch),
        "choices": choice_accuracy(model, data.choices, tokens_per_batch=per_batch),
    }
