"""Nothing from a dataset or a checkpoint is executed, rendered, unpickled, or taken as a path."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import spice_trainer
from spice_trainer import ProxyModel, SpiceConfig, select_subset
from spice_trainer.cli.select import main as run_select
from spice_trainer.data.tokenized_rows import TokenizedRows
from spice_trainer.proxy.model import resolve_proxy
from spice_trainer.recording.metrics import RunTotals
from spice_trainer.recording.summary import print_summary
from tests.support.models import tiny_lora_model, tiny_model
from tests.support.subsets import assistant, user
from tests.support.trainers import make_trainer, tiny_tokenizer, trained_indices

PACKAGE = Path(spice_trainer.__file__).parent
HOSTILE = [
    "[red]x[/red]",
    "[link=file:///]y[/link]",
    "{{ 7 * 7 }}",
    "{% raise %}",
    "<script>1</script>",
    "$(id)",
    ":smile: %s",
]

# The source

FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "subprocess"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {"torch.load", "numpy.load", "np.load", "os.system", "os.popen", "importlib.import_module"}
# Modules of the package by names that stand in it: a table, and what lies in a folder. Any other call is a danger.
OWN_IMPORTS = {
    "__init__.py": ["import_module(f'{__name__}.{_MODULES[name]}')", "importlib.import_module"],
    "gradients/layers/registry.py": ["importlib.import_module(_module.name)"],
}


def find_dangers(source: str) -> list[str]:
    """What a source does that could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = {f"{module}.{alias.name}" for alias in node.names}
            found += sorted(names & FORBIDDEN_CALLS)
            found += [module] if module.split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.split(".")[-1] == "import_module":
                found.append(ast.unparse(node))
            found += [called] if called in FORBIDDEN_NAMES | FORBIDDEN_CALLS - {"importlib.import_module"} else []
            found += [
                f"trust_remote_code={ast.unparse(word.value)}"
                for word in node.keywords
                if word.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(word.value) == "True"
            ]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "import os.path, dill",
        "torch.load(path)",
        "from torch import load",
        "np.load(path)",
        "eval(text)",
        "def f():\n    exec(text)",
        "os.system(text)",
        "importlib.import_module(text)",
        "import_module(text)",
        "f(trust_remote_code=True)",
    ],
)
def test_dangers_are_found(source: str) -> None:
    assert find_dangers(source)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_runs_nothing_that_it_reads(path: Path) -> None:
    expected = OWN_IMPORTS.get(path.relative_to(PACKAGE).as_posix(), [])
    assert sorted(find_dangers(path.read_text(encoding="utf-8"))) == expected


# Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, spice={}, save_strategy="steps", save_steps=2, max_steps=4).train()
    return folder


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(tmp_path: Path, finished: Path, text: str) -> Any:
    checkpoint = tmp_path / "earlier" / "checkpoint-2"
    shutil.copytree(finished / "checkpoint-2", checkpoint)
    (checkpoint / "spice" / "state.json").write_text(text)
    trainer = make_trainer(tmp_path / "run", spice={}, max_steps=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def test_paths_in_a_checkpoint_are_not_followed(tmp_path: Path, finished: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "selections.jsonl").write_text("mine\n")
    state = json.loads((finished / "checkpoint-2" / "spice" / "state.json").read_text())
    paths = {name: str(outside) for name in ("output_dir", "directory", "records", "path", "../../x", "state_folder")}
    state |= paths | {"sampler": state["sampler"] | paths, "totals": state["totals"] | paths}
    resume(tmp_path, finished, json.dumps(state))
    assert all_files(outside) == {"selections.jsonl": b"mine\n"}
    assert {path.name for path in tmp_path.iterdir()} == {"earlier", "outside", "run"}
    assert trained_indices(tmp_path / "run") == trained_indices(finished)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: "[" * 100_000,
        lambda state: json.dumps(state).replace('"epoch": 0', '"epoch": ' + "9" * 5_000),
        lambda state: json.dumps(state | {"window": {"sums": {"x": 1.0}, "counts": {}}}),
        lambda state: json.dumps(state | {"window": {"sums": {"x": 1.0}, "counts": {"x": 0}}}),
        lambda state: json.dumps(state | {"totals": {"num_steps": 10**400}}),
        lambda state: json.dumps(state | {"totals": {"num_steps": float("nan")}}),
        lambda state: json.dumps(state | {"totals": {"num_steps": {"__reduce__": "os.system"}}}),
        lambda state: json.dumps(state | {"transfers": {"transfers": [{"__class__": 1}]}}),
        lambda state: json.dumps(state | {"sampler": state["sampler"] | {"empty_steps": ["x"]}}),
        lambda state: json.dumps(state | {"sampler": state["sampler"] | {"selector": None}}),
        lambda state: json.dumps(state | {"schedule": "[red]"}),
        lambda state: json.dumps(state | {"config": [1]}),
    ],
)
def test_hostile_values_of_a_checkpoint_are_refused(change: Any, tmp_path: Path, finished: Path) -> None:
    state = json.loads((finished / "checkpoint-2" / "spice" / "state.json").read_text())
    with pytest.raises(ValueError, match=r"SPICE's state in .* (cannot be read|has other values)"):
        resume(tmp_path, finished, change(state))
    assert not list((tmp_path / "run").rglob("*.jsonl"))


# Texts


@pytest.mark.parametrize("rich", [True, False])
def test_a_folders_name_is_printed_as_it_is(
    rich: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    for name in HOSTILE:
        print_summary(RunTotals(num_steps=1), name)
        assert f"Records: {name}\n" in capsys.readouterr().out


def test_texts_of_rows_are_written_and_scored_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": f"{HOSTILE[number % len(HOSTILE)]} w{3 + number}"} for number in range(20)]
    subset = select_subset(
        tiny_lora_model(),
        Dataset.from_list(rows),
        SpiceConfig(pool_size=5, num_selected=2),
        output_dir=tmp_path,
        processing_class=tiny_tokenizer(),
    )
    lines = (tmp_path / "spice_subset.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == subset.dataset.to_list() and len(lines) == 8
    assert all(row in rows for row in subset.dataset.to_list())
    shown = capsys.readouterr()
    said = shown.out + shown.err + caplog.text
    assert "SPICE summary" in said and "script" not in said and "49" not in lines[0]
    # Not even in the manifest and the records, which are often shared without the data.
    for path in [tmp_path / "manifest.json", tmp_path / "manifest.jsonl", *(tmp_path / "spice").iterdir()]:
        assert "script" not in path.read_text(encoding="utf-8")


TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.mark.parametrize("assistant_only", [False, True])
def test_messages_are_no_templates(assistant_only: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ message", "{% generation %}{{ message").replace(
        "}} {% endfor", "}}{% endgeneration %} {% endfor"
    )
    rendered = []
    apply = type(tokenizer).apply_chat_template

    def keep(messages: Any, **options: Any) -> Any:
        as_text = {name: value for name, value in options.items() if not name.startswith("return_")}
        rendered.append(apply(tokenizer, messages, **as_text | {"tokenize": False}))
        return apply(tokenizer, messages, **options)

    tokenizer.apply_chat_template = keep
    rows = [{"messages": [user("{{ 7 * 7 }}"), assistant("w4 {% set x = 1 %}{{ messages }}")]}]
    TokenizedRows(rows, tokenizer, assistant_only=assistant_only)
    assert rendered and all("{{ 7 * 7 }} w4 {% set x = 1 %}{{ messages }}" in text for text in rendered)


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_a_template_in_a_row_stays_in_its_sandbox(attack: str) -> None:
    """A row may bring its template, as TRL's may; it is rendered in the tokenizer's sandbox."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": [user("w3"), assistant("w4")], "chat_template_kwargs": {"chat_template": attack}}]
    with pytest.raises(ValueError, match=r"Row 0 of the proxy's dataset.*(SecurityError|unsafe)"):
        TokenizedRows(rows, tokenizer)


# Code of others


@pytest.mark.parametrize("trusted", [None, False, True])
def test_trust_is_what_the_user_said(trusted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load(result: Any) -> Any:
        def from_pretrained(name: str, **options: Any) -> Any:
            seen.append(options.get("trust_remote_code"))
            return result()

        return staticmethod(from_pretrained)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load(tiny_model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load(tiny_tokenizer))
    given = {} if trusted is None else {"trust_remote_code": trusted}
    ProxyModel.from_pretrained("org/model", model_kwargs=given)
    assert seen == [trusted, trusted]


def test_a_proxy_of_the_settings_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(ProxyModel, "from_pretrained", lambda name, **options: seen.append(options))
    config = SpiceConfig(proxy_model_name_or_path="org/model")
    resolve_proxy(None, config, device=torch.device("cpu"), seed=0)
    assert "trust_remote_code" not in seen[0]["model_kwargs"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("flag", [None, "true", "false"])
def test_the_command_trusts_what_its_flag_says(
    flag: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl = pytest.importorskip("trl")
    has_flag = "trust_remote_code" in trl.ModelConfig.__dataclass_fields__
    if flag is not None and not has_flag:
        pytest.skip("TRL no longer has the flag")

    seen: list[dict[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        seen.append(options)
        raise Stop

    monkeypatch.setattr(ProxyModel, "from_pretrained", load)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one row"}\n')
    flags = [] if flag is None else ["--trust_remote_code", flag]
    with pytest.raises(Stop):
        run_select(["--model_name_or_path", "org/model", "--dataset_name", str(rows), "--output_dir", "out", *flags])
    assert seen[0]["model_kwargs"]["trust_remote_code"] is (flag == "true")
