"""What several processes need on a machine without a GPU; for tests only. Each names the library that asks for it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


def honour_fsdp_on_cpu() -> None:
    """Lets accelerate shard with FSDP between CPU processes.

    accelerate 1.15 (`AcceleratorState.__init__`) looks at an FSDP plugin only if the processes' type is one of a list
    of GPU-like devices. `MULTI_CPU` is not among them, so on a CPU the plugin is dropped and DDP trains, silently.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialize(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        is_first = not AcceleratorState._shared_state.get("fsdp_plugin")
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if is_first and fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            # torch 2.13's FSDP1 finds "cpu:0" (accelerate's name for it) inconsistent with parameters on "cpu".
            self.device = torch.device("cpu")
            PartialState._shared_state |= {"distributed_type": self.distributed_type, "device": self.device}
            # torch 2.13's FSDP1 gathers Adam's two moments in one buffer after the other, and to offload them takes
            # `.cpu()` of it, which on the CPU is the buffer itself: both come out as the second
            # (`_allgather_orig_param_states`). Without offloading it copies.
            fsdp_plugin.optim_state_dict_config.offload_to_cpu = False

    AcceleratorState.__init__ = initialize


def keep_unsharded_weights_on_cpu() -> None:
    """Lets FSDP1 give out a full state dict on the CPU, where torch 2.13 ends in a segmentation fault instead.

    To offload a state dict, `FlatParamHandle.to_cpu` copies the gathered weights to the CPU and frees the gathered
    ones. On the CPU the "copy" is the same memory, so the state dict reads what was freed. Nothing needs moving here.
    """
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    FlatParamHandle.to_cpu = lambda self: nullcontext()


def store_adapters_under_fsdp1() -> None:
    """Lets a checkpoint under FSDP1 hold the adapter, which with peft 0.21 is empty, on GPUs as well.

    peft looks in the state dict for names it makes from the model's modules, and takes FSDP1's `_fsdp_wrapped_module.`
    out of their beginning only (`_get_tuner_state_dict_key_prefixes`), while every wrapped layer has one. No adapter
    weight is found, saved or loaded: resuming goes on from the weights the run began with, without a word. Loading
    also asks every process for the names of a full state dict, which accelerate gives to process 0 alone.
    """
    from accelerate.utils import fsdp_utils
    from peft.tuners import tuners_utils

    find_prefixes = tuners_utils._get_tuner_state_dict_key_prefixes
    set_weights = fsdp_utils._set_model_state_dict

    def without_wrappers(*args: Any, **kwargs: Any) -> set[str]:
        return {prefix.replace("_fsdp_wrapped_module.", "") for prefix in find_prefixes(*args, **kwargs)}

    def set_adapter(model: Any, state_dict: Any, adapter_only: bool = False, sd_options: Any = None) -> Any:
        if not adapter_only or sd_options is not None:
            return set_weights(model, state_dict, adapter_only, sd_options)
        named = {key.replace(".weight", ".default.weight"): value for key, value in state_dict.items()}
        result = model.load_state_dict(named, strict=False)
        assert named and not result.unexpected_keys
        return result

    tuners_utils._get_tuner_state_dict_key_prefixes = without_wrappers
    fsdp_utils._set_model_state_dict = set_adapter


def prepare_deepspeed_on_cpu() -> None:
    """Sets up DeepSpeed's communication between CPU processes.

    deepspeed 0.19 compiles its shared-memory collectives (`deepspeed_shm_comm`) when it is first used, which takes
    minutes; without them it uses gloo. And accelerate 1.15 starts torch's process group only, when told to use the
    CPU, while `deepspeed.zero.Init` needs DeepSpeed's own, before a model is loaded.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


def partition_small_parameters(args: Any) -> None:
    """Makes ZeRO-3 partition a tiny model's parameters too.

    By default parameters of fewer than 100,000 numbers stay whole on every process
    (`stage3_param_persistence_threshold`), which here would be all of them.
    """
    args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def prepare(config: str) -> None:
    """What this configuration needs, before `TrainingArguments` are built."""
    torch.set_num_threads(1)
    if config.startswith("fsdp"):
        honour_fsdp_on_cpu()
        keep_unsharded_weights_on_cpu()
        store_adapters_under_fsdp1()
    elif config.startswith("deepspeed"):
        prepare_deepspeed_on_cpu()
