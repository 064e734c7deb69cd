from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset, load_dataset, load_from_disk
from torch import nn

from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.subset.model import describe_model, fingerprint_model
from tests.support.models import PlainLanguageModel, tiny_lora_model, tiny_model

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"question {number} é\n"}], "number": number, "share": number / 7}
    for number in range(12)
]


class TestDatasetFingerprint:
    def test_says_the_same_of_the_same_rows(self, tmp_path: Path) -> None:
        dataset = Dataset.from_list(ROWS)
        expected = fingerprint_dataset(dataset)
        dataset.save_to_disk(str(tmp_path / "saved"))
        json_file = str(tmp_path / "rows.jsonl")
        Path(json_file).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        same = {
            "list": ROWS,
            "tuple": tuple(ROWS),
            "other order of keys": [dict(reversed(row.items())) for row in ROWS],
            "copy": Dataset.from_list(ROWS),
            "twice reversed": dataset.select(range(11, -1, -1)).select(range(11, -1, -1)),
            "mapped": dataset.map(lambda row: row),
            "saved and loaded": load_from_disk(str(tmp_path / "saved")),
            "json": load_dataset("json", data_files=json_file, split="train", cache_dir=str(tmp_path / "cache")),
            "torch format": dataset.with_format("torch"),
            "transform": dataset.with_transform(lambda batch: {"input_ids": [[1]] * len(batch["number"])}),
        }
        assert {name: fingerprint_dataset(value) for name, value in same.items()} == dict.fromkeys(same, expected)

    def test_of_a_known_dataset_never_changes(self) -> None:
        # Written down once: another value would make every manifest so far unusable.
        expected = "27b4309931bd1ce09ef80c7297f449c5ff9eff9376661e9a937713e274d88d36"
        assert fingerprint_dataset([{"text": "naïve\n", "count": 1, "share": 0.1, "tags": ["a", None]}]) == expected

    @pytest.mark.parametrize(
        "change",
        [
            lambda rows: rows[4].update(number=99),
            lambda rows: rows[4].update(share=rows[4]["share"] + 1e-12),
            lambda rows: rows[4]["messages"][0].update(content="question 4 e\n"),
            lambda rows: rows[4]["messages"].append({"role": "user", "content": ""}),
            lambda rows: rows[4].update(number="4"),
            lambda rows: rows.reverse(),
            lambda rows: rows.append(rows[0]),
            lambda rows: [row.update(extra=None) for row in rows],
            lambda rows: [row.update(numbers=row.pop("number")) for row in rows],
        ],
    )
    def test_sees_every_change_of_a_small_dataset(self, change: Any) -> None:
        rows = json.loads(json.dumps(ROWS))
        assert fingerprint_dataset(rows) == fingerprint_dataset(ROWS)
        change(rows)
        assert fingerprint_dataset(rows) != fingerprint_dataset(ROWS)

    def test_tensors_and_arrays_are_lists(self) -> None:
        lists = [{"input_ids": [1, 2, 3], "weight": 0.5}]
        arrays = [{"input_ids": numpy.array([1, 2, 3], dtype=numpy.int32), "weight": numpy.float32(0.5)}]
        tensors = [{"input_ids": torch.tensor([1, 2, 3]), "weight": torch.tensor(0.5)}]
        assert fingerprint_dataset(lists) == fingerprint_dataset(arrays) == fingerprint_dataset(tensors)
        assert fingerprint_dataset(lists) == fingerprint_dataset(Dataset.from_list(lists).with_format("numpy"))

    def test_fields_that_arrow_fills_in_do_not_count(self) -> None:
        ragged = [{"call": {"name": "f"}}, {"call": {"name": "g", "city": "Oslo"}}]
        assert fingerprint_dataset(ragged) == fingerprint_dataset(Dataset.from_list(ragged))

    def test_of_a_large_dataset_reads_evenly_spread_rows(self) -> None:
        rows = [{"number": number} for number in range(5_001)]
        read: list[int] = []

        class Recorder:
            def __len__(self) -> int:
                return len(rows)

            def __getitem__(self, index: int) -> dict[str, int]:
                read.append(index)
                return rows[index]

        fingerprint = fingerprint_dataset(Recorder())
        assert fingerprint == fingerprint_dataset(Dataset.from_list(rows))
        assert (len(set(read)), read[0], read[-1]) == (2_000, 0, 5_000)
        assert {later - earlier for earlier, later in itertools.pairwise(read)} == {2, 3}
        assert fingerprint_dataset(rows, max_rows=10_000) != fingerprint
        assert fingerprint_dataset(rows, max_rows=1) == fingerprint_dataset([*rows[:-1], {"number": -1}], max_rows=1)

    def test_other_values(self) -> None:
        row = {"time": datetime.datetime(2024, 1, 2), "bytes": b"\x00\xff", "nothing": None, "nan": float("nan")}
        assert fingerprint_dataset([row]) == fingerprint_dataset(Dataset.from_list([row]))
        assert fingerprint_dataset([]) == fingerprint_dataset(Dataset.from_list([]))
        fingerprint_dataset([{"text": "half a pair: \ud83d"}])
        with pytest.raises(TypeError, match="cannot write a object as JSON, which row 0 of the dataset holds.*Fix: "):
            fingerprint_dataset([{"image": object()}])
        with pytest.raises(TypeError, match="Row 0 of the dataset is a int.*Fix: "):
            fingerprint_dataset([1])
        with pytest.raises(ValueError, match="max_rows=0 is below 1"):
            fingerprint_dataset(ROWS, max_rows=0)


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
