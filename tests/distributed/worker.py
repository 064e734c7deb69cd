"""What every process of a run does, under `accelerate launch --module tests.distributed.worker` or forked.

    worker CONFIG FOLDER DEVICE TASK [key=value ...]

Every task ends all processes with a barrier and `os._exit`: a stock DDP run on gloo aborts in one of four exits
("terminate called without an active exception", torch 2.13), after its work is done.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets.distributed import split_dataset_by_node
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, set_seed

import spice_trainer.distributed
from spice_trainer import ProxyModel, SpiceConfig, SpiceSampler, attach_spice, detach_spice, select_subset
from spice_trainer.sampling.run import SelectionRun
from spice_trainer.sampling.step_selector import StepSelector
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.selection.results import StepSelection
from tests.distributed import cpu_shims, setting
from tests.distributed.observers import LoaderWalk, ScoreWatch, WeightProbe
from tests.support.trainers import checkpointing_options, collate

WRAPPERS = {
    "multi_gpu": "DistributedDataParallel",
    "fsdp1": "FullyShardedDataParallel",
    "fsdp2": "FSDP",
    "deepspeed_zero1": "DeepSpeedEngine",
    "deepspeed_zero2": "DeepSpeedEngine",
    "deepspeed_zero3": "DeepSpeedEngine",
}


@dataclass(frozen=True)
class Worker:
    """One process of a run, and what it can do."""

    config: str
    folder: Path
    device: str
    options: Mapping[str, str]
    rank: int
    world_size: int

    def build(
        self, name: str, *, spice: dict[str, Any] | None = None, proxy: ProxyModel | None = None, **overrides: Any
    ) -> tuple[Trainer, WeightProbe]:
        """A trainer with SPICE, its arguments first, from the model every process loads."""
        if "checkpointing" in self.options:
            overrides |= checkpointing_options(use_reentrant=self.options["checkpointing"] == "reentrant")
        args = setting.arguments(
            self.folder / name, world_size=self.world_size, use_cpu=self.device == "cpu", **overrides
        )
        if self.config == "deepspeed_zero3":
            cpu_shims.partition_small_parameters(args)
        probe = WeightProbe()
        set_seed(args.seed)
        model = setting.load_model(Path(self.options["model"]), quantized="quantized" in self.options)
        is_quantized = any(type(module).__name__ == "Linear4bit" for module in model.modules())
        assert is_quantized == ("quantized" in self.options)
        # Loaded in shards from the start, as `zero3_init_flag` asks.
        assert any(hasattr(parameter, "ds_id") for parameter in model.parameters()) == (
            self.config == "deepspeed_zero3"
        )
        trainer = setting.make_trainer(model, args, spice=spice, proxy=proxy, callbacks=[probe])
        return trainer, probe

    def check_wrapper(self, trainer: Trainer) -> None:
        """Fails where a library fell back to something else than the configuration says, as many do silently."""
        assert (trainer.args.world_size, torch.distributed.get_world_size()) == (self.world_size, self.world_size)
        wrapper = type(trainer.model_wrapped).__name__
        assert wrapper.startswith(WRAPPERS[self.config]), f"{self.config} wraps the model in {wrapper}"
        is_checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        assert is_checkpointed == ("checkpointing" in self.options)
        parameters = list(trainer.model_wrapped.parameters())
        if self.config == "fsdp2":
            assert all(isinstance(parameter, DTensor) for parameter in parameters)
        elif self.config == "fsdp1":
            whole = sum(
                parameter.numel() for parameter in setting.load_model(Path(self.options["model"])).parameters()
            )
            assert sum(parameter.numel() for parameter in parameters) < (
                0.7 * whole if self.world_size > 1 else whole + 1
            )
        elif self.config.startswith("deepspeed"):
            assert trainer.model_wrapped.zero_optimization_stage() == int(self.config[-1])
            assert all(hasattr(parameter, "ds_id") for parameter in parameters) == (self.config[-1] == "3")
            if self.config[-1] == "3":
                assert sum(parameter.numel() for parameter in parameters) == 0

    def train(self, trainer: Trainer, probe: WeightProbe, **options: Any) -> list[dict[str, Tensor]]:
        """Trains, and returns the adapter before every step and after the last."""
        trainer.train(**options)
        self.check_wrapper(trainer)
        row = setting.dataset()[0]
        batch = {key: value.to(trainer.args.device) for key, value in collate([row]).items()}
        return [*probe.before_step, probe.read(trainer, batch)]

    def run_everything(self) -> dict[str, Any]:
        """Trains with scoring, resumes, scores with coordinates, trains with the picks replayed."""
        original = GradientScorer.score
        watch = ScoreWatch()
        watch.install()
        heard: list[list[int]] = []
        trainer, probe = self.build("scored")
        if self.rank == self.world_size - 1:
            trainer.add_callback(LoaderWalk(trainer))
        trainer._spice.sampler.add_listener(lambda selection: heard.append(list(selection.indices)))
        weights = self.train(trainer, probe)
        found = watch.tensors()
        GradientScorer.score = original
        states = torch.get_rng_state()

        resumed, probe = self.build("resumed")
        again = self.train(
            resumed, probe, resume_from_checkpoint=str(self.folder / "scored" / f"checkpoint-{setting.SAVED_STEP}")
        )

        watch = ScoreWatch()
        watch.install()
        # One step with the measure that needs the gradients' coordinates, from the initial weights.
        diagonal, probe = self.build("diagonal", spice={"information": "diagonal"}, max_steps=1, save_strategy="no")
        diagonal.train()
        found |= {f"diagonal.{key}": value for key, value in watch.tensors().items()}

        replay(heard)
        replayed, probe = self.build("replayed")
        without = self.train(replayed, probe)
        rng_equal = bool(torch.equal(states, torch.get_rng_state()))

        save_file(found, self.folder / f"scores.{self.rank}.safetensors")
        if self.rank == 0:
            flat = {f"step{step}.{name}": value for step, part in enumerate(weights) for name, value in part.items()}
            save_file({name: value.contiguous() for name, value in flat.items()}, self.folder / "weights.safetensors")
        return {
            "picks": heard,
            "change_in_training": difference(weights[:1], weights[-1:]),
            "scored_against_replayed": difference(weights, without),
            "losses_equal": losses(trainer) == losses(replayed),
            "rng_equal": rng_equal,
            "scored_against_resumed": difference(weights[setting.SAVED_STEP :], again),
            "scored_against_resumed_first": difference(weights[setting.SAVED_STEP :][:1], again[:1]),
            "resumed_losses_equal": losses(trainer) == losses(resumed),
        }

    def train_and_listen(self) -> dict[str, Any]:
        """Trains, or goes on from a checkpoint, perhaps one of another number of processes."""
        spice, args = (json.loads(self.options.get(name, "{}")) for name in ("spice", "args"))
        if "stream" in self.options:
            stream = setting.stream()
            if self.options["stream"] == "split":
                stream = split_dataset_by_node(stream, rank=self.rank, world_size=self.world_size)
            elif self.options["stream"] != "whole" and self.rank:
                # The first step's rows are those of the other process.
                stream = setting.OtherStream(self.options["stream"])
            elif self.options["stream"] != "whole":
                stream = setting.OtherStream("as it is")
            setting.dataset = lambda: stream
        proxy = setting.load_proxy(Path(self.options["proxy"]), seed=self.rank) if "proxy" in self.options else None
        trainer, _ = self.build("trained", spice=spice, proxy=proxy, **args)
        found = self.listen(trainer, resume_from_checkpoint=self.options.get("checkpoint"))
        learned = {}
        if proxy is not None:
            weights = {name: value for name, value in proxy.model.named_parameters() if value.requires_grad}
            learned = {name: sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in weights.items()}
        return found | {"learned": learned}

    def listen(self, trainer: Trainer, **options: Any) -> dict[str, Any]:
        """Trains; picks and losses of every step."""
        heard: list[list[int]] = []
        trainer._spice.sampler.add_listener(lambda selection: heard.append(list(selection.indices)))
        trainer.train(**options)
        self.check_wrapper(trainer)
        return {"picks": heard, "losses": losses(trainer)}

    def train_on_images(self) -> dict[str, Any]:
        """Trains a model that reads images as TRL does."""
        from tests.support.processors import make_image_trainer

        num_images = json.loads(self.options["num_images"])
        trainer = make_image_trainer(
            self.folder / "trained",
            self.options["architecture"],
            num_images=num_images,
            per_device_train_batch_size=4 // self.world_size,
        )
        if self.config == "deepspeed_zero3":
            cpu_shims.partition_small_parameters(trainer.args)
        return self.listen(trainer)

    def select(self) -> dict[str, Any]:
        """Selects a subset with no target training."""
        # A fresh adapter of each process's own; process 0's counts.
        proxy = setting.load_proxy(Path(self.options["proxy"]), seed=self.rank)
        config = SpiceConfig(**setting.SETTINGS)
        subset = select_subset(
            proxy,
            setting.dataset(),
            config,
            output_dir=self.folder / "subset",
            samples_per_step=setting.SAMPLES_PER_STEP,
            accelerator=Accelerator(cpu=self.device == "cpu"),
        )
        return {"rows": subset.dataset.to_list()}

    def fail(self) -> dict[str, Any]:
        """Trains until the last process fails, while it scores the first step after the checkpoint."""
        trainer, _ = self.build("failing", spice=json.loads(self.options.get("spice", "{}")))
        select_step = StepSelector.select

        def failing_select(selector: StepSelector, *args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step > setting.SAVED_STEP and self.rank == self.world_size - 1:
                scorer = selector.gradient_scorer
                if self.options["place"] == "collator":
                    scorer.rows = replace(scorer.rows, collate=self.die)
                else:
                    # Within the forward, where sharded weights are gathered from every process.
                    model = scorer.get_model()
                    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.act_fn"))
                    layer.forward = self.die
            return select_step(selector, *args, **kwargs)

        StepSelector.select = failing_select
        trainer.train()
        return {"steps": trainer.state.global_step}

    def see_other_rows(self) -> dict[str, Any]:
        """Rows of the same lengths as the other processes', whose content differs on the last one."""
        when, same = self.options["when"], setting.dataset()
        other = same.map(lambda row: {"input_ids": row["input_ids"][::-1]}) if self.rank else same
        if "map_style" in self.options:
            same, other = list(same), list(other)
        rows = same if when == "starting" else other
        setting.dataset = lambda: rows
        accelerator, model = Accelerator(cpu=True), Path(self.options["model"])
        config, trained = SpiceConfig(**setting.SETTINGS), 0
        error = ""
        try:
            if when == "binding":
                SpiceSampler(config).bind(
                    setting.load_model(model),
                    rows,
                    data_collator=collate,
                    per_device_train_batch_size=2,
                    accelerator=accelerator,
                )
            elif when == "selecting":
                select_subset(
                    setting.load_model(model), rows, config, output_dir=self.folder / "subset", accelerator=accelerator
                )
            else:
                trainer, _ = self.build("other")
                trainer.train_dataset = other
                trainer.train()
                trained = trainer.state.global_step
        except ValueError as caught:
            error = str(caught)
        return {"error": error, "trained": trained}

    def see_other_validation_rows(self) -> dict[str, Any]:
        """Validation rows of other content, or in another number, on the last process."""
        rows = setting.validation_rows()
        if self.rank and self.options["when"] == "number":
            rows = rows[1:]
        elif self.rank:
            rows[0] |= {"input_ids": rows[0]["input_ids"][::-1]}
        setting.validation_rows = lambda: rows
        try:
            self.build("other", spice={"strategy": "targeted_matching"})
        except ValueError as caught:
            return {"error": str(caught)}
        return {"error": ""}

    def freeze(self) -> dict[str, Any]:
        """Trains, and freezes the upper layer's adapter on the way, on every process or on the last alone."""
        ranks = range(self.world_size) if self.options["where"] == "everywhere" else [self.world_size - 1]
        # What is frozen gets no gradient, which DDP must be told to expect.
        trainer, _ = self.build("frozen", ddp_find_unused_parameters=True)
        if self.rank in ranks:
            trainer.add_callback(setting.Freeze())
        return self.listen(trainer) | {"layers": len(trainer._spice.sampler.scorer.modules)}

    def attach_on_one(self) -> dict[str, Any]:
        """Attaches on process 0 alone, as under `if trainer.is_world_process_zero():`."""
        self.wait_shortly()
        trainer, _ = self.build("attached")
        # Together they attach and detach as often as they like.
        detach_spice(trainer)
        attach_spice(trainer, SpiceConfig(**setting.SETTINGS)).detach()
        if self.rank == 0:
            attach_spice(trainer, SpiceConfig(**setting.SETTINGS))
        trainer.train()
        return {"steps": trainer.state.global_step}

    def wait_shortly(self) -> None:
        """Waits for seconds where a run waits for minutes."""
        spice_trainer.distributed.SECONDS_TO_NOTICE, spice_trainer.distributed.SECONDS_TO_COME = 2.0, 3.0

    def disagree(self) -> dict[str, Any]:
        """Does something on the last process alone, that others wait for or do not do."""
        self.wait_shortly()
        how, is_last = self.options["how"], self.rank == self.world_size - 1
        if how == "bind":
            accelerator = Accelerator(cpu=True)
            if not is_last:
                SpiceSampler(SpiceConfig(**setting.SETTINGS)).bind(
                    setting.load_model(Path(self.options["model"])),
                    setting.dataset(),
                    data_collator=collate,
                    per_device_train_batch_size=2,
                    accelerator=accelerator,
                )
            torch.distributed.barrier()
            return {}
        trainer, _ = self.build("disagreeing")
        if how == "detach" and is_last:
            detach_spice(trainer)
        if how == "break" and is_last:
            trainer.train_dataset = trainer.train_dataset.remove_columns("labels")
        trainer.train()
        return {"steps": trainer.state.global_step}

    def die(self, *args: Any, **kwargs: Any) -> Any:
        """Fails in the way asked for, and notes when."""
        (self.folder / "failed_at").write_text(str(time.time()))
        if self.options["way"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the user's own error")


def difference(first: Sequence[Mapping[str, Tensor]], second: Sequence[Mapping[str, Tensor]]) -> float:
    """Largest difference between the weights of two runs, 0 only if they are equal bit for bit."""
    assert len(first) == len(second) and all(a.keys() == b.keys() and a for a, b in zip(first, second, strict=True))
    return max(float((a[name] - b[name]).abs().max()) for a, b in zip(first, second, strict=True) for name in a)


def replay(steps: Sequence[Sequence[int]]) -> None:
    """Hands out recorded picks from now on; scoring is refused."""

    def recorded_step(self: SelectionRun, epoch: int, step_in_epoch: int) -> StepSelection:
        return StepSelection(step=self.global_step, epoch=epoch, indices=tuple(steps[self.global_step]))

    def refuse(self: GradientScorer, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("scored while replaying")

    SelectionRun._score_step = recorded_step
    GradientScorer.score = refuse


def losses(trainer: Trainer) -> list[float]:
    """The logged loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TASKS = {
    "all": Worker.run_everything,
    "train": Worker.train_and_listen,
    "images": Worker.train_on_images,
    "select": Worker.select,
    "fail": Worker.fail,
    "other_rows": Worker.see_other_rows,
    "other_validation_rows": Worker.see_other_validation_rows,
    "freeze": Worker.freeze,
    "attach_on_one": Worker.attach_on_one,
    "disagree": Worker.disagree,
}


def main(config: str, folder: str, device: str, task: str, *options: str) -> None:
    """Does the task and writes what it found, one file a process."""
    worker = Worker(
        config,
        Path(folder),
        device,
        dict(option.split("=", 1) for option in options),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    # Where every thread stands, should the run take too long.
    faulthandler.dump_traceback_later(setting.TIMEOUT - 20)
    if device == "cpu":
        cpu_shims.prepare(config)
    result = TASKS[task](worker) | {"world_size": worker.world_size}
    (worker.folder / f"{task}.{worker.rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
