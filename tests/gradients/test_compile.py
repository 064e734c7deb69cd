"""torch.compile: training stays compiled, scoring does not, and neither compiles more than training alone would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import spice_trainer.gradients.backends
from spice_trainer.gradients.backends import uncompiled
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.gradient_loop import CollectingSink, collate, example_rows, looped_gradients, relative_error
from tests.support.models import add_lora, tiny_model
from tests.support.replays import train_and_replay
from tests.support.trainers import make_trainer

compiler = pytest.importorskip("torch._dynamo", reason="needs torch.compile")

# The compiler warns of what it does with functions that it cannot see through, such as hooks, and of threads it set.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::UserWarning:transformers")

# Traces and guards as every backend does, but needs no C++ compiler and generates no code.
BACKEND = "eager"


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    compiler.reset()
    compiler.utils.counters.clear()


def num_graphs() -> int:
    """Graphs compiled so far."""
    return int(compiler.utils.counters["stats"].get("unique_graphs", 0))


def one_layer_model(**lora: Any) -> PeftModel:
    return add_lora(tiny_model(num_hidden_layers=1), **lora)


@pytest.mark.slow
def test_a_compiled_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps, compared with the same steps without scoring, which may compile nothing of its own."""
    compiled_while: dict[str, int] = {}
    compute = SampleGradients.compute

    def counting(self: SampleGradients, *args: Any, **kwargs: Any) -> Tensor:
        before = num_graphs()
        losses = compute(self, *args, **kwargs)
        compiled_while["scoring"] = compiled_while.get("scoring", 0) + num_graphs() - before
        return losses

    monkeypatch.setattr(SampleGradients, "compute", counting)
    counts: list[int] = []

    def make(output_dir: Path) -> Any:
        counts.append(num_graphs())
        compiler.reset()
        return make_trainer(
            output_dir,
            model=one_layer_model(lora_dropout=0.3),
            spice={},
            verify=True,
            max_steps=3,
            torch_compile=True,
            torch_compile_backend=BACKEND,
        )

    trainer = train_and_replay(make, tmp_path, monkeypatch, num_steps=3)
    counts.append(num_graphs())
    assert isinstance(trainer.model_wrapped, compiler.OptimizedModule), "nothing was compiled"
    assert not isinstance(trainer.model, compiler.OptimizedModule)
    assert compiled_while == {"scoring": 0}
    with_scoring, without = counts[1] - counts[0], counts[2] - counts[1]
    assert with_scoring == without > 0, "scoring made training compile again"


def compile_wrapper(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=BACKEND)  # type: ignore[return-value]


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=BACKEND)
    return model


def compile_layer(model: nn.Module) -> nn.Module:
    model.get_submodule("base_model.model.model.layers.0").compile(backend=BACKEND)
    return model


# What torch.compile meets in the attention masks of transformers 4.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compile_model", [compile_wrapper, compile_in_place, compile_layer])
def test_models_compiled_by_their_user(compile_model: Callable[[nn.Module], nn.Module]) -> None:
    """Scoring finds the layers, compiles nothing, and what was compiled serves the next training step."""
    model, rows = one_layer_model(), example_rows()
    _, expected = looped_gradients(model, rows)
    compiled = compile_model(model)
    first = training_gradients(compiled, rows)
    before = num_graphs()
    assert before > 0
    sink = CollectingSink()
    with SampleGradients(compiled, find_trained_modules(compiled)) as sample_gradients:
        sample_gradients.compute(*collate(rows), sink)
    assert relative_error(sink.by_module(), expected) < 1e-5
    assert num_graphs() == before
    again = training_gradients(compiled, rows)
    assert num_graphs() == before
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


def test_without_the_context_hooks_would_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would miss if nothing could be compiled while scoring."""
    monkeypatch.setattr(spice_trainer.gradients.backends, "uncompiled", lambda model: torch.enable_grad())
    model = compile_layer(add_lora(tiny_model(num_hidden_layers=1), target_modules=["q_proj"]))
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.compute(*collate(example_rows()), CollectingSink())
    assert num_graphs() > 0


def test_the_context_is_for_compiled_models_alone() -> None:
    """What a model compiles for itself, as flex attention does, stays compiled while scoring."""

    @torch.compile(backend=BACKEND)
    def double(values: Tensor) -> Tensor:
        return values * 2

    with uncompiled(one_layer_model()):
        double(torch.ones(3))
    assert num_graphs() == 1
    with uncompiled(compile_in_place(one_layer_model())):
        double(torch.ones(3, 3, 3))
    assert num_graphs() == 1


def training_gradients(model: nn.Module, rows: Any) -> list[Tensor]:
    inputs, labels = collate(rows)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    gradients = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    model.zero_grad()
    assert gradients
    return gradients
