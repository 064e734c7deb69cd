"""Layers in unusual form: their sample gradients are those of every weight that trains, found without SPICE."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spice_trainer.data.checks import token_id_limits
from spice_trainer.gradients.lora import choose_modules, find_trained_modules
from tests.support.gradient_loop import batched_gradients, example_rows
from tests.support.models import VOCAB_SIZE, add_lora, tiny_lora_model, tiny_model

TOLERANCE = 1e-5


class _ScaledLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 48, bias=False)
        self.scale = nn.Parameter(torch.full((48,), 2.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class _ScaledEmbedding(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE, 32)
        self.embed_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class _ListNorm(nn.Module):
    """A norm by its name, which takes a list and gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        return nn.functional.rms_norm(values[0], (32,)) * self.weight, values[0]


class _CallsNormOfList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _ListNorm()

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.inner([hidden])[0]
        return normed


class _ChangesInPlace(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.inner(inputs)
        return output.mul_(2.0)


class _GatedBlock(nn.Module):
    """A block of the model's with a weight of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.gate = nn.Parameter(torch.full((32,), 0.5))
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        output: Tensor = self.block(hidden, *args, **kwargs)
        return output * self.gate


def _double(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 2.0


def _with(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny_model()
        change(model)
        return model

    return make


def _biased(model: nn.Module) -> nn.Module:
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48)
    return model.model.layers[0].mlp.up_proj


def _up_proj(model: nn.Module) -> nn.Module:
    return model.model.layers[0].mlp.up_proj


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": _with(lambda model: parametrizations.weight_norm(_biased(model))),
    "spectral_norm": _with(lambda model: parametrizations.spectral_norm(_biased(model))),
    "old_weight_norm": _with(lambda model: nn.utils.weight_norm(_biased(model))),
    "old_spectral_norm": _with(lambda model: nn.utils.spectral_norm(_up_proj(model))),
    "norm_with_parametrization": _with(
        lambda model: parametrizations.weight_norm(setattr(model.model, "norm", nn.LayerNorm(32)) or model.model.norm)
    ),
    "linear_with_scale": _with(lambda model: setattr(model.model.layers[0].mlp, "up_proj", _ScaledLinear())),
    "embedding_with_scale": _with(lambda model: model.set_input_embeddings(_ScaledEmbedding())),
    "norm_of_list": _with(lambda model: setattr(model.model, "norm", _CallsNormOfList())),
    "hook_on_norm": _with(lambda model: model.model.layers[0].input_layernorm.register_forward_hook(_double)),
    "hook_on_embedding": _with(lambda model: model.model.embed_tokens.register_forward_hook(_double)),
    "hook_on_linear": _with(lambda model: _up_proj(model).register_forward_hook(_double)),
    "embedding_in_place": _with(
        lambda model: setattr(model.model, "embed_tokens", _ChangesInPlace(model.model.embed_tokens))
    ),
    "prefix": lambda: get_peft_model(tiny_model(), PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
}

# Settings of newer releases of PEFT.
if "alora_invocation_tokens" in LoraConfig.__dataclass_fields__:
    MODELS["alora"] = lambda: tiny_lora_model(alora_invocation_tokens=[5])
if "ensure_weight_tying" in LoraConfig.__dataclass_fields__:
    MODELS["head_with_exchanged_sizes"] = lambda: add_lora(
        tiny_model(tie_word_embeddings=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )


def _expected(model: nn.Module, weights: list[Tensor]) -> Tensor:
    """Gradients of the rows, one at a time, by autograd."""
    model.eval()
    gradients = []
    for input_ids, labels in example_rows():
        logits = model(input_ids=torch.tensor([input_ids]), attention_mask=torch.ones(1, len(input_ids)))["logits"][0]
        loss = nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100)
        found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in found]).double())
    return torch.stack(gradients)


def _check(model: nn.Module, modules: dict[str, nn.Module], weights: list[Tensor]) -> None:
    _, gradients = batched_gradients(model, example_rows(), modules=modules)
    ours, expected = torch.cat(gradients, dim=1).double(), _expected(model, weights)
    # Of the products, since layers come in another order.
    assert ours.shape == expected.shape
    gram, expected_gram = ours @ ours.T, expected @ expected.T
    assert float((gram - expected_gram).abs().max()) <= TOLERANCE * float(expected_gram.abs().max())


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", MODELS)
def test_sample_gradients_are_those_of_every_trained_weight(name: str) -> None:
    model = MODELS[name]()
    assert set(token_id_limits(model)) <= {VOCAB_SIZE, None}
    _check(model, find_trained_modules(model), [weight for weight in model.parameters() if weight.requires_grad])


def test_a_layer_within_a_block_that_trains_scores_without_the_block() -> None:
    model = tiny_model()
    model.model.layers[0] = _GatedBlock(model.model.layers[0])
    modules = choose_modules(find_trained_modules(model), target_modules=["q_proj"])
    _check(model, modules, [module.weight for module in modules.values()])


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_tied_weight_scores_by_both_of_its_layers(name: str) -> None:
    model = tiny_model(tie_word_embeddings=True)
    modules = choose_modules(find_trained_modules(model), target_modules=[name])
    assert list(modules) == ["model.embed_tokens", "lm_head"]
    _check(model, modules, [model.lm_head.weight])


def test_modules_are_named_as_before_peft_wrapped_them() -> None:
    model = tiny_lora_model(use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[3])
    modules = find_trained_modules(model)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    chosen = choose_modules(modules, target_modules=["layers.0.self_attn.q_proj", "lm_head", "embed_tokens"])
    expected = [f"{prefix}{kind}.default" for kind in ("A", "B", "magnitude_vector")]
    assert [name for name in chosen if "q_proj" in name] == expected
    assert [name for name in chosen if "q_proj" not in name] == [
        name for name in modules if "lm_head" in name or "embed_tokens" in name
    ]
