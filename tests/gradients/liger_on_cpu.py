"""What `test_liger.py` runs in a process of its own: Liger patches whole modules of transformers, for good.

Triton's interpreter runs the kernels on the CPU, one program after the other (`TRITON_INTERPRET=1`), but for two gaps
that `complete_interpreter` fills: scalar arguments stay Python floats, and functions of the device library do nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from triton.runtime import interpreter

import spice_trainer.trainer.checks
from tests.support.gradient_loop import batched_gradients, collate, example_rows, looped_gradients, relative_error
from tests.support.models import add_lora, tiny_model
from tests.support.replays import train_and_replay
from tests.support.trainers import make_trainer, tiny_rows


def complete_interpreter() -> None:
    convert = interpreter._implicit_cvt

    def convert_floats_too(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = convert_floats_too
    rms_norm.rsqrt = lambda value: tl.rsqrt(value)


def apply_liger(model: Any) -> None:
    """As the Trainer does when training begins."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, None)


def compare_gradients() -> dict[str, Any]:
    """Batched gradients of a model with Liger's kernels, against its own loop and against the model without them."""
    model, rows = add_lora(tiny_model(num_hidden_layers=1)), example_rows()
    _, plain = looped_gradients(model, rows)
    apply_liger(model)
    losses, found = batched_gradients(model, rows)
    _, expected = looped_gradients(model, rows)
    inputs, labels = collate(rows)
    outputs = model.train()(**inputs, labels=labels)
    return {
        "forward": model.get_base_model().forward.__module__,
        "modules": sorted({type(module).__name__ for module in model.modules()}),
        "logits_in_training": outputs.logits is not None,
        "error_of_loop": relative_error(found, expected),
        "error_of_plain": relative_error(found, plain),
        "losses_finite": bool(losses.isfinite().all()),
    }


def train() -> dict[str, Any]:
    """A run with `use_liger_kernel=True`, and the same steps without scoring."""
    forwards: list[str] = []

    def watched(verify: Any) -> Any:
        def call(model: Any, *args: Any, **kwargs: Any) -> float:
            forwards.append(model.get_base_model().forward.__module__)
            return verify(model, *args, **kwargs)

        return call

    rows = [{key: value[:6] for key, value in row.items()} for row in tiny_rows(8)]
    for row in rows:
        row["labels"][-1] = row["input_ids"][-1]

    def make(output_dir: Path) -> Any:
        return make_trainer(
            output_dir,
            model=add_lora(tiny_model(num_hidden_layers=1), lora_dropout=0.3),
            train_dataset=rows,
            spice={"pool_size": 4, "num_selected": 2},
            verify=True,
            per_device_train_batch_size=2,
            use_liger_kernel=True,
        )

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name in ("verify_gradients", "verify_directions"):
            patch.setattr(spice_trainer.trainer.checks, name, watched(getattr(spice_trainer.trainer.checks, name)))
        trainer = train_and_replay(make, Path(folder), patch, num_steps=2)
    return {"forward": trainer.model.get_base_model().forward.__module__, "verified": forwards}


if __name__ == "__main__":
    torch.manual_seed(0)
    complete_interpreter()
    print(json.dumps({"gradients": compare_gradients, "train": train}[sys.argv[1]]()))
