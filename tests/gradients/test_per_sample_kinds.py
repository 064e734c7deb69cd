"""Everything that trains, not LoRA alone: sample gradients equal one-at-a-time autograd, whatever the pieces' size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn

from spice_trainer.data.rows import collate_row
from spice_trainer.gradients import per_sample
from spice_trainer.gradients.layers.parameters import ParameterLayer
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.layers.scale import ScaleLayer
from spice_trainer.gradients.lora import choose_modules, find_trained_modules
from spice_trainer.gradients.verification import GradientMismatchError, verify_directions, verify_gradients
from tests.support.gradient_loop import batched_gradients, collate, example_rows, looped_gradients, relative_error
from tests.support.models import PlainLanguageModel, add_lora, tiny_lora_model, tiny_model
from tests.support.trainers import collate as collate_plain
from tests.support.trainers import tiny_rows

TOLERANCE = 1e-5


def _randomized(model: nn.Module) -> nn.Module:
    """Adapters begin with zeros, of which nothing has a gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


class _Doubled(nn.Linear):
    """Linear by its class, but not by what it does; Llama 4's router is one."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2.0 * super().forward(inputs)


def _with_another_linear() -> nn.Module:
    model = PlainLanguageModel()
    model.mix = _Doubled(16, 16)
    return model


def _with_a_shared_bias() -> nn.Module:
    """As BERT: the head's weight is the embedding's, and its bias also one of the module that holds it."""
    model = PlainLanguageModel()
    model.bias = model.head.bias
    model.head.weight = model.embedding.weight
    return model


FULL = {
    **{name: lambda name=name: tiny_model(name) for name in ("llama", "qwen3", "gemma2", "gpt2", "phi3", "gpt_neox")},
    "opt": lambda: tiny_model("opt"),
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "untied": lambda: tiny_model(tie_word_embeddings=False),
    "padding": lambda: tiny_model(pad_token_id=7, tie_word_embeddings=False),
    "scaled_embedding": lambda: tiny_model("gemma2", tie_word_embeddings=False),
    "some": lambda: _only(tiny_model(), ("norm", "down_proj")),
    "biases": lambda: _only(tiny_model("gpt_neox"), ("bias",)),
    "plain": PlainLanguageModel,
}
BESIDE_LORA: dict[str, Callable[[], nn.Module]] = {
    "dora": lambda: tiny_lora_model(use_dora=True),
    "dora_gpt2": lambda: tiny_lora_model("gpt2", use_dora=True),
    "dora_magnitude_alone": lambda: _only(tiny_lora_model(use_dora=True), ("magnitude",)),
    "rslora": lambda: tiny_lora_model(use_rslora=True),
    "lora_bias": lambda: tiny_lora_model("gpt_neox", lora_bias=True),
    "bias_all": lambda: tiny_lora_model("gpt_neox", bias="all"),
    "bias_lora_only": lambda: tiny_lora_model("opt", bias="lora_only"),
    "embeddings_to_save": lambda: tiny_lora_model(modules_to_save=["embed_tokens", "lm_head"]),
    "norms_to_save": lambda: tiny_lora_model(modules_to_save=["norm", "input_layernorm"]),
}
BY_AUTOGRAD: dict[str, Callable[[], nn.Module]] = {
    "embedding_lora": lambda: tiny_lora_model(target_modules=["embed_tokens", "q_proj"]),
    "tokens": lambda: tiny_lora_model(trainable_token_indices=[3, 4, 9]),
    "tied_tokens": lambda: add_lora(tiny_model(tie_word_embeddings=True), trainable_token_indices=[3, 4, 9]),
    "adalora": lambda: get_peft_model(
        tiny_model(), AdaLoraConfig(target_modules=["q_proj", "up_proj"], total_step=10, task_type="CAUSAL_LM")
    ),
    "vera": lambda: get_peft_model(tiny_model(), VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
    **{
        config.__name__: lambda config=config, options=options: get_peft_model(
            tiny_model(), config(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
        )
        for config, options in (
            (LoHaConfig, {}),
            (LoKrConfig, {}),
            (OFTConfig, {"oft_block_size": 4}),
            (HRAConfig, {}),
        )
    },
    "another_linear": _with_another_linear,
    "shared_bias": _with_a_shared_bias,
    "ia3": lambda: get_peft_model(tiny_model(), IA3Config(task_type="CAUSAL_LM")),
}


def _only(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    return model


def _error(model: nn.Module) -> float:
    # The shortest row has hardly a gradient in some adapters: no relative error tells anything there.
    rows = example_rows()[:4]
    losses, found = batched_gradients(model, rows, extra_padding=2)
    expected_losses, expected = looped_gradients(model, rows, allow_unused=True)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    return relative_error(found, expected)


@pytest.mark.parametrize("max_numbers", [40, 3000, 2**21])
@pytest.mark.parametrize("kind", FULL)
def test_a_model_that_trains_in_full(kind: str, max_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(per_sample.PIECE_NUMBERS, "cpu", max_numbers)
    assert _error(_randomized(FULL[kind]())) < TOLERANCE


@pytest.mark.parametrize("kind", BESIDE_LORA)
def test_what_trains_beside_lora(kind: str) -> None:
    model = _randomized(BESIDE_LORA[kind]())
    assert not any(layer.takes_autograd for layer in scored_layers(find_trained_modules(model)))
    assert _error(model) < TOLERANCE


@pytest.mark.parametrize("kind", BY_AUTOGRAD)
def test_what_has_no_rule_is_autograds_row_by_row(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = _randomized(BY_AUTOGRAD[kind]())
    assert _error(model) < TOLERANCE
    assert caplog.text.count("candidates are scored one at a time") == 1


@pytest.mark.parametrize("verify", [verify_gradients, verify_directions])
@pytest.mark.parametrize("kind", [*FULL, *BESIDE_LORA, "tokens", "shared_bias"])
def test_both_checks_follow_them(kind: str, verify: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    # Several groups of layers, and not all of a kind.
    monkeypatch.setattr("spice_trainer.gradients.verification._GROUP_NUMBERS", 3000)
    monkeypatch.setattr("spice_trainer.gradients.verification._MAX_NUMBERS", 20_000)
    model = _randomized((FULL | BESIDE_LORA | BY_AUTOGRAD)[kind]())
    rows = [collate_row(number, tiny_rows()[number], collate_plain) for number in (0, 1)]
    assert verify(model, find_trained_modules(model), rows, device=torch.device("cpu")) < TOLERANCE


@pytest.mark.parametrize("verify", [verify_gradients, verify_directions])
def test_a_wrong_rule_is_caught_in_a_large_model(
    verify: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spice_trainer.gradients.verification._GROUP_NUMBERS", 3000)
    right = ScaleLayer.sample_gradients
    monkeypatch.setattr(ScaleLayer, "sample_gradients", lambda *args: 2.0 * right(*args))
    model = tiny_model()
    rows = [collate_row(number, tiny_rows()[number], collate_plain) for number in (0, 1)]
    with pytest.raises(GradientMismatchError, match="norm"):
        verify(model, find_trained_modules(model), rows, device=torch.device("cpu"))


def test_a_part_of_a_model_that_trains_in_full() -> None:
    model = tiny_model()
    modules = find_trained_modules(model)
    chosen = choose_modules(modules, layers=1)
    assert set(chosen) == {name for name in modules if ".layers.1." in name}
    rows = example_rows()
    found = batched_gradients(model, rows, modules=chosen)[1]
    every = dict(zip(modules, batched_gradients(model, rows)[1], strict=True))
    assert relative_error(found, [every[name] for name in chosen]) < 1e-6


def test_parameters_that_layers_share_in_part_count_once() -> None:
    model = _with_a_shared_bias()
    layers = scored_layers(find_trained_modules(model))
    assert sum(layer.num_coordinates for layer in layers) == sum(weight.numel() for weight in model.parameters())


def test_a_tied_weight_is_one_layer_whose_gradient_is_the_sum() -> None:
    model = tiny_model(tie_word_embeddings=True)
    modules = find_trained_modules(model)
    layers = scored_layers(modules)
    assert len(modules) == len(layers) + 1
    (tied,) = (layer for layer in layers if len(layer.parts) > 1)
    assert [part.name for part in tied.parts] == ["model.embed_tokens", "lm_head"]
    assert sum(layer.num_coordinates for layer in layers) == sum(weight.numel() for weight in model.parameters())


def test_tied_layers_that_differ_in_more_are_left_to_autograd() -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.lm_head.bias = nn.Parameter(torch.randn(61))
    (tied,) = (layer for layer in scored_layers(find_trained_modules(model)) if isinstance(layer, ParameterLayer))
    assert tied.num_coordinates == model.lm_head.weight.numel() + 61
    assert _error(model) < TOLERANCE


def test_nothing_is_held_for_all_rows_of_a_large_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, largest = tiny_model(tie_word_embeddings=False), 0
    monkeypatch.setitem(per_sample.PIECE_NUMBERS, "cpu", 100)

    class Watching:
        def add(self, module_index: int, gradients: torch.Tensor, rows: slice = slice(None), start: int = 0) -> None:
            nonlocal largest
            largest = max(largest, gradients.numel())

        def add_sparse(self, *args: object) -> None: ...

        def restart(self, rows: object) -> None: ...

    with per_sample.SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.compute(*collate(example_rows()), Watching())
    assert 0 < largest <= 100
