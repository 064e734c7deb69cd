"""One run: an arm with a seed and a learning rate, trained, measured, and continued where it was interrupted.

    <folder>/clock.jsonl   seconds of each step's training      <folder>/curve.jsonl   losses on the validation rows
    <folder>/spice/        what SPICE picked, and its seconds   <folder>/checkpoint-N  where a killed run goes on

Lines behind the checkpoint that a run continues from are cut off, and written anew.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from comparison.evaluation import answer_losses, choice_accuracy, held_out_losses, mean_losses
from comparison.frozen import StoredStates
from comparison.json_lines import append_line, keep_lines, read_lines
from comparison.model import build_model
from comparison.plan import Run, final_runs, wanted_steps
from comparison.prepared import PreparedData, quartiles
from comparison.settings import Arm, Settings
from comparison.tokens import TokenRow
from comparison.trainers import batch_size, build_trainer, ordered_rows
from spice_trainer.recording.checkpoint import last_complete_checkpoint


class StepClock(TrainerCallback):
    """Writes what each step's forward, backward and update took; what chose its rows is not in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._started = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        append_line(self.path, {"step": state.global_step, "seconds": now() - self._started})


class CurveWriter(TrainerCallback):
    """Measures the model every few steps and at the end. It comes after SPICE's own callback, and is on no clock."""

    def __init__(self, path: Path, rows: Sequence[TokenRow], *, every: int, tokens_per_batch: int) -> None:
        self.path = path
        self.rows = rows
        self.every = every
        self.tokens_per_batch = tokens_per_batch

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Measures; a checkpoint at the very end would only be removed."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            started = now()
            losses = held_out_losses(model, self.rows, tokens_per_batch=self.tokens_per_batch)
            append_line(self.path, {"step": state.global_step, "losses": losses, "seconds": now() - started})
        if state.global_step >= state.max_steps:
            control.should_save = False


def now() -> float:
    """The time, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train_run(
    settings: Settings,
    data: PreparedData,
    run: Run,
    *,
    path: str,
    tokenizer: Any,
    folder: Path,
    states: StoredStates | None = None,
    finished: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Train and measure one run, from where an interrupted attempt left it.

    Args:
        settings ([`Settings`]): The comparison.
        data ([`PreparedData`]): Its rows.
        run ([`Run`]): Arm, seed, learning rate, steps.
        path (`str`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        folder (`Path`): Where the run writes.
        states ([`StoredStates`], *optional*): What the model's last layers are fed with.
        finished (`Sequence[dict]`): Results so far, which an arm of as many seconds as another goes by.

    Returns:
        `dict[str, Any]`: The run's line of results.
    """
    arm = settings.arm(run.arm)
    evaluation, per_batch = settings.evaluation, settings.evaluation.tokens_per_batch
    # An arm with steps of its own has a curve of as many points, and is saved as often.
    num_steps = num_updates(settings, arm, data, run, finished)
    stretch = num_steps / run.num_steps
    checkpoint = _checkpoint(folder)
    _cut_off(folder, 0 if checkpoint is None else int(checkpoint.rsplit("-", 1)[1]))
    model = build_model(settings, path, run.seed, states)
    trainer = build_trainer(
        settings,
        arm,
        model,
        tokenizer,
        data,
        seed=run.seed,
        learning_rate=run.learning_rate,
        num_steps=num_steps,
        save_steps=round(settings.save_every * stretch),
        folder=folder,
        clock=StepClock(folder / "clock.jsonl"),
    )
    curve_writer = CurveWriter(
        folder / "curve.jsonl", data.validation, every=round(evaluation.every * stretch), tokens_per_batch=per_batch
    )
    trainer.add_callback(curve_writer)
    trainer.train(resume_from_checkpoint=checkpoint)
    started = now()
    is_final = run.num_steps == wanted_steps(arm, data.report["num_steps"])
    losses = answer_losses(model, data.test, tokens_per_batch=per_batch) if is_final else None
    choices = choice_accuracy(model, data.choices, tokens_per_batch=per_batch) if is_final else None
    seconds = now() - started
    trained = trained_rows(settings, run, data, folder, num_steps)
    steps = _steps(folder, data, trained)
    curve = read_lines(folder / "curve.jsonl")
    totals = {name: sum(step[name] for step in steps) for name in ("scoring", "selecting", "training")}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "num_steps": run.num_steps,
        "num_updates": num_steps,
        "fields": arm.identity,
        "rows_trained": sum(step["rows"] for step in steps),
        "tokens_trained": sum(step["tokens"] for step in steps),
        "label_tokens_trained": sum(step["label_tokens"] for step in steps),
        "rows_trained_by_domain": dict(sorted(sum((step["domains"] for step in steps), Counter()).items())),
        "picks": describe_picks(data, trained),
        "seconds": totals | {"evaluation": seconds + sum(point["seconds"] for point in curve)},
        "curve": [_point(point, steps[: point["step"]]) for point in curve],
        "validation": curve[-1]["losses"],
        "test": None if losses is None else mean_losses(data.test, losses),
        "test_row_losses": None if losses is None else [round(loss, 5) for loss in losses],
        "choices": choices,
    }


def num_updates(settings: Settings, arm: Arm, data: PreparedData, run: Run, finished: Sequence[dict[str, Any]]) -> int:
    """Optimizer steps of a run: its own, those of all rows, or as many as fit into another arm's seconds."""
    if arm.kind == "full":
        whole = -(-len(data.train) * settings.num_epochs // settings.batch_size)
        return round(run.num_steps * whole / data.report["num_steps"])
    if arm.kind != "same_seconds":
        return run.num_steps
    reference = settings.reference
    assert reference is not None and arm.seconds_of is not None
    seconds = {}
    for name in (arm.seconds_of, reference.name):
        runs = set(final_runs(settings, settings.arm(name), finished, data.report["num_steps"]))
        line = next(line for line in finished if line["seed"] == run.seed and Run.of(line) in runs)
        seconds[name] = sum(line["seconds"][part] for part in ("scoring", "selecting", "training"))
        if name == reference.name:
            seconds[name] /= line["num_updates"]
    return max(1, round(seconds[arm.seconds_of] / seconds[reference.name]))


def trained_rows(settings: Settings, run: Run, data: PreparedData, folder: Path, num_steps: int) -> list[list[int]]:
    """The training rows of each step."""
    arm = settings.arm(run.arm)
    order = ordered_rows(settings, arm, data, run.seed, num_steps)
    if order is None:
        return [line["indices"] for line in read_lines(folder / "spice" / "trained.jsonl")]
    size = batch_size(settings, arm)
    return [order[step * size : (step + 1) * size] for step in range(num_steps)]


def describe_picks(data: PreparedData, trained: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What kind of rows were trained on: shares of all, and the quartiles of the answers' tokens."""
    indices = [index for step in trained for index in step]
    rows = [data.train[index] for index in indices]
    return {
        "wanted": sum(row.wanted for row in rows) / len(rows),
        "corrupt": sum(row.corrupt for row in rows) / len(rows),
        "unique": len(set(indices)) / len(rows),
        "label_tokens": quartiles([row.num_labels for row in rows]),
    }


def clean_up(folder: Path) -> None:
    """Remove the checkpoints of a run whose results are written."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _checkpoint(folder: Path) -> str | None:
    try:
        return last_complete_checkpoint(folder)
    except ValueError:
        # Killed while it wrote its first.
        return None


def _cut_off(folder: Path, step: int) -> None:
    if step == 0 and folder.exists():
        shutil.rmtree(folder)
    for name in ("clock.jsonl", "curve.jsonl"):
        keep_lines(folder / name, lambda line: line["step"] <= step)


def _steps(folder: Path, data: PreparedData, trained: list[list[int]]) -> list[dict[str, Any]]:
    """What each step trained on and took."""
    clock = {line["step"]: line["seconds"] for line in read_lines(folder / "clock.jsonl")}
    # SPICE counts a step by the updates before it.
    costs = {line["step"] + 1: line for line in read_lines(folder / "spice" / "costs.jsonl")}
    steps = []
    for number, indices in enumerate(trained, 1):
        rows = [data.train[index] for index in indices]
        cost = costs.get(number, {})
        steps.append(
            {
                "scoring": cost.get("seconds_scoring", 0.0),
                "selecting": cost.get("seconds_selecting", 0.0),
                "training": clock[number],
                "rows": len(rows),
                "tokens": sum(len(row.input_ids) for row in rows),
                "label_tokens": sum(row.num_labels for row in rows),
                "domains": Counter(row.domain for row in rows),
            }
        )
    return steps


def _point(point: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "step": point["step"],
        "rows": sum(step["rows"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
        "seconds": sum(step[name] for step in steps for name in ("scoring", "selecting", "training")),
        "losses": point["losses"],
    }
