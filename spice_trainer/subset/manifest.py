"""The manifest of a selected subset: which rows were picked, by what, and from which data.

    manifest.json    the dataset's and the model's fingerprints, settings, versions
    manifest.jsonl   one line a picked row, in the order of picking, with the fields of `selections.jsonl`

With the manifest and the dataset, [`rebuild_subset`] gives the subset again without the model that selected it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from spice_trainer.data.checks import check_is_rows
from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.data.rows import fetch_rows
from spice_trainer.recording.records import SelectedRow as SelectedRow
from spice_trainer.utils.files import read_regular, replace_file
from spice_trainer.utils.logging import printable
from spice_trainer.utils.saved import parse_json

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ROWS_FILE = "manifest.jsonl"

_LIBRARIES = ("spice_trainer", "torch", "transformers", "peft", "datasets")


def installed_versions() -> dict[str, str | None]:
    """Versions of spice_trainer and of the libraries that a selection depends on; `None` for one not installed."""
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


@dataclass(frozen=True)
class SubsetManifest:
    """Everything that says how a subset came about, and all that is needed to build it again.

    Args:
        rows (`tuple[SelectedRow, ...]`): The picked rows, in the order of picking.
        num_rows (`int`): Number of rows of the dataset.
        dataset_fingerprint (`str`): [`fingerprint_dataset`] of the dataset.
        model (`dict[str, Any]`): [`describe_model`] of the model that selected.
        config (`dict[str, Any]`): [`SpiceConfig.to_dict`] of the settings.
        samples_per_step (`int`): Number of rows of a selection step.
        seed (`int`): Seed of the pools.
        validation_fingerprint (`str`, *optional*): The same of the validation set, for a strategy that reads one.
        versions (`dict[str, str | None]`, *optional*): Versions of the libraries. Defaults to the installed ones.
        format_version (`int`, *optional*): Version of the two files. Defaults to the one this package writes.
    """

    rows: tuple[SelectedRow, ...]
    num_rows: int
    dataset_fingerprint: str
    model: dict[str, Any]
    config: dict[str, Any]
    samples_per_step: int
    seed: int
    validation_fingerprint: str | None = None
    versions: dict[str, str | None] = field(default_factory=installed_versions)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Checks every value: a manifest may come from anybody."""
        object.__setattr__(self, "rows", tuple(self.rows))
        _check_types(self, "the manifest")
        for place, row in enumerate(self.rows):
            _check_types(row, f"picked row {place}")
        outside = [row.index for row in self.rows if not row.index < self.num_rows]
        if outside:
            raise ValueError(
                f"The manifest picks row {outside[0]} of a dataset of {self.num_rows} rows. Likely cause: row numbers "
                "of another dataset, or of a manifest.jsonl edited by hand. Fix: give the row numbers and num_rows of "
                "the one dataset that was selected from."
            )
        repeated = [index for index, count in Counter(self.indices).items() if count > 1]
        if repeated:
            raise ValueError(
                f"The manifest picks row {repeated[0]} more than once, which no selection does. Likely cause: "
                "manifests put together, or edited by hand. Fix: give each row once."
            )

    @property
    def indices(self) -> tuple[int, ...]:
        """Rows of the dataset, in the order of picking."""
        return tuple(row.index for row in self.rows)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `manifest.jsonl`, then `manifest.json`, which says by a checksum which rows belong to it."""
        folder = Path(folder)
        named = ({name: getattr(row, name) for name in ("index", "step", "epoch")} | vars(row) for row in self.rows)
        lines = "".join(_to_json(row, f"picked row {row['index']}") + "\n" for row in named)
        metadata = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "rows"}
        metadata |= {"num_selected": len(self.rows), "rows_sha256": _sha256(lines.encode())}
        text = _to_json(metadata, "the manifest's metadata", indent=1) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / ROWS_FILE, lines)
        replace_file(folder / MANIFEST_FILE, text)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SubsetManifest:
        """Reads the manifest in a folder; a `ValueError` if its two files do not belong together."""
        path, rows_path = Path(folder) / MANIFEST_FILE, Path(folder) / ROWS_FILE
        for item in (path, rows_path):
            if not item.is_file():
                raise FileNotFoundError(
                    printable(
                        f"{item} is missing, so {folder} holds no whole subset. Likely cause: another folder, or a "
                        "selection or export that was interrupted: manifest.json is written last. Fix: give the "
                        "folder that holds manifest.json, or write it again."
                    )
                )
        try:
            metadata, content = parse_json(read_regular(path)), read_regular(rows_path)
            version = metadata.pop("format_version")
            if version == FORMAT_VERSION and metadata.pop("rows_sha256") == _sha256(content):
                rows = tuple(SelectedRow(**parse_json(line)) for line in content.split(b"\n") if line)
                if metadata.pop("num_selected") != len(rows):
                    raise ValueError(f"num_selected is not {len(rows)}, the number of its rows")
                return cls(rows=rows, format_version=version, **metadata)
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                printable(
                    f"{path} is not a manifest of spice_trainer ({type(error).__name__}: {error}). Likely cause: a "
                    "file of the same name that another program wrote, or one edited by hand. Fix: give the folder "
                    "of an exported subset."
                )
            ) from error
        if version != FORMAT_VERSION:
            versions = metadata.get("versions")
            wrote = versions.get("spice_trainer") if isinstance(versions, dict) else None
            text = (
                f"{path} is of format version {version}, this version of spice_trainer reads {FORMAT_VERSION}. Fix: "
                f"read it with the version that wrote it, spice_trainer {wrote}."
            )
        else:
            text = (
                f"{rows_path} is not the file that {path} was written with: its checksum differs. Likely cause: it "
                "was edited, or replaced by another selection that was interrupted. Fix: write both again."
            )
        raise ValueError(printable(text))


def rebuild_subset(manifest_or_folder: SubsetManifest | str | os.PathLike[str], dataset: Any) -> Any:
    """Builds the subset again from the dataset it was selected from; no model is needed.

    Args:
        manifest_or_folder ([`SubsetManifest`], `str` or `os.PathLike`): The manifest, or the folder it was saved in.
        dataset (`datasets.Dataset` or `Sequence[Mapping[str, Any]]`): The dataset that was selected from.

    Returns:
        `datasets.Dataset` or `list`: `dataset.select(indices)`, or a list of the rows where the dataset has no
        `select`.

    Raises:
        ValueError: If this is another dataset: another number of rows, or other content. The content of a dataset of
            more than 2,000 rows is compared on a sample, see [`fingerprint_dataset`].
    """
    manifest = manifest_or_folder
    if not isinstance(manifest, SubsetManifest):
        manifest = SubsetManifest.load(manifest)
    check_is_rows(dataset)
    if len(dataset) != manifest.num_rows:
        raise ValueError(
            f"The dataset has {len(dataset)} rows, but the manifest's has {manifest.num_rows}: its row numbers would "
            "give other rows. Likely cause: the dataset was filtered, packed or extended since, or this is another "
            "split. Fix: load the dataset that was selected from, prepared as it was then, or select anew."
        )
    fingerprint = fingerprint_dataset(dataset)
    if fingerprint != manifest.dataset_fingerprint:
        raise ValueError(
            f"The dataset's content has the fingerprint {fingerprint}, but the manifest's dataset has "
            f"{manifest.dataset_fingerprint}: its row numbers would give other rows. Likely cause: rows were edited, "
            "shuffled or sorted since, or columns were added, removed, renamed or tokenised. Fix: load the dataset "
            "that was selected from, prepared as it was then, or select anew."
        )
    if hasattr(dataset, "select"):
        return dataset.select(manifest.indices)
    return fetch_rows(dataset, manifest.indices)


def _to_json(value: Mapping[str, Any], what: str, *, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Cannot write {what} as JSON: {error}. Likely cause: a number that is not finite, or a value such as a "
            f"tensor, in {str(value)[:200]}. Fix: give finite Python numbers, strings, lists and dicts."
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# What each annotation of the manifest and its rows admits: `True` is no number, and no number is NaN.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number from 0 on", lambda value: type(value) is int and value >= 0),
    "str": ("a text", lambda value: isinstance(value, str)),
    "str | None": ("a text or null", lambda value: value is None or isinstance(value, str)),
    "float | None": ("a number or null", lambda value: value is None or _is_number(value)),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
    "dict[str, str | None]": (
        "texts by name",
        lambda value: (
            isinstance(value, dict) and all(item is None or isinstance(item, str) for item in value.values())
        ),
    ),
    "tuple[SelectedRow, ...]": (
        "picked rows",
        lambda value: isinstance(value, tuple) and all(isinstance(row, SelectedRow) for row in value),
    ),
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _check_types(record: Any, name: str) -> None:
    for item in fields(record):
        value = getattr(record, item.name)
        kind, is_kind = _KINDS[str(item.type)]
        if not is_kind(value):
            shown = printable(repr(value))[:60]
            raise ValueError(
                f"{item.name} of {name} is {shown}, but has to be {kind}. Likely cause: a file edited by hand, or a "
                "number that is not finite. Fix: give the values that the selection wrote."
            )
