"""Finding the LoRA layers, and refusing by name what cannot be scored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import UnsupportedModelError, choose_modules, find_trained_modules, is_lora
from tests.support.models import ARCHITECTURES, add_lora, tiny_lora_model, tiny_model
from tests.support.versions import before

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_trainable_parameter_belongs_to_a_found_layer(architecture: str) -> None:
    model = tiny_lora_model(architecture)
    found = find_trained_modules(model)
    covered = {id(parameter) for module in found.values() for parameter in module.parameters()}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert covered == trainable
    assert all(model.get_submodule(name) is module for name, module in found.items())
    named = [name for name, _ in model.named_modules()]
    assert [named.index(name) for name in found] == sorted(named.index(name) for name in found)


def test_layers_and_kinds_are_counted() -> None:
    assert len(find_trained_modules(tiny_lora_model())) == 2 * 7 * 2
    some = find_trained_modules(tiny_lora_model(target_modules=["q_proj"], layers_to_transform=[1]))
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert list(some) == [f"{prefix}.lora_A.default", f"{prefix}.lora_B.default"]


def test_a_named_adapter_is_found() -> None:
    model = get_peft_model(tiny_model(), tiny_lora_model().peft_config["default"], adapter_name="mine")
    assert all(name.endswith((".lora_A.mine", ".lora_B.mine")) for name in find_trained_modules(model))


def test_only_the_adapter_that_trains_is_found() -> None:
    model = tiny_lora_model()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert len(find_trained_modules(model)) == 28
    assert all(name.endswith(".second") for name in find_trained_modules(model))


def test_half_an_adapter_may_be_frozen() -> None:
    model = tiny_lora_model()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert len(find_trained_modules(model)) == 14
    assert all(".lora_B." in name for name in find_trained_modules(model))


def test_an_unmerged_adapter_is_found_again() -> None:
    model = tiny_lora_model()
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match=r"q_proj' is merged into .*model\.unmerge_adapter\(\)"):
        find_trained_modules(model)
    model.unmerge_adapter()
    assert len(find_trained_modules(model)) == 28


OTHERS: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "dora": (lambda: tiny_lora_model(use_dora=True), 42, set()),
    "norm": (lambda: tiny_lora_model(modules_to_save=["model.norm"]), 28, {"model.norm.modules_to_save.default"}),
    "head": (lambda: tiny_lora_model(modules_to_save=["lm_head"]), 28, {"lm_head.modules_to_save.default"}),
    "embedding": (lambda: tiny_lora_model(target_modules=["embed_tokens", "q_proj"]), 6, set()),
    "tokens": (
        lambda: tiny_lora_model(trainable_token_indices=[1, 2]),
        28,
        {"model.embed_tokens.token_adapter.trainable_tokens_delta"},
    ),
    "bias": (
        lambda: add_lora(tiny_model(attention_bias=True), target_modules=["q_proj"], bias="lora_only"),
        4,
        {f"model.layers.{number}.self_attn.q_proj.base_layer" for number in (0, 1)},
    ),
    "full": (tiny_model, 0, {name for name, module in tiny_model().named_modules() if module._parameters}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_trains_beside_lora_is_found_and_can_be_left_out(kind: str) -> None:
    build, num_lora, others = OTHERS[kind]
    model = build()
    found = {name.removeprefix("base_model.model.") for name in find_trained_modules(model)}
    assert {name for name in found if not is_lora(name)} == others
    assert sum(map(is_lora, found)) == num_lora
    if num_lora:
        assert set(find_trained_modules(model, scoring_parameters="lora")) == set(
            filter(is_lora, find_trained_modules(model))
        )
    else:
        with pytest.raises(UnsupportedModelError, match=r'scoring_parameters="lora", and of the 21 modules'):
            find_trained_modules(model, scoring_parameters="lora")


def _frozen_adapter() -> PeftModel:
    model = tiny_lora_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _disabled_adapter() -> PeftModel:
    model = tiny_lora_model()
    model.base_model.disable_adapter_layers()
    return model


FROZEN: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "frozen_model": (lambda: tiny_model().requires_grad_(False), r"\(LlamaForCausalLM\) has no trainable parameter"),
    "frozen_adapter": (_frozen_adapter, r"\(PeftModelForCausalLM\) has no trainable parameter.*is_trainable=True"),
    "disabled_adapter": (_disabled_adapter, r"\(PeftModelForCausalLM\) has no trainable parameter"),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_a_model_that_trains_nothing_is_told_how_to_get_something(kind: str) -> None:
    build, message = FROZEN[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        find_trained_modules(build())


def test_the_error_is_a_value_error() -> None:
    assert issubclass(UnsupportedModelError, ValueError)


@pytest.mark.skipif(before("transformers", "5"), reason="the experts are modules, not parameters")
def test_the_matrices_of_expert_parameters_are_one_layer_each() -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = add_lora(tiny_model("mixtral"), target_modules=["q_proj"], target_parameters=parameters)
    modules = find_trained_modules(model)
    layer = "base_model.model.model.layers.1"
    assert [name for name in modules if ".1." in name] == [
        f"{layer}.self_attn.q_proj.lora_A.default",
        f"{layer}.self_attn.q_proj.lora_B.default",
        f"{layer}.mlp.experts.base_layer.lora_A.default",
        f"{layer}.mlp.experts.lora_A.default",
    ]
    assert list(choose_modules(modules, layers=1, target_modules=["experts"])) == list(modules)[-2:]
    for layer_of in scored_layers(modules):
        assert [weight.shape for weight in layer_of.parameters] == list(layer_of.shapes)
