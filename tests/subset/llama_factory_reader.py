"""A small reader of LLaMA-Factory's data folders, written from its rules (data/parser.py, loader.py, converter.py).

An entry that has `columns` or `tags` sets all of them: what it leaves out becomes absent, not the default.
Conversations must alternate and end with the assistant; supervised training drops rows without exactly one response.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import load_dataset

COLUMNS = {"messages": "conversations", "prompt": "instruction", "query": "input", "response": "output"} | {
    "history": None,
    "system": None,
    "tools": None,
}
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
FILE_TYPES = {"json": "json", "jsonl": "json"}


def read_llama_factory(dataset_dir: Path, name: str, cache_dir: Path) -> list[dict[str, Any]]:
    """The rows as LLaMA-Factory aligns them: prompt, response, system, tools."""
    # Read as on a platform whose own encoding is ASCII: LLaMA-Factory names none.
    entry = json.loads((dataset_dir / "dataset_info.json").read_text(encoding="ascii"))[name]
    formatting = entry.get("formatting", "alpaca")
    columns = {key: entry["columns"].get(key) for key in COLUMNS} if "columns" in entry else COLUMNS
    tags = {key: entry["tags"].get(key) for key in TAGS} if "tags" in entry else TAGS
    path = dataset_dir / entry["file_name"]
    file_type = FILE_TYPES[path.suffix[1:]]
    rows = load_dataset(file_type, data_files=[str(path)], split="train", cache_dir=str(cache_dir))
    convert = {"alpaca": _read_alpaca, "sharegpt": _read_sharegpt}[formatting]
    return [convert(row, columns, tags) for row in rows]


def is_trained_on(row: dict[str, Any]) -> bool:
    """Whether supervised training keeps an aligned row."""
    return len(row["prompt"]) % 2 == 1 and len(row["response"]) == 1


def _read_alpaca(row: dict[str, Any], columns: dict[str, Any], tags: dict[str, Any]) -> dict[str, Any]:
    prompt = []
    if columns["history"] and isinstance(row[columns["history"]], list):
        for old_prompt, old_response in row[columns["history"]]:
            prompt += [{"role": "user", "content": old_prompt}, {"role": "assistant", "content": old_response}]
    query = [row[columns[key]] for key in ("prompt", "query") if columns[key] and row[columns[key]]]
    prompt.append({"role": "user", "content": "\n".join(query)})
    response = []
    if columns["response"] and isinstance(row[columns["response"]], str):
        response = [{"role": "assistant", "content": row[columns["response"]]}]
    return _aligned(prompt, response, row, columns)


def _read_sharegpt(row: dict[str, Any], columns: dict[str, Any], tags: dict[str, Any]) -> dict[str, Any]:
    names = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "observation",
        tags["function_tag"]: "function",
        tags["system_tag"]: "system",
    }
    accepted = ((tags["user_tag"], tags["observation_tag"]), (tags["assistant_tag"], tags["function_tag"]))
    messages = row[columns["messages"]]
    system = None
    if tags["system_tag"] and messages and messages[0][tags["role_tag"]] == tags["system_tag"]:
        system, messages = messages[0][tags["content_tag"]], messages[1:]
    aligned = []
    for position, message in enumerate(messages):
        if message[tags["role_tag"]] not in accepted[position % 2]:
            return _aligned([], [], row, columns, system)
        aligned.append({"role": names[message[tags["role_tag"]]], "content": message[tags["content_tag"]]})
        assert isinstance(aligned[-1]["content"], str), "its templates join strings"
    if len(aligned) % 2:
        return _aligned([], [], row, columns, system)
    return _aligned(aligned[:-1], aligned[-1:], row, columns, system)


def _aligned(
    prompt: list[Any], response: list[Any], row: dict[str, Any], columns: dict[str, Any], system: str | None = None
) -> dict[str, Any]:
    if system is None:
        system = row[columns["system"]] if columns["system"] else ""
    tools = row[columns["tools"]] if columns["tools"] else ""
    assert not tools or isinstance(json.loads(tools), list), "its tool formatter reads a JSON list"
    return {"prompt": prompt, "response": response, "system": system or "", "tools": tools or ""}
