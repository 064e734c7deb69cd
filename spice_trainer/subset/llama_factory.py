"""LLaMA-Factory's description of a subset: the entry of `dataset_info.json`, and the rows where it needs other ones.

    rows                                        entry
    prompt, completion (conversational)         sharegpt, on rows converted to `messages`
    prompt, completion (text)                   alpaca: prompt, response
    messages (role/content or from/value)       sharegpt; converted first if there are tool calls or parts of content
    conversations (from/value or role/content)  the same
    instruction, output (input, system, history)  alpaca
    text                                        alpaca, as pretraining reads it: prompt alone

Where rows have columns of several kinds, the first of these counts. LLaMA-Factory takes a column or tag that an entry
leaves out as absent once the entry has `columns` or `tags` at all, so everything that counts is written out. It skips
conversations that do not alternate between user and assistant, and rows without an answer: they are counted here.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from spice_trainer.data.json_values import to_json_value, without_nulls

_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_SHAREGPT_ROLE_TAGS = _ROLE_TAGS | {"user_tag": "human", "assistant_tag": "gpt"}
_KNOWN_ROLES = {"human": "user", "gpt": "assistant", "tool": "observation", "ipython": "observation"} | {
    "developer": "system"
}
# LLaMA-Factory's own reader of OpenAI rows puts this between the results of parallel tool calls.
_BETWEEN_TOOL_RESULTS = "\n</tool_response>\n<tool_response>\n"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class LlamaFactoryFormat:
    """How LLaMA-Factory reads a subset."""

    entry: dict[str, Any]
    """The entry of `dataset_info.json`, but for its `file_name`."""
    convert: Callable[[Row], dict[str, Any]] | None
    """Makes a row one that LLaMA-Factory reads; `None` where it reads them as they are."""
    num_skipped: int
    """Rows that LLaMA-Factory leaves out."""


def describe_format(rows: Iterable[Row]) -> LlamaFactoryFormat | None:
    """Finds out how LLaMA-Factory reads rows; `None` if it does not: tokenised ones, or with other columns."""
    examples = _first_values(rows)

    def holds_text(*columns: str) -> bool:
        return all(isinstance(examples.get(column), str) for column in columns)

    if holds_text("prompt", "completion"):
        return _alpaca(rows, {"prompt": "prompt", "response": "completion"})
    if _message_keys(examples.get("prompt")) and _message_keys(examples.get("completion")):
        return _conversations(rows, ("prompt", "completion"), examples)
    for column in ("messages", "conversations"):
        if _message_keys(examples.get(column)):
            return _conversations(rows, (column,), examples)
    if holds_text("instruction", "output"):
        columns = {"prompt": "instruction", "response": "output"}
        columns |= {"query": "input"} if holds_text("input") else {}
        columns |= {"system": "system"} if holds_text("system") else {}
        columns |= {"history": "history"} if isinstance(examples.get("history"), list) else {}
        return _alpaca(rows, columns)
    if holds_text("text"):
        return LlamaFactoryFormat({"formatting": "alpaca", "columns": {"prompt": "text"}}, None, 0)
    return None


def _alpaca(rows: Iterable[Row], columns: dict[str, str]) -> LlamaFactoryFormat:
    num_skipped = sum(not isinstance(row[columns["response"]], str) for row in rows)
    return LlamaFactoryFormat({"formatting": "alpaca", "columns": columns}, None, num_skipped)


def _conversations(rows: Iterable[Row], columns: tuple[str, ...], examples: Row) -> LlamaFactoryFormat | None:
    """The entry of conversational rows, whose messages stand in one column or in `prompt` and `completion`."""
    keys = _message_keys(examples[columns[0]])
    assert keys is not None, "only called for columns of messages"
    tools, system = examples.get("tools"), examples.get("system")

    def convert(row: Row) -> dict[str, Any]:
        converted: dict[str, Any] = {"messages": _convert_messages(_messages_of(row, columns), keys)}
        if tools is not None:
            converted["tools"] = _as_text(row["tools"])
        if isinstance(system, str):
            converted["system"] = row["system"] or ""
        return converted

    roles: set[str] = set()
    is_plain = len(columns) == 1 and (tools is None or isinstance(tools, str))
    num_skipped = 0
    for row in rows:
        messages = _messages_of(row, columns)
        if any(_has_media(message.get(keys[1])) for message in messages):
            return None
        roles.update(str(message.get(keys[0])) for message in messages)
        is_plain = is_plain and all(_is_plain(message, keys) for message in messages) and messages != []
        num_skipped += not _alternates(convert(row)["messages"])

    extra = {"tools": "tools"} if tools is not None else {}
    extra |= {"system": "system"} if isinstance(system, str) else {}
    for role_tags in (_ROLE_TAGS, _SHAREGPT_ROLE_TAGS):
        if is_plain and roles <= set(role_tags.values()):
            entry = _sharegpt_entry(columns[0], keys, role_tags, extra)
            return LlamaFactoryFormat(entry, None, num_skipped)
    return LlamaFactoryFormat(
        _sharegpt_entry("messages", ("role", "content"), _ROLE_TAGS, extra), convert, num_skipped
    )


def _sharegpt_entry(
    column: str, keys: tuple[str, str], role_tags: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "formatting": "sharegpt",
        "columns": {"messages": column, **extra},
        "tags": {"role_tag": keys[0], "content_tag": keys[1], **role_tags},
    }


def _convert_messages(messages: Iterable[Row], keys: tuple[str, str]) -> list[dict[str, str]]:
    """Messages as LLaMA-Factory names them; the results of parallel tool calls become one message.

    As in LLaMA-Factory's own reader of OpenAI rows, a message with tool calls loses its other content.
    """
    converted: list[dict[str, str]] = []
    previous_is_tool = False
    for message in messages:
        role = str(message.get(keys[0]))
        role = _KNOWN_ROLES.get(role, role)
        content = _content_as_text(message.get(keys[1]))
        if role == "assistant" and message.get("tool_calls"):
            role, content = "function_call", _tool_calls_as_text(message["tool_calls"])
        if role == "observation" and previous_is_tool:
            converted[-1]["content"] += _BETWEEN_TOOL_RESULTS + content
        else:
            converted.append({"role": role, "content": content})
        previous_is_tool = role == "observation"
    return converted


def _tool_calls_as_text(tool_calls: Iterable[Row]) -> str:
    functions: list[dict[str, Any]] = []
    for tool_call in tool_calls:
        function = tool_call.get("function") or tool_call
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # OpenAI's interface gives arguments as JSON inside a string, which would be written as a string again.
            with contextlib.suppress(json.JSONDecodeError):
                arguments = json.loads(arguments)
        functions.append({"name": function.get("name"), "arguments": arguments if arguments is not None else {}})
    return _as_text(functions)


def _as_text(value: Any) -> str:
    """JSON text of a value, or the value if it is text. Nulls go: Arrow fills in the fields that other rows have."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(without_nulls(to_json_value(value, "a tool")), ensure_ascii=False, allow_nan=False)


def _content_as_text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content if isinstance(content, str) else ""


def _has_media(content: Any) -> bool:
    return isinstance(content, list) and any(
        not isinstance(part, Mapping) or part.get("type") != "text" for part in content
    )


def _is_plain(message: Row, keys: tuple[str, str]) -> bool:
    return isinstance(message.get(keys[1]), str) and not message.get("tool_calls")


def _alternates(messages: list[dict[str, str]]) -> bool:
    """Whether LLaMA-Factory takes a conversation: user and assistant in turn, after at most one system message."""
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    turns = (("user", "observation"), ("assistant", "function_call"))
    return (
        roles != [] and len(roles) % 2 == 0 and all(role in turns[position % 2] for position, role in enumerate(roles))
    )


def _messages_of(row: Row, columns: tuple[str, ...]) -> list[Row]:
    return [message for column in columns for message in row[column] or []]


def _message_keys(value: Any) -> tuple[str, str] | None:
    """The names of a message's role and content, or `None` for what is no list of messages."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return None
    for keys in (("role", "content"), ("from", "value")):
        if set(keys) <= value[0].keys():
            return keys
    return None


def _first_values(rows: Iterable[Row]) -> dict[str, Any]:
    """The first value of each column that says what the column holds: neither null nor an empty list."""
    values: dict[str, Any] = {}
    missing: set[str] | None = None
    for row in rows:
        missing = set(row) if missing is None else missing
        for column in list(missing):
            if row[column] is not None and row[column] != []:
                values[column] = row[column]
                missing.discard(column)
        if not missing:
            break
    return values
