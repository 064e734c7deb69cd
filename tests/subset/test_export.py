from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset, load_from_disk

from spice_trainer.subset.export import export_subset
from spice_trainer.subset.manifest import SubsetManifest, rebuild_subset
from tests.subset.llama_factory_reader import read_llama_factory
from tests.support.models import tiny_lora_model
from tests.support.subsets import INDICES, MESSAGES, NUM_ROWS, PROMPTS, export, make_manifest, make_rows, read_jsonl
from tests.support.trainers import make_sft_trainer, tiny_tokenizer, training_options

pytestmark = pytest.mark.oldest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestFiles:
    def test_all_say_the_same(self, tmp_path: Path) -> None:
        dataset = Dataset.from_list(MESSAGES)
        manifest = make_manifest(dataset, INDICES)
        files = export_subset(dataset, manifest, tmp_path / "out")
        expected = [MESSAGES[index] for index in INDICES]
        assert load_from_disk(str(files.dataset)).to_list() == expected
        assert read_jsonl(files.jsonl, tmp_path / "cache") == expected
        assert [json.loads(line) for line in files.jsonl.read_bytes().decode().split("\n")[:-1]] == expected
        assert SubsetManifest.load(tmp_path / "out") == manifest
        assert rebuild_subset(files.manifest.parent, dataset).to_list() == expected
        names = ["dataset", "dataset_info.json", "manifest.json", "manifest.jsonl", "spice_subset.jsonl"]
        assert sorted(os.listdir(tmp_path / "out")) == names
        assert files.llama_factory_jsonl == files.jsonl
        assert files.dataset_info == tmp_path / "out" / "dataset_info.json"

    def test_of_a_list_is_that_of_a_dataset(self, tmp_path: Path) -> None:
        rows = [row | {"score": 1 / 3} for row in MESSAGES]
        tensors = [row | {"score": torch.tensor(row["score"], dtype=torch.float64)} for row in rows]
        export(rows, tmp_path / "dataset")
        export_subset(tensors, make_manifest(tensors, INDICES), tmp_path / "list")
        names = ("spice_subset.jsonl", "dataset_info.json", "manifest.json", "manifest.jsonl")
        first, second = contents(tmp_path / "dataset"), contents(tmp_path / "list")
        assert {name: first[name] for name in names} == {name: second[name] for name in names}
        assert json.loads(first["spice_subset.jsonl"].split(b"\n")[0])["score"] == 1 / 3

    def test_formats_and_transforms_are_put_aside(self, tmp_path: Path) -> None:
        dataset = Dataset.from_list(MESSAGES)
        transformed = dataset.with_transform(lambda batch: {"input_ids": [[1, 2]] * len(batch["messages"])})
        files = export(transformed, tmp_path / "out")
        assert load_from_disk(str(files.dataset)).to_list() == [MESSAGES[index] for index in INDICES]

    def test_token_columns_stay_in_the_dataset_alone(self, tmp_path: Path) -> None:
        tokens = {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1], "completion_mask": [0, 1]}
        files = export([row | tokens for row in MESSAGES], tmp_path / "out")
        assert read_jsonl(files.jsonl, tmp_path / "cache") == [MESSAGES[index] for index in INDICES]
        assert load_from_disk(str(files.dataset)).to_list() == [MESSAGES[index] | tokens for index in INDICES]

    def test_tokenised_rows_are_written_as_they_are(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [{"input_ids": [number, 2], "labels": [-100, 2]} for number in range(NUM_ROWS)]
        files = export(rows, tmp_path / "out")
        assert read_jsonl(files.jsonl, tmp_path / "cache") == [rows[index] for index in INDICES]
        assert (files.dataset_info, files.llama_factory_jsonl) == (None, None)
        assert not (tmp_path / "out" / "dataset_info.json").exists()
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].startswith("SPICE: the rows have `input_ids`, `labels`, and no text")
        assert "Select from the dataset before it is tokenised" in warnings[0]

    def test_numbers_that_are_not_finite_become_null(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [row | {"score": float("nan") if number == 5 else 1.0} for number, row in enumerate(MESSAGES)]
        files = export(rows, tmp_path / "out")
        scores = [row["score"] for row in read_jsonl(files.jsonl, tmp_path / "cache")]
        assert scores == [None, 1.0, 1.0, 1.0]
        assert "SPICE: 1 rows hold numbers that are not finite" in caplog.text

    def test_nothing_of_the_rows_is_executed(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        rows = make_rows(lambda question, answer: {"prompt": f"{{{{ {code} }}}}", "completion": f"!!python {code}"})
        files = export(rows, tmp_path / "out")
        assert read_jsonl(files.jsonl, tmp_path / "cache") == rows[: len(INDICES)]
        read_llama_factory(tmp_path / "out", "spice_subset", tmp_path / "cache")
        assert not mark.exists()
        assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".py", ".pkl", ".pt", ".bin")]


class TestRefusals:
    @pytest.mark.parametrize(
        "name", ["a/b", "../a", "a\\b", "", ".", "..", ".hidden", "a,b", "manifest", "a\n", "/tmp/a", "a b"]
    )
    def test_of_names(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ValueError, match="name=.* cannot be the name of a subset.*Fix: use letters"):
            export(MESSAGES, tmp_path / "out", name=name)
        assert os.listdir(tmp_path) == []

    def test_of_another_dataset_and_of_no_rows(self, tmp_path: Path) -> None:
        manifest = make_manifest(MESSAGES, INDICES)
        with pytest.raises(ValueError, match="has the fingerprint .* but the manifest's dataset has"):
            export_subset(list(reversed(MESSAGES)), manifest, tmp_path / "out")
        with pytest.raises(ValueError, match="picks no row.*Likely cause: .*Fix: "):
            export(MESSAGES, tmp_path / "out", ())
        mixed = [{"text": "w3", "value": number if number else "none"} for number in range(3)]
        with pytest.raises(ValueError, match=r"do not fit into a datasets.Dataset.*number in.*Fix: "):
            export_subset(mixed, make_manifest(mixed, (1, 0)), tmp_path / "out")
        assert os.listdir(tmp_path) == []

    def test_without_datasets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install spice-trainer\[sft\]"):
            export_subset(MESSAGES, make_manifest(MESSAGES, INDICES), tmp_path / "out")


class TestOverwriting:
    def test_the_same_once_more_changes_nothing(self, tmp_path: Path) -> None:
        export(MESSAGES, tmp_path)
        before = contents(tmp_path)
        export(MESSAGES, tmp_path)
        assert contents(tmp_path) == before

    def test_another_subset_is_refused_and_replaced_only_on_demand(self, tmp_path: Path) -> None:
        export(MESSAGES, tmp_path)
        before = contents(tmp_path)
        with pytest.raises(FileExistsError) as error:
            export(MESSAGES, tmp_path, (0, 3))
        assert contents(tmp_path) == before
        text = str(error.value)
        assert "already holds dataset, spice_subset.jsonl, manifest.jsonl, manifest.json, with other content" in text
        assert "Likely cause: another selection" in text and "Fix: give another output_dir (or name), or over" in text
        files = export(MESSAGES, tmp_path, (0, 3), overwrite=True)
        assert load_from_disk(str(files.dataset)).to_list() == [MESSAGES[0], MESSAGES[3]]
        assert SubsetManifest.load(tmp_path).indices == (0, 3)

    @pytest.mark.parametrize("name", ["spice_subset.jsonl", "spice_subset_llamafactory.jsonl", "manifest.jsonl"])
    def test_a_file_of_somebody_else_stays(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"already holds {name}, with other content"):
            export(MESSAGES, tmp_path)
        assert contents(tmp_path) == {name: b"mine"}

    def test_a_folder_of_somebody_else_is_never_removed(self, tmp_path: Path) -> None:
        (tmp_path / "dataset").mkdir()
        (tmp_path / "dataset" / "mine.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=r"dataset.*Fix: "):
                export(MESSAGES, tmp_path, overwrite=overwrite)
        assert contents(tmp_path) == {"dataset/mine.txt": b"mine"}

    def test_the_dataset_selected_from_is_never_removed(self, tmp_path: Path) -> None:
        Dataset.from_list(MESSAGES).save_to_disk(str(tmp_path / "dataset"))
        before = contents(tmp_path)
        with pytest.raises(FileExistsError, match="although overwrite=True: it is the dataset that was selected from"):
            export(load_from_disk(str(tmp_path / "dataset")), tmp_path, overwrite=True)
        assert contents(tmp_path) == before

    def test_other_entries_of_dataset_info_are_kept(self, tmp_path: Path) -> None:
        others = {"identity": {"file_name": "identity.json"}, "数据": {"hf_hub_url": "a/b"}}
        (tmp_path / "dataset_info.json").write_text(json.dumps(others, ensure_ascii=False), encoding="utf-8")
        export(MESSAGES, tmp_path, name="mine")
        info = json.loads((tmp_path / "dataset_info.json").read_text())
        assert list(info) == ["identity", "数据", "mine"]
        assert {name: info[name] for name in others} == others
        shutil.rmtree(tmp_path / "dataset")
        for name in ("mine.jsonl", "manifest.json", "manifest.jsonl"):
            (tmp_path / name).unlink()
        info["mine"]["num_samples"] = 3
        (tmp_path / "dataset_info.json").write_text(json.dumps(info))
        with pytest.raises(FileExistsError, match="already holds the entry 'mine' of dataset_info.json"):
            export(MESSAGES, tmp_path, name="mine")
        export([{"input_ids": [1], "labels": [1]}] * NUM_ROWS, tmp_path, name="mine", overwrite=True)
        assert json.loads((tmp_path / "dataset_info.json").read_text()) == others

    @pytest.mark.parametrize("text", ["[]", "{", "null"])
    def test_a_damaged_dataset_info_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "dataset_info.json").write_text(text)
        with pytest.raises(ValueError, match="is not LLaMA-Factory's list of datasets.*Fix: "):
            export(MESSAGES, tmp_path, overwrite=True)
        assert contents(tmp_path) == {"dataset_info.json": text.encode()}

    def test_a_saved_dataset_as_output_dir_is_refused(self, tmp_path: Path) -> None:
        Dataset.from_list(MESSAGES).save_to_disk(str(tmp_path))
        with pytest.raises(ValueError, match="output_dir is itself a saved dataset"):
            export(MESSAGES, tmp_path, overwrite=True)

    @pytest.mark.parametrize("num_moves", range(4))
    def test_an_interrupted_export_does_not_look_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_moves: int
    ) -> None:
        export(MESSAGES, tmp_path, (0, 3))
        moves = []
        replace = os.replace

        def stop(source: Any, target: Any) -> None:
            if Path(target).parent == tmp_path and Path(source).parent != tmp_path:
                moves.append(target)
                if len(moves) > num_moves:
                    raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                export(MESSAGES, tmp_path, overwrite=True)
        with pytest.raises(FileNotFoundError, match=r"manifest.json is missing"):
            SubsetManifest.load(tmp_path)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
        export(MESSAGES, tmp_path, overwrite=True)
        assert SubsetManifest.load(tmp_path).indices == INDICES


class TestTrl:
    """The JSONL trains as it is: one step of `SFTTrainer`, on the tokens of the rows it was made from."""

    def test_messages(self, tmp_path: Path) -> None:
        from trl import SFTConfig, SFTTrainer

        files = export(MESSAGES, tmp_path / "out")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' </s> ' }}{% endfor %}"
        trainer = SFTTrainer(
            model=tiny_lora_model(),
            args=SFTConfig(**training_options(tmp_path / "run", bf16=False, max_steps=1)),
            train_dataset=load_dataset("json", data_files=str(files.jsonl), split="train", cache_dir=str(tmp_path)),
            processing_class=tokenizer,
        )
        self._check(trainer, tokenizer)

    def test_prompt_and_completion(self, tmp_path: Path) -> None:
        files = export(PROMPTS, tmp_path / "out")
        dataset = load_dataset("json", data_files=str(files.jsonl), split="train", cache_dir=str(tmp_path))
        trainer = make_sft_trainer(tmp_path / "run", train_dataset=dataset, max_steps=1)
        self._check(trainer, tiny_tokenizer())

    def _check(self, trainer: Any, tokenizer: Any) -> None:
        for index, row in zip(INDICES, trainer.train_dataset, strict=True):
            words = tokenizer.convert_ids_to_tokens(row["input_ids"])
            assert f"w{3 + index}" in words and f"w{30 + index}" in words
        trainer.train()
        assert trainer.state.global_step == 1
        assert trainer.state.log_history[0]["loss"] > 0
