"""Models and adapters that cannot be scored, or that change between attaching and training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
)

from spice_trainer import SpiceCallback
from spice_trainer.gradients.lora import UnsupportedModelError
from tests.bad_input.scene import ATTACHING, STARTING, TRAINING, BadInput, Scene
from tests.support.families import family_model
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.multimodal import tiny_multimodal_model


def _model(build: Callable[[], nn.Module], **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    return lambda scene: scene.attach(model=build(), **options)


def _later(change: Callable[[Any], Any]) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train()
        change(scene.trainer)
        return train

    return prepare


def _put_new_parameters(model: Any) -> None:
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.requires_grad:
                setattr(module, name, torch.nn.Parameter(weight.detach().clone()))


class _AfterAStep(TrainerCallback):
    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.change(model)


def _meanwhile(change: Callable[[Any], Any]) -> Callable[[Scene], Callable[[], Any]]:
    """Changes the model while it trains, and takes back what the change did to its flags."""

    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train(callbacks=[_AfterAStep(change)])
        flags = [(parameter, parameter.requires_grad) for parameter in scene.trainer.model.parameters()]

        def attempt() -> None:
            try:
                train()
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

        return attempt

    return prepare


def _ask_past_spice(trainer: Any) -> None:
    trainer.get_batch_samples = partial(Trainer.get_batch_samples, trainer)


def _accumulate_more(trainer: Any) -> None:
    class Accumulates(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.gradient_accumulation_steps = 2

    trainer.add_callback(Accumulates())


def _ask_ahead(trainer: Any) -> None:
    get_batch_samples = trainer.get_batch_samples

    def ask_twice(*args: Any) -> Any:
        get_batch_samples(*args)
        return get_batch_samples(*args)

    trainer.get_batch_samples = ask_twice


def _merged() -> nn.Module:
    model = tiny_lora_model()
    model.merge_adapter()
    return model


def _disabled() -> nn.Module:
    model = tiny_lora_model()
    model.base_model.disable_adapter_layers()
    return model


def _inactive() -> nn.Module:
    """The adapter that trains is not the one that the model uses."""
    model = tiny_lora_model()
    model.add_adapter("second", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("second")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".default." in name)
    return model


def _frozen() -> nn.Module:
    return tiny_model().requires_grad_(False)


def _broken(name: str) -> nn.Module:
    model = tiny_lora_model()
    with torch.no_grad():
        next(value for key, value in model.named_parameters() if name in key).fill_(float("nan"))
    return model


def _bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    return add_lora(BertForMaskedLM(BertConfig(vocab_size=61, **sizes)), task_type=None)


def _classifier() -> nn.Module:
    return add_lora(LlamaForSequenceClassification(tiny_model().config), task_type=None, target_modules=["q_proj"])


def _headless() -> nn.Module:
    return add_lora(AutoModel.from_config(tiny_model().config), task_type=None)


def _no_forward(scene: Scene) -> Callable[[], Any]:
    """A layer whose LoRA matrices are used without being called, as fused kernels do."""
    model = tiny_lora_model()
    layer = model.base_model.model.model.layers[1].mlp.up_proj

    def fused(hidden: torch.Tensor) -> torch.Tensor:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        added: torch.Tensor = layer.base_layer(hidden) + hidden @ down.T @ up.T * layer.scaling["default"]
        return added

    layer.forward = fused
    return scene.attach(model=model)


ROWS = (
    BadInput(
        "no_adapter",
        '`scoring_parameters="lora"` without LoRA (full fine-tuning)',
        ATTACHING,
        UnsupportedModelError,
        (
            'SpiceConfig: scoring_parameters="lora", and of the 21 modules of LlamaForCausalLM that train none is of',
            'Fix: leave it out (scoring_parameters="all"), or train a LoRA adapter',
        ),
        lambda scene: scene.attach({"scoring_parameters": "lora"}, model=tiny_model()),
    ),
    BadInput(
        "prompt_tuning",
        "an adapter that lengthens rows by virtual tokens (`PromptTuningConfig`, `PromptEncoderConfig`)",
        ATTACHING,
        UnsupportedModelError,
        ("trains virtual tokens in front of each row (PromptTuningConfig)", "Fix: train a LoRA adapter (LoraConfig)"),
        _model(lambda: get_peft_model(tiny_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))),
    ),
    BadInput(
        "frozen",
        "a loaded adapter that is not trainable",
        ATTACHING,
        UnsupportedModelError,
        ("has no trainable parameter", "`PeftModel.from_pretrained(..., is_trainable=True)`"),
        _model(lambda: tiny_lora_model().requires_grad_(False)),
    ),
    BadInput(
        "unloaded",
        "an adapter merged into the model (`merge_and_unload`)",
        ATTACHING,
        UnsupportedModelError,
        ("(LlamaForCausalLM) has no trainable parameter", "peft_config=LoraConfig(...)"),
        _model(lambda: tiny_lora_model().merge_and_unload()),
    ),
    BadInput(
        "merged",
        "a merged adapter",
        ATTACHING,
        UnsupportedModelError,
        ("q_proj' is merged into the base weights", "call `model.unmerge_adapter()`"),
        _model(_merged),
    ),
    BadInput(
        "disabled",
        "a disabled adapter",
        ATTACHING,
        UnsupportedModelError,
        ("(PeftModelForCausalLM) has no trainable parameter",),
        _model(_disabled),
    ),
    BadInput(
        "inactive",
        "training another adapter than the active one",
        ATTACHING,
        RuntimeError,
        ("28 of 28 scored layers got no gradient", "q_proj.lora_A.default", "`model.set_adapter('default')`"),
        _model(_inactive),
    ),
    BadInput(
        "bypassed",
        "fused LoRA kernels that don't call the layers",
        ATTACHING,
        None,
        (
            "candidates are scored one at a time, which is slow",
            "layers.1.mlp.up_proj.lora_A.default' is bypassed",
        ),
        _no_forward,
    ),
    BadInput(
        "vision_alone",
        "LoRA on a vision tower alone, and rows without images",
        ATTACHING,
        ValueError,
        ("No scored layer gets a gradient from rows", "`target_modules` names only a part of the model"),
        _model(lambda: add_lora(tiny_multimodal_model("llava"), target_modules=r".*vision_tower.*q_proj")),
    ),
    BadInput(
        "reformer",
        "a Reformer",
        ATTACHING,
        UnsupportedModelError,
        ("a ReformerModelWithLMHead, whose reversible layers", "a sample has no gradient of its own", "proxy="),
        _model(lambda: family_model("reformer")),
    ),
    BadInput(
        "classifier",
        "a model for classification",
        ATTACHING,
        UnsupportedModelError,
        ("The model is a LlamaForSequenceClassification", "load it with `AutoModelForCausalLM`"),
        _model(_classifier),
    ),
    BadInput(
        "masked_model",
        "a masked language model",
        ATTACHING,
        UnsupportedModelError,
        ("The model is a BertForMaskedLM", "does not predict next tokens"),
        _model(_bert),
    ),
    BadInput(
        "headless",
        "a model without its output layer (`AutoModel`)",
        ATTACHING,
        UnsupportedModelError,
        ("The model is a LlamaModel", "load it with `AutoModelForCausalLM`"),
        _model(_headless),
    ),
    BadInput(
        "broken_weight",
        "a weight that is NaN (a broken checkpoint)",
        ATTACHING,
        ValueError,
        ("The gradients of rows", "not finite, also by plain autograd", "a broken checkpoint"),
        _model(lambda: _broken("embed_tokens")),
    ),
    BadInput(
        "broken_later",
        "weights that become NaN while training",
        TRAINING,
        RuntimeError,
        ("weights of the model that scores are not finite, such as", "embed_tokens", "had been so before step 0"),
        _later(lambda trainer: next(trainer.model.parameters()).data.fill_(float("nan"))),
    ),
    BadInput(
        "callback_removed",
        "taking the `SpiceCallback` off the trainer",
        TRAINING,
        RuntimeError,
        ("SpiceCallback was taken from the trainer's callbacks", "call detach_spice(trainer)"),
        _later(lambda trainer: trainer.remove_callback(SpiceCallback)),
    ),
    BadInput(
        "other_batches",
        "a `get_batch_samples` bound after attaching that does not call the one before",
        TRAINING,
        RuntimeError,
        ("Step 0 would train on rows that SPICE did not pick", "Call attach_spice after your own changes"),
        _later(_ask_past_spice),
    ),
    BadInput(
        "accumulation_changed",
        "another `gradient_accumulation_steps` once training has begun",
        TRAINING,
        RuntimeError,
        ("gradient_accumulation_steps was 1 when training began and is 2", "schedules the batch size", "keep it"),
        _later(_accumulate_more),
    ),
    BadInput(
        "batches_ahead",
        "a `get_batch_samples` that fetches a step ahead",
        TRAINING,
        RuntimeError,
        ("asked for before the Trainer had finished step 0", "fetches ahead", "one step at a time"),
        _later(_ask_ahead),
    ),
    BadInput(
        "frozen_later",
        "freezing the adapter after attaching",
        STARTING,
        UnsupportedModelError,
        ("has no trainable parameter",),
        _later(lambda trainer: trainer.model.requires_grad_(False)),
    ),
    BadInput(
        "merged_later",
        "merging the adapter after attaching",
        STARTING,
        UnsupportedModelError,
        ("q_proj' is merged into the base weights", "call `model.unmerge_adapter()`"),
        _later(lambda trainer: trainer.model.merge_adapter()),
    ),
    BadInput(
        "frozen_meanwhile",
        "freezing the whole adapter in mid-run",
        TRAINING,
        RuntimeError,
        (
            "Every layer was frozen since the last step",
            "a callback that freezes",
            "`control.should_training_stop",
        ),
        _meanwhile(lambda model: model.requires_grad_(False)),
    ),
    BadInput(
        "unfrozen_for_nothing",
        "unfreezing layers that the Trainer's optimizer does not have",
        TRAINING,
        None,
        (
            "1 layers have parameters that require a gradient but are not in the optimizer",
            "on_train_begin",
            "optimizer.add_param_group",
        ),
        _meanwhile(lambda model: model.get_base_model().model.norm.requires_grad_(True)),
    ),
    BadInput(
        "parameters_replaced_meanwhile",
        "putting new parameters in the place of those that train, in mid-run",
        TRAINING,
        RuntimeError,
        ("None of the layers that trained has a parameter in the optimizer", "`module.weight.data.copy_(...)`"),
        _meanwhile(_put_new_parameters),
    ),
    BadInput(
        "merged_meanwhile",
        "merging the adapter in mid-run",
        TRAINING,
        RuntimeError,
        ("The adapter 'default' was merged into the base weights in mid-run", "call `model.unmerge_adapter()` before"),
        _meanwhile(lambda model: model.merge_adapter()),
    ),
    BadInput(
        "switched_off_meanwhile",
        "switching the adapter off in mid-run, or another one on",
        TRAINING,
        RuntimeError,
        ("The adapter 'default' was switched off in mid-run", "call `model.enable_adapter_layers()` before"),
        _meanwhile(lambda model: model.base_model.disable_adapter_layers()),
    ),
    BadInput(
        "replaced_later",
        "another model, with nothing that trains, after attaching",
        STARTING,
        UnsupportedModelError,
        ("(LlamaForCausalLM) has no trainable parameter",),
        _later(lambda trainer: vars(trainer).update({name: _frozen() for name in ("model", "model_wrapped")})),
    ),
)
