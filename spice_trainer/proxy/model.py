"""The proxy: a small model that scores candidates instead of the target, and learns a little from what it picked.

The paper's own pipeline (a 0.5B model of the family selects for a 7B to 70B target). Scoring then costs what the small
model costs, and nothing is asked of the target: it may be sharded, quantised, or train without LoRA.

    cycle t: pools ─ the proxy's LoRA gradients ─ picks ─┬─ the target's optimizer step
                                                         └─ every `update_every` cycles one of the proxy's own
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.rows import DataCollator
from spice_trainer.gradients.lora import UnsupportedModelError, find_trained_modules, is_lora
from spice_trainer.proxy.targets import language_model_targets
from spice_trainer.utils.fields import RealNumber, WholeNumber
from spice_trainer.utils.random import seeded_random_state


class ProxyModel:
    """A small causal language model with a LoRA adapter that scores instead of the target.

    With the target's tokenizer it reads the trainer's own tokenised rows. With another it reads its own copy of the
    same rows: give a `dataset` tokenised for it, or a `processing_class`, with which it tokenises the raw
    conversation, prompt and completion, or text columns of the training dataset itself.

    In a run of several processes each has a copy of it; scoring is shared, its gradients are averaged, and it never
    enters the target's DDP, FSDP or DeepSpeed wrapper.

    Args:
        model (`torch.nn.Module`):
            A PEFT model with a trainable LoRA adapter, on the device where it is to score, in any precision. Its
            adapter is trained by SPICE, and by nothing else.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. `None` means the target's.
        dataset (`datasets.Dataset` or sequence, *optional*):
            The training rows tokenised for this model, row i for row i.
        data_collator (`Callable`, *optional*):
            Collates rows of `dataset` into `input_ids` and `labels`. Defaults to the trainer's own, or to right
            padding if `dataset` or `processing_class` is given.
        learning_rate (`float`, *optional*, defaults to `2e-4`):
            Of its own AdamW, constant. 0 keeps the proxy as it is.
        update_every (`int`, *optional*, defaults to `1`):
            Cycles (optimizer steps of the target) between its updates.
        weight_decay (`float`, *optional*, defaults to `0.01`):
            Of its AdamW.
        max_grad_norm (`float`, *optional*, defaults to `1.0`):
            Its gradient is scaled down to this norm. 0 leaves it as it is.

    Raises:
        TypeError: If `model` is no module.
        ValueError: If nothing of it trains, or a value is out of range.

    Example:
    ```python
    >>> proxy = ProxyModel(get_peft_model(small_model, LoraConfig(target_modules="all-linear")))
    >>> attach_spice(trainer, SpiceConfig(), proxy=proxy)
    ```
    """

    learning_rate: float
    weight_decay: float
    max_grad_norm: float

    def __init__(
        self,
        model: nn.Module,
        *,
        processing_class: Any = None,
        dataset: Any = None,
        data_collator: DataCollator | None = None,
        learning_rate: float = 2e-4,
        update_every: int = 1,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"ProxyModel needs a model, got {type(model).__name__}. Load it first, or write "
                "`ProxyModel.from_pretrained(name_or_path)`."
            )
        at_least_0 = RealNumber("at least 0", "there is no less than none", lambda x: x >= 0)
        for name, value in (
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("max_grad_norm", max_grad_norm),
        ):
            setattr(self, name, at_least_0("ProxyModel", name, value))
        counts_cycles = WholeNumber(1, "it counts cycles; learning_rate=0 keeps the proxy as it is")
        self.update_every = counts_cycles("ProxyModel", "update_every", update_every)
        try:
            self.modules = find_trained_modules(model)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"This proxy cannot score. {error} A proxy without an adapter gets one with "
                '`get_peft_model(model, LoraConfig(target_modules="all-linear"))`.'
            ) from error
        others = [name for name in self.modules if not is_lora(name)]
        if others:
            raise UnsupportedModelError(
                f"This proxy trains {len(others)} modules beside LoRA, such as {others[0]!r}, and a proxy learns by a "
                "LoRA adapter alone. A model without one gets it with `get_peft_model(model, LoraConfig("
                'target_modules="all-linear"))`; leave `modules_to_save` and the like out.'
            )
        self.model = model
        self.processing_class = processing_class
        self.dataset = dataset
        self.data_collator = data_collator

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        lora_config: Any = None,
        device: Any = None,
        processing_class: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> ProxyModel:
        """Loads a model with its tokenizer and adds a fresh adapter.

        Args:
            name_or_path (`str`):
                A causal language model on the hub or in a folder, or a model that reads images, too.
            lora_config (`peft.LoraConfig`, *optional*):
                The adapter. Defaults to r 16, α 32 without dropout. Without `target_modules` it goes on the attention
                and the MLPs of the language model: not on a vision tower, a router or experts.
            device (`torch.device` or `str`, *optional*):
                Where it scores. Defaults to where `from_pretrained` puts it.
            processing_class (`transformers.PreTrainedTokenizerBase`, *optional*):
                Its tokenizer. Defaults to the one beside the model.
            model_kwargs (`Mapping[str, Any]`, *optional*):
                Arguments of the model's `from_pretrained`: `dtype`, `quantization_config`, `revision`, ...
            kwargs:
                Those of [`ProxyModel`].

        Returns:
            [`ProxyModel`]
        """
        from peft import LoraConfig, get_peft_model
        from transformers import AutoTokenizer

        model_kwargs = dict(model_kwargs or {})
        model = _load(name_or_path, model_kwargs)
        if processing_class is None:
            shared = ("revision", "token", "trust_remote_code", "gguf_file", "subfolder")
            beside = {key: value for key, value in model_kwargs.items() if key in shared}
            processing_class = AutoTokenizer.from_pretrained(name_or_path, **beside)
        if lora_config is None:
            lora_config = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")
        if lora_config.target_modules is None and not getattr(lora_config, "target_parameters", None):
            lora_config = replace(lora_config, target_modules=language_model_targets(model))
        model = get_peft_model(model, lora_config)
        if device is not None:
            model = model.to(device)
        return cls(model, processing_class=processing_class, **kwargs)


def _load(name_or_path: str, model_kwargs: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **model_kwargs)
    except ValueError as error:
        # Of some models that read images transformers makes causal language models, and of others not.
        if "Unrecognized configuration class" not in str(error):
            raise
        return AutoModelForImageTextToText.from_pretrained(name_or_path, **model_kwargs)


def resolve_proxy(
    proxy: ProxyModel | None, config: SpiceConfig, *, device: torch.device, seed: int
) -> ProxyModel | None:
    """The proxy that was given, else the one that a configuration names, loaded onto the device, else none.

    The seed is that of the fresh adapter, the same on every process.
    """
    if proxy is not None or config.proxy_model_name_or_path is None:
        return proxy
    name = config.proxy_model_name_or_path
    try:
        with seeded_random_state(device, seed):
            return ProxyModel.from_pretrained(
                name,
                device=device,
                model_kwargs={"dtype": "auto"},
                learning_rate=config.proxy_learning_rate,
                update_every=config.proxy_update_every,
            )
    except OSError as error:
        raise OSError(
            f"The proxy cannot be loaded: SpiceConfig has proxy_model_name_or_path={name!r}, which is no model on the "
            f"hub and no folder with one, or cannot be reached ({error}). Fix: correct the name, or load it yourself "
            "and pass `proxy=ProxyModel(model)` to attach_spice."
        ) from error
