"""Selection with no target training: pick a tenth once, then train on it with whatever trains.

    dataset ─ pools ─ the selector's LoRA gradients ─ picks ─┬─ the selector learns from them (as in the paper)
                                                             └─ records ─ manifest ─ dataset, JSONL, LLaMA-Factory

One pass over the data: every row is a candidate once. The result does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from spice_trainer.config import SpiceConfig
from spice_trainer.data.checks import check_token_ids
from spice_trainer.data.fingerprints import fingerprint_dataset
from spice_trainer.data.reading import read_rows
from spice_trainer.data.sample import RowSample
from spice_trainer.data.validation_sets import checked_sets, named_sets
from spice_trainer.distributed import Processes, check_agreement
from spice_trainer.gradients.verification import verify_gradients
from spice_trainer.proxy.model import ProxyModel
from spice_trainer.sampling.build import build_selector
from spice_trainer.sampling.sampler import SpiceSampler
from spice_trainer.sampling.schedule import build_schedule
from spice_trainer.scoring.memory import check_memory
from spice_trainer.scoring.passes import input_device
from spice_trainer.scoring.runtime import Runtime
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.subset.export import DATASET_FOLDER, check_name, export_subset
from spice_trainer.subset.manifest import SubsetManifest
from spice_trainer.subset.model import describe_model, without_fingerprint
from spice_trainer.subset.run import SubsetRun
from spice_trainer.utils.fields import WholeNumber
from spice_trainer.utils.logging import show_messages
from spice_trainer.utils.random import preserved_random_state

if TYPE_CHECKING:
    from datasets import Dataset

# The paper's T.
POOLS_PER_STEP = 10
SELECTOR_FOLDER = "selector"


@dataclass(frozen=True)
class SelectedSubset:
    """What [`select_subset`] selected.

    Args:
        dataset (`datasets.Dataset`):
            The selected rows with all their columns, in the order of picking.
        manifest (`SubsetManifest`):
            Which rows of the given dataset they are (`manifest.indices`), by what they were picked, and from which
            data.
        output_dir (`pathlib.Path`):
            The folder that holds both, and what else was written.
    """

    dataset: Dataset
    manifest: SubsetManifest
    output_dir: Path


def select_subset(
    model: nn.Module | ProxyModel,
    dataset: Any,
    config: SpiceConfig | None = None,
    *,
    output_dir: str | os.PathLike[str],
    processing_class: Any = None,
    validation_dataset: Any = None,
    data_collator: Any = None,
    samples_per_step: int | None = None,
    max_length: int | None = 1024,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    seed: int = 42,
    save_steps: int = 10,
    name: str = "spice_subset",
    overwrite: bool = False,
    verify: bool = True,
    accelerator: Accelerator | None = None,
) -> SelectedSubset:
    """Selects a subset of a dataset with a model that learns from its own picks, and writes it down.

    Interrupted, it continues from its last state when called again with the same arguments; finished, it returns what
    it found. Under `accelerate launch` all processes call it, score together, and return the same.

    Rows are scored, and the model learns, by the cross-entropy of their label tokens.

    Args:
        model (`torch.nn.Module` or [`ProxyModel`]):
            The selector: a causal language model with a trainable LoRA adapter. A [`ProxyModel`] brings its own
            optimizer settings; for a plain model they are `config.proxy_learning_rate` and
            `config.proxy_update_every`.
        dataset (`datasets.Dataset` or sequence):
            Rows to select from, raw (`messages`, `prompt` and `completion`, or `text`, as TRL's SFT reads them) or
            tokenised (`input_ids` and `labels`).
        config ([`SpiceConfig`], *optional*):
            Settings. Defaults to `SpiceConfig()`: 12 of every 120.
        output_dir (`str` or `os.PathLike`):
            Where the subset, its manifest, the records and the states go.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            The selector's tokenizer. Needed for raw rows.
        validation_dataset (`datasets.Dataset`, sequence, or `dict` of these, *optional*):
            Rows like those of `dataset` that the model shall do well on, in one set or several, for rules that aim:
            the first `config.validation_rows` of each.
        data_collator (`Callable`, *optional*):
            Collates tokenised rows. Defaults to right padding.
        samples_per_step (`int`, *optional*):
            Rows picked between two updates of the selector. Defaults to `pools_per_step` (10 if that is `None`) pools
            of `num_selected`, 120 as in the paper.
        max_length (`int`, *optional*, defaults to 1024):
            Tokens that a raw row is cut to while scoring; the written rows stay whole.
        completion_only_loss (`bool`, *optional*):
            As in `SFTConfig`: whether only completions are label tokens. `None` does so for prompts and completions.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            As in `SFTConfig`: whether only the assistant's turns of `messages` are label tokens.
        seed (`int`, *optional*, defaults to 42):
            Seed of the pools, unless `config.pool_seed` is set, and of the selector's dropout.
        save_steps (`int`, *optional*, defaults to 10):
            Steps between two states, from which an interrupted selection continues.
        name (`str`, *optional*, defaults to `"spice_subset"`):
            Name of the JSONL file and of LLaMA-Factory's entry.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to begin anew where `output_dir` holds another selection.
        verify (`bool`, *optional*, defaults to `True`):
            Whether to compare the batched sample gradients of two short rows with autograd's first.
        accelerator (`accelerate.Accelerator`, *optional*):
            Gives device, precision and processes. Defaults to a new one.

    Returns:
        [`SelectedSubset`]: The rows, their manifest, and the folder. Beside `dataset/` and the manifest it holds
        `<name>.jsonl`, `dataset_info.json` for LLaMA-Factory, and the records under `spice/`.

    Raises:
        TypeError: If `model` or `config` is of another type.
        ValueError: If something rules the selection out; the message says what and how to fix it.
        FileExistsError: If `output_dir` holds another subset and `overwrite` is `False`.
        RuntimeError: If processes were launched together but don't see each other.
        ImportError: Without the library `datasets`.

    Example:
    ```python
    >>> subset = select_subset(model, dataset, SpiceConfig(), output_dir="subset", processing_class=tokenizer)
    >>> SFTTrainer(model="Qwen/Qwen2.5-7B", args=args, train_dataset=subset.dataset).train()
    ```
    """
    config = SpiceConfig() if config is None else config
    if not isinstance(config, SpiceConfig):
        raise TypeError(f"config must be a SpiceConfig, got {type(config).__name__}.")
    # Nothing trains beside the selector, and there is no other model to compare it with.
    config = replace(config, overlap_scoring=False, proxy_check_pools=0)
    if config.score_once_after:
        raise ValueError(
            f"SpiceConfig: score_once_after={config.score_once_after} begins with steps on random rows, which would "
            "be in the subset. Fix: set score_once_after=0, which scores every row once at the weights that the "
            "selector has, or train the selector beforehand."
        )
    # Not after hours of selecting.
    if find_spec("datasets") is None:
        raise ImportError("select_subset writes a `datasets.Dataset`. Fix: pip install spice-trainer[sft].")
    check_name(name)
    WholeNumber(1, "it counts steps between two states")("select_subset", "save_steps", save_steps)
    WholeNumber(0, "seeds are counted from 0")("select_subset", "seed", seed)
    if samples_per_step is not None:
        WholeNumber(1, "a step picks at least one row")("select_subset", "samples_per_step", samples_per_step)
    if max_length is not None:
        WholeNumber(1, "a row keeps at least one token")("select_subset", "max_length", max_length)
    with _accelerator_for(accelerator) as accelerator:
        _check_launch(accelerator)
        processes = Processes.of(accelerator)
        show_messages(is_main=processes.is_main)
        proxy = model if isinstance(model, ProxyModel) else _as_proxy(model, config)
        _move(proxy.model, accelerator.device)
        with processes.failing_together("preparing the selection"):
            read = partial(
                read_rows,
                model=proxy.model,
                processing_class=proxy.processing_class if processing_class is None else processing_class,
                data_collator=data_collator,
                max_length=max_length,
                completion_only=completion_only_loss,
                assistant_only=assistant_only_loss,
            )
            rows = read(dataset)
            given = {} if validation_dataset is None else named_sets(validation_dataset)
            sets = {name: read(rows) for name, rows in given.items()}
            with preserved_random_state(accelerator.device):
                validation = checked_sets(sets, rows.dataset, config.validation_rows)
            if samples_per_step is None:
                samples_per_step = (config.pools_per_step or POOLS_PER_STEP) * config.num_selected
            schedule = build_schedule(
                config,
                len(dataset),
                per_device_train_batch_size=samples_per_step,
                num_slots=1,
                token_normalized=True,
                drop_last=False,
                seed=seed,
            )
            runtime = Runtime(lambda: proxy.model, schedule.seed, processes=processes, autocast=accelerator.autocast)
            selector = build_selector(config, schedule, runtime, rows, proxy=proxy, validation=validation)
            identity = _identify(proxy, dataset, config, samples_per_step=samples_per_step, seed=schedule.seed)
            if validation:
                found = [fingerprint_dataset(rows) for rows in given.values()]
                identity["validation_fingerprint"] = found[0] if len(found) == 1 else found
        seen = {"the number of rows": len(dataset), "the settings": config, "the seed": schedule.seed}
        seen["the fingerprint of the rows' content"] = identity["dataset_fingerprint"]
        seen["the fingerprint of the validation rows"] = identity.get("validation_fingerprint")
        check_agreement(processes, seen)
        sampler = SpiceSampler(config, proxy)
        sampler.prepare(schedule, selector, total_steps=schedule.steps_per_epoch)
        described = processes.broadcast(describe_model(proxy.model) if processes.is_main else {})
        # A fresh adapter is drawn anew when a selection is continued, and comes from its state.
        identity["model"] = without_fingerprint(described)
        output_dir = Path(output_dir)
        run = SubsetRun(sampler, output_dir, processes, identity, described, save_steps, overwrite)
        with processes.failing_together("looking into output_dir"):
            is_done = processes.is_main and run.is_done()
        if not processes.broadcast(is_done):
            with processes.failing_together("verifying the sample gradients"):
                check_selection(
                    selector.gradient_scorer,
                    config,
                    verify=verify and processes.is_main,
                    autocast=accelerator.autocast,
                )
            run.run()
            with processes.failing_together("writing the subset"):
                if processes.is_main:
                    export_subset(dataset, run.manifest(), output_dir, name=name, overwrite=overwrite)
                    # The embedding is as it was; looking for it would ask the hub.
                    proxy.model.save_pretrained(output_dir / SELECTOR_FOLDER, save_embedding_layers=False)  # type: ignore[operator]
            run.finish()
    from datasets import load_from_disk

    return SelectedSubset(
        load_from_disk(os.fspath(output_dir / DATASET_FOLDER)), SubsetManifest.load(output_dir), output_dir
    )


@contextmanager
def _accelerator_for(given: Accelerator | None) -> Iterator[Accelerator]:
    """The user's, or one for this selection: its precision must not be that of a Trainer built afterwards."""
    if given is not None:
        yield given
        return
    # Reading it through AcceleratorState() would set it.
    is_first = not AcceleratorState._shared_state
    try:
        yield Accelerator()
    finally:
        if is_first:
            AcceleratorState._reset_state()


def _check_launch(accelerator: Accelerator) -> None:
    """Refuses processes that were launched together and would each select alone, into the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and accelerator.num_processes == 1:
        raise RuntimeError(
            f"{launched} processes were launched, but this one would select alone, and so would each of the others. "
            "On CPUs set ACCELERATE_USE_CPU=true, or pass accelerator=Accelerator(cpu=True), to select together."
        )


def _as_proxy(model: Any, config: SpiceConfig) -> ProxyModel:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"select_subset needs a model with a LoRA adapter, got {type(model).__name__}. Load it first, or write "
            "`ProxyModel.from_pretrained(name_or_path)`."
        )
    return ProxyModel(model, learning_rate=config.proxy_learning_rate, update_every=config.proxy_update_every)


def _move(model: nn.Module, device: torch.device) -> None:
    """Onto this process's device, unless the user placed the model (`device_map`, quantised weights)."""
    is_placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    if not is_placed and input_device(model).type != device.type:
        model.to(device)


def _identify(
    proxy: ProxyModel, dataset: Any, config: SpiceConfig, *, samples_per_step: int, seed: int
) -> dict[str, Any]:
    """What two selections have in common that pick the same."""
    return {
        "dataset_fingerprint": fingerprint_dataset(dataset),
        "samples_per_step": samples_per_step,
        "seed": seed,
        "learning_rate": proxy.learning_rate,
        "update_every": proxy.update_every,
        **config.to_dict(),
    }


def check_selection(
    scorer: GradientScorer,
    config: SpiceConfig,
    *,
    verify: bool,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Looks at some rows, the memory and two gradients before anything is selected."""
    rows = RowSample.read(scorer.rows.dataset, device=scorer.device).collate(scorer.rows.collate)
    if not any(row.num_label_tokens > 0 for row in rows):
        raise ValueError(
            f"None of {len(rows)} rows looked at has a label token (all labels are -100), so nothing could be "
            "scored. Look at the prompt masking and at `max_length`."
        )
    check_token_ids(rows, scorer.vocabulary)
    scorer.check_validation()
    check_memory(scorer, min(config.pool_size, len(scorer.rows.dataset)), config)
    if verify and config.takes_gradients:
        shortest = sorted((row for row in rows if row.num_label_tokens > 0), key=lambda row: row.num_tokens)[:2]
        verify_gradients(scorer.get_model(), scorer.modules, shortest, device=scorer.device, autocast=autocast)
