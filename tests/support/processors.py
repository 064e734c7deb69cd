"""Processors of the tiny models that read images, built in memory, and conversations about drawn images.

Words are `w7` to `w50`, which are their own token ids; everything else is a mark.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.multimodal import IMAGE, tiny_multimodal_model
from tests.support.trainers import attach, training_options

TARGETS = {
    "all": "all-linear",
    "language": r".*language_model.*\.(q_proj|v_proj|o_proj|up_proj)",
    "vision": r".*vis.*\.(q_proj|v_proj|qkv|fc1|linear_fc1)",
}
# Text rows, rows with an image, rows with two.
NUM_IMAGES = [number % 3 for number in range(24)]
POOL_SIZE = 8

_WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "user": 3, "assistant": 4, "<unk>": 6}
_WORDS |= {f"w{number}": number for number in range(7, 51)} | {"<|python_tag|>": 58, "<|video_pad|>": 59}
_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content[0].text }} </s>{% endgeneration %}"
    "{% else %}{% for part in message.content %}"
    "{{ 'IMAGE' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
_SIZE = {"height": 8, "width": 8}


def _tokenizer(image: str, **special: str) -> PreTrainedTokenizerFast:
    words = _WORDS | {image: IMAGE} | {token: 61 + number for number, token in enumerate(special.values())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": image, **special},
    )


def _llava() -> Any:
    # 4 patches and one more, which the model leaves out.
    images = transformers.CLIPImageProcessor(size=_SIZE, crop_size=_SIZE)
    options = {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    return transformers.LlavaProcessor(images, _tokenizer("<image>"), **options)


def _mllama() -> Any:
    images = transformers.MllamaImageProcessor(size=_SIZE, max_image_tiles=1)
    return transformers.MllamaProcessor(images, _tokenizer("<|image|>"))


def _qwen(name: str) -> Callable[[], Any]:
    def make() -> Any:
        processor = getattr(transformers, name)

        class WithoutVideos(processor):  # type: ignore[misc, valid-type]
            """Video processors need torchvision."""

            def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
                super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

        size = {"shortest_edge": 64, "longest_edge": 256}
        images = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
        marks = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
        return WithoutVideos(images, _tokenizer("<|image_pad|>", **marks))

    return make


def _gemma3() -> Any:
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    images = transformers.Gemma3ImageProcessor(size=_SIZE)
    return transformers.Gemma3Processor(images, _tokenizer("<image_soft_token>", **marks), image_seq_length=4)


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_PROCESSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "llava": (_llava, "<image>"),
    "mllama": (_mllama, "<|image|>"),
    "qwen2_vl": (_qwen("Qwen2VLProcessor"), _QWEN_IMAGE),
    "qwen3_vl": (_qwen("Qwen3VLProcessor"), _QWEN_IMAGE),
    "gemma3": (_gemma3, "<start_of_image>"),
}


def tiny_processor(architecture: str) -> Any:
    """What turns conversations with images into the inputs of `tiny_multimodal_model(architecture)`."""
    make, image = _PROCESSORS[architecture]
    processor = make()
    processor.chat_template = processor.tokenizer.chat_template = _TEMPLATE.replace("IMAGE", image)
    return processor


def conversations(num_images: Sequence[int], *, form: str = "messages", seed: int = 0) -> Dataset:
    """Rows with so many images each, of two sizes; with `form="prompt"` prompts and completions.

    With `form="image"` each has one, under this name.
    """
    generator, rows = random.Random(seed), list[dict[str, Any]]()

    def say(role: str) -> dict[str, str]:
        words = [f"w{generator.randint(7, 50)}" for _ in range(generator.randint(2, 8))]
        return {"role": role, "content": " ".join(words)}

    def draw() -> Any:
        height, width = 8, generator.choice((8, 16))
        return Picture.frombytes("RGB", (width, height), generator.randbytes(3 * width * height))

    for number, count in enumerate(num_images):
        asked, answered, images = [say("user")], [say("assistant")], [draw() for _ in range(count)]
        said = {"prompt": asked, "completion": answered} if form == "prompt" else {"messages": asked + answered}
        seen = {"image": images[0]} if form == "image" else {"images": images}
        rows.append({"id": f"row {number}", **said, **seen})
    turns = [{"role": Value("string"), "content": Value("string")}]
    features: dict[str, Any] = {"prompt": turns, "completion": turns} if form == "prompt" else {"messages": turns}
    features |= {"image": Image()} if form == "image" else {"images": [Image()]}
    return Dataset.from_list(rows, features=Features({"id": Value("string"), **features}))


def make_image_trainer(
    output_dir: str | os.PathLike[str],
    architecture: str,
    *,
    spice: Mapping[str, Any] | None = {},
    targets: str = "all",
    form: str = "messages",
    num_images: Sequence[int] = NUM_IMAGES,
    is_stream: bool = False,
    lora_dropout: float = 0.0,
    **arguments: Any,
) -> Any:
    """A `trl.SFTTrainer` that makes the adapter and the collator itself, with SPICE but for `spice=None`."""
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    dataset = conversations([1] * len(num_images) if form == "image" else num_images, form=form)
    trainer = SFTTrainer(
        model=tiny_multimodal_model(architecture),
        args=SFTConfig(**training_options(output_dir, **{"bf16": False, "max_length": None} | arguments)),
        train_dataset=dataset.to_iterable_dataset() if is_stream else dataset,
        processing_class=tiny_processor(architecture),
        peft_config=LoraConfig(r=4, target_modules=TARGETS[targets], lora_dropout=lora_dropout, task_type="CAUSAL_LM"),
    )
    assert type(trainer.data_collator).__name__ == "DataCollatorForVisionLanguageModeling"
    if spice is not None:
        spice = {"pool_size": POOL_SIZE, "num_selected": 4} | dict(spice)
    attach(trainer, spice, verify=True)
    return trainer
