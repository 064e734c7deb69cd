"""The shipped accelerate configurations: valid, complete, for one machine of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tests.distributed.launch import CONFIG_FOLDER, CONFIG_NAMES, cpu_config, load_config

TYPES = {"single_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP"}


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of nested sections as `section.key`."""
    return {
        f"{name}.{key}" if isinstance(value, dict) else name: entry
        for name, value in values.items()
        for key, entry in (value.items() if isinstance(value, dict) else [(name, value)])
    }


def test_every_shipped_configuration_is_known() -> None:
    assert {path.stem for path in CONFIG_FOLDER.iterdir()} == set(CONFIG_NAMES)


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_configuration_loads_and_is_for_gpus(name: str) -> None:
    path = CONFIG_FOLDER / f"{name}.yaml"
    loaded = load_config_from_file(str(path))
    assert loaded.distributed_type == TYPES.get(name, "DEEPSPEED")
    assert loaded.num_processes == (1 if name == "single_gpu" else 8)
    assert loaded.mixed_precision == "bf16" and not loaded.use_cpu and loaded.num_machines == 1
    first, second, third = path.read_text().splitlines()[:3]
    assert first.startswith("# ") and second.startswith("# ") and not third.startswith("#")


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_sections_hold_only_what_the_launcher_reads(name: str) -> None:
    # The loader checks the names at the top level alone; a misspelt one within a section would do nothing.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    values = load_config(name)
    section = values.get("fsdp_config", {}) | values.get("deepspeed_config", {})
    assert section.keys() <= known.keys()
    if name.startswith("fsdp"):
        assert section["fsdp_version"] == int(name[-1])
    if name.startswith("deepspeed"):
        assert section["zero_stage"] == int(name[-1])


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_the_tests_change_only_what_a_cpu_cannot_do(name: str) -> None:
    shipped, derived = flat(load_config(name)), flat(cpu_config(name, num_processes=2))
    changed = {key for key in shipped.keys() | derived.keys() if shipped.get(key) != derived.get(key)}
    allowed = {"use_cpu", "gpu_ids", "mixed_precision", "num_processes", "main_process_port"}
    if name == "fsdp1":
        allowed |= {"fsdp_config.fsdp_sync_module_states", "fsdp_config.fsdp_cpu_ram_efficient_loading"}
    assert changed <= allowed
