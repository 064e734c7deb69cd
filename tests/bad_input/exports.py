"""Manifests, exports, and the command's `--dataset_name`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from spice_trainer.data.files import open_dataset
from spice_trainer.subset.manifest import SubsetManifest, rebuild_subset
from tests.bad_input.scene import CALLING, BadInput, Scene
from tests.support.subsets import PROMPTS, export, make_manifest
from tests.support.trainers import tiny_dataset


def _rebuild(change: Callable[[Path], Any] | None, rows: Any = PROMPTS) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        make_manifest(PROMPTS, (5, 1)).save(scene.folder)
        if change is not None:
            change(scene.folder)
        return lambda: rebuild_subset(scene.folder, rows)

    return prepare


def _edit_manifest(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _edit_rows(folder: Path) -> None:
    path = folder / "manifest.jsonl"
    path.write_text(path.read_text().replace('"index": 5', '"index": 6'))


def _export_into(name: str, content: str, **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        (scene.folder / name).write_text(content)
        return lambda: export(PROMPTS, scene.folder, **options)

    return prepare


def _open(name: str, content: str | None, split: str = "train") -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        scene.patch.setattr("datasets.config.HF_DATASETS_CACHE", scene.folder.parent / "datasets_cache")
        if content is not None:
            (scene.folder / name).write_text(content)
        return lambda: open_dataset(str(scene.folder / name), split)

    return prepare


def _open_splits(scene: Scene) -> Callable[[], Any]:
    DatasetDict({"train": tiny_dataset(3), "test": tiny_dataset(2)}).save_to_disk(str(scene.folder / "rows"))
    return lambda: open_dataset(str(scene.folder / "rows"), "validation")


ROWS = (
    BadInput(
        "manifest_of_other_rows",
        "rebuilding a subset from an edited dataset",
        CALLING,
        ValueError,
        ("The dataset's content has the fingerprint", "rows were edited, shuffled or sorted"),
        _rebuild(None, [row | {"prompt": "w3"} for row in PROMPTS]),
    ),
    BadInput(
        "manifest_of_more_rows",
        "rebuilding a subset from a shorter or longer dataset",
        CALLING,
        ValueError,
        ("The dataset has 7 rows, but the manifest's has 8",),
        _rebuild(None, PROMPTS[:-1]),
    ),
    BadInput(
        "edited_picks",
        "picks edited by hand",
        CALLING,
        ValueError,
        ("manifest.jsonl is not the file that", "its checksum differs"),
        _rebuild(_edit_rows),
    ),
    BadInput(
        "manifest_version",
        "a manifest of another version",
        CALLING,
        ValueError,
        ("is of format version 9", "Fix: read it with the version that wrote it"),
        _rebuild(_edit_manifest(format_version=9)),
    ),
    BadInput(
        "manifest_of_another_kind",
        "a manifest with other values",
        CALLING,
        ValueError,
        (
            "is not a manifest of spice_trainer (ValueError: model of the manifest is",
            "Fix: give the folder of an exported subset",
        ),
        _rebuild(_edit_manifest(model="../../etc/passwd")),
    ),
    BadInput(
        "rows_outside",
        "a manifest that picks rows the dataset has not",
        CALLING,
        ValueError,
        ("picks row 9 of a dataset of 8 rows",),
        lambda scene: lambda: make_manifest(PROMPTS, (9,)),
    ),
    BadInput(
        "no_manifest",
        "a folder without a manifest",
        CALLING,
        FileNotFoundError,
        ("manifest.json",),
        lambda scene: lambda: SubsetManifest.load(scene.folder),
    ),
    BadInput(
        "file_of_ones_own",
        "exporting over a file of one's own",
        CALLING,
        FileExistsError,
        ("already holds", "spice_subset.jsonl", "Fix: give another output_dir (or name), or overwrite=True"),
        _export_into("spice_subset.jsonl", "mine"),
    ),
    BadInput(
        "folder_of_ones_own",
        "the same with a `dataset` that is no dataset, and `overwrite=True`",
        CALLING,
        FileExistsError,
        ("is not replaced, although overwrite=True", "or move it away yourself"),
        _export_into("dataset", "mine", overwrite=True),
    ),
    BadInput(
        "broken_info",
        "a `dataset_info.json` that is none of LLaMA-Factory's",
        CALLING,
        ValueError,
        ("is not LLaMA-Factory's list of datasets",),
        _export_into("dataset_info.json", "[1, 2"),
    ),
    BadInput(
        "no_file",
        "`--dataset_name` of no file",
        CALLING,
        FileNotFoundError,
        ("rows.jsonl: there is no such file",),
        _open("rows.jsonl", None),
    ),
    BadInput(
        "broken_file",
        "`--dataset_name` of a file that is not JSON",
        CALLING,
        ValueError,
        ("the file holds no JSON rows that fit together", "one object a line"),
        _open("rows.jsonl", '{"text": "w3"}\n{"text": \n'),
    ),
    BadInput(
        "empty_file",
        "`--dataset_name` of an empty file",
        CALLING,
        ValueError,
        ("the file holds no JSON rows", "it is empty"),
        _open("rows.jsonl", ""),
    ),
    BadInput(
        "other_file",
        "`--dataset_name` of a file of another kind",
        CALLING,
        ValueError,
        ("is a file of another kind", "Give a .json or .jsonl file"),
        _open("rows.csv", "text\nw3\n"),
    ),
    BadInput(
        "no_split",
        "`--dataset_train_split` of no split",
        CALLING,
        ValueError,
        ("has the splits train, test", "asks for 'validation'"),
        _open_splits,
    ),
)
