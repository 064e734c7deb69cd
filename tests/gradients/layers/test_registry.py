"""A kind of layer is one file, or one class from outside, and everything else follows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spice_trainer.gradients.layers
from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.layers import registry
from spice_trainer.gradients.layers.base import LAYER_KINDS, ScoredLayer, register_layer
from spice_trainer.gradients.layers.linear import LinearLayer
from spice_trainer.gradients.layers.parameters import ParameterLayer
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.optimizer_state import layer_states
from spice_trainer.gradients.verification import GradientMismatchError, verify_directions, verify_gradients
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients, relative_error
from tests.support.models import tiny_lora_model
from tests.support.trainers import collate, tiny_rows


class Transposed(nn.Module):
    """y = xᵀ W + b with a weight of (inputs, outputs), no subclass of `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.clone())
        self.bias = nn.Parameter(torch.zeros(linear.out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight + self.bias


class TransposedLayer(ScoredLayer):
    @property
    def parameters(self) -> Sequence[Tensor]:
        return [self.module.weight, self.module.bias]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        return [tuple(self.module.weight.shape), tuple(self.module.bias.shape)]

    def keep(self, args: Any, kwargs: Any, num_samples: int, num_tokens: int) -> Tensor | None:
        return args[0].detach() if len(args[0]) == num_samples else None

    def sample_gradients(
        self, inputs: Tensor, output_gradients: Tensor, start: int = 0, stop: int | None = None
    ) -> Tensor:
        weight = torch.einsum("nsi,nso->nio", inputs, output_gradients).flatten(1)
        return torch.cat([weight, output_gradients.sum(1)], dim=1)[:, start:stop]

    def output(self, inputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        return inputs @ parameters[0] + parameters[1]


@pytest.fixture
def registered() -> Iterator[None]:
    register_layer(Transposed)(TransposedLayer)
    yield
    del LAYER_KINDS[Transposed]


def _model() -> nn.Module:
    model = tiny_lora_model()
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            module.lora_A["default"] = Transposed(module.lora_A["default"])
    return model


def test_a_registered_kind_is_found_and_its_gradients_are_autograds(registered: None) -> None:
    model, rows = _model(), example_rows()
    modules = find_trained_modules(model)
    assert [type(module) for module in modules.values()] == [Transposed, nn.Linear] * 14
    losses, found = batched_gradients(model, rows)
    expected_losses, expected = looped_gradients(model, rows)
    assert relative_error(found, expected) < 1e-5
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert [layer.num_coordinates for layer in registry.scored_layers(modules)] == [part.shape[1] for part in found]


@pytest.mark.parametrize("verify", [verify_gradients, verify_directions])
def test_both_checks_follow_it(verify: object, registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    rows = [collate_row(number, tiny_rows()[number], collate) for number in (0, 1)]
    arguments = (model, find_trained_modules(model), rows)
    assert 0 < verify(*arguments, device=torch.device("cpu")) < 1e-5
    right = TransposedLayer.sample_gradients
    monkeypatch.setattr(TransposedLayer, "sample_gradients", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    with pytest.raises(GradientMismatchError, match=r"lora_A\.default"):
        verify(*arguments, device=torch.device("cpu"))


def test_the_optimizers_state_has_its_coordinates(registered: None) -> None:
    model = _model()
    modules = find_trained_modules(model)
    optimizer = torch.optim.AdamW(parameter for module in modules.values() for parameter in module.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for (_, module), state in zip(modules.items(), layer_states(optimizer, modules, setting="x=y"), strict=True):
        momentum = torch.cat([0.1 * parameter.grad.flatten() for parameter in module.parameters()])
        torch.testing.assert_close(state.flat("exp_avg"), momentum)


def test_what_is_not_registered_is_left_to_autograd() -> None:
    model, rows = _model(), example_rows()
    found = batched_gradients(model, rows)[1]
    assert relative_error(found, looped_gradients(model, rows)[1]) < 1e-5
    assert registry.layer_kind(Transposed(nn.Linear(2, 2))) is ParameterLayer


def test_a_class_of_a_library_goes_by_its_name() -> None:
    name = f"{Transposed.__module__}.Transposed"
    register_layer(name)(TransposedLayer)
    try:
        assert registry.layer_kind(Transposed(nn.Linear(2, 2))) is TransposedLayer
        with pytest.raises(ValueError, match=r"Transposed is scored by TransposedLayer already"):
            register_layer(name)(TransposedLayer)
    finally:
        del LAYER_KINDS[name]


def test_a_class_has_one_kind_and_passes_it_on() -> None:
    with pytest.raises(ValueError, match="Linear is scored by LinearLayer already"):
        register_layer(nn.Linear)(TransposedLayer)
    # As FSDP makes them when it shards a layer.
    assert registry.layer_kind(type("FSDPLinear", (nn.Linear,), {})(2, 2)) is LinearLayer
    assert registry.layer_kind(nn.Conv2d(1, 1, 1)) is ParameterLayer


def test_a_file_in_the_folder_is_all_that_a_kind_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pairs.py").write_text(
        "from torch import nn\n"
        "from spice_trainer.gradients.layers.base import ScoredLayer, register_layer\n"
        "@register_layer(nn.Bilinear)\n"
        "class BilinearLayer(ScoredLayer): pass\n"
    )
    folder = [*spice_trainer.gradients.layers.__path__, str(tmp_path)]
    monkeypatch.setattr(spice_trainer.gradients.layers, "__path__", folder)
    importlib.reload(registry)
    try:
        assert registry.layer_kind(nn.Bilinear(2, 2, 2)).__name__ == "BilinearLayer"
    finally:
        del LAYER_KINDS[nn.Bilinear]
        del sys.modules["spice_trainer.gradients.layers.pairs"]
