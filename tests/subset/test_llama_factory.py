from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.subset.llama_factory_reader import is_trained_on, read_llama_factory
from tests.support.subsets import INDICES, MESSAGES, NUM_ROWS, PROMPTS, assistant, export, make_rows, read_jsonl, user

FUNCTION = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Tromsø"}'}}
CALLED = json.dumps([{"name": "weather", "arguments": {"city": "Tromsø"}}], ensure_ascii=False)
TOOL_TALK = [
    user("q"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "weather"},
    {"role": "tool", "content": "4", "name": "weather"},
    assistant("a"),
]
TOOL_PROMPT = [
    user("q"),
    {"role": "function", "content": CALLED},
    {"role": "observation", "content": "3\n</tool_response>\n<tool_response>\n4"},
]
# The columns of a row made of a question and an answer, what LLaMA-Factory should read, whether from a second file.
FORMATS: dict[str, tuple[Any, Any, bool]] = {
    "messages": (
        lambda q, a: {"messages": [{"role": "system", "content": "s"}, user(q), assistant(a)], "other": 1},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)], "system": "s"},
        False,
    ),
    "several turns": (
        lambda q, a: {"messages": [user("x"), assistant("y"), user(q), assistant(a)]},
        lambda q, a: {"prompt": [user("x"), assistant("y"), user(q)], "response": [assistant(a)]},
        False,
    ),
    "tools as text": (
        lambda q, a: {"messages": [user(q), assistant(a)], "tools": json.dumps([FUNCTION])},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)], "tools": json.dumps([FUNCTION])},
        False,
    ),
    "tool calls": (
        lambda q, a: {"messages": copy.deepcopy(TOOL_TALK), "tools": [FUNCTION]},
        lambda q, a: {"prompt": TOOL_PROMPT, "response": [assistant("a")], "tools": json.dumps([FUNCTION])},
        True,
    ),
    "content in parts": (
        lambda q, a: {"messages": [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in
                                   (("user", q), ("assistant", a))]},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)]},
        True,
    ),
    "developer": (
        lambda q, a: {"messages": [{"role": "developer", "content": "s"}, user(q), assistant(a)]},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)], "system": "s"},
        True,
    ),
    "prompt and completion": (
        lambda q, a: {"prompt": q, "completion": a},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)]},
        False,
    ),
    "conversational prompt and completion": (
        lambda q, a: {"prompt": [{"role": "system", "content": "s"}, user(q)], "completion": [assistant(a)]},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)], "system": "s"},
        True,
    ),
    "alpaca": (
        lambda q, a: {"instruction": q, "input": "more", "output": a, "text": "template"},
        lambda q, a: {"prompt": [user(f"{q}\nmore")], "response": [assistant(a)]},
        False,
    ),
    "alpaca with system and history": (
        lambda q, a: {"instruction": q, "output": a, "system": "s", "history": [["x", "y"]]},
        lambda q, a: {"prompt": [user("x"), assistant("y"), user(q)], "response": [assistant(a)], "system": "s"},
        False,
    ),
    "text": (
        lambda q, a: {"text": q},
        lambda q, a: {"prompt": [user(q)], "response": []},
        False,
    ),
    "conversations": (
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}], "system": "s"},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)], "system": "s"},
        False,
    ),
    "conversations of user and assistant": (
        lambda q, a: {"conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)]},
        False,
    ),
    "conversations that mix names": (
        lambda q, a: {"conversations": [{"from": "user", "value": q}, {"from": "gpt", "value": a}]},
        lambda q, a: {"prompt": [user(q)], "response": [assistant(a)]},
        True,
    ),
}  # fmt: skip


class TestLlamaFactory:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_reads_what_the_rows_say(self, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
        make_row, make_expected, is_converted = FORMATS[kind]
        rows = make_rows(make_row)
        files = export(rows, tmp_path / "out", name="picks")
        read = read_llama_factory(tmp_path / "out", "picks", tmp_path / "cache")
        expected = make_rows(lambda q, a: {"system": "", "tools": ""} | make_expected(q, a))
        assert read == [expected[index] for index in INDICES]
        assert all(is_trained_on(row) for row in read) == (kind != "text")
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []
        assert files.llama_factory_jsonl == tmp_path / "out" / f"picks{'_llamafactory' * is_converted}.jsonl"
        # The file for TRL holds the rows as they are, whatever LLaMA-Factory needs.
        stored = Dataset.from_list(rows).select(INDICES).to_list()
        assert read_jsonl(files.jsonl, tmp_path / "cache") == stored

    def test_entry_of_messages(self, tmp_path: Path) -> None:
        export(MESSAGES, tmp_path)
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
        tags |= {"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
        assert json.loads((tmp_path / "dataset_info.json").read_text()) == {
            "spice_subset": {
                "file_name": "spice_subset.jsonl",
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": tags,
            }
        }

    def test_rows_that_it_skips_are_counted(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = copy.deepcopy(MESSAGES)
        rows[5]["messages"].append(user("no answer"))
        rows[6]["messages"].insert(0, assistant("hello"))
        rows[1]["messages"] = []
        export(rows, tmp_path / "out")
        assert "SPICE: LLaMA-Factory will skip 3 of the 4 exported rows" in caplog.text
        read = read_llama_factory(tmp_path / "out", "spice_subset", tmp_path / "cache")
        assert [is_trained_on(row) for row in read] == [False, False, False, True]
        caplog.clear()
        answers = [row | {"completion": None} if number == 5 else row for number, row in enumerate(PROMPTS)]
        export(answers, tmp_path / "alpaca")
        assert "will skip 1 of the 4" in caplog.text

    def test_nulls_that_arrow_fills_in_do_not_reach_tools(self, tmp_path: Path) -> None:
        def row(parameter: str) -> dict[str, Any]:
            parameters = {"type": "object", "properties": {parameter: {"type": "string"}}}
            function = {"name": "f", "parameters": parameters}
            call = {"function": {"name": "f", "arguments": {parameter: "x"}}}
            talk = [user("q"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
            return {"messages": [*talk, assistant("a")], "tools": [{"type": "function", "function": function}]}

        rows = [row(f"name{number % 2}") for number in range(NUM_ROWS)]
        export(rows, tmp_path / "out", (0, 1))
        for number, read in enumerate(read_llama_factory(tmp_path / "out", "spice_subset", tmp_path / "cache")):
            assert json.loads(read["tools"]) == rows[number]["tools"]
            assert json.loads(read["prompt"][1]["content"]) == [{"name": "f", "arguments": {f"name{number}": "x"}}]

    def test_pictures_get_no_entry(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is it?"}]
        rows = [{"messages": [{"role": "user", "content": parts}]}] * NUM_ROWS
        assert export(rows, tmp_path / "out").dataset_info is None
        assert "gets no entry" in caplog.text
