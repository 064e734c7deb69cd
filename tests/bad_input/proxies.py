"""Proxies that cannot score, cannot read the rows, or were loaded by a wrong name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset

from spice_trainer import ProxyModel, SpiceConfig, SpiceSampler, attach_spice
from spice_trainer.gradients.lora import UnsupportedModelError
from tests.bad_input.scene import ATTACHING, CREATING, SETTINGS, STARTING, BadInput, Scene
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.multimodal import collator, multimodal_rows, tiny_multimodal_model
from tests.support.trainers import tiny_dataset


def _create(build: Callable[[], Any]) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: build


def _attach(proxy: Callable[[], Any], settings: Any = None, **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        built = proxy()
        if isinstance(built, ProxyModel):
            scene.models.append(built.model)
        models = {"model": options["model"]()} if "model" in options else {}
        return scene.attach(settings, proxy=built, **options | models)

    return prepare


def _second_proxy(scene: Scene) -> Callable[[], Any]:
    proxy = ProxyModel(tiny_lora_model())
    sampler, trainer = SpiceSampler(SpiceConfig(**SETTINGS), proxy), scene.make()
    return lambda: attach_spice(trainer, sampler, proxy=proxy)


def _itself(scene: Scene) -> Callable[[], Any]:
    model = tiny_lora_model()
    return scene.attach(model=model, proxy=ProxyModel(model))


def _own_rows_of_a_stream(scene: Scene) -> Callable[[], Any]:
    proxy = ProxyModel(tiny_lora_model(), dataset=tiny_dataset())
    return scene.attach(proxy=proxy, train_dataset=tiny_dataset().to_iterable_dataset(), max_steps=3)


def _by_name(name: str) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.attach({"proxy_model_name_or_path": str(scene.folder / name)})


ROWS = (
    BadInput(
        "proxy_of_a_stream",
        "a proxy with a dataset of its own, and a stream to train on",
        ATTACHING,
        ValueError,
        ("The proxy has a dataset of its own, and the training dataset is a stream", "leave `dataset` out"),
        _own_rows_of_a_stream,
    ),
    BadInput(
        "name_as_proxy",
        "a name in place of a proxy",
        CREATING,
        TypeError,
        ("ProxyModel needs a model, got str", "`ProxyModel.from_pretrained(name_or_path)`"),
        _create(lambda: ProxyModel("org/model")),  # type: ignore[arg-type]
    ),
    BadInput(
        "proxy_without_adapter",
        "a proxy without a LoRA adapter",
        CREATING,
        UnsupportedModelError,
        (
            "This proxy trains 21 modules beside LoRA",
            "by a LoRA adapter alone",
            'LoraConfig(target_modules="all-linear"',
        ),
        _create(lambda: ProxyModel(tiny_model())),
    ),
    BadInput(
        "proxy_rate",
        "a negative learning rate of a proxy",
        CREATING,
        ValueError,
        ("ProxyModel: learning_rate=-0.1 is not at least 0",),
        _create(lambda: ProxyModel(tiny_lora_model(), learning_rate=-0.1)),
    ),
    BadInput(
        "proxy_updates",
        "`update_every=0`, to keep the proxy as it is",
        CREATING,
        ValueError,
        ("ProxyModel: update_every=0 is below 1", "learning_rate=0 keeps the proxy as it is"),
        _create(lambda: ProxyModel(tiny_lora_model(), update_every=0)),
    ),
    BadInput(
        "loaded_model_as_name",
        "a loaded model as `proxy_model_name_or_path`",
        CREATING,
        ValueError,
        ("is no name", "`proxy=ProxyModel(model)`"),
        _create(lambda: SpiceConfig(proxy_model_name_or_path=3)),  # type: ignore[arg-type]
    ),
    BadInput(
        "model_as_proxy",
        "a model in place of a `ProxyModel`",
        ATTACHING,
        TypeError,
        ("proxy must be a ProxyModel, got PeftModelForCausalLM", "`ProxyModel(model)`"),
        _attach(tiny_lora_model),
    ),
    BadInput(
        "no_such_proxy",
        "`proxy_model_name_or_path` of no model",
        ATTACHING,
        OSError,
        ("The proxy cannot be loaded", "no/model", "Fix: correct the name"),
        _by_name("no/model"),
    ),
    BadInput(
        "two_proxies",
        "a proxy beside a sampler",
        ATTACHING,
        ValueError,
        ("A SpiceSampler brings its own proxy", "`SpiceSampler(config, proxy)`"),
        _second_proxy,
    ),
    BadInput(
        "own_proxy",
        "the model that trains as its own proxy",
        ATTACHING,
        ValueError,
        ("trains weights of the very model that it scores for", "Fix: leave the proxy out"),
        _itself,
    ),
    BadInput(
        "check_without_proxy",
        "`proxy_check_pools` without a proxy",
        ATTACHING,
        ValueError,
        ("proxy_check_pools=2 without a proxy", "Fix: pass `proxy=ProxyModel(...)`"),
        lambda scene: scene.attach({"proxy_check_pools": 2}),
    ),
    BadInput(
        "overlap_without_proxy",
        "`overlap_scoring` without a proxy",
        ATTACHING,
        ValueError,
        ("overlap_scoring=True without a proxy",),
        lambda scene: scene.attach({"overlap_scoring": True}),
    ),
    BadInput(
        "check_without_adapter",
        "`proxy_check_pools` with a target that trains nothing SPICE can score by",
        ATTACHING,
        UnsupportedModelError,
        ("proxy_check_pools=1 compares", "Fix: set proxy_check_pools=0", "has no trainable parameter"),
        _attach(
            lambda: ProxyModel(tiny_lora_model()),
            {"proxy_check_pools": 1},
            model=lambda: tiny_model().requires_grad_(False),
        ),
    ),
    BadInput(
        "fewer_rows_for_proxy",
        "a proxy's dataset of another length",
        ATTACHING,
        ValueError,
        ("The proxy's dataset has 54 rows and the training dataset 55", "Row i of one must be row i of the other"),
        _attach(lambda: ProxyModel(tiny_lora_model(), dataset=tiny_dataset(54))),
    ),
    BadInput(
        "unlabelled_rows_for_proxy",
        "a proxy's dataset without labels",
        ATTACHING,
        ValueError,
        ("The proxy's dataset has rows of ['attention_mask', 'input_ids'], without labels", "data_collator=..."),
        _attach(lambda: ProxyModel(tiny_lora_model(), dataset=tiny_dataset().remove_columns("labels"))),
    ),
    BadInput(
        "other_vocabulary",
        "a proxy of another vocabulary without its tokenizer",
        ATTACHING,
        ValueError,
        ("vocabulary has 4,000 entries and the target's 61", "`ProxyModel(model, processing_class=...)`"),
        _attach(lambda: ProxyModel(add_lora(tiny_model(vocab_size=4000)))),
    ),
    BadInput(
        "small_vocabulary",
        "token ids beyond the proxy's vocabulary",
        ATTACHING,
        ValueError,
        ("holds the token id 60, and the proxy's vocabulary ends at 39",),
        _attach(lambda: ProxyModel(add_lora(tiny_model(vocab_size=40)))),
    ),
    BadInput(
        "text_proxy",
        "a proxy that reads no images for rows with images",
        ATTACHING,
        ValueError,
        ("rows have pixel_values, and the proxy (LlamaForCausalLM) reads token ids alone", "Fix: a proxy that reads"),
        _attach(
            lambda: ProxyModel(add_lora(tiny_model(vocab_size=64))),
            model=lambda: add_lora(tiny_multimodal_model("llava")),
            train_dataset=Dataset.from_list(multimodal_rows([0, 1] * 20)),
            data_collator=collator("llava"),
            remove_unused_columns=False,
        ),
    ),
    BadInput(
        "large_proxy",
        "a proxy larger than the model it scores for",
        ATTACHING,
        None,
        ("the proxy has 32,736 parameters, more than the 23,136", "Leave the proxy out, or take a smaller one"),
        _attach(lambda: ProxyModel(add_lora(tiny_model(num_hidden_layers=3)))),
    ),
    BadInput(
        "proxy_added",
        "resuming with a proxy what was selected without one",
        STARTING,
        ValueError,
        ("selected without a proxy", "Resume without `proxy`, or start a new run"),
        lambda scene: scene.train(proxy=ProxyModel(tiny_lora_model()), resume=str(scene.finished() / "checkpoint-4")),
    ),
)
