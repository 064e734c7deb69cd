from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset

from spice_trainer import SpiceConfig
from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.subset.manifest import SubsetManifest, installed_versions, rebuild_subset
from spice_trainer.subset.model import describe_model
from tests.support.models import tiny_lora_model
from tests.support.subsets import make_manifest

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"question {number} é\n"}], "number": number, "share": number / 7}
    for number in range(12)
]
INDICES = (7, 0, 3, 11)


class TestManifest:
    def test_round_trip(self, tmp_path: Path) -> None:
        manifest = make_manifest(ROWS, INDICES, model=describe_model(tiny_lora_model()))
        manifest.save(tmp_path / "a" / "b")
        loaded = SubsetManifest.load(tmp_path / "a" / "b")
        assert loaded == manifest
        assert loaded.indices == INDICES
        assert SpiceConfig(**loaded.config) == SpiceConfig()
        assert loaded.versions == installed_versions()
        assert loaded.versions["torch"] and loaded.versions["spice_trainer"]

    def test_rows_open_as_a_dataset(self, tmp_path: Path) -> None:
        manifest = make_manifest(ROWS, INDICES)
        manifest.save(tmp_path)
        path = str(tmp_path / "manifest.jsonl")
        loaded = load_dataset("json", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
        assert loaded.to_list() == [asdict(row) for row in manifest.rows]

    def test_files_are_readable_by_others_and_no_temporary_stays(self, tmp_path: Path) -> None:
        make_manifest(ROWS, INDICES).save(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["manifest.json", "manifest.jsonl"]
        (tmp_path / "plain").touch()
        modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
        assert len(modes) == 1

    def test_a_number_that_is_not_finite_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        manifest = make_manifest(ROWS, INDICES)
        with pytest.raises(ValueError, match="gain of picked row 0 is nan, but has to be a number.*not finite.*Fix: "):
            replace(manifest, rows=(replace(manifest.rows[0], gain=float("nan")),))
        with pytest.raises(ValueError, match="Cannot write the manifest's metadata as JSON.*tensor.*Fix: "):
            replace(manifest, model={"weight": torch.ones(1)}).save(tmp_path)
        assert os.listdir(tmp_path) == []

    def test_rows_outside_the_dataset_are_refused(self) -> None:
        with pytest.raises(ValueError, match="picks row 12 of a dataset of 12 rows. Likely cause: .*Fix: "):
            make_manifest(ROWS, (0, 12))
        with pytest.raises(ValueError, match="picks row 3 more than once.*Fix: "):
            make_manifest(ROWS, (3, 1, 3))

    def test_half_written_manifest_is_refused(self, tmp_path: Path) -> None:
        make_manifest(ROWS, INDICES).save(tmp_path)
        make_manifest(ROWS, (1, 2)).save(tmp_path / "other")
        (tmp_path / "manifest.jsonl").write_bytes((tmp_path / "other" / "manifest.jsonl").read_bytes())
        with pytest.raises(ValueError, match="checksum differs. Likely cause: .*interrupted. Fix: "):
            SubsetManifest.load(tmp_path)
        (tmp_path / "manifest.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"manifest.json is missing.*written last. Fix: "):
            SubsetManifest.load(tmp_path)

    def test_other_formats_are_refused(self, tmp_path: Path) -> None:
        replace(make_manifest(ROWS, INDICES), format_version=99).save(tmp_path)
        with pytest.raises(ValueError, match=r"format version 99, .* reads 1. Fix: .* spice_trainer 0\."):
            SubsetManifest.load(tmp_path)
        for text in ("[1, 2]", "{", '{"format_version": 1}'):
            (tmp_path / "manifest.json").write_text(text)
            with pytest.raises(ValueError, match="is not a manifest of spice_trainer.*Fix: "):
                SubsetManifest.load(tmp_path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"index": 7', '"index": true'),
            ('"index": 7', '"index": 7.0'),
            ('"index": 7', '"index": -1'),
            ('"index": 7', '"index": 0'),
            ('"index": 7', f'"index": {"9" * 5000}'),
            ('"gain": 0.1', '"gain": NaN'),
            ('"gain": 0.1', '"gain": 1e999'),
            ('"gain": 0.1', '"gain": "\x1b[31m"'),
            ('"step": 0', '"step": null'),
            ('"step": 0', '"stride": 0'),
            ("{", "[" * 100_000),
            ("{", "\udcff"),
            ("{", "3 {"),
        ],
    )
    @pytest.mark.parametrize("is_signed", [True, False])
    def test_hostile_rows_are_refused(self, old: str, new: str, is_signed: bool, tmp_path: Path) -> None:
        make_manifest(ROWS, INDICES).save(tmp_path)
        rows, metadata = tmp_path / "manifest.jsonl", tmp_path / "manifest.json"
        before = rows.read_bytes()
        after = before.replace(old.encode(), new.encode("utf-8", "surrogateescape"), 1)
        assert after != before
        rows.write_bytes(after)
        if is_signed:
            digests = (hashlib.sha256(content).hexdigest() for content in (before, after))
            metadata.write_text(metadata.read_text().replace(*digests))
        with pytest.raises(
            ValueError, match="is not a manifest of spice_trainer" if is_signed else "checksum"
        ) as error:
            SubsetManifest.load(tmp_path)
        assert str(error.value).isprintable()

    @pytest.mark.parametrize(
        "change",
        [
            {"num_rows": True},
            {"num_rows": 3},
            {"num_selected": 3},
            {"samples_per_step": "2"},
            {"seed": None},
            {"dataset_fingerprint": 3},
            {"validation_fingerprint": []},
            {"versions": {"torch": 2}},
            {"versions": []},
            {"config": [1]},
            {"model": None},
            {"format_version": True},
            {"format_version": {"\x1b[2J": 1}},
            {"rows": []},
            {"\x1b[2J": 1},
        ],
    )
    def test_hostile_metadata_is_refused(self, change: dict[str, Any], tmp_path: Path) -> None:
        make_manifest(ROWS, INDICES).save(tmp_path)
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=r"is not a manifest of spice_trainer|is of format version") as error:
            SubsetManifest.load(tmp_path)
        assert str(error.value).isprintable()

    @pytest.mark.parametrize("content", [b"\xff{", b"[" * 100_000, b'{"format_version": NaN}', b'"x"', b"null", b""])
    def test_hostile_files_are_refused(self, content: bytes, tmp_path: Path) -> None:
        make_manifest(ROWS, INDICES).save(tmp_path)
        (tmp_path / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match="is not a manifest of spice_trainer"):
            SubsetManifest.load(tmp_path)

    @pytest.mark.parametrize("name", ["manifest.json", "manifest.jsonl"])
    def test_links_and_fifos_are_not_read(self, name: str, tmp_path: Path) -> None:
        make_manifest(ROWS, INDICES).save(tmp_path)
        (tmp_path / name).rename(tmp_path / "real")
        (tmp_path / name).symlink_to(tmp_path / "real")
        with pytest.raises(ValueError, match="it is a link, which is not followed"):
            SubsetManifest.load(tmp_path)
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="is missing, so"):
            SubsetManifest.load(tmp_path)


class TestRebuild:
    def test_dataset_and_list(self, tmp_path: Path) -> None:
        manifest = make_manifest(ROWS, INDICES)
        manifest.save(tmp_path)
        expected = [ROWS[index] for index in INDICES]
        assert rebuild_subset(tmp_path, ROWS) == expected
        rebuilt = rebuild_subset(str(tmp_path), Dataset.from_list(ROWS))
        assert isinstance(rebuilt, Dataset)
        assert rebuilt.to_list() == rebuild_subset(manifest, ROWS) == expected

    def test_another_number_of_rows_is_refused(self) -> None:
        with pytest.raises(ValueError, match="has 11 rows, but the manifest's has 12.*filtered.*Fix: load"):
            rebuild_subset(make_manifest(ROWS, INDICES), ROWS[:-1])

    def test_changed_content_is_refused(self) -> None:
        manifest = make_manifest(ROWS, INDICES)
        changed = [*ROWS[:5], ROWS[5] | {"number": 6}, *ROWS[6:]]
        with pytest.raises(ValueError) as error:
            rebuild_subset(manifest, Dataset.from_list(changed))
        text = str(error.value)
        assert fingerprint_dataset(changed) in text and manifest.dataset_fingerprint in text
        assert "Likely cause: rows were edited, shuffled" in text and "Fix: load the dataset" in text

    def test_a_dict_of_splits_and_a_stream_are_refused(self) -> None:
        dataset = Dataset.from_list(ROWS)
        with pytest.raises(TypeError, match=r"DatasetDict of \['test', 'train'\].*Fix: .*dataset\[\"train\"\]"):
            rebuild_subset(make_manifest(ROWS, INDICES), DatasetDict({"train": dataset, "test": dataset}))
        with pytest.raises(TypeError, match="IterableDataset, which has no length.*Fix: .*streaming"):
            rebuild_subset(make_manifest(ROWS, INDICES), dataset.to_iterable_dataset())
