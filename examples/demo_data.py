"""Real instruction data for the demo, read from installed packages: nothing is downloaded when it runs.

Three sources whose answers differ in length and kind:

| source | rows | answers | licence |
|---|---|---|---|
| chatterbot-corpus | questions and small talk | a word to a sentence | BSD-3-Clause |
| actionsheets | "how do I ... in Python" | a line of code | MIT |
| Python's standard library | signature and docstring | a function's body | PSF-2.0 |
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, str]


def package_folder(name: str) -> Path:
    """Find an installed package's folder without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The demo reads its data from the package {name!r}; `make demo` installs it.")
    return Path(next(iter(spec.submodule_search_locations)))


def chat_rows() -> Iterator[Row]:
    """Question and answer pairs of the ChatterBot corpus, English."""
    for path in sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(conversation) == 2 and all(isinstance(turn, str) for turn in conversation):
                yield {"source": "chat", "prompt": conversation[0], "completion": conversation[1]}


def action_rows() -> Iterator[Row]:
    """Actions and the line of Python that does them, from the action sheets."""

    def walk(node: dict[str, Any], heading: str, sheet: str) -> Iterator[Row]:
        heading = node.get("section", heading)
        if isinstance(node.get("action"), str) and isinstance(node.get("code"), str):
            prompt = f"Python, {sheet}, {heading}: {node['action']}".replace("_", "")
            yield {"source": "action", "prompt": prompt, "completion": node["code"]}
        for child in node.values():
            if isinstance(child, dict):
                yield from walk(child, heading, sheet)

    for path in sorted((package_folder("actionsheets") / "data" / "python").rglob("*.toml")):
        sheet = tomllib.loads(path.read_text(encoding="utf-8"))
        title = sheet.get("title", path.stem)
        yield from walk({k: v for k, v in sheet.items() if isinstance(v, dict)}, title, title)


def function_rows() -> Iterator[Row]:
    """Functions of the standard library: signature and first docstring line ask, the body answers."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.glob("*.py")):
        try:
            source = path.read_text(encoding="utf-8")
            functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        except (UnicodeDecodeError, SyntaxError):
            continue
        for function in functions:
            docstring = ast.get_docstring(function)
            if not docstring or len(function.body) < 2:
                continue
            body = "\n".join(ast.unparse(statement) for statement in function.body[1:])
            signature = f"def {function.name}({ast.unparse(function.args)})"
            summary = " ".join(docstring.split("\n\n")[0].split())
            prompt = f"Write the body of this Python function.\n{signature}: {summary}"
            yield {"source": "function", "prompt": prompt, "completion": body}


def demo_rows(
    tokenizer: Any, *, num_train: int, num_heldout: int, max_tokens: int, seed: int
) -> tuple[list[Row], list[Row]]:
    """Draw the demo's training and held-out rows, as evenly as possible from the sources.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Measures rows; those over `max_tokens` are left out, none is cut.
        num_train (`int`): Training rows.
        num_heldout (`int`): Held-out rows.
        max_tokens (`int`): Most tokens of a prompt and its answer together, the chat template's own not counted.
        seed (`int`): Seed of the draw.

    Returns:
        `tuple[list[Row], list[Row]]`: Training and held-out rows. No prompt and no answer of a source is in both.
    """
    generator = random.Random(seed)
    train: list[Row] = []
    heldout: list[Row] = []
    sources = (chat_rows, action_rows, function_rows)
    for position, source in enumerate(sources):
        num_here, num_heldout_here = (
            number // len(sources) + (position < number % len(sources)) for number in (num_train, num_heldout)
        )
        # Equal answers ("I don't know.") or prompts would leak from training into the held-out rows.
        by_answer = {row["completion"].strip(): row for row in source()}
        candidates = list({row["prompt"].strip(): row for answer, row in by_answer.items() if answer}.values())
        generator.shuffle(candidates)
        fitting: list[Row] = []
        for row in candidates:
            if len(fitting) == num_here + num_heldout_here:
                break
            if len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) <= max_tokens:
                fitting.append({key: value.strip() for key, value in row.items()})
        if len(fitting) < num_here + num_heldout_here:
            raise ValueError(
                f"{source.__name__} has {len(fitting)} rows of at most {max_tokens} tokens; "
                f"{num_here} to train on and {num_heldout_here} held out were asked for. Ask for fewer."
            )
        heldout += fitting[:num_heldout_here]
        train += fitting[num_heldout_here:]
    generator.shuffle(train)
    generator.shuffle(heldout)
    return train, heldout
