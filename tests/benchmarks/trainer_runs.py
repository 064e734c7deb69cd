"""Short runs of a real Trainer on a workload, timed step by step."""

from __future__ import annotations

import io
import itertools
import json
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from spice_trainer import SpiceConfig, attach_spice
from tests.benchmarks.clock import synchronize
from tests.benchmarks.workload import Workload, collate


class StepsClock(TrainerCallback):
    """Seconds from one optimizer step's end to the next."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.ends)]


def collate_items(items: list[dict[str, Any]]) -> Any:
    """The workload's collator for rows of a `datasets.Dataset`."""
    from tests.benchmarks.real_model import Row

    return collate([Row(0, item["input_ids"], item["labels"]) for item in items])


def train(workload: Workload, num_steps: int, *, num_rows: int, spice: bool) -> list[dict[str, Any]]:
    """Runs a Trainer on the first `num_rows`, with SPICE or on rows drawn at random, and tells what each step took.

    A step trains on `num_selected` rows of each of `num_pools` pools: as many rows in either case. The first step is
    left out, in which caches fill.
    """
    rows = workload.rows(num_rows)
    dataset = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    clock = StepsClock(workload.device)
    is_bf16 = "bfloat16" in str(workload.dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=workload.make_model(),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=workload.num_selected,
                gradient_accumulation_steps=workload.num_pools,
                max_steps=num_steps + 1,
                learning_rate=2e-4,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=workload.device.type == "cpu",
                bf16=is_bf16,
                remove_unused_columns=False,
            ),
            train_dataset=dataset,
            data_collator=collate_items,
            callbacks=[clock],
        )
        if spice:
            config = SpiceConfig(
                pool_size=workload.pool_size,
                num_selected=workload.num_selected,
                pools_per_step=workload.num_pools,
                scoring_tokens_per_batch=workload.tokens_per_batch,
            )
            attach_spice(trainer, config, verify=False)
        with redirect_stdout(io.StringIO()):  # SPICE's own summary
            trainer.train()
        steps: list[dict[str, Any]] = [{"whole": seconds} for seconds in clock.seconds]
        if spice:
            costs = (Path(folder) / "spice" / "costs.jsonl").read_text().splitlines()
            for step, line in zip(steps, costs, strict=True):
                found = json.loads(line)
                step |= {part: found[f"seconds_{part}"] for part in ("scoring", "selecting", "training")}
                step |= {key: found[key] for key in ("tokens_scored", "tokens_trained")}
    return steps[1:]
