"""Data loading shared by the examples: conversations, and their tokens with the prompt masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

# Column names in common use, in the order they are looked for.
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")


def load_rows(name_or_path: str, split: str = "train", config: str | None = None) -> Dataset:
    """Load a training set as conversations.

    Args:
        name_or_path (`str`): A local JSONL file, a folder written by `Dataset.save_to_disk`, or a dataset's name on
            the Hugging Face Hub.
        split (`str`): The split to take where there are several.
        config (`str`, *optional*): The dataset's configuration on the Hub.

    Returns:
        `Dataset`: The columns `prompt` and `completion`, lists of messages, as TRL reads them. Of a dataset with
        `messages` the last one is the completion.
    """
    dataset = _open(name_or_path, split, config)
    columns = dataset.column_names
    if "messages" in columns:
        return dataset.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=columns
        )
    prompt = next((name for name in PROMPT_COLUMNS if name in columns), None)
    completion = next((name for name in COMPLETION_COLUMNS if name in columns), None)
    if prompt is None or completion is None:
        raise ValueError(
            f"{name_or_path} has the columns {columns}; the examples need `messages`, or one of {PROMPT_COLUMNS} and "
            f"one of {COMPLETION_COLUMNS}. Rename them with `Dataset.rename_columns`."
        )

    def converse(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
        question, answer = row[prompt], row[completion]
        if prompt == "instruction" and row.get("input"):
            question = f"{question}\n\n{row['input']}"
        return {
            "prompt": question if isinstance(question, list) else [{"role": "user", "content": question}],
            "completion": answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}],
        }

    return dataset.map(converse, remove_columns=columns, desc="Conversations")


def _open(name_or_path: str, split: str, config: str | None) -> Dataset:
    path = Path(name_or_path)
    if path.is_dir():
        dataset = load_from_disk(str(path))
        return dataset[split] if isinstance(dataset, DatasetDict) else dataset
    if path.name.endswith((".json", ".jsonl", ".jsonl.gz")):
        # `load_dataset` would report a missing file as an unknown dataset on the Hub.
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no training set at {path} (looked for from {Path.cwd()}). "
                "demo_output/train.jsonl is written by `make demo`."
            )
        return load_dataset("json", data_files=str(path), split="train")
    return load_dataset(name_or_path, config, split=split)


def tokenize_rows(dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Tokenize every row with the chat template; only the completion keeps its labels.

    Args:
        dataset (`Dataset`): Rows from [`load_rows`].
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with a chat template.
        max_length (`int`): Longer rows are cut; a row whose completion is cut away whole is dropped.

    Returns:
        `Dataset`: The columns `input_ids`, `attention_mask` and `labels`, the prompt's labels all -100.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "This tokenizer's chat template renders a prompt differently once its answer follows, so the answer's "
                f"tokens cannot be told from the prompt's: {whole!r} does not start with {prompt!r}."
            )
        # Apart, so that no token spans the border between what is given and what is learned.
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        completion_ids = tokenizer(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"]
        input_ids = (prompt_ids + completion_ids)[:max_length]
        labels = ([-100] * len(prompt_ids) + completion_ids)[:max_length]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    tokens = dataset.map(tokenize, remove_columns=dataset.column_names, desc="Tokenizing")
    return tokens.filter(lambda row: any(label != -100 for label in row["labels"]), desc="Dropping cut rows")
