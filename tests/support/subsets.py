"""Rows to select from, manifests that pick some of them, and exports of the picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from spice_trainer import SpiceConfig
from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.subset.export import SubsetFiles, export_subset
from spice_trainer.subset.manifest import SelectedRow, SubsetManifest

NUM_ROWS = 8
INDICES = (5, 1, 6, 2)
# Line breaks of every kind, a character outside the first plane, and what would end a JSON string or run as code.
TEXT = 'w3 w4\nw5\r\n\u2028\u0085 naïve 😀 "quoted" \\ {{ 7 * 7 }} __import__("os") <|im_end|>'


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def make_rows(make_row: Any) -> list[dict[str, Any]]:
    return [make_row(f"w{3 + number} {TEXT}", f"w{30 + number} {TEXT}") for number in range(NUM_ROWS)]


def export(
    rows: list[dict[str, Any]] | Dataset, folder: Path, indices: tuple[int, ...] = INDICES, **options: Any
) -> SubsetFiles:
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return export_subset(dataset, make_manifest(dataset, indices), folder, **options)


def read_jsonl(path: Path, cache: Path) -> list[dict[str, Any]]:
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    assert isinstance(rows, Dataset)
    return rows.to_list()


MESSAGES = make_rows(lambda question, answer: {"messages": [user(question), assistant(answer)]})
PROMPTS = make_rows(lambda question, answer: {"prompt": question, "completion": answer})


def make_manifest(dataset: Any, indices: tuple[int, ...], **overrides: Any) -> SubsetManifest:
    rows = tuple(
        SelectedRow(
            index=index,
            step=position // 2,
            epoch=0,
            pool=0,
            order=position % 2,
            gain=0.1 + position,
            conflict=0.0,
            score=1 / 3,
            gradient_norm=2.5,
            label_tokens=3,
        )
        for position, index in enumerate(indices)
    )
    values = {
        "rows": rows,
        "num_rows": len(dataset),
        "dataset_fingerprint": fingerprint_dataset(dataset),
        "model": {"name_or_path": "tiny"},
        "config": SpiceConfig().to_dict(),
        "samples_per_step": 2,
        "seed": 42,
    }
    return SubsetManifest(**(values | overrides))
