"""Several processes under `accelerate launch`: the picks, gradients and weights of one process, whatever the wrapper.

Each mode that users launch is launched once, with its shipped configuration on CPU processes; the tests look at what
that left behind.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spice_trainer.selection.pool import select_pool
from tests.distributed import setting
from tests.distributed.launch import fork, launch
from tests.support.trainers import read_records, trained_indices

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Configuration, processes, gradient checkpointing, what trains.
MODES = {
    "ddp": ("multi_gpu", 2, "reentrant", "lora"),
    "ddp-4": ("multi_gpu", 4, None, "lora"),
    "fsdp1": ("fsdp1", 2, None, "lora"),
    "fsdp2": ("fsdp2", 2, "non-reentrant", "lora"),
    "zero1": ("deepspeed_zero1", 2, None, "lora"),
    "zero2": ("deepspeed_zero2", 2, "reentrant", "lora"),
    "zero3": ("deepspeed_zero3", 2, "non-reentrant", "lora"),
    "ddp-full": ("multi_gpu", 2, None, "full"),
    "fsdp2-full": ("fsdp2", 2, None, "full"),
    "zero2-full": ("deepspeed_zero2", 2, None, "full"),
    "zero3-full": ("deepspeed_zero3", 2, None, "full"),
    "ddp-dora": ("multi_gpu", 2, None, "dora"),
    "ddp-saved": ("multi_gpu", 2, None, "saved"),
    "zero3-saved": ("deepspeed_zero3", 2, None, "saved"),
    "ddp-experts": ("multi_gpu", 2, None, "experts"),
}
TOLERANCE = 1e-5


class Run:
    """What the processes of one mode wrote."""

    def __init__(self, folder: Path, num_processes: int, model_folder: Path) -> None:
        self.folder = folder
        self.results = [json.loads((folder / f"all.{rank}.json").read_text()) for rank in range(num_processes)]
        self.result = self.results[0]
        self.scores = [load_file(folder / f"scores.{rank}.safetensors") for rank in range(num_processes)]
        self.weights = load_file(folder / "weights.safetensors")
        self.model_folder = model_folder

    def adapter(self, step: int) -> dict[str, Tensor]:
        """What trains before a step, by name."""
        prefix = f"step{step}."
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models that every process loads, by what trains."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("lora", "full", "dora", "saved", "experts")}
    setting.save_model(folders["lora"])
    setting.save_full_model(folders["full"])
    setting.save_model(folders["dora"], use_dora=True)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    setting.save_model(
        folders["experts"],
        architecture="mixtral",
        lora_dropout=0.0,
        target_modules=["q_proj"],
        target_parameters=experts,
    )
    setting.save_model(folders["saved"], modules_to_save=["lm_head", "norm"])
    return folders


@pytest.fixture(scope="module", params=MODES)
def run(
    request: pytest.FixtureRequest, model_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """One launch of a mode."""
    config, num_processes, checkpointing, kind = MODES[request.param]
    model_folder = model_folders[kind]
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    options = [f"model={model_folder}"] + ([] if checkpointing is None else [f"checkpointing={checkpointing}"])
    start = launch if num_processes == 2 else fork
    start(config, folder, "all", *options, num_processes=num_processes).check()
    return Run(folder, num_processes, model_folder)


def put_adapter(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives a model what trained in a run."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {name for name, value in parameters.items() if value.requires_grad} == weights.keys()
    for name, value in weights.items():
        parameters[name].data.copy_(value)


def gram_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest error of an inner product beside the two gradients' norms."""
    norms = theirs.diagonal().sqrt()
    return float(((ours - theirs).abs() / (norms[:, None] * norms[None, :])).max())


def test_every_process_got_the_same_picks_and_they_were_recorded(run: Run) -> None:
    assert all(result["picks"] == run.result["picks"] for result in run.results)
    assert run.result["world_size"] == len(run.results)
    assert [len(step) for step in run.result["picks"]] == [8, 8, 1, 8, 8, 1]
    assert trained_indices(run.folder / "scored") == run.result["picks"]
    assert any(setting.LONG_ROW in pool["candidates"] for pool in read_records(run.folder / "scored", "pools"))


def test_picks_and_gram_matrices_are_those_of_one_process(run: Run, tmp_path: Path) -> None:
    trainer = setting.single_trainer(run.model_folder, tmp_path)
    trainer._spice.begin_run()
    sampler = trainer._spice.sampler
    for step, picks in enumerate(run.result["picks"]):
        put_adapter(trainer.model, run.adapter(step))
        plan = sampler.schedule.pools(*divmod(step, setting.STEPS_PER_EPOCH))
        expected = []
        for scores, budget in zip(sampler.scorer.score(plan.pools), plan.budgets, strict=True):
            expected += select_pool(scores, budget, sampler.config).indices
            name = f"step{step}.pool{scores.pool}"
            [owner] = [found for found in run.scores if f"{name}.gram" in found]
            assert gram_error(owner[f"{name}.gram"], scores.gram) <= TOLERANCE
            torch.testing.assert_close(owner[f"{name}.norms"], scores.gradient_norms, rtol=TOLERANCE, atol=0.0)
        assert picks == expected, f"picks of step {step}"


def test_sample_gradients_are_those_of_one_process(run: Run, tmp_path: Path) -> None:
    trainer = setting.single_trainer(run.model_folder, tmp_path, spice={"information": "diagonal"})
    trainer._spice.begin_run()
    sampler = trainer._spice.sampler
    largest = 0.0
    for scores in sampler.scorer.score(sampler.schedule.pools(0, 0).pools):
        expected = scores.gradients.double() * scores.row_weights[:, None]
        [found] = [part for part in run.scores if f"diagonal.step0.pool{scores.pool}.gradients" in part]
        error = (found[f"diagonal.step0.pool{scores.pool}.gradients"] - expected).norm(dim=1) / expected.norm(dim=1)
        largest = max(largest, float(error.max()))
    assert largest <= TOLERANCE


def test_training_is_bit_identical_to_training_on_the_same_picks_without_scoring(run: Run) -> None:
    for result in run.results:
        assert result["change_in_training"] > 1e-3, "nothing was trained, so nothing was compared"
        assert result["scored_against_replayed"] == 0.0
        assert result["losses_equal"] and result["rng_equal"]
    assert trained_indices(run.folder / "replayed") == run.result["picks"]


def test_resuming_goes_on_bit_identically(run: Run) -> None:
    for result in run.results:
        assert result["scored_against_resumed"] == 0.0 and result["resumed_losses_equal"]
    for name in ("selections", "pools", "trained"):
        assert read_records(run.folder / "resumed", name) == read_records(run.folder / "scored", name)
