"""The layers that a proxy's fresh adapter goes on, for each family of models, loaded from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from spice_trainer import ProxyModel
from spice_trainer.data.rows import collate_row
from spice_trainer.gradients.lora import UnsupportedModelError
from spice_trainer.gradients.verification import verify_gradients
from spice_trainer.proxy.targets import language_model_targets
from tests.support.models import PlainLanguageModel, tiny_model
from tests.support.multimodal import MULTIMODAL, tiny_multimodal_model
from tests.support.trainers import collate, tiny_rows, tiny_tokenizer
from tests.support.versions import before

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj", "down_proj"}
FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
TARGETS: dict[str, set[str]] = {
    "llama": ATTENTION | GATED,
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "falcon": FUSED,
    "gpt_neox": FUSED,
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "qwen2_moe": ATTENTION | GATED,
    "qwen3_moe": ATTENTION,
    "mixtral": ATTENTION,
    "glm4_moe": ATTENTION,
    "gpt_oss": ATTENTION,
    "jetmoe": {"kv_proj"},
    "jamba": ATTENTION | GATED,
    **dict.fromkeys(MULTIMODAL, ATTENTION | GATED),
}
# OPT's small models have a projection before and after all layers.
OVERRIDES: dict[str, dict[str, Any]] = {"opt": {"word_embed_proj_dim": 16}}


def save(architecture: str, folder: Path) -> Path:
    """A model and its tokenizer in a folder."""
    model: Any
    if architecture in MULTIMODAL:
        model = tiny_multimodal_model(architecture)
    else:
        model = tiny_model(architecture, **OVERRIDES.get(architecture, {}))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.skipif(before("transformers", "5"), reason="some of these models have other parts")
@pytest.mark.parametrize("architecture", TARGETS)
def test_a_fresh_adapter_is_on_layers_that_score(architecture: str, tmp_path: Path) -> None:
    proxy = ProxyModel.from_pretrained(str(save(architecture, tmp_path)))
    adapted = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in proxy.modules}
    assert {name.rpartition(".")[2] for name in adapted} == TARGETS[architecture]
    assert not any(part in name for name in adapted for part in ("vision", "visual", "project", "mamba", ".experts"))
    settings = proxy.model.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (16, 32, 0.0)
    assert not settings.target_parameters
    rows = [collate_row(number, row, collate) for number, row in enumerate(tiny_rows(2))]
    assert verify_gradients(proxy.model, proxy.modules, rows, device=torch.device("cpu")) < 1e-5


def test_a_model_without_numbered_layers_keeps_its_head_out() -> None:
    model = PlainLanguageModel()
    model.get_output_embeddings = lambda: model.head
    assert language_model_targets(model) == ["mix"]
    model.mix = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"PlainLanguageModel.*`lora_config=LoraConfig.*--lora_target_mod"):
        language_model_targets(model)


def test_layers_that_are_named_stay(tmp_path: Path) -> None:
    folder = str(save("gemma3", tmp_path))
    proxy = ProxyModel.from_pretrained(folder, lora_config=LoraConfig(r=2, target_modules=["q_proj"]))
    # Of the language model and the vision tower.
    assert len(proxy.modules) == 8
    ours = ProxyModel.from_pretrained(folder, lora_config=LoraConfig(r=2))
    assert len(ours.modules) == 28 and ours.model.peft_config["default"].r == 2
