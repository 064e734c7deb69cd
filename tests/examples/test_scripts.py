"""Every script in `examples/` runs, as its own head says to call it, on a tiny model and without a network."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.examples.comparisons import EXAMPLES, tiny_file, write_model
from tests.support.forks import Ended, fork
from tests.support.trainers import read_records, trained_indices

pytest.importorskip("trl")
pytest.importorskip("rich")

# Run by these tests, which know what must come of them.
RUN_ELSEWHERE = {
    "compare.py": ("test_comparison_runs.py", 'start("run", '),
    "sensitivity.py": ("test_sensitivity.py", "example.main("),
    "theory.py": ("test_theory.py", "example.main("),
}
SPICE = ["--pool_size", "8", "--num_selected", "4", "--max_steps", "2"]
OF_TRAINER = ["--use_cpu", "true", "--report_to", "none", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
OF_TRAINER += ["--gradient_accumulation_steps", "2", "--max_length", "64", *SPICE]
LORA = ["--use_peft", "--lora_target_modules", "all-linear"]
ARGUMENTS: dict[str, list[str]] = {
    "accelerate_loop.py": ["--dataset", "rows.jsonl", "--model", "model", "--output_dir", "out", *SPICE],
    "trainer.py": ["--dataset_name", "rows.jsonl", "--output_dir", "out", "--model_name_or_path", "model",
                   *OF_TRAINER],
    "sft.py": ["--config", str(EXAMPLES / "sft.yaml"), "--dataset_name", "rows.jsonl", "--output_dir", "out",
               "--model_name_or_path", "model", *OF_TRAINER],
    "proxy.py": ["--dataset_name", "rows.jsonl", "--output_dir", "out", "--model_name_or_path", "model", "--dtype",
                 "float32", "--proxy_model_name_or_path", "proxy", "--proxy_check_pools", "2", *LORA, *OF_TRAINER],
    # With TRL's own precision, bfloat16, which selecting must leave to it.
    "select_then_sft.py": ["--dataset_name", "rows.jsonl", "--output_dir", "out", "--model_name_or_path", "model",
                           "--proxy_model_name_or_path", "proxy", *LORA, *OF_TRAINER],
    "demo.py": ["--output-dir", "out", "--steps", "2", "--pool-size", "6", "--heldout", "6"],
}  # fmt: skip


def scripts() -> set[str]:
    """The examples that are called, not imported."""
    return {path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}


def test_every_example_is_run_by_a_test() -> None:
    assert scripts() == {*ARGUMENTS, *RUN_ELSEWHERE}
    for test, call in RUN_ELSEWHERE.values():
        assert call in (Path(__file__).parent / test).read_text()


def words(source: str) -> Iterator[dict[str, str]]:
    """Rows in the place of those that the demo reads from packages which tests do without."""
    for number in range(60):
        word = f"w{3 + number}"
        yield {"source": source, "prompt": f"{word} w3 {source}", "completion": f"{word} w4 w5"}


def run_script(name: str, arguments: list[str], folder: str) -> None:
    """What `python examples/NAME ARGUMENTS` does."""
    os.chdir(folder)
    sys.path[:0] = [str(EXAMPLES)]
    import demo_data

    sources: dict[str, Any] = {f"{source}_rows": lambda source=source: words(source) for source in ("chat", "action")}
    with patch.multiple(demo_data, **sources), patch.object(sys, "argv", [name, *arguments]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run(name: str, folder: Path) -> Ended:
    offline = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    arguments = [(name, ARGUMENTS[name], str(folder))]
    ended = fork(run_script, arguments, folder / "printed", environments=[offline])
    assert ended.codes == [0], ended.stderr[-4000:]
    return ended


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model", "proxy", "out/model"):
        write_model(tmp_path / name)
    tiny_file(tmp_path / "rows.jsonl", 60)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "demo.py" else name for name in ARGUMENTS]
)
def test_an_example_trains_and_leaves_its_adapter(name: str, folder: Path) -> None:
    printed = run(name, folder).stdout
    out = folder / "out" / ("with_spice" if name == "demo.py" else "")
    assert (out / "adapter_model.safetensors").is_file()
    if name == "accelerate_loop.py":
        assert "step 2: loss" in printed
    elif name == "select_then_sft.py":
        selected = read_records(out / "subset", "selections")
        # Half of each pool.
        assert len(selected) == 30 and "Training on 30 of 60 rows" in printed
    else:
        assert [len(indices) for indices in trained_indices(out)] == [4, 4]
    if name == "proxy.py":
        assert len((out / "spice" / "transfer.jsonl").read_text().splitlines()) == 2
    if name == "demo.py":
        assert "SPICE - random:" in printed
