"""Hidden states of a row at a layer: against the model's own, whatever its batch mates, and without a trace."""

import pytest
import torch

from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.hidden_states import (
    HiddenStates,
    decoder_layers,
    last_layer,
    lowest_trained_layer,
    states_are_alone,
)
from tests.support.families import FAMILIES, family_model
from tests.support.models import (
    ARCHITECTURES,
    VOCAB_SIZE,
    add_lora,
    enable_checkpointing,
    tiny_lora_model,
    tiny_model,
)
from tests.support.multimodal import collated, tiny_multimodal_model
from tests.support.traces import model_state, random_states

TARGETS = ["q_proj", "down_proj"]


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}, torch.where(mask, ids, -100)


def states_of(model, layer, lengths=(5, 9, 3)):
    inputs, labels = batch(lengths)
    with HiddenStates(model, layer) as hidden_states:
        return hidden_states.compute(inputs, labels)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1])
def test_they_are_position_weighted_means_of_what_a_layer_takes(architecture, layer):
    model = tiny_lora_model(architecture).eval()
    inputs, _ = batch((5, 9, 3))
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[layer]
    for row, (states, found) in enumerate(zip(expected, states_of(model, layer), strict=True)):
        length = int(inputs["attention_mask"][row].sum())
        weights = [position + 1 for position in range(length)]
        mean = sum(weight * state for weight, state in zip(weights, states[:length], strict=True)) / sum(weights)
        assert torch.allclose(found, mean, rtol=1e-5, atol=1e-6)


def test_the_last_layers_output_is_before_the_last_norm():
    model = tiny_model("llama")
    norm_inputs = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: norm_inputs.append(args[0]))
    inputs, _ = batch((6, 6))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    weights = torch.arange(1.0, 7.0) / 21
    assert torch.allclose(states_of(model, 2, (6, 6)), torch.einsum("s,nsh->nh", weights, norm_inputs[0]), atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_ones_are_what_the_head_reads(architecture):
    model = tiny_lora_model(architecture).eval()
    inputs, _ = batch((6, 6))
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
    weights = torch.arange(1.0, 7.0) / 21
    found = states_of(model, last_layer(model), (6, 6))
    assert torch.allclose(found, torch.einsum("s,nsh->nh", weights, expected), rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch():
    model = tiny_lora_model("llama")
    together = states_of(model, 1)
    for row in range(3):
        inputs, labels = batch((5, 9, 3))
        length = int(inputs["attention_mask"][row].sum())
        alone = {key: value[row : row + 1, :length] for key, value in inputs.items()}
        with HiddenStates(model, 1) as hidden_states:
            found = hidden_states.compute(alone, labels[row : row + 1, :length])
        assert torch.allclose(found[0], together[row], rtol=1e-5, atol=1e-6)


def test_the_mean_is_taken_in_full_precision():
    model = tiny_lora_model("llama")
    inputs, labels = batch((5, 9, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16), HiddenStates(model, 1) as hidden_states:
        found = hidden_states.compute(inputs, labels)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    assert torch.allclose(found, states_of(model, 1), rtol=0.05, atol=0.01)


def test_the_forward_ends_at_the_layer_and_leaves_no_trace():
    model = tiny_lora_model("llama").train()
    called = []
    model.get_output_embeddings().register_forward_hook(lambda *args: called.append("head"))
    decoder_layers(model)[1].mlp.register_forward_hook(lambda *args: called.append("mlp"))
    before, random_before = model_state(model), random_states()
    states_of(model, 1)
    assert called == []
    after = model_state(model)
    assert str(before) == str(after)
    assert str(random_before) == str(random_states())


def test_which_layer_is_the_lowest_that_trains():
    assert lowest_trained_layer(tiny_model("llama").requires_grad_(False)) == 2
    assert lowest_trained_layer(tiny_lora_model("llama")) == 0
    assert lowest_trained_layer(add_lora(tiny_model("llama"), layers_to_transform=[1], target_modules=TARGETS)) == 1
    assert lowest_trained_layer(add_lora(tiny_model("gpt2"), layers_to_transform=[1], target_modules=["c_attn"])) == 1
    assert (
        lowest_trained_layer(
            add_lora(
                tiny_model("llama"), layers_to_transform=[1], target_modules=TARGETS, modules_to_save=["embed_tokens"]
            )
        )
        == 0
    )
    head = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False)
    head.lm_head.requires_grad_(True)
    head.model.norm.requires_grad_(True)
    assert lowest_trained_layer(head) == 2
    tied = tiny_model("llama", tie_word_embeddings=True).requires_grad_(False)
    tied.lm_head.requires_grad_(True)
    assert lowest_trained_layer(tied) == 0


def test_a_layer_that_is_not_there():
    with pytest.raises(ValueError, match="hidden_layer=4, and the model has the layers 0 to 1"):
        HiddenStates(tiny_model("llama"), 4)
    with pytest.raises(ValueError, match="has no list of layers"):
        decoder_layers(torch.nn.Linear(2, 2))


# Attention of several kinds, state spaces, recurrence, experts, sliding windows, no positions, learned positions.
STRUCTURES = [
    "llama", "gpt2", "bloom", "falcon", "gpt_neox", "opt", "gemma3_text", "qwen3_moe", "deepseek_v3", "jamba",
    "mamba2", "rwkv", "recurrent_gemma", "xlstm", "bart", "modernbert-decoder", "minimax", "cohere2",
]  # fmt: skip
# Whose layers take something else than a vector a token.
WITHOUT = ["deepseek_v4", "gemma3n_text", "hy_v4", "xlnet"]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("family", [family for family in STRUCTURES if family in FAMILIES])
def test_families_of_many_structures(family):
    model = family_model(family, "lora").eval()
    layer = len(decoder_layers(model)) - 1
    taken = []
    handle = decoder_layers(model)[layer].register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    inputs, _ = batch((5, 9, 3))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()
    found = states_of(model, layer)
    for row, states in enumerate(found):
        length = int(inputs["attention_mask"][row].sum())
        weights = torch.arange(1.0, length + 1)
        expected = (weights[:, None] * taken[0][row, :length].float()).sum(dim=0) / weights.sum()
        assert torch.allclose(states, expected, rtol=1e-4, atol=1e-5)
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("family", [family for family in WITHOUT if family in FAMILIES])
def test_families_whose_layers_take_something_else(family):
    with pytest.raises(
        ValueError, match=r"The layer \(\w+\) whose hidden states are compared took .* Fix: SpiceConfig"
    ):
        states_of(family_model(family, "lora"), 1)


def rows_of(lengths):
    inputs, labels = batch(lengths)
    return [
        collate_row(index, {"input_ids": ids[:length], "labels": row[:length]}, single)
        for index, (ids, row, length) in enumerate(zip(inputs["input_ids"], labels, lengths, strict=True))
    ]


def single(rows):
    (row,) = rows
    return {key: value[None] for key, value in row.items()}


def test_models_that_mix_rows_are_found():
    assert states_are_alone(tiny_lora_model("llama"), 1, rows_of((5, 9)), torch.device("cpu"))
    model = tiny_lora_model("llama")
    decoder_layers(model)[0].register_forward_hook(
        lambda module, args, output: (
            (output[0] if isinstance(output, tuple) else output).mean(dim=0, keepdim=True)
            + (output[0] if isinstance(output, tuple) else output)
        )
    )
    assert not states_are_alone(model, 1, rows_of((5, 9)), torch.device("cpu"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing(use_reentrant):
    model = tiny_lora_model("llama")
    expected = states_of(model, 1)
    enable_checkpointing(model, use_reentrant=use_reentrant)
    model.train()
    assert torch.equal(states_of(model, 1), expected)


def test_of_a_compiled_model():
    model = tiny_lora_model("llama")
    expected = states_of(model, 1)
    compiled = torch.compile(model, backend="eager")
    compiled(**batch((5, 9, 3))[0])
    assert torch.allclose(states_of(compiled, 1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llava", "qwen2_vl", "gemma3"])
def test_of_the_language_model_beside_a_vision_tower(architecture):
    model = add_lora(tiny_multimodal_model(architecture), target_modules=r".*language_model.*q_proj")
    layers, base = decoder_layers(model), model.get_base_model()
    assert len(layers) == base.config.get_text_config().num_hidden_layers
    assert all(any(layer is module for module in base.get_decoder().modules()) for layer in layers)
    with HiddenStates(model, 1) as hidden_states:
        for row in collated(architecture, [1, 2]):
            found = hidden_states.compute(row.inputs, row.labels)
            assert found.shape == (1, base.config.get_text_config().hidden_size) and bool(found.isfinite().all())
