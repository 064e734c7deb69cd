"""A whole comparison on a tiny model, in processes of its own: fair arms, and results that no kill changes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.comparisons import NUM_STEPS, results, start, tiny_comparison, without_clocks
from tests.support.trainers import same_weights, trainable_weights

from comparison.driver import check_fields, check_shared  # isort: skip
from comparison.json_lines import append_line, read_lines  # isort: skip
from comparison.model import build_model, load_tokenizer  # isort: skip
from comparison.prepared import prepare_data  # isort: skip
from comparison.run import StepClock  # isort: skip
from comparison.settings import Settings, load_settings  # isort: skip
from comparison.trainers import build_trainer, pools_of, row_order  # isort: skip

# Dies on the spot, as by `kill -9`, when the n-th line is about to be written, or in the middle of one.
KILL_AT_LINE = """
import os, signal, comparison.json_lines as lines, comparison.run as run, comparison.driver as driver
seen = 0
def append(path, values, append_line=lines.append_line):
    global seen
    seen += 1
    if seen == {number}:
        if {torn}:
            with path.open("ab") as file:
                file.write(b'{{"arm": "torn')
        os.kill(os.getpid(), signal.SIGKILL)
    append_line(path, values)
run.append_line = driver.append_line = append
"""
# Dies while the n-th checkpoint is half written.
KILL_IN_CHECKPOINT = """
import os, signal, transformers
seen = 0
def save(self, output_dir):
    global seen
    seen += 1
    if seen == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, output_dir)
original = transformers.Trainer._save_optimizer_and_scheduler
transformers.Trainer._save_optimizer_and_scheduler = save
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, output = start("run", tiny_comparison(folder, seeds=[0], learning_rates=[1e-2, 1e-3]))
    assert statuses == [0], output[-3000:]
    return folder


def copy_of(whole: Path, folder: Path, **overrides: Any) -> Path:
    """The same comparison, with an empty output directory."""
    for name in ("model", "rows.jsonl"):
        source = whole / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    return tiny_comparison(folder, **({"seeds": [0], "learning_rates": [1e-2, 1e-3]} | overrides))


@pytest.mark.slow
def test_results_of_a_comparison(whole: Path) -> None:
    lines = results(whole / "output")
    assert [(line["arm"], line["learning_rate"]) for line in lines] == [
        (arm, rate) for arm in ("full", "random", "spice") for rate in (1e-2, 1e-3)
    ]
    by_arm = {line["arm"]: line for line in lines if line["learning_rate"] == 1e-2}
    # 4 steps of 4 rows of 16 candidates; the arm full trains on all 64 of them.
    assert {arm: line["rows_trained"] for arm, line in by_arm.items()} == {"full": 64, "random": 16, "spice": 16}
    assert {arm: line["num_updates"] for arm, line in by_arm.items()} == {"full": 16, "random": 4, "spice": 4}
    for arm, line in by_arm.items():
        steps = [point["step"] for point in line["curve"]]
        assert steps == ([8, 16] if arm == "full" else [2, 4])
        assert [point["rows"] for point in line["curve"]] == [line["rows_trained"] // 2, line["rows_trained"]]
        assert line["validation"] == line["curve"][-1]["losses"]
        assert set(line["choices"]) == {"options", "contrast"} and line["test"]["all"]["rows"] == 15
        assert sum(line["rows_trained_by_domain"].values()) == line["rows_trained"]
        assert line["seconds"]["training"] > 0 and line["seconds"]["evaluation"] > 0
        assert line["curve"][-1]["seconds"] == pytest.approx(
            sum(line["seconds"][name] for name in ("scoring", "selecting", "training"))
        )
    assert by_arm["spice"]["seconds"]["scoring"] > 0 and by_arm["full"]["seconds"]["scoring"] == 0
    losses = [line["validation"]["all"]["loss_per_token"] for line in by_arm.values()]
    base = json.loads((whole / "output" / "base.json").read_text())
    assert len(set(losses)) == 3 and max(losses) < base["validation"]["all"]["loss_per_token"]
    assert not list((whole / "output").glob("runs/*/checkpoint-*"))


@pytest.mark.slow
def test_all_arms_see_the_same_pools(whole: Path) -> None:
    settings = load_settings(whole / "comparison.yaml")
    schedule = pools_of(settings, settings.arm("random"), 64, 0)
    expected = [sorted(pool) for step in range(NUM_STEPS) for pool in schedule.pools(0, step).pools]
    for arm in ("random", "spice"):
        records = read_lines(whole / "output" / "runs" / f"{arm}-seed0-lr0.01-steps4" / "spice" / "pools.jsonl")
        assert [sorted(line["candidates"]) for line in records] == expected
        assert [line["num_selected"] for line in records] == [2] * 8


@pytest.mark.slow
def test_nothing_is_done_twice(whole: Path) -> None:
    before = (whole / "output" / "results.jsonl").read_bytes()
    statuses, output = start("run", whole / "comparison.yaml", attempts=[KILL_AT_LINE.format(number=1, torn=False)])
    assert statuses == [0] and (whole / "output" / "results.jsonl").read_bytes() == before, output[-3000:]
    pytest.importorskip("matplotlib")
    statuses, output = start("report", whole / "comparison.yaml")
    assert statuses == [0] and "Held-out loss (test)" in output
    assert "Held-out loss (test)" in (whole / "output" / "report.md").read_text()


# A run of an arm that selects writes 4 lines of its clock, 2 of its curve after steps 2 and 4, and one of results.
MOMENTS = {
    "step 3, then a torn curve, then a torn result": [(4, False), (1, False), (4, True), (2, True)],
    "a result, then the next run": [(7, True), (2, True)],
}
CHECKPOINTS = [KILL_IN_CHECKPOINT.format(number=number) for number in (1, 2, 1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "attempts"),
    [
        *(
            ("spice", [KILL_AT_LINE.format(number=number, torn=torn) for number, torn in moments])
            for moments in MOMENTS.values()
        ),
        ("spice", CHECKPOINTS),
        ("random", [KILL_AT_LINE.format(number=6, torn=True), *CHECKPOINTS]),
        ("full", [KILL_AT_LINE.format(number=13, torn=True), *CHECKPOINTS]),
    ],
    ids=[*MOMENTS, "spice, checkpoints", "random", "full"],
)
def test_a_killed_comparison_ends_as_one_that_was_not(
    arm: str, attempts: list[str], whole: Path, tmp_path: Path
) -> None:
    config = copy_of(whole, tmp_path)
    statuses, output = start("run", config, "--arms", arm, attempts=[*attempts, ""])
    assert statuses[-1] == 0 and statuses.count(-signal.SIGKILL) >= min(4, len(attempts)), output[-3000:]
    assert set(statuses) == {0, -signal.SIGKILL}
    expected = [line for line in results(whole / "output") if line["arm"] == arm]
    assert without_clocks(results(tmp_path / "output")) == without_clocks(expected)
    for line in results(tmp_path / "output"):
        assert line["seconds"].keys() == expected[0]["seconds"].keys() and line["seconds"]["training"] > 0


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(whole: Path, tmp_path: Path) -> None:
    config = copy_of(whole, tmp_path, learning_rates=[1e-2])
    clock = tmp_path / "output" / "runs" / "spice-seed0-lr0.01-steps4" / "clock.jsonl"
    before = tmp_path / "before.jsonl"
    # Killed in step 3, before its line; the second attempt keeps what it finds.
    attempts = [
        KILL_AT_LINE.format(number=4, torn=False),
        f"import shutil; shutil.copy({str(clock)!r}, {str(before)!r})",
    ]
    statuses, output = start("run", config, "--arms", "spice", attempts=attempts)
    assert statuses == [-signal.SIGKILL, 0], output[-3000:]
    # Equal clock readings: the first steps were not done again.
    assert len(read_lines(before)) == 2 and read_lines(clock)[:2] == read_lines(before)
    assert [line["step"] for line in read_lines(clock)] == [1, 2, 3, 4]


def trainer_of(settings: Settings, arm: str, folder: Path, *, seed: int = 0) -> Any:
    tokenizer = load_tokenizer(settings.model)
    data = prepare_data(settings, tokenizer)
    return build_trainer(
        settings,
        settings.arm(arm),
        build_model(settings, settings.model, seed),
        tokenizer,
        data,
        seed=seed,
        learning_rate=0.1,
        num_steps=NUM_STEPS,
        save_steps=1,
        folder=folder,
        clock=StepClock(folder / "clock.jsonl"),
    )


def test_arms_begin_with_the_same_weights_and_batch(tmp_path: Path) -> None:
    settings = load_settings(tiny_comparison(tmp_path))
    trainers = {arm.name: trainer_of(settings, arm.name, tmp_path / arm.name) for arm in settings.arms}
    weights = {name: trainable_weights(trainer.model) for name, trainer in trainers.items()}
    assert same_weights(weights["full"], weights["random"]) and same_weights(weights["full"], weights["spice"])
    other = trainer_of(settings, "random", tmp_path / "other", seed=1)
    assert not same_weights(weights["random"], trainable_weights(other.model))
    # The last of two layers alone.
    assert all("layers.1." in name for name in weights["full"])
    for trainer in trainers.values():
        assert trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps == 4
        assert trainer.args.data_seed == trainer.args.seed == 0


def test_all_the_data_is_read_once_in_an_order_of_the_seed() -> None:
    assert sorted(row_order(64, 7)) == list(range(64))
    assert row_order(64, 7) == row_order(64, 7) != row_order(64, 8)


def test_results_of_another_comparison_are_kept_apart(tmp_path: Path) -> None:
    settings = load_settings(tiny_comparison(tmp_path))
    check_shared(tmp_path, settings.shared())
    check_shared(tmp_path, load_settings(tiny_comparison(tmp_path, seeds=[5], learning_rates=[1.0])).shared())
    other = load_settings(tiny_comparison(tmp_path, batch_size=8, adapter={"r": 8}))
    with pytest.raises(ValueError, match=r"another comparison: adapter .*; batch_size was 4 and is 8. Set"):
        check_shared(tmp_path, other.shared())
    line = {"arm": "spice", "fields": {"kind": "spice", "gradient_normalization": "unit"}}
    with pytest.raises(ValueError, match=r"the arm 'spice' are of .*unit.*sqrt_tokens.* now. Rename the arm"):
        check_fields(settings, line)
    check_fields(settings, line | {"arm": "gone"})


def test_an_unknown_arm_and_an_arm_with_too_few_steps_are_named(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, arms=[{"name": "wide", "fields": {"pool_size": 16}}], seeds=[0])
    statuses, output = start("run", config, "--arms", "none")
    assert statuses == [1] and "No arm is named 'none'. There are wide" in output
    statuses, output = start("run", config)
    assert statuses == [1] and "epoch of the arm 'wide' has 2 steps, fewer than the comparison's 4" in output
    assert not (tmp_path / "output" / "results.jsonl").exists()


def test_layers_of_the_adapter(tmp_path: Path) -> None:
    settings = load_settings(tiny_comparison(tmp_path, adapter={"last_layers": 3}))
    with pytest.raises(ValueError, match=r"last_layers=3 needs a model of at least so many layers .it has 2"):
        build_model(settings, settings.model, 0)
    settings = load_settings(tiny_comparison(tmp_path, adapter={"last_layers": None}))
    model = build_model(settings, settings.model, 0)
    names = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable_weights(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    settings = load_settings(tiny_comparison(tmp_path))
    last = build_model(settings, settings.model, 0)
    assert {name.replace("layers.1.", "layers.0.") for name in trainable_weights(last)} == {
        name for name in trainable_weights(model) if "layers.0." in name
    }
    assert last.dtype == torch.float32


def test_a_line_is_whole_before_the_next_begins(tmp_path: Path) -> None:
    append_line(tmp_path / "folder" / "lines.jsonl", {"a": 1})
    assert read_lines(tmp_path / "folder" / "lines.jsonl") == [{"a": 1}]
