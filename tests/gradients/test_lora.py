"""Finding the LoRA layers, and refusing by name what cannot be scored."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import UnsupportedModelError, choose_modules, find_lora_modules
from tests.support.models import ARCHITECTURES, ConvolutionModel, add_lora, tiny_lora_model, tiny_model
from tests.support.versions import before

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_trainable_parameter_belongs_to_a_found_layer(architecture: str) -> None:
    model = tiny_lora_model(architecture)
    found = find_lora_modules(model)
    covered = {id(parameter) for module in found.values() for parameter in module.parameters()}
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert covered == trainable
    assert all(model.get_submodule(name) is module for name, module in found.items())
    named = [name for name, _ in model.named_modules()]
    assert [named.index(name) for name in found] == sorted(named.index(name) for name in found)


def test_layers_and_kinds_are_counted() -> None:
    assert len(find_lora_modules(tiny_lora_model())) == 2 * 7 * 2
    some = find_lora_modules(tiny_lora_model(target_modules=["q_proj"], layers_to_transform=[1]))
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert list(some) == [f"{prefix}.lora_A.default", f"{prefix}.lora_B.default"]


def test_a_named_adapter_is_found() -> None:
    model = get_peft_model(tiny_model(), tiny_lora_model().peft_config["default"], adapter_name="mine")
    assert all(name.endswith((".lora_A.mine", ".lora_B.mine")) for name in find_lora_modules(model))


def test_only_the_adapter_that_trains_is_found() -> None:
    model = tiny_lora_model()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    assert len(find_lora_modules(model)) == 28
    assert all(name.endswith(".second") for name in find_lora_modules(model))


def test_half_an_adapter_may_be_frozen() -> None:
    model = tiny_lora_model()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert len(find_lora_modules(model)) == 14
    assert all(".lora_B." in name for name in find_lora_modules(model))


def test_an_unmerged_adapter_is_found_again() -> None:
    model = tiny_lora_model()
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError):
        find_lora_modules(model)
    model.unmerge_adapter()
    assert len(find_lora_modules(model)) == 28


def _trainable_norm() -> PeftModel:
    model = tiny_lora_model()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def _merged() -> PeftModel:
    model = tiny_lora_model()
    model.merge_adapter()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "dora": (
        lambda: tiny_lora_model(use_dora=True),
        ["the LoRA variant DoRA (`use_dora`); use plain LoRA", "q_proj.lora_A.default", "and 25 more"],
    ),
    "dora_magnitude": (
        lambda: tiny_lora_model(use_dora=True),
        ["the magnitude of DoRA", "q_proj.lora_magnitude_vector.default", "and 11 more"],
    ),
    "alora": (
        lambda: tiny_lora_model(alora_invocation_tokens=[1, 2]),
        ["the LoRA variant aLoRA (`alora_invocation_tokens`)"],
    ),
    "modules_to_save": (
        lambda: tiny_lora_model(modules_to_save=["lm_head"]),
        ["beside LoRA (`modules_to_save`); leave them out: base_model.model.lm_head.modules_to_save.default.weight"],
    ),
    "embedding": (
        lambda: tiny_lora_model(target_modules=["embed_tokens", "q_proj"]),
        ["LoRA on an embedding", "`target_modules`", "embed_tokens.lora_embedding_A.default"],
    ),
    "embedding_alone": (
        lambda: tiny_lora_model(target_modules=["embed_tokens"]),
        ["LoRA on an embedding", "embed_tokens.lora_embedding_B.default"],
    ),
    "trainable_token_indices": (
        lambda: tiny_lora_model(trainable_token_indices=[1, 2]),
        ["(`trainable_token_indices`)", "embed_tokens.token_adapter.trainable_tokens_delta.default"],
    ),
    "norm": (
        _trainable_norm,
        [
            "parameters outside the adapter; freeze them with `requires_grad_(False)`: ",
            "base_model.model.model.norm.weight",
        ],
    ),
    "bias": (
        lambda: add_lora(tiny_model(attention_bias=True), bias="lora_only"),
        ['biases of the base model (`bias="lora_only"` or `bias="all"`); use `bias="none"`', "and 5 more"],
    ),
    "merged": (_merged, ["a merged LoRA adapter; call `model.unmerge_adapter()`", "and 25 more"]),
    "convolution": (
        lambda: add_lora(ConvolutionModel(), target_modules=["conv"], task_type=None),
        ["LoRA on a layer that is not linear", "conv.lora_A.default.weight"],
    ),
    "multi_head_attention": (
        lambda: add_lora(ConvolutionModel(), target_modules=["attention"], task_type=None),
        ["LoRA on `torch.nn.MultiheadAttention`", "attention.lora_A.default"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_scored_is_refused_by_name(kind: str) -> None:
    if kind == "alora" and before("peft", "0.18"):
        pytest.skip("aLoRA came with PEFT 0.18")
    build, phrases = REFUSED[kind]
    with pytest.raises(UnsupportedModelError) as caught:
        find_lora_modules(build())
    message = str(caught.value)
    assert message.startswith("SPICE scores samples by the gradients of plain LoRA layers")
    for phrase in phrases:
        assert phrase in message


def _frozen_adapter() -> PeftModel:
    model = tiny_lora_model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _disabled_adapter() -> PeftModel:
    model = tiny_lora_model()
    model.base_model.disable_adapter_layers()
    return model


WITHOUT_LORA: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "full_model": (tiny_model, r"\(LlamaForCausalLM\) trains [\d,]+ parameters but has no trainable LoRA layer"),
    "frozen_model": (lambda: tiny_model().requires_grad_(False), "has no trainable parameter and no trainable LoRA"),
    "frozen_adapter": (_frozen_adapter, r"\(PeftModelForCausalLM\) has no trainable parameter.*is_trainable=True"),
    "disabled_adapter": (_disabled_adapter, r"\(PeftModelForCausalLM\) has no trainable parameter"),
    "another_adapter": (
        lambda: get_peft_model(tiny_model(), IA3Config(task_type="CAUSAL_LM")),
        r"trains [\d,]+ parameters but has no trainable LoRA layer.*peft_config=LoraConfig",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_LORA)
def test_a_model_without_trainable_lora_is_told_how_to_get_it(kind: str) -> None:
    build, message = WITHOUT_LORA[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        find_lora_modules(build())


def test_the_error_is_a_value_error() -> None:
    assert issubclass(UnsupportedModelError, ValueError)


@pytest.mark.skipif(before("transformers", "5"), reason="the experts are modules, not parameters")
def test_the_matrices_of_expert_parameters_are_one_layer_each() -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = add_lora(tiny_model("mixtral"), target_modules=["q_proj"], target_parameters=parameters)
    modules = find_lora_modules(model)
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
