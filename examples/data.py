"""Data loading shared by the examples: rows with a prompt and a completion, and their tokens with the prompt masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

# Column names in common use, in the order they are looked for.
PROMPT_COLUMNS = ("prompt", "instruction", "question", "input")
COMPLETION_COLUMNS = ("completion", "response", "output", "answer")


def load_rows(name_or_path: str, split: str = "train", config: str | None = None) -> Dataset:
    """Load a training set.

    Args:
        name_or_path (`str`): A local JSONL file, a folder written by `Dataset.save_to_disk`, or a dataset's name on
            the Hugging Face Hub.
        split (`str`): The split to take where there are several.
        config (`str`, *optional*): The dataset's configuration on the Hub.

    Returns:
        `Dataset`: The rows, in a format TRL reads: the columns `prompt` and `completion`, or `messages`.
    """
    path = Path(name_or_path)
    if path.is_dir():
        dataset = load_from_disk(str(path))
    elif path.suffix in (".json", ".jsonl", ".gz"):
        # `load_dataset` would report a missing file as an unknown dataset on the Hub.
        if not path.is_file():
            raise FileNotFoundError(
                f"There is no training set at {path} (looked for from {Path.cwd()}). "
                "demo_output/train.jsonl is written by `make demo`."
            )
        dataset = load_dataset("json", data_files=str(path), split="train")
    else:
        dataset = load_dataset(name_or_path, config, split=split)
    if isinstance(dataset, DatasetDict):
        dataset = dataset[split]
    if "messages" in dataset.column_names:
        return dataset.select_columns(["messages"])
    prompt = next((name for name in PROMPT_COLUMNS if name in dataset.column_names), None)
    completion = next((name for name in COMPLETION_COLUMNS if name in dataset.column_names), None)
    if prompt is None or completion is None:
        raise ValueError(
            f"{name_or_path} has the columns {dataset.column_names}; the examples need `messages`, or one of "
            f"{PROMPT_COLUMNS} and one of {COMPLETION_COLUMNS}. Rename them with `Dataset.rename_columns`."
        )
    dataset = dataset.select_columns([prompt, completion])
    return dataset.rename_columns({prompt: "prompt", completion: "completion"})


def as_messages(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split a row into the messages that ask and the messages that answer."""
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt, completion


def tokenize_rows(dataset: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Tokenize every row with the chat template; only the answer keeps its labels.

    Args:
        dataset (`Dataset`): Rows from [`load_rows`].
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with a chat template.
        max_length (`int`): Longer rows are cut; a row whose answer is cut away whole is dropped.

    Returns:
        `Dataset`: The columns `input_ids`, `attention_mask` and `labels`, the prompt's labels all -100.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, completion = as_messages(row)
        # As text first: the token count of the prompt alone is then the same in both calls.
        prompt_text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        full_text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        prompt_ids = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(full_text[len(prompt_text) :], add_special_tokens=False)["input_ids"]
        input_ids = (prompt_ids + answer_ids)[:max_length]
        labels = ([-100] * len(prompt_ids) + answer_ids)[:max_length]
        return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}

    tokens = dataset.map(tokenize, remove_columns=dataset.column_names, desc="Tokenizing")
    return tokens.filter(lambda row: any(label != -100 for label in row["labels"]), desc="Dropping cut rows")
