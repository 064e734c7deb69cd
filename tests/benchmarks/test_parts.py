"""Every part of the benchmark runs on a tiny model, and what it reports follows from what it measured."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spice_trainer import PoolScores
from tests.benchmarks import __main__ as command
from tests.benchmarks.comparators import COMPARATORS, Unavailable
from tests.benchmarks.methods import ARRIVAL, LABEL_COLUMNS, LOOP, SORTED, VMAP
from tests.benchmarks.parts import gpu, options, scoring
from tests.benchmarks.parts.end_to_end import compare
from tests.benchmarks.synthetic import qwen2_config
from tests.benchmarks.tables import plain_table

pytestmark = pytest.mark.slow

WORDS = ["--model", "tiny", "--rows", "24", "--pools", "2", "--repeats", "2", "--batch-size", "4"]


def run(part: str, *words: str, folder: Path | None = None) -> dict[str, Any]:
    output = [] if folder is None else ["--output", str(folder / "out.json")]
    return command.main([*WORDS, "--parts", part, *output, *words])


def test_scoring_checks_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(
        "scoring", "--scoring-options", "layers=1", "modules=down_proj tokens=2", "--profile", folder=tmp_path
    )
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(written))
    result = written["parts"]["scoring"]
    methods = result["methods"]
    ours = [name for name in methods if name.startswith("ours") and "without" not in name]
    assert len(ours) == 4 and {SORTED, ARRIVAL, LABEL_COLUMNS, LOOP, VMAP, *COMPARATORS} <= methods.keys()
    for name, entry in methods.items():
        if "unavailable" in entry:
            assert "seconds" not in entry and "WRONG" not in entry["unavailable"], (name, entry)
            continue
        if "seconds" in entry:
            assert len(entry["seconds"]) == 2 and entry["peak_bytes"] > 0
            pairs = zip(entry["seconds"], methods[SORTED]["seconds"], strict=True)
            assert entry["ratios"] == [mine / floor for mine, floor in pairs]
            pairs = zip(entry["seconds"], methods[ARRIVAL]["seconds"], strict=True)
            assert entry["ratios_to_arrival"] == [mine / theirs for mine, theirs in pairs]
        if name not in (SORTED, ARRIVAL, LABEL_COLUMNS) and "without" not in name:
            assert entry["error"] < 1e-4
    exact = methods[scoring.EXACT]
    without = methods[scoring.WITHOUT_GRAM.format(scoring.EXACT)]["ratios"]
    assert all(0 < gram < whole for gram, whole in zip(exact["gram_seconds"], exact["seconds"], strict=True))
    assert without == [
        (whole - gram) / floor
        for whole, gram, floor in zip(exact["seconds"], exact["gram_seconds"], methods[SORTED]["seconds"], strict=True)
    ]
    assert result["feature_bytes"][scoring.EXACT] == 24 * result["dimension"] * 4
    assert result["memory_ratios"][scoring.EXACT] == exact["peak_bytes"] / (
        methods[SORTED]["peak_bytes"] + 24 * result["dimension"] * 4
    )
    shown = capsys.readouterr().out
    assert "target at most 1.05" in shown and "layers=1" in shown and "aten::" in shown
    where = written["conditions"]
    assert where["workload"]["rows"] == 24 and where["versions"]["torch"] == torch.__version__
    assert 0 < where["workload"]["padding_share_sorted"] < 1


def test_a_library_that_is_missing_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Unavailable("not here; pip install something==1.0")

    for name, comparator in COMPARATORS.items():
        monkeypatch.setitem(COMPARATORS, name, type(comparator)(comparator.requirement, refuse))
    run("scoring", "--repeats", "1", "--scoring-options", "tokens=2", "--skip", "vmap", "--skip-memory")
    assert "Opacus GradSampleModule: not measured. not here; pip install something==1.0" in capsys.readouterr().out


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"other": {"error": 0.5}, scoring.EXACT: {"error": 1e-6}}
    scoring.check_errors(methods, 1e-3)
    assert methods["other"]["unavailable"].startswith("WRONG")
    original = scoring.gram_error
    monkeypatch.setattr(scoring, "gram_error", lambda *args: original(*args) + 0.1)
    with pytest.raises(SystemExit, match="Not the loop's gradients"):
        run("scoring", "--scoring-options", "tokens=2", "--skip", "vmap", *COMPARATORS)


def test_a_row_is_cut_behind_its_last_label() -> None:
    row = scoring.Row(0, [5, 6, 7, 8, 9, 10], [5, -100, 7, 8, -100, 10])
    # The first label is predicted by nothing.
    assert scoring.truncated(row, 1).input_ids == [5, 6, 7]
    assert scoring.truncated(row, 2).labels == [5, -100, 7, 8]
    assert scoring.truncated(row, 3) is row


def test_selection() -> None:
    result = run("selection", "--pool-sizes", "20", "30", "--direct-dim", "512")["parts"]["selection"]
    assert [(point["pool_size"], point["num_selected"]) for point in result["points"]] == [(20, 2), (30, 3)]
    assert all(point["same_picks"] for point in result["points"])
    for lists in result["share"].values():
        assert lists["select_share"] == [a / b for a, b in zip(lists["selecting"], lists["scoring"], strict=True)]


def test_end_to_end() -> None:
    result = run(
        "end_to_end", "--trainer-steps", "1", "--growth-pool-sizes", "3", "6", "--growth-lengths", "8", "16",
        "--growth-length-rows", "3", "--growth-ranks", "2", "4", "--growth-pools", "1", "2",
    )["parts"]["end_to_end"]  # fmt: skip
    assert result["rows_a_step"] == {"scored": 24, "trained": 2} and result["steps_of_all"] == 12
    for repeat in range(2):
        (step,) = result["steps"]["SPICE"][repeat]
        # What is timed inside the step is part of it.
        assert 0 < step["scoring"] + step["selecting"] + step["training"] < step["whole"] * 1.01
        assert len(result["steps"]["all the data"][repeat]) == 12
    growth = result["growth"]
    assert growth["number of pools"]["tokens"]["2"] > growth["number of pools"]["tokens"]["1"]
    assert growth["tokens a row"]["tokens"] == {"8": 24, "16": 48}
    dimensions = list(growth["gradient dimension D"]["tokens"])
    assert int(dimensions[1]) == 2 * int(dimensions[0])
    for sweep in growth.values():
        assert all(len(values) == 2 for values in sweep["scoring"]["seconds"].values())
        assert next(iter(sweep["gram"]["ratios"].values())) == [1.0, 1.0]


def test_a_step_is_compared_with_all_the_data() -> None:
    spice = [
        {"whole": 6.0, "scoring": 4.0, "selecting": 0.5, "training": 1.0, "tokens_scored": 90, "tokens_trained": 9}
    ]
    found = compare(spice, [{"whole": 2.0}, {"whole": 4.0}], [{"whole": 0.5}, {"whole": 1.5}], 10.0)
    assert (found["random"], found["all"], found["other"]) == (3.0, 10.0, 0.5)
    assert (found["over_random"], found["over_all"], found["select_share"]) == (2.0, 0.6, 0.125)


def test_options_at_moments() -> None:
    result = run(
        "options", "--moments", "0", "2", "--scoring-options", "layers=1", "modules=v_proj tokens=3", "prefilter=0.5"
    )["parts"]["options"]  # fmt: skip
    assert result["moments"] == [0, 2] and len(result["records"]) == 2 * 2 * 2 * 4
    assert set(result["ratios"]) == {"full", "layers=1", "modules=v_proj tokens=3", "prefilter=0.5"}
    for line in result["summary"]:
        if line["option"] == "full":
            assert (line["overlap"], line["retained"], line["time"]) == (1.0, 1.0, 1.0)
        assert line["time"] == statistics.median(result["ratios"][line["option"]])
        if "norm_error" in line:
            assert line["norm_error"] < 1e-4, line["option"]
    for record in result["records"]:
        assert 0 <= record["overlap"] <= 1 and record["retained"] <= 1 + 1e-9
    text = "\n".join(plain_table(table) for table in options.tables(result))
    assert "WRONG" not in text and "prefilter=0.5" in text


def test_the_frontier_has_what_nothing_beats() -> None:
    lines = [
        {"option": name, "time": time, "retained": retained}
        for name, time, retained in (("slow", 1.0, 1.0), ("worse", 0.9, 0.7), ("half", 0.5, 0.8), ("tenth", 0.1, 0.2))
    ]
    assert options.frontier(lines) == ["tenth", "half", "slow"]


def test_what_was_timed_is_what_is_told_of() -> None:
    class Grams:
        def gram(self, option: Any) -> Any:
            return np.diag([4.0, 9.0, 16.0])

        losses, label_tokens = np.array([1.0, 3.0, 2.0]), np.array([1, 1, 1])

    def error(norms: list[float], option: Any, kept: tuple[int, ...] | None = None) -> float:
        whole = None if kept is None else PoolScores(sound=torch.ones(3, dtype=torch.bool))
        scores = PoolScores(
            sound=torch.ones(len(norms), dtype=torch.bool),
            gradient_norms=torch.tensor(norms, dtype=torch.float64),
            whole=whole,
            kept=kept or (),
        )
        return options.norm_error(scores, Grams(), option)  # type: ignore[arg-type]

    assert error([2.0, 3.3, 4.0], options.FULL) == pytest.approx(0.1)
    half = options.ScoringOption(prefilter=0.5)
    assert error([3.0, 5.0], half, (1, 2)) == pytest.approx(0.25)
    # Other rows than those of largest loss, and no filter at all.
    assert error([2.0, 3.0], half, (0, 1)) == error([2.0, 3.0, 4.0], half) == float("inf")


def test_aim() -> None:
    result = run("aim")["parts"]["aim"]
    assert result["layer"] == 1 and set(result["seconds"]) == {
        "exact gradients",
        "sketched gradients",
        "hidden states",
    }
    assert all(value > 0 for values in result["milliseconds"].values() for value in values)


def test_sketch() -> None:
    result = run("sketch", "--sketch-dims", "64", "256", "99999999")["parts"]["sketch"]
    assert list(result["seconds"]) == [SORTED, "0", "256", "64"]
    exact = [record for record in result["records"] if record["dim"] == 0]
    assert len(exact) == 2 * 4 and all(record["overlap"] == record["retained"] == 1.0 for record in exact)


def test_the_part_for_gpus_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--parts", "gpu"])
    assert "needs a CUDA device" in capsys.readouterr().out


def test_a_shape_is_measured() -> None:
    config = qwen2_config(
        "0.5B", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
        max_position_embeddings=2048,
    )  # fmt: skip
    arguments = argparse.Namespace(
        gpu_pools=1, gpu_pool_size=4, gpu_tokens_per_batch=[1024], gpu_exact=True, repeats=1, profile=True
    )
    found = gpu.measure_shape(
        config, torch.device("cpu"), arguments, lambda line: None, loop_rows=2, dtype=torch.float32
    )
    assert found["rows"] == 4 and found["entries"][gpu.LOOP]["rows"] == 2
    ours = found["entries"]["ours, sketch, 1,024 tokens"]
    assert ours["tokens_per_second"] == [found["tokens"] / ours["seconds"][0]]
    assert ours["hours_for_the_paper"] == pytest.approx(ours["seconds"][0] / 4 * 97_500 / 3600)
    text = "\n".join(plain_table(table) for table in gpu.tables({"shapes": {"0.5B": found}}))
    assert "times the loop's tokens a second; target at least 15" in text and "aten::" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "smollm2"], "--data is needed"),
        (["--model", "tiny", "--rows", "25", "--pools", "2"], "do not make 2 even pools"),
        (["--model", "tiny", "--repeats", "0"], "must be at least 1"),
        (["--parts", "gpu", "--gpu-loop-rows", "3B=5"], "'3B=5' is not SHAPE=ROWS"),
    ],
)
def test_bad_arguments(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(words)
    assert message in capsys.readouterr().err
