"""Selecting with no target training: what a run picks that scores with the same model, written down and resumable."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, load_from_disk

from spice_trainer import ProxyModel, SelectedSubset, SpiceConfig, attach_spice, select_subset
from spice_trainer.cli.main import main as run_command
from spice_trainer.cli.select import main as run_select
from spice_trainer.data.files import open_dataset
from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.sampling.run import SelectionRun
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.subset.manifest import SubsetManifest, rebuild_subset
from tests.proxy.test_proxy import LEARNING_RATE
from tests.runs.test_side_effects import random_state
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.multimodal import MULTIMODAL, tiny_multimodal_model
from tests.support.trainers import (
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_tokenizer,
    trainable_weights,
    trained_indices,
)
from tests.support.versions import before

pytestmark = pytest.mark.oldest

SETTINGS: dict[str, Any] = {
    "pool_size": 10,
    "num_selected": 4,
    "gradient_normalization": "sqrt_tokens",
    "proxy_learning_rate": LEARNING_RATE,
}
# Six steps of a pool each over 55 rows, the last of half a pool.
OPTIONS: dict[str, Any] = {"samples_per_step": 4, "save_steps": 2}


def select(
    output_dir: Path, *, dropout: float = 0.0, spice: dict[str, Any] | None = None, **options: Any
) -> SelectedSubset:
    model = options.pop("model", None) or tiny_lora_model(lora_dropout=dropout)
    dataset = options.pop("dataset", None)
    dataset = tiny_dataset() if dataset is None else dataset
    return select_subset(
        model, dataset, SpiceConfig(**SETTINGS | (spice or {})), output_dir=output_dir, **OPTIONS | options
    )


def picks(output_dir: Path) -> list[list[int]]:
    return trained_indices(output_dir)


def test_picks_are_those_of_a_run_with_the_same_proxy(tmp_path: Path) -> None:
    model = tiny_lora_model(lora_dropout=0.3)
    proxy = ProxyModel(copy.deepcopy(model), learning_rate=LEARNING_RATE)
    trainer = make_trainer(tmp_path / "run")
    attach_spice(trainer, SpiceConfig(**SETTINGS), proxy=proxy)
    trainer.train()
    before = random_state()
    subset = select(tmp_path / "subset", model=model)
    assert random_state() == before
    assert picks(tmp_path / "subset") == picks(tmp_path / "run")
    assert read_records(tmp_path / "subset", "selections") == read_records(tmp_path / "run", "selections")
    assert same_weights(trainable_weights(model), trainable_weights(proxy.model)), "it learned something else"
    indices = sum(picks(tmp_path / "subset"), [])
    assert len(indices) == 22 == len(set(indices))
    assert subset.dataset.to_list() == tiny_dataset().select(indices).to_list()


def test_the_manifest_rebuilds_the_subset(tmp_path: Path) -> None:
    subset = select(tmp_path)
    assert isinstance(subset, SelectedSubset) and subset.output_dir == tmp_path
    assert subset.manifest == SubsetManifest.load(tmp_path)
    assert subset.dataset.to_list() == tiny_dataset().select(subset.manifest.indices).to_list()
    assert rebuild_subset(tmp_path, tiny_dataset()).to_list() == subset.dataset.to_list()
    assert load_from_disk(str(tmp_path / "dataset")).to_list() == subset.dataset.to_list()
    manifest = SubsetManifest.load(tmp_path)
    assert manifest.indices == tuple(sum(picks(tmp_path), []))
    assert manifest.config == SpiceConfig(**SETTINGS).to_dict()
    assert (manifest.samples_per_step, manifest.seed, manifest.num_rows) == (4, 42, 55)
    assert manifest.model["lora"]["r"] == 4
    with pytest.raises(ValueError, match="fingerprint"):
        rebuild_subset(tmp_path, tiny_dataset(seed=1))


def test_the_precision_stays_open_for_a_trainer_built_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a process where nothing has built an Accelerator yet.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    select(tmp_path / "whole")
    assert AcceleratorState._shared_state == {}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 2)
        select(tmp_path / "interrupted")
    assert AcceleratorState._shared_state == {}
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    # One that is set already is the user's, and stays.
    select(tmp_path / "again")
    assert AcceleratorState().mixed_precision == "bf16"


class Interrupted(Exception):
    """Stands for a killed process."""


def interrupt(patch: pytest.MonkeyPatch, step: int) -> None:
    original = SelectionRun.select_step

    def select_step(self: SelectionRun) -> Any:
        if self.position.step_in_epoch == step:
            raise Interrupted
        return original(self)

    patch.setattr(SelectionRun, "select_step", select_step)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_an_interrupted_selection_continues_bit_identically(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(tmp_path / "whole", dropout=0.3)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, step)
        select(tmp_path / "part", dropout=0.3)
    assert not (tmp_path / "part" / "manifest.json").exists()
    states = sorted(path.name for path in (tmp_path / "part").glob("selection-*"))
    assert states == ([f"selection-{step - step % 2}"] if step >= 2 else [])
    # A fresh adapter is drawn anew when the script runs again; the state has the weights.
    model = add_lora(tiny_model(), seed=7 if step >= 2 else 0, lora_dropout=0.3)
    subset = select(tmp_path / "part", model=model)
    for name in ("selections", "pools", "trained"):
        assert read_records(tmp_path / "part", name) == read_records(tmp_path / "whole", name)
    ours, theirs = SubsetManifest.load(tmp_path / "part"), SubsetManifest.load(tmp_path / "whole")
    assert ours == theirs
    assert subset.dataset.to_list() == load_from_disk(str(tmp_path / "whole" / "dataset")).to_list()
    assert not list((tmp_path / "part").glob("*selection-*"))


def test_continuing_another_selection_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 4)
        select(tmp_path)
    with pytest.raises(ValueError, match=r"unfinished selection of another kind: learning_rate was 0\.01 and is 0\.5"):
        select(tmp_path, spice={"proxy_learning_rate": 0.5})
    with pytest.raises(ValueError, match=r"another selection schedule: .*pool_size was 10 and is 11"):
        select(tmp_path, spice={"pool_size": 11})
    with pytest.raises(ValueError, match=r"of another kind: conflict_penalty was 0\.1 and is 0\.2\. Continue it with"):
        select(tmp_path, spice={"conflict_penalty": 0.2})
    changed = tiny_dataset(seed=2)
    with pytest.raises(ValueError, match=r"unfinished selection of another kind: dataset_fingerprint was"):
        select(tmp_path, dataset=changed)
    select(tmp_path, dataset=changed, overwrite=True)
    assert SubsetManifest.load(tmp_path).num_rows == 55
    assert len(read_records(tmp_path, "trained")) == 6


def test_a_finished_selection_is_returned_and_another_one_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = select(tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, 0)
        assert select(tmp_path).dataset.to_list() == first.dataset.to_list()
        with pytest.raises(FileExistsError, match=r"another selection \(other config\), .*overwrite=True"):
            select(tmp_path, spice={"conflict_penalty": 0.5})
        with pytest.raises(FileExistsError, match=r"another selection \(other dataset_fingerprint\)"):
            select(tmp_path, dataset=tiny_dataset(seed=2))
        with pytest.raises(FileExistsError, match=r"another selection \(other model\)"):
            select(tmp_path, model=add_lora(tiny_model(), r=2))
    assert load_from_disk(str(tmp_path / "dataset")).to_list() == first.dataset.to_list()
    again = select(tmp_path, spice={"gradient_normalization": "none"}, overwrite=True)
    assert again.dataset.to_list() != first.dataset.to_list()
    assert rebuild_subset(tmp_path, tiny_dataset()).to_list() == again.dataset.to_list()


def test_every_so_many_steps_the_selector_learns(tmp_path: Path) -> None:
    model = tiny_lora_model()
    before = trainable_weights(model)
    select(tmp_path / "never", model=model, spice={"proxy_update_every": 50})
    assert same_weights(before, trainable_weights(model))
    select(tmp_path / "always", model=model)
    assert not same_weights(before, trainable_weights(model))
    # What it learned can be loaded as an adapter.
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "always" / "selector", is_trainable=True)
    assert same_weights(trainable_weights(loaded), trainable_weights(model))


RAW = [
    {"prompt": f"w{3 + n % 50} w{9 + n % 40}", "completion": " ".join(f"w{5 + n % 7}" for _ in range(1 + n % 5))}
    for n in range(40)
]


def test_raw_rows_are_tokenised_for_scoring_and_written_whole(tmp_path: Path) -> None:
    dataset = Dataset.from_list(RAW)
    with pytest.raises(
        ValueError, match=r"raw rows \(completion, prompt\) and select_subset has no tokenizer.*processing"
    ):
        select(tmp_path, dataset=dataset)
    subset = select(tmp_path, dataset=dataset, processing_class=tiny_tokenizer(), max_length=3)
    assert all(row in RAW for row in subset.dataset.to_list()) and len(subset.dataset) == 16
    lines = [json.loads(line) for line in (tmp_path / "spice_subset.jsonl").read_text().splitlines()]
    assert lines == subset.dataset.to_list()
    entry = json.loads((tmp_path / "dataset_info.json").read_text())["spice_subset"]
    assert entry["file_name"] == "spice_subset.jsonl"
    pools = read_records(tmp_path, "selections")
    assert all(1 <= line["label_tokens"] <= 2 for line in pools)


def test_rows_without_labels_and_empty_datasets_are_refused(tmp_path: Path) -> None:
    masked = [row | {"labels": [-100] * len(row["labels"])} for row in tiny_dataset().to_list()]
    with pytest.raises(ValueError, match=r"None of 18 rows looked at has a label token"):
        select(tmp_path, dataset=Dataset.from_list(masked))
    with pytest.raises(ValueError, match=r"dataset has 0 rows"):
        select(tmp_path, dataset=tiny_dataset().select([]))
    assert not any(tmp_path.iterdir())


def test_tokenised_rows_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The dataset has rows of .*without labels\. Fix: .*data_collator=\.\.\."):
        select(tmp_path, dataset=tiny_dataset().remove_columns("labels"))


def test_a_wrong_gradient_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spice_trainer.gradients.layers.linear import LinearLayer
    from spice_trainer.gradients.verification import GradientMismatchError

    original = LinearLayer.sample_gradients
    monkeypatch.setattr(LinearLayer, "sample_gradients", lambda *args: original(*args) * 2)
    with pytest.raises(GradientMismatchError):
        select(tmp_path)
    assert not any(tmp_path.iterdir())
    select(tmp_path, verify=False)


def test_defaults_are_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def select_nothing(self: StepSelector, plan: Any, **kwargs: Any) -> Any:
        seen.append(plan)
        raise Interrupted

    monkeypatch.setattr(StepSelector, "select", select_nothing)
    with pytest.raises(Interrupted):
        select_subset(tiny_lora_model(), tiny_dataset(1500), output_dir=tmp_path, verify=False)
    [plan] = seen
    assert [len(pool) for pool in plan.pools] == [120] * 10 and list(plan.budgets) == [12] * 10


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RAW))
    (tmp_path / "select.yaml").write_text(
        f"model_name_or_path: {tmp_path / 'model'}\ndataset_name: {tmp_path / 'rows.jsonl'}\n"
        "dtype: float32\nlora_r: 4\nlora_dropout: 0.1\npool_size: 10\nnum_selected: 4\nproxy_learning_rate: 0.01\n"
    )
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        flags = ["--config", str(tmp_path / "select.yaml"), "--output_dir", str(output), "--samples_per_step", "8"]
        run_command(["select", *flags, "--subset_name", "picked"])
    assert f"16 rows selected. They are in {outputs[0]}, with their manifest." in capsys.readouterr().out
    assert read_records(outputs[0], "selections") == read_records(outputs[1], "selections")
    manifest = SubsetManifest.load(outputs[0])
    assert manifest.model["lora"]["r"] == 4 and manifest.model["lora"]["lora_dropout"] == 0.1
    assert any(name.endswith("down_proj") for name in manifest.model["lora"]["target_modules"])
    assert manifest.config["proxy_learning_rate"] == 0.01 and manifest.samples_per_step == 8
    rows = [json.loads(line) for line in (outputs[0] / "picked.jsonl").read_text().splitlines()]
    assert rows == [RAW[index] for index in manifest.indices]
    shutil.rmtree(outputs[0])


@pytest.mark.skipif(before("transformers", "5"), reason="its experts are modules, not parameters")
@pytest.mark.parametrize("architecture", ["gemma3", "mixtral"])
def test_the_command_line_chooses_layers_that_score(tmp_path: Path, architecture: str) -> None:
    """Where "all-linear" puts an adapter on a vision tower or on stacked experts."""
    model = tiny_multimodal_model(architecture) if architecture in MULTIMODAL else tiny_model(architecture)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RAW))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    flags += ["--output_dir", str(tmp_path / "subset"), "--dtype", "float32", "--pool_size", "10"]
    run_select([*flags, "--num_selected", "4", "--samples_per_step", "8"])
    manifest = SubsetManifest.load(tmp_path / "subset")
    assert len(manifest.rows) == 16
    targets = manifest.model["lora"]["target_modules"]
    assert targets and not any("vision" in name or "experts" in name for name in targets)


def test_the_command_line_reads_a_validation_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("rows", RAW), ("validation", RAW[:5])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl")]
    flags += ["--output_dir", str(tmp_path / "subset"), "--dtype", "float32", "--lora_r", "4", "--pool_size", "10"]
    flags += ["--num_selected", "4", "--samples_per_step", "8", "--strategy", "less", "--validation_rows", "3"]
    with pytest.raises(SystemExit):
        run_select(flags)
    assert "--strategy less needs --validation_dataset_name" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"--validation_dataset_name gone\.jsonl: there is no such file"):
        run_select([*flags, "--validation_dataset_name", "gone.jsonl"])
    run_select([*flags, "--validation_dataset_name", str(tmp_path / "validation.jsonl")])
    manifest = SubsetManifest.load(tmp_path / "subset")
    expected = fingerprint_dataset(open_dataset(str(tmp_path / "validation.jsonl"), "test"))
    assert manifest.validation_fingerprint == expected and len(manifest.rows) == 16


def test_the_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_select(["--output_dir", str(tmp_path)])
    assert "--model_name_or_path and --dataset_name are needed" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"--dataset_name gone\.jsonl: there is no such file"):
        open_dataset("gone.jsonl", "train")
    tiny_dataset().save_to_disk(str(tmp_path / "saved"))
    assert open_dataset(str(tmp_path / "saved"), "train").to_list() == tiny_dataset().to_list()


def test_a_proxy_model_brings_its_own_settings(tmp_path: Path) -> None:
    proxy = ProxyModel(tiny_lora_model(), learning_rate=0.5, update_every=3)
    select(tmp_path, model=proxy)
    trained = trainable_weights(proxy.model)
    assert not same_weights(trained, trainable_weights(tiny_lora_model()))
    assert all(torch.isfinite(value).all() for value in trained.values())


def test_processes_that_would_select_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"4 processes were launched, .*ACCELERATE_USE_CPU=true"):
        select(tmp_path, accelerator=accelerator)
