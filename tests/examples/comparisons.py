"""A tiny comparison on disk: a Llama of two layers, its tokenizer, and a file of rows; run as its own process."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.forks import fork
from tests.support.models import VOCAB_SIZE, tiny_model
from tests.support.trainers import tiny_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# The examples are scripts: what lies beside them is imported by its bare name.
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))
import compare  # noqa: E402

NUM_STEPS = 4
DOMAINS = ("code", "general", "math")
TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} </s> {% endfor %}"


def write_model(folder: Path) -> None:
    """A random model and a word-level tokenizer with a chat template."""
    tiny_model(max_position_embeddings=128).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def tiny_file(path: Path, num_rows: int = 400, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random words: two domains with long answers, and one whose source answers `w5` or `w6`."""
    generator = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{generator.randint(3, VOCAB_SIZE - 1)}" for _ in range(generator.randint(least, most)))

    rows = []
    for number in range(num_rows):
        domain = DOMAINS[number % 3]
        response = generator.choice(["w5", "w6"]) if domain == "general" else words(1, 12)
        rows.append({"id": f"row{number}", "domain": domain, "source": f"{domain} source"})
        rows[-1] |= {"instruction": words(9, 16), "response": response}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def tiny_comparison(folder: Path, **overrides: Any) -> Path:
    """The YAML file of a comparison that takes seconds. A dict given for a part is laid over it."""
    model = folder / "model"
    if not model.exists():
        write_model(model)
    if not (folder / "rows.jsonl").exists():
        tiny_file(folder / "rows.jsonl")
    values: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1, "last_layers": 1},
        "data": {
            "path": str(folder / "rows.jsonl"),
            "validation_share": 0.15,
            "test_share": 0.15,
            "max_length": 64,
            "validation_rows": 12,
            "test_rows": 15,
        },
        "batch_size": 4,
        "micro_batch_size": 2,
        "pool_size": 8,
        "num_selected": 2,
        "num_steps": NUM_STEPS,
        "seeds": [0, 1],
        "learning_rates": [1e-2],
        "training": {"use_cpu": True, "bf16": False},
        "save_every": 1,
        "evaluation": {"every": 2, "tokens_per_batch": 256, "choice_rows": 5},
        "output_dir": str(folder / "output"),
        "arms": [
            {"name": "full", "kind": "full"},
            {"name": "random", "kind": "random"},
            {"name": "spice", "fields": {"gradient_normalization": "sqrt_tokens"}},
        ],
    }
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), Mapping) else value
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(command: str, config: Path, *options: str, attempts: Sequence[str] = ("",)) -> tuple[list[int], str]:
    """Run `compare.py` once for each of `attempts`, which is Python that runs before it and decides when it dies.

    Returns:
        The exit status of each (−9 where it was killed), and what they printed.
    """
    arguments = ["compare.py", command, str(config), *options]
    ended = []
    for number, moment in enumerate(attempts):
        folder = config.parent / "printed" / f"{command}-{number}"
        ended.append(fork(_compare, [(arguments, moment)], folder, timeout=300))
        assert not ended[-1].timed_out, ended[-1].stderr[-3000:]
    output = "".join(attempt.stdout for attempt in ended) + "".join(attempt.stderr for attempt in ended)
    return [code for attempt in ended for code in attempt.codes], output


def _compare(arguments: list[str], moment: str) -> None:
    """One attempt, in a forked process."""
    exec(moment, {})
    sys.argv = arguments
    compare.main()


def results(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of results, in order."""
    return [json.loads(line) for line in (output_dir / "results.jsonl").read_text().splitlines()]


def without_clocks(values: Any) -> Any:
    """The same without seconds, which no two runs share."""
    if isinstance(values, dict):
        return {name: without_clocks(value) for name, value in values.items() if name != "seconds"}
    return [without_clocks(value) for value in values] if isinstance(values, list) else values
