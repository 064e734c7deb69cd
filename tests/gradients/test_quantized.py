"""QLoRA: LoRA on a base that bitsandbytes holds in 4 or 8 bits, loaded from a folder as users load it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import spice_trainer.gradients.backends
import spice_trainer.scoring.scorer
from spice_trainer import attach_spice
from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.backends import (
    check_quantized_layers,
    rows_influence_each_other,
    training_flag_for_scoring,
    warn_of_quantization,
)
from spice_trainer.gradients.layers.linear import LinearLayer
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.gradients.verification import TOLERANCES, verify_gradients
from tests.support.gradient_loop import batched_gradients, example_rows, looped_gradients, relative_error
from tests.support.models import add_lora, tiny_model
from tests.support.replays import train_and_replay
from tests.support.trainers import collate, make_sft_trainer, make_trainer, tiny_rows

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

LAYERS = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}
BITS = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk, with features enough for blocks of 64."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def load_quantized(
    folder: Path, bits: int, *, dtype: torch.dtype = torch.float32, prepare: bool = False, **lora: Any
) -> PeftModel:
    """Loads the base in 4 or 8 bits and adds LoRA; `prepare` as PEFT's QLoRA recipe does."""
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )
    if prepare:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # names that transformers 5 renamed
            # Reentrant is what PEFT leaves it at, with a warning, unless told.
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = add_lora(model, **lora)
    assert any(type(module) is LAYERS[bits] for module in model.modules()), "the base is not quantised"
    return model


def base_layers(model: nn.Module, bits: int) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is LAYERS[bits]]


def quantized_weights(model: nn.Module, bits: int) -> list[bytes]:
    """The stored bits of every base layer and the scales beside them."""
    stored = []
    for module in base_layers(model, bits):
        state = module.weight.quant_state if bits == 4 else module.state
        scales = state.absmax if bits == 4 else state.SCB if state.SCB is not None else module.weight.SCB
        stored.append(module.weight.data.numpy().tobytes() + scales.numpy().tobytes())
    return stored


def loop_in_training_mode(model: nn.Module, rows: Any, bits: int) -> Any:
    """`looped_gradients`, whose evaluation mode would change a 4-bit base for good, with the base left training."""
    layers = base_layers(model, bits)
    original = nn.Module.train

    def train(module: nn.Module, mode: bool = True) -> nn.Module:
        original(module, mode)
        for layer in layers:
            layer.training = True
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "train", train)
        return looped_gradients(model, rows)


@BITS
@pytest.mark.parametrize("prepare", [False, True], ids=["plain", "prepared"])
def test_sample_gradients_equal_one_at_a_time_autograd(folder: Path, bits: int, prepare: bool) -> None:
    model, rows = load_quantized(folder, bits, prepare=prepare).train(), example_rows()
    before = quantized_weights(model, bits)
    losses, found = batched_gradients(model, rows)
    assert quantized_weights(model, bits) == before, "scoring changed the base"
    expected_losses, expected = loop_in_training_mode(model, rows, bits)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert relative_error(found, expected) < 1e-5
    # The base is really another one: it rounds.
    plain = add_lora(tiny_model(hidden_size=64, intermediate_size=128))
    assert relative_error(looped_gradients(plain, rows)[1], expected) > 1e-3


@BITS
def test_bfloat16_base(folder: Path, bits: int) -> None:
    model, rows = load_quantized(folder, bits, dtype=torch.bfloat16, prepare=True).train(), example_rows()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = batched_gradients(model, rows)
        _, expected = loop_in_training_mode(model, rows, bits)
    cosines = torch.cosine_similarity(torch.cat(found, dim=1), torch.cat(expected, dim=1))
    assert float(cosines.min()) > 0.99


@BITS
def test_base_layers_keep_their_training_kernels_while_scoring(folder: Path, bits: int) -> None:
    """PEFT's wrappers of the same class names, which hold the dropout, don't."""
    model = load_quantized(folder, bits, lora_dropout=0.3)
    training = {name for name, module in model.named_modules() if training_flag_for_scoring(module)}
    assert len(training) == 14 and all(name.endswith(".base_layer") for name in training)
    plain = load_quantized(folder, bits)
    rows = example_rows()
    dropping = batched_gradients(model.train(), rows)[1]
    assert relative_error(dropping, batched_gradients(plain.eval(), rows)[1]) == 0
    assert not any(module.training for module in plain.modules()), "modes were not restored"


@BITS
@pytest.mark.parametrize("prepare", [False, True], ids=["plain", "prepared"])
def test_the_check_at_attach_time(folder: Path, bits: int, prepare: bool, tmp_path: Path) -> None:
    model = load_quantized(folder, bits, prepare=prepare, randomize=False)
    before = quantized_weights(model, bits)
    rows = [collate_row(number, tiny_rows()[number], collate) for number in (0, 1)]
    assert verify_gradients(model, find_trained_modules(model), rows, device=torch.device("cpu")) < 1e-5
    make_trainer(tmp_path, model=model, spice={}, verify=True)
    assert quantized_weights(model, bits) == before, "the check changed the base"


def test_the_check_still_catches_a_wrong_gradient(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_quantized(folder, 4)
    rows = [collate_row(number, tiny_rows()[number], collate) for number in (0, 1)]
    right = LinearLayer.sample_gradients
    factor = 1 + 4 * TOLERANCES[torch.bfloat16]
    monkeypatch.setattr(LinearLayer, "sample_gradients", lambda *args: factor * right(*args))
    with pytest.raises(RuntimeError, match="differs from autograd's by"):
        verify_gradients(model, find_trained_modules(model), rows, device=torch.device("cpu"))


@BITS
@pytest.mark.parametrize("kind", ["trainer", "prepared", "sft"])
def test_training_with_scoring_equals_training_without(
    folder: Path, bits: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(output_dir: Path) -> Any:
        model = load_quantized(folder, bits, prepare=kind == "prepared", lora_dropout=0.3)
        build = make_sft_trainer if kind == "sft" else make_trainer
        trainer = build(output_dir, model=model, spice={}, verify=True, max_steps=3)
        bases.append((model, quantized_weights(model, bits)))
        return trainer

    bases: list[tuple[nn.Module, list[bytes]]] = []
    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)
    for model, before in bases:
        assert quantized_weights(model, bits) == before


def test_layers_in_the_inference_format_are_refused(folder: Path, tmp_path: Path) -> None:
    model = load_quantized(folder, 4)
    check_quantized_layers(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    layer.weight.quant_state.packing_format_for_cpu = True  # as an evaluation on a CPU with AVX512-BF16 leaves it
    trainer = make_trainer(tmp_path, model=model)
    words = (
        r"4-bit layer 'base_model\.model\.model\.layers\.1\.mlp\.up_proj\.base_layer' is in bitsandbytes' inference "
        r'format for CPUs, through which no gradient passes.*evaluated or generates.*eval_strategy="no"'
    )
    with pytest.raises(RuntimeError, match=words):
        attach_spice(trainer)


def test_the_inference_format_is_what_an_evaluation_leaves(folder: Path) -> None:
    """The reason for the refusal above, where this CPU converts."""
    model = load_quantized(folder, 4)
    if not base_layers(model, 4)[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes converts nothing")
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(RuntimeError, match="no gradient passes"):
        batched_gradients(model.train(), example_rows())


def test_outliers_of_a_row_change_how_the_others_are_rounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why 8-bit rows are scored alone where activations are rounded, as on a GPU; evaluation mode rounds here too."""
    model, rows = load_quantized(folder, 8), example_rows()
    monkeypatch.setattr(spice_trainer.gradients.backends, "training_flag_for_scoring", lambda module: False)
    _, together = batched_gradients(model, rows)
    _, expected = looped_gradients(model, rows)
    assert relative_error(together, expected) > 1e-3
    for number, row in enumerate(rows):
        _, alone = batched_gradients(model, [row])
        assert relative_error(alone, [gradients[number : number + 1] for gradients in expected]) < 1e-5
    for layer in base_layers(model, 8):
        layer.state.threshold = 0.0
    _, expected = looped_gradients(model, rows)
    assert relative_error(batched_gradients(model, rows)[1], expected) < 1e-5


def test_rows_that_influence_each_other_are_scored_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    compute = SampleGradients.compute

    def watched(self: SampleGradients, inputs: Any, labels: torch.Tensor, sink: Any) -> torch.Tensor:
        sizes.append(len(labels))
        assert bool(inputs["attention_mask"].all()), "a row alone needs no padding"
        return compute(self, inputs, labels, sink)

    for module in (spice_trainer.scoring.scorer, spice_trainer.gradients.backends):
        monkeypatch.setattr(module, "rows_influence_each_other", lambda model: True)
    trainer = make_trainer(tmp_path, model=load_quantized(folder, 8), spice={}, max_steps=1)
    monkeypatch.setattr(SampleGradients, "compute", watched)
    trainer.train()
    assert sizes == [1] * 10
    rows = [collate_row(number, tiny_rows()[number], collate) for number in (0, 1)]
    verify_gradients(trainer.model, find_trained_modules(trainer.model), rows, device=torch.device("cpu"))
    assert sizes == [1] * 12


def test_rows_influence_each_other_only_where_outliers_are_told_apart(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eight, four = load_quantized(folder, 8), load_quantized(folder, 4)
    assert not rows_influence_each_other(eight) and not rows_influence_each_other(four)
    elsewhere = copy.deepcopy(eight)
    for layer in base_layers(elsewhere, 8):
        layer.weight = nn.Parameter(layer.weight.data.to("meta"), requires_grad=False)
    assert rows_influence_each_other(elsewhere)
    warn_of_quantization(elsewhere)
    assert "candidates are scored one at a time" in caplog.text and "llm_int8_threshold=0.0" in caplog.text
    caplog.clear()
    for layer in base_layers(elsewhere, 8):
        layer.state.threshold = 0.0
    assert not rows_influence_each_other(elsewhere)
    for model in (eight, four, elsewhere):
        warn_of_quantization(model)
    assert not caplog.records
