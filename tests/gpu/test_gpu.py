"""What needs a CUDA device: gradients there, and whole runs in the precisions and with the kernels it has."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spice_trainer.gradients.backends import rows_influence_each_other
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.per_sample import SampleGradients
from tests.support.gradient_loop import CollectingSink, batched_gradients, collate, example_rows, relative_error
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.trainers import collate as collate_rows
from tests.support.trainers import make_sft_trainer, make_trainer, same_weights, trainable_weights, trained_indices

pytestmark = [
    pytest.mark.gpu,
    # The Trainer would run torch.nn.DataParallel over several, which SPICE refuses.
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="make a single GPU visible: CUDA_VISIBLE_DEVICES=0"),
]

# GPU kernels warn of what these tests do not care for: TF32, matrix sizes, casts of inputs.
quiet = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def full_precision() -> Iterator[None]:
    """float32 products in float32."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def gradients_on_gpu(model: nn.Module, rows: Any) -> list[torch.Tensor]:
    """Batched sample gradients, brought to the CPU."""
    inputs, labels = collate(rows)
    sink = CollectingSink()
    with SampleGradients(model, find_trained_modules(model)) as sample_gradients:
        sample_gradients.compute({key: value.cuda() for key, value in inputs.items()}, labels.cuda(), sink)
    return [gradients.cpu() for gradients in sink.by_module()]


def gradients_one_at_a_time(model: nn.Module, rows: Any) -> list[torch.Tensor]:
    """The loop: each row alone, the model's own loss, plain autograd."""
    modules = find_trained_modules(model)
    per_row = []
    model.eval()
    for input_ids, labels in rows:
        loss = model(
            input_ids=torch.tensor([input_ids], device="cuda"), labels=torch.tensor([labels], device="cuda")
        ).loss
        found = torch.autograd.grad(loss, [module.weight for module in modules.values()])
        per_row.append([gradient.flatten().float().cpu() for gradient in found])
    return [torch.stack(module) for module in zip(*per_row, strict=True)]


def check_run(trainer: Any, *, num_steps: int = 3) -> None:
    """Trains, and looks at what must hold in any precision."""
    assert next(trainer.model.parameters()).device.type == "cuda"
    before = trainable_weights(trainer.model)
    trainer.train()
    after = trainable_weights(trainer.model)
    assert not same_weights(before, after)
    assert all(bool(value.isfinite().all()) for value in after.values())
    steps = trained_indices(trainer.args.output_dir)
    assert len(steps) == num_steps and all(len(step) == 4 for step in steps)
    entries = [entry for entry in trainer.state.log_history if "spice/information" in entry]
    assert len(entries) == num_steps and all(entry["spice/information"] > 0 for entry in entries)


def options(**overrides: Any) -> dict[str, Any]:
    return {"spice": {}, "verify": True, "use_cpu": False, "max_steps": 3} | overrides


@pytest.mark.usefixtures("full_precision")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_sample_gradients_equal_one_at_a_time_autograd(architecture: str) -> None:
    model, rows = tiny_lora_model(architecture), example_rows()
    on_cpu = batched_gradients(model, rows)[1]
    model.cuda()
    found = gradients_on_gpu(model, rows)
    assert relative_error(found, gradients_one_at_a_time(model, rows)) < 1e-4
    assert relative_error(found, on_cpu) < 1e-4


def test_scoring_draws_nothing_from_the_devices_generator(tmp_path: Path) -> None:
    def drawing_collate(rows: Any) -> Any:
        torch.rand(1, device="cuda")
        torch.rand(1)
        return collate_rows(rows)

    model = tiny_lora_model(lora_dropout=0.3)
    trainer = make_trainer(tmp_path, model=model, spice={}, data_collator=drawing_collate, use_cpu=False)
    trainer._spice.begin_run()
    trainer.model.train()
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    scores = list(trainer._spice.sampler.scorer.score([range(10), range(10, 15)]))
    assert len(scores) == 2 and all(bool(pool.sound.all()) for pool in scores)
    assert torch.equal(torch.cuda.get_rng_state(), before[0]) and torch.equal(torch.get_rng_state(), before[1])


@quiet
@pytest.mark.parametrize("build", [make_trainer, make_sft_trainer])
def test_a_float32_run(build: Any, tmp_path: Path) -> None:
    check_run(build(tmp_path, **options()))


@quiet
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_mixed_precision_run(precision: str, tmp_path: Path) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bfloat16")
    trainer = make_trainer(tmp_path, **options(**{precision: True}))
    dtypes = set()
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.base_layer")
    layer.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    check_run(trainer)
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}


def load_quantized(folder: Path, bits: int, *, threshold: float = 6.0) -> Any:
    """A base of 4 or 8 bits with LoRA, by PEFT's QLoRA recipe."""
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    else:
        quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    return add_lora(prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False}))


@quiet
@pytest.mark.parametrize("bits", [4, 8])
def test_a_qlora_run(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_quantized(tmp_path / "model", bits)
    # Rounding of 8-bit activations depends on the batch, so these rows are scored one at a time.
    assert rows_influence_each_other(model) == (bits == 8)
    check_run(make_trainer(tmp_path / "run", model=model, **options(bf16=True)))


@quiet
def test_an_8_bit_row_alone_has_the_loops_gradient(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, rows = load_quantized(tmp_path, 8), example_rows()
    expected = gradients_one_at_a_time(model, rows)
    for number, row in enumerate(rows):
        found = gradients_on_gpu(model, [row])
        # The model computes in half precision and rounds activations to 8 bits.
        assert relative_error(found, [gradients[number : number + 1] for gradients in expected]) < 0.1


@quiet
def test_a_liger_run(tmp_path: Path) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")
    trainer = make_trainer(tmp_path, **options(use_liger_kernel=True))
    check_run(trainer)
    assert trainer.model.get_base_model().forward.__module__.startswith("liger_kernel")
    model, rows = trainer.model, example_rows()
    assert relative_error(gradients_on_gpu(model, rows), gradients_one_at_a_time(model, rows)) < 1e-2


@quiet
@pytest.mark.slow
def test_a_compiled_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **options(torch_compile=True))
    check_run(trainer)
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@quiet
def test_scoring_beside_the_training(device: str, tmp_path: Path, full_precision: None) -> None:
    """A proxy on a stream of its own, and one on another device: the picks and weights of a run without overlap."""
    from spice_trainer import ProxyModel, SpiceConfig, attach_spice

    picks, weights = [], []
    for overlap in (False, True):
        torch.manual_seed(0)
        proxy = ProxyModel(tiny_lora_model(seed=3).to(device), learning_rate=1e-2)
        trainer = make_trainer(tmp_path / str(overlap), use_cpu=False)
        settings = SpiceConfig(
            pool_size=10, num_selected=4, gradient_normalization="sqrt_tokens", overlap_scoring=overlap
        )
        attach_spice(trainer, settings, proxy=proxy)
        trainer.train()
        picks.append(trained_indices(tmp_path / str(overlap)))
        weights.append(
            trainable_weights(trainer.model) | {f"proxy.{k}": v for k, v in trainable_weights(proxy.model).items()}
        )
    assert picks[0] == picks[1] and len(picks[0]) == 6
    assert same_weights(*weights)
