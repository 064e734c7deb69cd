"""Whether checkpoints hold the adapter: with PEFT 0.21 they do not under FSDP1, and SPICE says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from spice_trainer import SpiceConfig, SpiceSampler
from spice_trainer.trainer.callback import SpiceCallback
from spice_trainer.trainer.checks import check_adapter_is_saved, finds_adapter
from tests.support.models import tiny_lora_model, tiny_model

# Alone, a process has nothing to shard.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
only_affected = pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="was written for PEFT 0.21")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process, which FSDP asks for."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(model: nn.Module, *, layers: bool) -> FullyShardedDataParallel:
    """Wraps a model as FSDP1 does, its decoder layers too if asked."""
    options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
    if layers:
        blocks = model.base_model.model.model.layers
        for index, block in enumerate(blocks):
            blocks[index] = FullyShardedDataParallel(block, **options)
    return FullyShardedDataParallel(model, **options)


@only_affected
def test_what_is_warned_of_is_true(alone: None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_lora_model()
    names = list(model.state_dict())
    sharded = shard(model, layers=True)
    state_dict = {name: torch.zeros(1) for name in names}
    assert get_peft_model_state_dict(model, state_dict=state_dict) == {}

    check_adapter_is_saved(sharded, is_resumed=False)
    [message] = caplog.messages
    assert message == (
        f"SPICE: PEFT {peft.__version__} does not find the adapter in a model that FSDP1 has wrapped, so a "
        "checkpoint's adapter file is empty, and so will be what is saved at the end. Use FSDP2: `fsdp_version: 2` in "
        'the accelerate configuration, or `fsdp_config={"version": 2}`.'
    )


@only_affected
def test_resuming_is_refused_before_anything_is_written(alone: None, tmp_path: Any) -> None:
    sharded = shard(tiny_lora_model(), layers=True)
    callback = SpiceCallback(SpiceSampler(SpiceConfig()))
    callback.resume_from = str(tmp_path / "checkpoint-2")
    args = TrainingArguments(output_dir=str(tmp_path / "output"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"cannot be resumed: PEFT .*FSDP1.*initial weights.*Use FSDP2.*start anew"):
        callback.on_train_begin(args, TrainerState(), TrainerControl(), model=sharded)
    assert not (tmp_path / "output").exists()


def test_where_the_adapter_is_found_nothing_is_said(alone: None, caplog: pytest.LogCaptureFixture) -> None:
    # The names of the whole model's adapter are found when only the root is wrapped.
    for model in (shard(tiny_lora_model(), layers=False), tiny_lora_model(), tiny_model()):
        assert finds_adapter(model)
        check_adapter_is_saved(model, is_resumed=True)
    assert not caplog.messages
