"""Kernels in the place of a model's own code, and what scoring must do so that gradients stay those of training.

    torch.compile      compiled modules are scored uncompiled: the hooks would be traced and compiled too, layer by
                       layer and for every shape, up to the limit at which the compiler gives up on a function
    bitsandbytes       4-bit and 8-bit linear layers choose their kernel by mode: in evaluation mode some lose the
                       gradient or mix the rows of a batch, so they score in training mode (they hold no dropout)
    Liger              replaces layers when training begins, after a check at attach time could see them

No package is imported here: what is not loaded cannot be part of a model.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from spice_trainer.utils.logging import logger

# On these, 8-bit layers multiply without rounding activations, as far as they are in training mode.
_EXACT_INT8_DEVICES = ("cpu", "xpu")


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Context in which gradients are taken: nothing compiled, every module in evaluation mode but quantised ones.

    Raises a RuntimeError for 4-bit layers through which no gradient passes.
    """
    check_quantized_layers(model)
    with uncompiled(model), preserved_modes(model):
        # The flag itself, not `eval()`: models override `train()` with side effects (frozen parts, buffers).
        for module in model.modules():
            module.training = training_flag_for_scoring(module)
        yield


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Context at whose end each module's own `training` flag comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Context in which the compiled parts of a model run as plain Python. What was compiled stays compiled.

    `TrainingArguments(torch_compile=True)` needs no such context: the trainer compiles a wrapper around the model, and
    scoring calls the model. It serves models that are compiled in place (`model.compile()`) or handed over compiled.
    """
    compiler = sys.modules.get("torch._dynamo")
    if compiler is None:
        return nullcontext()
    wrapper: type = compiler.OptimizedModule
    is_compiled = any(
        isinstance(module, wrapper) or module._compiled_call_impl is not None for module in model.modules()
    )
    # Only then: the stance also switches off what a model compiles for itself, such as flex attention.
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def training_flag_for_scoring(module: nn.Module) -> bool:
    """The `training` flag that a module has while gradients are taken: `False`, but for quantised linear layers.

    On a CPU bitsandbytes' layers run other kernels in evaluation mode: 4-bit weights are repacked in place for a
    product through which no gradient passes, and 8-bit layers round activations, which they don't when they train.
    """
    return _is_quantized(module, "Linear4bit", "Linear8bitLt")


def needs_whole_graph(model: nn.Module) -> bool:
    """Whether the model's sharding needs a backward through every module, from its outputs to its inputs.

    FSDP1 and ZeRO-3 gather a module's weights in the backward when a gradient reaches its outputs, and let go of them
    when one reaches its inputs: they fail where only one of the two happens. FSDP2 does not need it.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    # ZeRO-3 numbers the parameters that it partitioned.
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are partitioned over processes, so that it cannot run a forward by itself.

    They are once FSDP wrapped the model, and as soon as a model is loaded under ZeRO-3. Only the main process asks
    with meaning: FSDP's efficient loading leaves the others without weights until it wraps the model.
    """
    return needs_whole_graph(model) or any(isinstance(module, FSDPModule) for module in model.modules())


def rows_influence_each_other(model: nn.Module) -> bool:
    """Whether a row's gradient depends on its batch mates and padding, so that rows must be scored one at a time.

    LLM.int8() computes the feature columns in which any token of the batch exceeds `llm_int8_threshold` in float16
    and rounds the others to 8 bits: one row's outliers decide how every row is rounded. Ask once the model is on the
    device where it trains.
    """
    layers: list[Any] = [module for module in model.modules() if _is_quantized(module, "Linear8bitLt")]
    return any(layer.state.threshold > 0 and layer.weight.device.type not in _EXACT_INT8_DEVICES for layer in layers)


# Models of which some layer mixes the rows of a batch, as was found when they were first scored.
_with_mixed_rows: WeakSet[nn.Module] = WeakSet()


# Modules without a rule that rows use, as was found when they were first scored; of a vision tower texts use nothing.
_used_by_rows: WeakSet[nn.Module] = WeakSet()


def must_score_alone(model: nn.Module, by_autograd: Iterable[nn.Module] = ()) -> bool:
    """Whether rows must be scored one at a time, as far as is known, where gradients of these are autograd's own."""
    is_needed = any(module in _used_by_rows for module in by_autograd)
    return is_needed or model in _with_mixed_rows or rows_influence_each_other(model)


def score_alone(model: nn.Module, layer_name: str) -> None:
    """From here on rows are scored one at a time; `layer_name` is a layer that mixes them."""
    _with_mixed_rows.add(model)
    warn_of_scoring_alone(model, layer_name, "takes the tokens of all rows together")


def score_unpadded(model: nn.Module, what: str = "gradient") -> None:
    """From here on they are, too: batch mates or padding were seen to change a row's gradient, or `what` else."""
    _with_mixed_rows.add(model)
    if model not in _warned:
        _warned.add(model)
        logger.warning(
            "SPICE: candidates are scored one at a time, which is slow on a GPU if they are short: in this model "
            "(%s) padding, or the other rows of a batch, change a row's %s.",
            type(model).__name__,
            what,
        )


@contextmanager
def scored_alone(model: nn.Module) -> Iterator[None]:
    """Context in which rows are, of a model of which it is not known that they must be."""
    _with_mixed_rows.add(model)
    try:
        yield
    finally:
        _with_mixed_rows.discard(model)


def score_alone_by(model: nn.Module, layer_name: str, module: nn.Module) -> None:
    """From here on rows are, wherever this module scores: it has no rule, and rows use it."""
    _used_by_rows.add(module)
    warn_of_scoring_alone(model, layer_name, f"({type(module).__name__}) has no rule of its own")


_warned: WeakSet[nn.Module] = WeakSet()


def warn_of_scoring_alone(model: nn.Module, layer_name: str, why: str) -> None:
    """Says so, once for a model."""
    if model not in _warned:
        _warned.add(model)
        logger.warning(
            "SPICE: candidates are scored one at a time, which is slow on a GPU if they are short: the layer %r %s. "
            "Leave it out of what trains, or choose others by SpiceConfig(scoring_target_modules=...), to score in "
            "batches.",
            layer_name,
            why,
        )


def warn_of_quantization(model: nn.Module) -> None:
    """Says so where rows are scored one at a time."""
    if rows_influence_each_other(model):
        logger.warning(
            "SPICE: candidates are scored one at a time, which is slow on a GPU if they are short. The 8-bit layers "
            "decide over a whole batch which columns they round (llm_int8_threshold > 0), so batch mates would change "
            "a sample's gradient. Load the model with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), "
            "or in 4 bits, to score in batches."
        )


def num_values(parameter: Tensor) -> int:
    """Numbers that a parameter stands for: 4-bit weights are stored two a byte, and ZeRO-3 leaves an empty tensor."""
    shape: Sequence[int] | None = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(getattr(parameter, "ds_numel", parameter.numel())) if shape is None else math.prod(shape)


def check_quantized_layers(model: nn.Module) -> None:
    """Refuses 4-bit layers in bitsandbytes' inference format for CPUs, through which no gradient passes."""
    for name, module in model.named_modules():
        if not _is_quantized(module, "Linear4bit"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"The 4-bit layer {name!r} is in bitsandbytes' inference format for CPUs, through which no gradient "
                "passes: training and scoring would go on with wrong gradients. bitsandbytes converts layers for good "
                "when the model is evaluated or generates on a CPU with AVX512-BF16. Load the model anew and set "
                '`eval_strategy="no"`, evaluate a copy, or train on a GPU.'
            )


def changes_when_training_begins(args: Any) -> bool:
    """Whether `trainer.train()` replaces parts of the model, which makes a check at attach time tell nothing."""
    return bool(getattr(args, "use_liger_kernel", False))


def _is_quantized(module: nn.Module, *names: str) -> bool:
    """Whether a module is one of these classes of bitsandbytes; PEFT's wrappers of the same names are not."""
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return False
    classes = tuple(cls for name in names if isinstance(cls := getattr(library.nn, name, None), type))
    return isinstance(module, classes)
