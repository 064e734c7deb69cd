"""README and docs: README is short, links lead somewhere, commands exist, and what is shown runs and is complete."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from spice_trainer import SpiceConfig
from spice_trainer.config import STRATEGIES
from tests.bad_input.table import ERRORS, as_markdown
from tests.support.models import tiny_lora_model, tiny_model
from tests.support.trainers import collate, make_trainer, tiny_dataset, tiny_tokenizer, training_options
from tests.test_layers import FLOORS, PACKAGE, room_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *DOCS,
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
URLS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
HOME = URLS["Homepage"]
# Their names stand for a model that is on the machine.
HUB_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, pages: list[Path]) -> list[Any]:
    """The fenced blocks of a language, each with its page and number as the test's name."""
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
        for page in pages
        for number, (found, text) in enumerate(_FENCE.findall(page.read_text(encoding="utf-8")))
        if found == language
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> str:
    """All that stands as code on a page."""
    text = page.read_text(encoding="utf-8")
    return "\n".join([*(block for _, block in _FENCE.findall(text)), *re.findall(r"`([^`]+)`", prose(page))])


def links(page: Path) -> list[str]:
    """The targets of a page's links, named ones too."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    text = re.sub(r"^\[[^\]]+\]: \S+$", "", text, flags=re.MULTILINE)
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    named = re.findall(r"\[([^\]]+)\](?![(\[])", re.sub(r"\[[^\]]*\](?=[(\[])", "", text))
    if defined:
        # Each is used, and each use is defined.
        assert set(named) == set(defined), page
    return inline + list(defined.values())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(page: Path) -> list[list[str]]:
    """The cells of all table rows of a page."""
    lines = [line for line in prose(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip().removesuffix("|").split("|")[1:]] for line in lines]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_what_helps_is_on_the_first_screen() -> None:
    first = "\n".join(README.read_text(encoding="utf-8").splitlines()[:40])
    assert "lost to random rows" in first
    assert "matching" in first


def check_link(link: str, page: Path) -> None:
    """Follows a link within the repository to its file and heading; others are left alone."""
    target, _, anchor = link.partition("#")
    if target.startswith(f"{HOME}/blob/main/"):
        path = ROOT / target.removeprefix(f"{HOME}/blob/main/")
    elif "://" in target:
        return
    else:
        # PyPI shows README alone.
        assert page != README, f"{link} is relative"
        path = page.parent / target if target else page
    assert path.exists(), link
    assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        check_link(link, page)


def test_the_projects_urls_lead_somewhere() -> None:
    assert URLS.keys() == {"Homepage", "Documentation", "Changelog", "Issues"}
    for url in URLS.values():
        assert url.startswith(HOME), url
        check_link(url, README)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    text = commands(page)
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    for module, name in re.findall(r"\b(spice_trainer(?:\.[a-z_]+)*)\.(\w+)", text):
        path = module.replace(".", "/")
        is_module = any((ROOT / path / found).exists() for found in (name, f"{name}.py"))
        assert is_module or hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for path in re.findall(r"(?<![\w/.])((?:examples|tests|docs|spice_trainer|accelerate_configs)/[\w/.]+)", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in text.splitlines():
        if line.startswith("make "):
            target = next(word for word in line.split()[1:] if "=" not in word)
            assert target in targets, line


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model and its tokenizer, as a folder that `from_pretrained` takes."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prelude(tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the shown code takes for granted, by name. It runs in an empty folder; rules that it registers go again."""
    from datasets import Dataset
    from trl import SFTConfig

    monkeypatch.chdir(tmp_path)
    rules = dict(STRATEGIES)
    words = [f"w{3 + number} w{4 + number}" for number in range(50)]
    yield {
        "model": tiny_folder,
        "args": SFTConfig(**training_options("output", bf16=False, max_length=32)),
        "dataset": Dataset.from_list([{"prompt": word, "completion": f" {word}"} for word in words]),
        "tokenizer": tiny_tokenizer(),
        # Where a model has its adapter already, its rows are tokenised, and a collator pads them.
        "lora_model": tiny_lora_model(),
        "tokenized": tiny_dataset(),
        "wanted": tiny_dataset(8, seed=5),
        "collator": collate,
        # Where SPICE is attached to another trainer than the one shown first.
        "trainer": make_trainer("output"),
        "gram": torch.eye(20, dtype=torch.float64),
    }
    STRATEGIES.clear()
    STRATEGIES.update(rules)


def run(block: str, prelude: dict[str, Any], tiny_folder: str) -> dict[str, Any]:
    names = dict(prelude)
    if "Trainer(" in block and "SFTTrainer" not in block:
        names["args"] = TrainingArguments(**training_options("output"))
    exec(compile(block.replace(HUB_MODEL, tiny_folder), "<block>", "exec"), names)
    return names


@pytest.mark.parametrize("block", blocks("python", [README, *DOCS]))
def test_code_runs(block: str, prelude: dict[str, Any], tiny_folder: str) -> None:
    names = run(block, prelude, tiny_folder)
    trainer = names["trainer"]
    if "attach_spice" in block:
        assert hasattr(trainer, "_spice") != ("detach()" in block)
    if "trainer.train()" in block:
        assert trainer.state.global_step > 0


@pytest.mark.parametrize("block", blocks("yaml", PAGES))
def test_yaml_is_a_configuration(block: str) -> None:
    values = yaml.safe_load(block)
    assert values.items() <= SpiceConfig(**values).to_dict().items()


def test_what_a_run_leaves_is_in_the_docs(prelude: dict[str, Any], tiny_folder: str) -> None:
    first = blocks("python", [README])[0].values[0]
    trainer = run(first, prelude, tiny_folder)["trainer"]
    logged = {key for line in trainer.state.log_history for key in line if key.startswith("spice/")}
    report = commands(ROOT / "docs" / "report.md")
    assert logged
    assert [key for key in logged if f"{key}\n" not in f"{report}\n"] == []
    documented = {
        row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in table_rows(ROOT / "docs/records.md")
    }
    for name in ("selections.jsonl", "pools.jsonl", "trained.jsonl"):
        line = json.loads(Path("output/spice", name).read_text(encoding="utf-8").splitlines()[0])
        assert set(line) == documented[name] - {"scoring_prefilter"}, name


def test_every_setting_is_in_the_docs() -> None:
    rows = [row for row in table_rows(ROOT / "docs" / "configuration.md") if row[0].startswith("`")]
    documented = {row[0].strip("`"): row[1].strip("`").replace("−", "-") for row in rows}
    defaults = {field.name: field.default for field in fields(SpiceConfig)}
    assert documented.keys() == defaults.keys()
    for name, default in defaults.items():
        assert (documented[name] if isinstance(default, str) else ast.literal_eval(documented[name])) == default, name


def test_the_picture_of_the_layers_is_that_of_their_test() -> None:
    picture = _FENCE.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))[0][1]
    shown = [line[:28].replace("/", "").replace(".py", "").split() for line in picture.splitlines()]
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__main__"}
    assert {room for line in shown for room in line} == rooms
    assert [sorted(line) for line in shown] == [
        sorted(room for room in rooms if FLOORS[room] == floor) for floor in sorted({FLOORS[room] for room in rooms})
    ]


def test_every_strategy_is_in_the_docs() -> None:
    rows = [row for row in table_rows(ROOT / "docs" / "strategies.md") if len(row) == 4 and row[0] != "`strategy`"]
    assert sorted(row[0].strip("`") for row in rows) == sorted(STRATEGIES)


ARMS = {
    "random": "random",
    "random rows": "random",
    'SPICE as published, `gradient_normalization="none"`': "spice none",
    'SPICE, default, `"sqrt_tokens"`': "spice sqrt_tokens",
    'SPICE, `gradient_normalization="sqrt_tokens"` (default)': "spice sqrt_tokens",
    'SPICE, `"unit"`': "spice unit",
    'SPICE, `"tokens"`': "spice tokens",
    'SPICE, `"none"` (as published)': "spice none",
    'SPICE, `"unit"`, `gradient_preconditioning="adam"`': "spice adam unit",
    '`strategy="matching"`, `"unit"`': "matching unit",
    '`strategy="matching"`, `"tokens"`': "matching tokens",
    "all 2,400 rows, ten times the steps": "full",
    "all 2,400 rows in 200 steps, one seed": "full",
    "before training": "before training",
}


def numbers(text: str) -> list[float]:
    found = re.findall(r"[−+]?\d+(?:\.\d+)?", text.replace(",", ""))
    return [float(number.replace("−", "-")) for number in found]


def test_the_figures_are_those_of_the_comparison() -> None:
    report = table_rows(ROOT / "examples" / "results" / "comparison" / "report.md")
    tables: list[dict[str, list[str]]] = []
    for name, *cells in report:
        if name == "arm":
            tables.append({})
        tables[-1][name] = cells
    # On test rows: seeds, loss per token, its difference to random, loss per row, its difference to random.
    losses = tables[0]
    seconds = next(table for table in tables if table["arm"][0] == "rows trained")
    shown = [(page, row) for page in (README, ROOT / "docs/results.md") for row in table_rows(page) if row[0] in ARMS]
    assert {row[0] for _, row in shown} == set(ARMS)
    for page, (name, *cells) in shown:
        arm = ARMS[name]
        if page == README:
            expected = [losses[arm][1], losses[arm][3]] if arm == "random" else [losses[arm][2], losses[arm][4]]
            _, _, scoring, selecting, training, *_ = (numbers(cell) for cell in seconds[arm])
            assert numbers(cells[2]) == pytest.approx([scoring[0] + selecting[0] + training[0]], abs=0.6), name
        else:
            expected = losses[arm][1:]
            assert numbers(cells[4]) == pytest.approx(numbers(seconds[arm][1]) if arm in seconds else [], abs=0.51)
        for cell, figure in zip(cells, expected, strict=False):
            # Rounded once more than the report's four digits.
            assert numbers(cell) == pytest.approx(numbers(figure), abs=0.00056), name


def test_the_errors_are_those_of_the_table() -> None:
    assert ERRORS.read_text(encoding="utf-8") == as_markdown(), "run `python -m tests.bad_input`"
