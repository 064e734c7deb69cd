"""What a manifest says of the model that selected: a description, and a fingerprint of its weights.

It answers "is this still the same?" on another machine and years later, so it reads values alone: no file names,
cache locations or object identities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spice_trainer.data.json_values import canonical_line
from spice_trainer.data.rows import spread_positions
from spice_trainer.distributed import without_wrapper
from spice_trainer.gradients.backends import num_values

MAX_VALUES = 4_096
"""Numbers of a tensor that a model's fingerprint reads, at most."""


def fingerprint_model(model: nn.Module) -> str:
    """Fingerprint of a model's weights, adapters included, from a sample of them.

    Hashed are the names, shapes and dtypes of all parameters and the bytes of 4,096 evenly spread values of each, so
    that a 7B model takes seconds; a change of other values alone is not seen. Quantised parameters count by their
    stored bytes and the scales beside them, parameters on the meta device by name, shape and dtype. Where a parameter
    is spread over processes (FSDP, ZeRO-3), only this process's share is read.
    """
    digest = hashlib.sha256()
    for name, parameter in _without_wrappers(model).named_parameters():
        digest.update(canonical_line([name, list(parameter.shape), str(parameter.dtype)], "a parameter"))
        for tensor in _stored_tensors(parameter):
            digest.update(_sampled_bytes(tensor))
    return digest.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a manifest says of the model that selected, as JSON values."""
    model = _without_wrappers(model)
    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) else model
    config = getattr(base, "config", None)
    parameters = list(model.parameters())
    return {
        "name_or_path": _text_or_none(getattr(config, "_name_or_path", None)),
        "class": type(base).__name__,
        "model_type": _text_or_none(getattr(config, "model_type", None)),
        "num_parameters": sum(num_values(parameter) for parameter in parameters),
        "num_trainable_parameters": sum(num_values(item) for item in parameters if item.requires_grad),
        "lora": _describe_adapter(model),
        "fingerprint": fingerprint_model(model),
    }


def without_fingerprint(description: Mapping[str, Any]) -> dict[str, Any]:
    """What two models have in common that differ in their weights alone."""
    return {key: value for key, value in description.items() if key != "fingerprint"}


def _sampled_bytes(tensor: Tensor) -> bytes:
    if tensor.is_meta or tensor.numel() == 0:
        return b""
    flat = tensor.detach().reshape(-1)
    # As bytes, because not every dtype (float8) can be indexed on every device.
    values = flat.view(torch.uint8).reshape(flat.numel(), -1)
    positions = torch.tensor(spread_positions(flat.numel(), MAX_VALUES), device=flat.device)
    return values[positions].cpu().numpy().tobytes()


def _stored_tensors(parameter: Tensor) -> Iterable[Tensor]:
    """The tensors that hold a parameter's bytes: itself, the parts of a subclass, a quantised one's scales."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _stored_tensors(getattr(parameter, name))
        return
    yield parameter
    state = getattr(parameter, "quant_state", None)
    holders = ((parameter, "SCB"), (state, "absmax"), (state, "offset"), (getattr(state, "state2", None), "absmax"))
    for holder, name in holders:
        scales = getattr(holder, name, None)
        if isinstance(scales, Tensor):
            yield scales


def _describe_adapter(model: nn.Module) -> dict[str, Any] | None:
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    active = getattr(model, "active_adapters", None)
    # A property of `PeftModel`, a method of a `PreTrainedModel` with an adapter.
    names = list(active() if callable(active) else active or configs)
    adapter = str(names[0])
    config = configs[adapter]
    fields = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    settings = {name: _adapter_value(getattr(config, name, None)) for name in fields}
    return {"adapter": adapter, **settings}


def _adapter_value(value: Any) -> Any:
    if isinstance(value, (set, frozenset, list, tuple)):
        return sorted(str(item) for item in value)
    return value


def _text_or_none(value: Any) -> str | None:
    return str(value) if value else None


def _without_wrappers(model: nn.Module) -> nn.Module:
    model = without_wrapper(model)
    original = getattr(model, "_orig_mod", model)  # inside `torch.compile`
    return original if isinstance(original, nn.Module) else model
