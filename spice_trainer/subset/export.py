"""The export of a selected subset: a `datasets` folder, JSONL for TRL, an entry for LLaMA-Factory, the manifest.

    dataset/                      all columns; `datasets.load_from_disk`
    <name>.jsonl                  the columns that trainers read; `datasets.load_dataset("json", data_files=...)`
    <name>_llamafactory.jsonl     only where LLaMA-Factory needs other rows
    dataset_info.json             LLaMA-Factory's entry `<name>`, beside the entries that were there
    manifest.jsonl, manifest.json the manifest; manifest.json is written last, so a folder that has it is whole

All of it is prepared in a hidden folder beside and then moved into place. A file that is there and holds something
else stays, unless `overwrite=True` is said.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.data.json_values import to_json_value, without_nonfinite
from spice_trainer.subset.llama_factory import LlamaFactoryFormat, describe_format
from spice_trainer.subset.manifest import MANIFEST_FILE, ROWS_FILE, SubsetManifest, rebuild_subset
from spice_trainer.utils.files import replace_file
from spice_trainer.utils.logging import logger

TOKEN_COLUMNS = frozenset(
    {"input_ids", "labels", "attention_mask", "token_type_ids", "position_ids", "seq_lengths", "completion_mask"}
    | {"assistant_masks", "special_tokens_mask"}
)
"""Columns of tokenised rows, left out of the JSONL where the text that they were made from is there too."""

DATASET_FOLDER = "dataset"
DATASET_INFO_FILE = "dataset_info.json"


@dataclass(frozen=True)
class SubsetFiles:
    """Where an exported subset is; the two of LLaMA-Factory are `None` for rows that it does not read."""

    dataset: Path
    jsonl: Path
    llama_factory_jsonl: Path | None
    dataset_info: Path | None
    manifest: Path


def export_subset(
    dataset: Any,
    manifest: SubsetManifest,
    output_dir: str | os.PathLike[str],
    *,
    name: str = "spice_subset",
    overwrite: bool = False,
) -> SubsetFiles:
    """Writes the subset that a manifest describes, in the order of picking.

    The JSONL holds the rows as they are, without token columns where their text is there. LLaMA-Factory reads the same
    file (`dataset_dir: <output_dir>`, `dataset: <name>`), except for rows that it cannot read as they are:
    conversational `prompt` and `completion`, tool calls, tools that are no string, and content in parts. For those
    `<name>_llamafactory.jsonl` is written too, with the conversation in `messages`. Rows that are only tokenised, or
    whose columns neither trainer knows, get no entry, and a warning.

    Exporting the same subset once more changes nothing, and `dataset_info.json` keeps its other entries, so that
    `output_dir` may be LLaMA-Factory's `data` folder.
    """
    check_name(name)
    stored = _as_stored_dataset(rebuild_subset(manifest, dataset))
    folder = Path(output_dir)
    dataset_info = _read_dataset_info(folder)
    llama_factory = describe_format(stored)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
    try:
        entry = _prepare(stored, manifest, staging, name, llama_factory)
        conflicts = _find_conflicts(folder, staging, name)
        if entry != dataset_info.get(name) and name in dataset_info:
            conflicts.append(f"the entry {name!r} of {DATASET_INFO_FILE}")
        if conflicts and not overwrite:
            raise FileExistsError(
                f"{folder} already holds {', '.join(conflicts)}, with other content than this manifest's subset. "
                "Likely cause: another selection was exported there, an export was interrupted, or the files are "
                "somebody else's. Fix: give another output_dir (or name), or overwrite=True to replace them."
            )
        if DATASET_FOLDER in conflicts:
            _check_may_be_removed(folder / DATASET_FOLDER, dataset)
        others = {key: value for key, value in dataset_info.items() if key != name}
        new_info = {**dataset_info, name: entry} if entry is not None else others
        _put_in_place(folder, staging, name, conflicts, new_info if new_info != dataset_info else None)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    logger.info("SPICE: %d of %d rows were exported to %s.", len(manifest.rows), manifest.num_rows, folder)
    return SubsetFiles(
        dataset=folder / DATASET_FOLDER,
        jsonl=folder / f"{name}.jsonl",
        llama_factory_jsonl=folder / entry["file_name"] if entry is not None else None,
        dataset_info=folder / DATASET_INFO_FILE if entry is not None else None,
        manifest=folder / MANIFEST_FILE,
    )


def check_name(name: str) -> None:
    """Refuses, with a `ValueError`, what cannot be the name of a file in `output_dir` and of an entry."""
    # LLaMA-Factory splits its list of names at commas.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == "manifest":
        raise ValueError(
            f"export_subset: name={name!r} cannot be the name of a subset: it becomes the name of a file in "
            "output_dir and of LLaMA-Factory's entry, and `manifest` is taken. Fix: use letters, digits, `.`, `_` and "
            '`-`, beginning with a letter or digit, such as "spice_subset", and give the folder as output_dir.'
        )


def _as_stored_dataset(subset: Any) -> Any:
    """The subset as a `datasets.Dataset` of the columns as stored, without formats and transforms."""
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError(
            f"Exporting a subset needs the library `datasets`. Fix: pip install spice-trainer[sft]. ({error})"
        ) from error
    if len(subset) == 0:
        raise ValueError(
            "The manifest picks no row, so there is no subset to export. Likely cause: every candidate's gradient was "
            "zero or not finite. Fix: look at `zero` and `nonfinite` in pools.jsonl."
        )
    if isinstance(subset, Dataset):
        return subset.with_format(None)
    rows = [to_json_value(row, "a row of the dataset") for row in subset]
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The picked rows do not fit into a datasets.Dataset: {error}. Likely cause: a field that is a number in "
            "one row and text in another. Fix: give every row's fields the same types, such as JSON text."
        ) from error


def _prepare(
    subset: Any, manifest: SubsetManifest, staging: Path, name: str, llama_factory: LlamaFactoryFormat | None
) -> dict[str, Any] | None:
    """Writes everything but `dataset_info.json` into an empty folder; returns LLaMA-Factory's entry."""
    subset.save_to_disk(str(staging / DATASET_FOLDER))
    manifest.save(staging)
    hidden: frozenset[str] = frozenset() if llama_factory is None else TOKEN_COLUMNS
    shown = [column for column in subset.column_names if column not in hidden]
    _write_jsonl(staging / f"{name}.jsonl", ({column: row[column] for column in shown} for row in subset))
    if llama_factory is None:
        logger.warning(
            "SPICE: the rows have %s, and no text that LLaMA-Factory reads (`messages`, `prompt` and `completion`, "
            "`conversations`, `instruction` and `output`, `text`): %s.jsonl holds them as they are, and %s gets no "
            "entry. Select from the dataset before it is tokenised to have the text exported.",
            ", ".join(f"`{column}`" for column in subset.column_names),
            name,
            DATASET_INFO_FILE,
        )
        return None
    if llama_factory.num_skipped:
        logger.warning(
            "SPICE: LLaMA-Factory will skip %d of the %d exported rows: it reads conversations in which user and "
            "assistant alternate and the assistant has the last word, and rows with an answer. TRL reads all.",
            llama_factory.num_skipped,
            len(subset),
        )
    file_name = f"{name}.jsonl"
    if llama_factory.convert is not None:
        file_name = f"{name}_llamafactory.jsonl"
        _write_jsonl(staging / file_name, map(llama_factory.convert, subset))
    return {"file_name": file_name, **llama_factory.entry}


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    # `Dataset.to_json` would round numbers to ten digits.
    num_replaced = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            plain = to_json_value(row, "a row of the dataset")
            try:
                text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
            except ValueError:
                num_replaced += 1
                text = json.dumps(without_nonfinite(plain), ensure_ascii=False, allow_nan=False)
            file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    if num_replaced:
        logger.warning(
            "SPICE: %d rows hold numbers that are not finite, which JSON lacks; they are null in %s and kept in %s/.",
            num_replaced,
            path.name,
            DATASET_FOLDER,
        )


def _file_names(name: str) -> tuple[str, ...]:
    return f"{name}.jsonl", f"{name}_llamafactory.jsonl", ROWS_FILE, MANIFEST_FILE


def _find_conflicts(folder: Path, staging: Path, name: str) -> list[str]:
    """What is in the folder under a name of the export and is not what the export would write."""
    conflicts = []
    existing = folder / DATASET_FOLDER
    if os.path.lexists(existing) and not _holds_same_rows(existing, staging / DATASET_FOLDER):
        conflicts.append(DATASET_FOLDER)
    for file_name in _file_names(name):
        old, new = folder / file_name, staging / file_name
        if os.path.lexists(old) and not (new.is_file() and old.is_file() and filecmp.cmp(old, new, shallow=False)):
            conflicts.append(file_name)
    return conflicts


def _holds_same_rows(first: Path, second: Path) -> bool:
    from datasets import load_from_disk

    try:
        datasets = [load_from_disk(str(path)) for path in (first, second)]
        prints = [fingerprint_dataset(item, max_rows=max(len(item), 1)) for item in datasets]
    except Exception:
        # Whatever cannot be read is not the subset; what it is instead does not matter here.
        return False
    return prints[0] == prints[1]


def _read_dataset_info(folder: Path) -> dict[str, Any]:
    path = folder / DATASET_INFO_FILE
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    # `Dataset.save_to_disk` writes a file of this name too.
    if not isinstance(content, dict) or (folder / "state.json").exists():
        raise ValueError(
            f"{path} is not LLaMA-Factory's list of datasets, so no entry can be added to it. Likely cause: "
            "output_dir is itself a saved dataset, or the file is damaged. Fix: give another output_dir, or move the "
            "file away."
        )
    return content


def _check_may_be_removed(existing: Path, dataset: Any) -> None:
    """Refuses to replace a folder that no export wrote, or that the dataset itself is read from."""
    sources = [Path(item["filename"]).resolve() for item in getattr(dataset, "cache_files", None) or ()]
    is_source = any(existing.resolve() in source.parents for source in sources)
    if is_source or existing.is_symlink() or not (existing / "state.json").is_file():
        raise FileExistsError(
            f"{existing} is not replaced, although overwrite=True: it is "
            f"{'the dataset that was selected from' if is_source else 'no folder that `datasets` saved'}. Fix: give "
            "another output_dir, or move it away yourself."
        )


def _put_in_place(
    folder: Path, staging: Path, name: str, conflicts: Iterable[str], dataset_info: Mapping[str, Any] | None
) -> None:
    existing = folder / DATASET_FOLDER
    if conflicts:
        # From here on the folder is half-written, and must not look whole if this is interrupted.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
    if DATASET_FOLDER in conflicts:
        shutil.rmtree(existing)
    if not existing.exists():
        os.replace(staging / DATASET_FOLDER, existing)
    if dataset_info is not None:
        # ASCII, because LLaMA-Factory opens the file in the platform's encoding.
        replace_file(folder / DATASET_INFO_FILE, json.dumps(dataset_info, indent=2) + "\n")
    for file_name in _file_names(name):
        if (staging / file_name).exists():
            os.replace(staging / file_name, folder / file_name)
        else:
            (folder / file_name).unlink(missing_ok=True)
