"""Sample gradients against one-sample-at-a-time autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.gradient_loop import (
    CollectingSink,
    batched_gradients,
    collate,
    example_rows,
    looped_gradients,
    relative_error,
)
from tests.support.models import (
    ARCHITECTURES,
    PlainLanguageModel,
    add_lora,
    enable_checkpointing,
    tiny_lora_model,
    tiny_model,
)

pytestmark = pytest.mark.oldest

TOLERANCE = 1e-5


def _lora_model(kind: str) -> PeftModel:
    """Every supported architecture, and every kind of plain LoRA on Llama."""
    if kind == "mixtral":
        return tiny_lora_model("mixtral", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    if kind in ARCHITECTURES:
        return tiny_lora_model(kind)
    if kind == "lora_bias":
        return add_lora(tiny_model(attention_bias=True, mlp_bias=True), lora_bias=True)
    if kind == "rslora":
        return tiny_lora_model(use_rslora=True)
    if kind == "some_layers":
        return tiny_lora_model(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    if kind == "mixed_ranks":
        return tiny_lora_model(rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"q_proj": 3})
    if kind == "head":
        return tiny_lora_model(target_modules=["q_proj", "lm_head"])
    if kind == "shared_layer":
        model = tiny_model(tie_word_embeddings=True)
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return add_lora(model)
    if kind == "plain":
        return add_lora(PlainLanguageModel(), target_modules=["mix", "head"], task_type=None)
    raise AssertionError(kind)


KINDS = (
    *ARCHITECTURES,
    "mixtral",
    "lora_bias",
    "rslora",
    "some_layers",
    "mixed_ranks",
    "head",
    "shared_layer",
    "plain",
)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_gradients_equal_one_at_a_time_autograd(kind: str) -> None:
    model, rows = _lora_model(kind).train(), example_rows()
    losses, found = batched_gradients(model, rows)
    expected_losses, expected = looped_gradients(model, rows)

    assert all(float(gradients.norm(dim=1).max()) > 1e-3 for gradients in expected), "the oracle must not be trivial"
    torch.testing.assert_close(losses, expected_losses, rtol=TOLERANCE, atol=1e-6)
    assert relative_error(found, expected) < TOLERANCE
    # Each module too, against its share: a small module that is wrong would drown in the sum.
    for name, ours, oracle in zip(find_trained_modules(model), found, expected, strict=True):
        scale = oracle.norm(dim=1) + 1e-2 * torch.cat(expected, dim=1).norm(dim=1)
        assert float(((ours - oracle).norm(dim=1) / scale).max()) < 5 * TOLERANCE, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_does_not_depend_on_batch_mates_or_padding(kind: str) -> None:
    model, rows = _lora_model(kind), example_rows()
    _, together = batched_gradients(model, rows)
    for index in range(len(rows)):
        mates = [rows[index], *example_rows(seed=index + 1)[:2]]
        for batch, padding in (([rows[index]], 0), ([rows[index]], 9), (mates, 0), (mates, 5)):
            losses, found = batched_gradients(model, batch, extra_padding=padding)
            error = relative_error([g[:1] for g in found], [g[index : index + 1] for g in together])
            assert error < TOLERANCE, (index, padding, len(batch))
            assert math.isfinite(float(losses[0]))


def test_left_padding_gives_the_same_gradients() -> None:
    # Without a label on the first token: behind left padding it would be predicted, by a padding position.
    model, rows = tiny_lora_model(), [(ids, [-100, *labels[1:]]) for ids, labels in example_rows()]
    _, expected = batched_gradients(model, rows)
    inputs, labels = collate(rows)
    shifts = [(inputs["attention_mask"].shape[1] - len(ids)) for ids, _ in rows]
    inputs = {
        key: torch.stack([value.roll(shift) for value, shift in zip(values, shifts, strict=True)])
        for key, values in inputs.items()
    }
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    labels = torch.stack([value.roll(shift) for value, shift in zip(labels, shifts, strict=True)])
    sink = CollectingSink()
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.compute(inputs, labels, sink)
    assert relative_error(sink.by_module(), expected) < TOLERANCE


def test_texts_packed_into_a_row_do_not_see_each_other() -> None:
    """Not with a cache, which models have in evaluation mode unless they are told otherwise."""
    model, sink = tiny_lora_model(), CollectingSink()
    texts = [ids for ids, _ in example_rows()[:2]]
    inputs = {
        "input_ids": torch.tensor([[token for ids in texts for token in ids]]),
        "position_ids": torch.tensor([[position for ids in texts for position in range(len(ids))]]),
    }
    labels = inputs["input_ids"].masked_fill(inputs["position_ids"] == 0, -100)
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.compute(inputs, labels, sink)
    num_labels = torch.tensor([len(ids) - 1.0 for ids in texts])
    _, alone = looped_gradients(model, [(ids, list(ids)) for ids in texts])
    expected = [(num_labels / num_labels.sum()) @ gradients for gradients in alone]
    assert relative_error(sink.by_module(), [gradients[None] for gradients in expected]) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_losses_equal_the_models_own(architecture: str) -> None:
    model, rows = tiny_lora_model(architecture), example_rows()
    losses, _ = batched_gradients(model, rows)
    model.eval()
    with torch.no_grad():
        own = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss for ids, labels in rows]
    torch.testing.assert_close(losses, torch.stack(own), rtol=1e-5, atol=1e-6)


def test_dropout_and_checkpointing_are_off_while_scoring() -> None:
    rows = example_rows()
    plain, dropping = tiny_lora_model(), tiny_lora_model(lora_dropout=0.3)
    enable_checkpointing(dropping.train(), use_reentrant=True)
    assert relative_error(batched_gradients(dropping, rows)[1], batched_gradients(plain, rows)[1]) == 0


def test_the_initial_adapter_moves_b_alone() -> None:
    model = tiny_lora_model(randomize=False)
    _, found = batched_gradients(model, example_rows())
    for name, gradients in zip(find_trained_modules(model), found, strict=True):
        assert (".lora_A." in name) == (float(gradients.abs().max()) == 0), name


def test_only_the_active_adapter_is_scored() -> None:
    model, rows = tiny_lora_model(), example_rows()
    expected = looped_gradients(model, rows)[1]
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("default")
    assert relative_error(batched_gradients(model, rows)[1], expected) < TOLERANCE


def test_autocast_gradients_point_the_same_way() -> None:
    model, rows = tiny_lora_model(), example_rows()
    _, exact = batched_gradients(model, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rounded = batched_gradients(model, rows)
    cosines = torch.cosine_similarity(torch.cat(exact, dim=1), torch.cat(rounded, dim=1))
    assert float(cosines.min()) > 0.99
    assert relative_error(rounded, exact) > 1e-5, "autocast did not reach the forward"


def test_float16_gradients_do_not_underflow() -> None:
    # A tiny LoRA scaling brings activation gradients below float16's smallest number unless the loss is scaled.
    model, rows = tiny_lora_model(lora_alpha=1e-5), example_rows()
    losses, exact = batched_gradients(model, rows)
    with torch.autocast("cpu", dtype=torch.float16):
        half_losses, half = batched_gradients(model, rows)
    assert relative_error(half, exact) < 0.02
    torch.testing.assert_close(half_losses, losses, rtol=0.01, atol=0)


def overflowing_model(factor: float) -> PeftModel:
    """Its forward is sane, but the gradient of A is `factor` times as large as in `tiny_lora_model`."""
    model = tiny_lora_model(lora_alpha=8 * factor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.div_(factor)
    return model


def poison_token(model: nn.Module, token: int, value: float) -> None:
    """The model's forward breaks on a token; its weights are sound."""
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill((args[0] == token)[..., None], value)
    )


@pytest.mark.parametrize(("factor", "repeats"), [(1, None), (125, [3, 4]), (1e4, [0, 1, 2, 3, 4])])
def test_float16_gradients_do_not_overflow_by_the_loss_scale(factor: float, repeats: list[int] | None) -> None:
    model, rows, sink = overflowing_model(factor), example_rows(), CollectingSink()
    losses, exact = batched_gradients(model, rows)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        SampleGradients(model, find_trained_modules(model)) as sample_gradients,
    ):
        half_losses = sample_gradients.compute(*collate(rows), sink)
    assert sink.rows == repeats
    assert relative_error(sink.by_module(), exact) < 0.01
    torch.testing.assert_close(half_losses, losses, rtol=0.01, atol=0)


@pytest.mark.parametrize("can_repeat", [True, False])
def test_what_float16_cannot_hold_is_not_finite_and_its_batch_mates_are_right(can_repeat: bool) -> None:
    # The gradients of the last two rows overflow by the loss scale, the forward of a row with token 60 by itself.
    model, rows, sink = overflowing_model(125), example_rows(), CollectingSink()
    rows = [([min(token, 59) for token in ids], [min(label, 59) for label in labels]) for ids, labels in rows]
    rows.insert(2, ([60, 7, 8, 9], [-100, 7, 8, 9]))
    factors: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: factors.append(1 + 1e6 * (args[0] == 60).any(1)[:, None, None])
    )
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda module, args, output: (output * factors[-1]).to(output.dtype))
    exact = torch.cat(batched_gradients(model, rows)[1], dim=1)
    assert exact.isfinite().all()
    with (
        torch.autocast("cpu", dtype=torch.float16),
        SampleGradients(model, find_trained_modules(model), can_repeat=can_repeat) as sample_gradients,
    ):
        losses = sample_gradients.compute(*collate(rows), sink)
    found = torch.cat(sink.by_module(), dim=1)
    sound = [0, 1, 3, 4, 5] if can_repeat else [0, 1, 3]
    assert found.isfinite().all(1).nonzero()[:, 0].tolist() == sound
    assert losses.isfinite().nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5]
    assert relative_error([found[sound]], [exact[sound]]) < 0.01


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "shared_layer", "plain"])
def test_a_sample_that_is_not_finite_does_not_change_its_batch_mates(kind: str, poison: float) -> None:
    model, rows = _lora_model(kind), example_rows()
    rows = [([min(token, 59) for token in ids], [min(label, 59) for label in labels]) for ids, labels in rows]
    _, expected = batched_gradients(model, rows)
    poison_token(model, 60, poison)
    short, long = ([7, 60, 8], [7, 60, 8]), ([60, *range(3, 25)], [-100] * 4 + [*range(6, 25)])
    for mates, padding in (([short], 0), ([long], 0), ([short, long], 5)):
        losses, found = batched_gradients(model, [mates[0], *rows, *mates[1:]], extra_padding=padding)
        where = slice(1, 1 + len(rows))
        assert relative_error([gradients[where] for gradients in found], expected) < TOLERANCE
        assert losses[where].isfinite().all() and not losses[0].isfinite()
        assert not torch.cat(found, dim=1)[0].isfinite().all()


def test_a_sample_without_labels_has_zero_gradient_and_loss() -> None:
    model, rows = tiny_lora_model(), example_rows()
    unlabelled = ([7, 8, 9, 10], [-100] * 4)
    only_first = ([7, 8, 9], [7, -100, -100])  # the first label is predicted by nothing
    losses, found = batched_gradients(model, [unlabelled, rows[0], only_first])
    assert losses[0] == 0 and losses[2] == 0
    assert all(float(gradients[[0, 2]].abs().max()) == 0 for gradients in found)
    assert relative_error([g[1:2] for g in found], looped_gradients(model, rows[:1])[1]) < TOLERANCE

    losses, found = batched_gradients(model, [unlabelled, only_first])
    assert losses.tolist() == [0, 0]
    assert all(float(gradients.abs().max()) == 0 for gradients in found)


def test_one_context_serves_many_batches() -> None:
    model, rows = tiny_lora_model(), example_rows()
    _, expected = looped_gradients(model, rows)
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        for batch in (slice(0, 2), slice(2, 3), slice(3, 5)):
            sink = CollectingSink()
            sample_gradients.compute(*collate(rows[batch]), sink)
            assert relative_error(sink.by_module(), [gradients[batch] for gradients in expected]) < TOLERANCE


def test_weights_changed_between_batches_are_seen() -> None:
    model, rows = tiny_lora_model(), example_rows()
    before = batched_gradients(model, rows)[1]
    with torch.no_grad():
        for module in find_trained_modules(model).values():
            module.weight.mul_(1.5)
    after = batched_gradients(model, rows)[1]
    assert relative_error(after, looped_gradients(model, rows)[1]) < TOLERANCE
    assert relative_error(after, before) > 0.1


def test_a_sink_may_overwrite_what_it_gets() -> None:
    class Overwriting(CollectingSink):
        def add(self, module_index: int, gradients: Tensor, *where: Any) -> None:
            super().add(module_index, gradients, *where)
            gradients.fill_(float("nan"))

    model, rows = _lora_model("shared_layer"), example_rows()
    sink = Overwriting()
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.compute(*collate(rows), sink)
    assert relative_error(sink.by_module(), looped_gradients(model, rows)[1]) < TOLERANCE


def test_a_deep_copy_made_while_closed_scores_on_its_own() -> None:
    model, rows = tiny_lora_model(), example_rows()
    batched_gradients(model, rows)
    twin = copy.deepcopy(model)
    assert relative_error(batched_gradients(twin, rows)[1], batched_gradients(model, rows)[1]) == 0
