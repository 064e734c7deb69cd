"""Small models that read images, built in memory, and rows with one image, several or none.

An image stands in the text as `IMAGE` tokens; its pixels are drawn from its number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from spice_trainer.data.rows import CandidateRow, collate_row
from spice_trainer.gradients.layers.registry import scored_layers
from spice_trainer.gradients.lora import find_trained_modules

IMAGE = 60
_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llava() -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**_TEXT),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )


def _mllama() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = _TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_scaling": rope}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    model = MllamaForConditionalGeneration(
        MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Closed gates would hide whatever is behind them.
            if "gate" in name and "proj" not in name:
                parameter.fill_(0.7)
    return model


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "mlp_ratio": 2,
    }
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=_TEXT | {"rope_parameters": rope, "rope_scaling": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            vision_start_token_id=61,
            vision_end_token_id=62,
            video_token_id=59,
        )
    )


def _qwen3_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "mrope_interleaved": True}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "out_hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        # Images enter the language model here, too.
        "deepstack_visual_indexes": [0],
    }
    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=_TEXT | {"head_dim": 8, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            vision_start_token_id=61,
            vision_end_token_id=62,
            video_token_id=59,
        )
    )


def _gemma3() -> nn.Module:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_use_head": False,
    }
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=_TEXT | {"head_dim": 8, "sliding_window": 16},
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        )
    )


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "mllama": _mllama,
    "qwen2_vl": _qwen2_vl,
    "gemma3": _gemma3,
}
if hasattr(transformers, "Qwen3VLConfig"):
    _MODELS["qwen3_vl"] = _qwen3_vl
MULTIMODAL = tuple(_MODELS)


def tiny_multimodal_model(architecture: str, *, seed: int = 0) -> nn.Module:
    """A model of two to three layers that reads images, weights large enough that every layer matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _MODELS[architecture]().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.15)
    return model


def multimodal_rows(num_images: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with so many images each, of 4 tokens an image, with a masked prompt."""
    generator = random.Random(seed)
    rows, image = [], 0
    for number in num_images:
        head = [61, *[IMAGE] * 4, 62] * number
        prompt, answer = ([generator.randint(7, 50) for _ in range(generator.randint(2, 6))] for _ in range(2))
        images = list(range(image, image + number))
        image += number
        labels = [-100] * len(head + prompt) + answer
        rows.append({"input_ids": head + prompt + answer, "labels": labels, "images": images})
    return rows


def collator(architecture: str) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """Right-pads rows and adds their images' pixels as the architecture reads them."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            key: torch.tensor([list(row[key]) + [value] * (length - len(row[key])) for row in rows])
            for key, value in (("input_ids", 0), ("labels", -100))
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(length)[None] < lengths[:, None]).long()
        pixels = [
            torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(image))
            for row in rows
            for image in row["images"]
        ]
        return batch | (_IMAGES[architecture](batch, rows, pixels) if pixels else {})

    return collate


def _llava_images(batch: Mapping[str, Tensor], rows: Sequence[Any], pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(list(pixels))}


def _mllama_images(batch: Mapping[str, Tensor], rows: Sequence[Any], pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    most = max(len(row["images"]) for row in rows)
    values, remaining = torch.zeros(len(rows), most, 1, 3, 8, 8), list(pixels)
    mask = torch.zeros(len(rows), batch["input_ids"].shape[1], most, 1, dtype=torch.long)
    for number, row in enumerate(rows):
        for place in range(len(row["images"])):
            values[number, place, 0] = remaining.pop(0)
            mask[number, 1 + 6 * place :, place] = 1
    ratios = torch.ones(len(rows), most, dtype=torch.long)
    return {
        "pixel_values": values,
        "aspect_ratio_ids": ratios,
        "aspect_ratio_mask": ratios[..., None],
        "cross_attention_mask": mask,
    }


def _qwen2_vl_images(batch: Mapping[str, Tensor], rows: Sequence[Any], pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    # 16 patches an image of 3 × 2 × 4 × 4 numbers; four patches make a token.
    return {
        "pixel_values": torch.cat([image.flatten().repeat(8).view(16, 96) for image in pixels]),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * len(pixels)),
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


def _gemma3_images(batch: Mapping[str, Tensor], rows: Sequence[Any], pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(list(pixels)), "token_type_ids": (batch["input_ids"] == IMAGE).long()}


_IMAGES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "llava": _llava_images,
    "mllama": _mllama_images,
    "qwen2_vl": _qwen2_vl_images,
    "qwen3_vl": _qwen2_vl_images,
    "gemma3": _gemma3_images,
}


def collated(architecture: str, num_images: Sequence[int]) -> list[CandidateRow]:
    """[`multimodal_rows`], each collated alone."""
    rows = multimodal_rows(num_images)
    return [collate_row(number, row, collator(architecture)) for number, row in enumerate(rows)]


def autograd_gradients(model: nn.Module, row: CandidateRow) -> list[Tensor]:
    """Gradients of one row's mean loss by layer, by one forward of the model and plain autograd."""
    layers = scored_layers(find_trained_modules(model))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    logits = model(**row.inputs).logits[0, :-1]
    targets = row.labels[0, 1:]
    loss = nn.functional.cross_entropy(logits, targets)
    for module, training in modes:
        module.training = training
    weights = [weight for layer in layers for weight in layer.parameters]
    # A row that uses none of them has a loss without a graph.
    loss = loss + 0.0 * weights[0].sum()
    found = iter(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    return [torch.cat([next(found).flatten() for _ in layer.parameters]) for layer in layers]
