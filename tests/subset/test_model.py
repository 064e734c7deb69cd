"""What a manifest says of the model that selected, and the fingerprint of its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from spice_trainer.subset.model import describe_model, fingerprint_model
from tests.support.models import PlainLanguageModel, tiny_lora_model, tiny_model


class TestModelFingerprint:
    def test_of_equal_models_is_equal(self) -> None:
        first = tiny_lora_model()
        assert fingerprint_model(first) == fingerprint_model(tiny_lora_model())
        compiled = torch.compile(first, backend="eager")
        assert fingerprint_model(compiled) == fingerprint_model(first)

    def test_sees_values_shapes_dtypes_and_names(self) -> None:
        def layer(size: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
            module = nn.Linear(size, size, dtype=dtype)
            for parameter in module.parameters():
                nn.init.ones_(parameter)
            return module

        changed = layer()
        with torch.no_grad():
            changed.weight[2, 1] += 1e-6
        models = [layer(), changed, layer(4), layer(dtype=torch.bfloat16), nn.Sequential(layer())]
        assert len({fingerprint_model(model) for model in models}) == len(models)

    def test_reads_a_sample_of_a_large_tensor(self) -> None:
        model = nn.Linear(1_000, 100, bias=False)
        before = fingerprint_model(model)
        with torch.no_grad():
            model.weight[0, 1] += 1
            assert fingerprint_model(model) == before
            model.weight[-1, -1] += 1
        assert fingerprint_model(model) != before

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int8, torch.float16])
    def test_every_dtype(self, dtype: torch.dtype) -> None:
        def model(values: list[int]) -> nn.Module:
            module = nn.Module()
            tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
            module.weight = nn.Parameter(tensor.reshape(2, 2).T, requires_grad=False)
            return module

        assert fingerprint_model(model([0, 1, 0, 1])) == fingerprint_model(model([0, 1, 0, 1]))
        assert fingerprint_model(model([0, 1, 0, 1])) != fingerprint_model(model([0, 1, 1, 1]))

    def test_meta_tensors_count_by_shape(self) -> None:
        with torch.device("meta"):
            first, second, other = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 3)
        assert fingerprint_model(first) == fingerprint_model(second) != fingerprint_model(other)

    def test_parts_of_a_tensor_subclass(self) -> None:
        two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")

        def model(value: float) -> nn.Module:
            module = nn.Module()
            module.weight = nn.Parameter(two_tensor.TwoTensor(torch.ones(3), torch.full((3,), value)))
            return module

        assert fingerprint_model(model(1.0)) == fingerprint_model(model(1.0)) != fingerprint_model(model(2.0))

    @pytest.mark.parametrize(("bits", "scales_are_quantised"), [(4, False), (4, True), (8, False)])
    def test_quantised_weights_count_by_their_bytes_and_scales(self, bits: int, scales_are_quantised: bool) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

        def model(scale: float) -> nn.Module:
            torch.manual_seed(1)
            plain = nn.Linear(64, 8, bias=False)
            layer = (
                bitsandbytes.nn.Linear4bit(64, 8, bias=False, compress_statistics=scales_are_quantised)
                if bits == 4
                else bitsandbytes.nn.Linear8bitLt(64, 8, bias=False, has_fp16_weights=False)
            )
            layer.load_state_dict({"weight": plain.weight.detach() * scale})
            return layer.to("cpu")

        # Twice the weights have the same codes, and scales twice as large.
        assert fingerprint_model(model(1.0)) == fingerprint_model(model(1.0)) != fingerprint_model(model(2.0))
        if bits == 4:
            assert describe_model(model(1.0))["num_parameters"] == 64 * 8


class TestDescribeModel:
    def test_of_a_lora_model(self) -> None:
        model = tiny_lora_model(lora_dropout=0.25, target_modules=["v_proj", "q_proj"])
        description = describe_model(model)
        assert description == {
            "name_or_path": None,
            "class": "LlamaForCausalLM",
            "model_type": "llama",
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_trainable_parameters": sum(item.numel() for item in model.parameters() if item.requires_grad),
            "lora": {
                "adapter": "default",
                "r": 4,
                "lora_alpha": 8,
                "lora_dropout": 0.25,
                "target_modules": ["q_proj", "v_proj"],
                "use_rslora": False,
                "use_dora": False,
            },
            "fingerprint": fingerprint_model(model),
        }
        assert json.loads(json.dumps(description, allow_nan=False)) == description

    def test_is_of_the_active_adapter(self) -> None:
        from peft import LoraConfig

        model = tiny_lora_model()
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter("second")
        assert describe_model(model)["lora"]["r"] == 2
        plain = tiny_model()
        plain.add_adapter(LoraConfig(r=3, target_modules=["q_proj"]), adapter_name="own")
        assert describe_model(plain)["lora"]["adapter"] == "own"

    def test_of_a_saved_and_of_a_plain_model(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        tiny_model().save_pretrained(tmp_path)
        loaded = describe_model(AutoModelForCausalLM.from_pretrained(tmp_path))
        assert (loaded["name_or_path"], loaded["lora"]) == (str(tmp_path), None)
        plain = describe_model(PlainLanguageModel())
        assert (plain["class"], plain["model_type"]) == ("PlainLanguageModel", "plain")
        assert describe_model(nn.Linear(2, 2))["num_parameters"] == 6
