"""Datasets by the name that a command was given: a file, a folder, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_dataset(
    name_or_path: str,
    split: str,
    dataset_config: str | None = None,
    *,
    name_flag: str = "--dataset_name",
    split_flag: str = "--dataset_train_split",
) -> Any:
    """Opens a JSON or JSONL file, a folder of `Dataset.save_to_disk`, or a dataset on the hub.

    `name_flag` and `split_flag` are the options that named the dataset and its split, for messages.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    path = Path(name_or_path)
    if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        if not path.is_file():
            raise FileNotFoundError(f"{name_flag} {name_or_path}: there is no such file.")
        try:
            return load_dataset("json", data_files=str(path), split="train")
        except (DatasetGenerationError, StopIteration) as error:
            raise ValueError(
                f"{name_flag} {name_or_path}: the file holds no JSON rows that fit together "
                f"({error.__cause__ or 'it is empty'}). It needs one object a line, each with the same columns."
            ) from error
    if path.is_file():
        raise ValueError(
            f"{name_flag} {name_or_path} is a file of another kind. Give a .json or .jsonl file (also .gz), a "
            "folder of `Dataset.save_to_disk`, or a dataset on the hub."
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = load_from_disk(str(path))
        if not isinstance(dataset, DatasetDict):
            return dataset
        if split not in dataset:
            raise ValueError(
                f"{name_flag} {name_or_path} has the splits {', '.join(dataset)}, and {split_flag} asks "
                f"for {split!r}. Name one of them."
            )
        return dataset[split]
    return load_dataset(name_or_path, dataset_config, split=split)
