"""Training on streams: the stock Trainer's epochs and rows, exact resume, and nothing moved by who looks on."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers.models import WordLevel
from transformers import TrainerCallback

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.data.references import hash_tokens
from spice_trainer.data.sample import SAMPLE_ROWS
from spice_trainer.sampling.run import SelectionRun
from spice_trainer.selection.results import StepSelection
from tests.support.models import VOCAB_SIZE, tiny_lora_model
from tests.support.streams import CountedStream, StatefulStream, tiny_stream
from tests.support.trainers import (
    SETTINGS,
    collate,
    make_sft_trainer,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    tiny_tokenizer,
    trainable_weights,
    trained_indices,
)

RECORDS = ("selections", "pools", "trained")
NUM_STEPS = 9
# Passes of 55 rows are six steps, the last of half a pool; two of pools of 10 a step are three.
OPTIONS: dict[str, Any] = {
    "lora_dropout": 0.3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": NUM_STEPS,
}


def records(output_dir: Path) -> list[bytes]:
    return [(output_dir / "spice" / f"{name}.jsonl").read_bytes() for name in RECORDS]


def epochs(output_dir: Path) -> list[int]:
    return [line["epoch"] for line in read_records(output_dir, "trained")]


class Replayed(CountedStream):
    """The rows that a run with SPICE trained on, pass for pass."""

    def __init__(self, output_dir: Path, rows: list[Any]) -> None:
        super().__init__(rows)
        lines = read_records(output_dir, "trained")
        self.picks = [
            [index for line in of_epoch for index in line["indices"]]
            for _, of_epoch in groupby(lines, key=lambda line: line["epoch"])
        ]

    def __iter__(self) -> Iterator[Any]:
        for index in self.picks[self.epoch]:
            yield self.rows[(index % len(self.rows) + self.epoch) % len(self.rows)]


@pytest.mark.oldest
def test_all_of_each_pool_trains_like_the_stock_trainer(tmp_path: Path) -> None:
    """Two passes and a half: losses, learning rates and epochs are those of the stock Trainer on the same rows."""
    rows = tiny_rows(16)
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 10}
    whole = {"pool_size": 4, "num_selected": 4}
    ours = make_trainer(tmp_path / "ours", spice=whole, train_dataset=CountedStream(rows), **options)
    ours.train()
    assert epochs(tmp_path / "ours") == [0] * 4 + [1] * 4 + [2] * 2
    stock = make_trainer(tmp_path / "stock", train_dataset=Replayed(tmp_path / "ours", rows), **options)
    stock.train()
    logs = [
        [(row["epoch"], row["loss"], row["learning_rate"]) for row in trainer.state.log_history if "loss" in row]
        for trainer in (ours, stock)
    ]
    torch.testing.assert_close(*map(torch.tensor, logs), rtol=0, atol=1e-6)
    assert len(logs[0]) == 10
    assert (ours.state.num_train_epochs, ours.state.max_steps) == (stock.state.num_train_epochs, 10)
    weights = trainable_weights(stock.model)
    for name, value in trainable_weights(ours.model).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_passes", [1, 10**9], ids=["finite", "without end"])
def test_each_row_is_read_once(num_passes: int, tmp_path: Path) -> None:
    stream = CountedStream(num_passes=num_passes)
    trainer = make_trainer(tmp_path, spice={}, train_dataset=stream, **OPTIONS)
    assert sum(stream.reads) <= 64
    stream.reads.clear()
    trainer.train()
    # The pass that ends is asked for one row more, and the first rows were looked at.
    assert stream.reads == ([55, 30] if num_passes == 1 else [90])
    assert sorted(sum((line["candidates"] for line in read_records(tmp_path, "pools")), [])) == list(
        range(85 if num_passes == 1 else 90)
    )
    # Rows are held as long as they are needed.
    assert len(trainer._spice.sampler.schedule.rows.held) <= 2 * 10


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Uninterrupted runs with a checkpoint after every step, each trained once."""
    finished: dict[str, tuple[Path, dict[str, Any]]] = {}

    def whole(kind: str) -> tuple[Path, dict[str, Any]]:
        if kind not in finished:
            output_dir = tmp_path_factory.mktemp("whole")
            saving = {"save_strategy": "steps", "save_steps": 1}
            trainer = make_trainer(output_dir, spice={}, train_dataset=STREAMS[kind](), **OPTIONS | saving)
            trainer.train()
            assert epochs(output_dir) == [0] * 6 + [1] * 3
            finished[kind] = output_dir, trainable_weights(trainer.model)
        return finished[kind]

    return whole


STREAMS: dict[str, Callable[[], Any]] = {
    "datasets": tiny_stream,
    "shuffle buffer": lambda: tiny_stream(buffer_size=16),
    "without a state": CountedStream,
    "with a state": StatefulStream,
}


@pytest.mark.parametrize("step", [1, 5, 6, 7])
@pytest.mark.parametrize("kind", STREAMS)
def test_resuming_equals_the_uninterrupted_run(
    kind: str, step: int, tmp_path: Path, whole_runs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    whole, weights = whole_runs(kind)
    shutil.copytree(whole, tmp_path / "run")
    stream = STREAMS[kind]()
    trainer = make_trainer(tmp_path / "run", spice={}, train_dataset=stream, **OPTIONS)
    if isinstance(stream, CountedStream):
        stream.reads.clear()
    with caplog.at_level(logging.INFO, logger="spice_trainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert same_weights(trainable_weights(trainer.model), weights)
    assert records(tmp_path / "run") == records(whole)
    assert "gives other rows" not in caplog.text
    # A buffer's rows are in no state, so what came before is read again; a pass begins without that.
    assert ("does not lead to" in caplog.text) == (kind == "shuffle buffer" and step in (5, 6))
    assert ("reading past" in caplog.text) == (kind in ("shuffle buffer", "without a state") and step in (5, 6))
    if isinstance(stream, CountedStream):
        within = {1: 55, 5: 15, 6: 5} if kind == "with a state" else {1: 55, 5: 55, 6: 55}
        assert stream.reads == [SAMPLE_ROWS, *([within[step]] if step in within else []), 30]


def test_resuming_a_run_that_had_ended(tmp_path: Path, whole_runs: Any) -> None:
    """More steps than it was to have: they go on in the same pass."""
    options = OPTIONS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, spice={}, train_dataset=tiny_stream(), **options).train()
    trainer = make_trainer(tmp_path, spice={}, train_dataset=tiny_stream(), **OPTIONS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    candidates, whole = (
        [(line["epoch"], line["candidates"]) for line in read_records(folder, "pools")]
        for folder in (tmp_path, whole_runs("datasets")[0])
    )
    assert candidates == whole
    again = make_trainer(tmp_path, spice={}, train_dataset=tiny_stream(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4 and len(read_records(tmp_path, "trained")) == 4


def test_ignore_data_skip_begins_the_pass_anew(tmp_path: Path, whole_runs: Any) -> None:
    shutil.copytree(whole_runs("datasets")[0], tmp_path / "run")
    options = OPTIONS | {"ignore_data_skip": True}
    trainer = make_trainer(tmp_path / "run", spice={}, train_dataset=tiny_stream(), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    lines = read_records(tmp_path / "run", "pools")
    assert lines[8]["candidates"] == list(range(55, 65)) and lines[8]["epoch"] == 1


def test_a_stream_in_another_order_is_said(tmp_path: Path, whole_runs: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its first rows are the same; those before the checkpoint are not."""
    shutil.copytree(whole_runs("without a state")[0], tmp_path / "run")
    rows = tiny_rows()
    trainer = make_trainer(
        tmp_path / "run", spice={}, train_dataset=CountedStream(rows[:20] + rows[:19:-1]), **OPTIONS
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert "gives other rows than those before the checkpoint" in caplog.text
    shutil.copytree(whole_runs("without a state")[0], tmp_path / "other")
    other = make_trainer(tmp_path / "other", spice={}, train_dataset=CountedStream(rows[::-1]), **OPTIONS)
    with pytest.raises(ValueError, match="dataset_fingerprint was"):
        other.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4"))


class StopEpochs(TrainerCallback):
    """Leaves the first pass after a step, of fewer rows than were looked at beforehand, and the next after two."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step in (1, 3)


def test_passes_that_are_left_early(tmp_path: Path) -> None:
    options = OPTIONS | {"callbacks": [StopEpochs()], "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path / "whole", spice={}, train_dataset=tiny_stream(), **options).train()
    assert epochs(tmp_path / "whole") == [0] + [1] * 2 + [2] * 6
    assert [line["candidates"][0] for line in read_records(tmp_path / "whole", "pools")] == list(range(0, 90, 10))
    for step in (1, 2, 3):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"run{step}"))
        trainer = make_trainer(folder, spice={}, train_dataset=tiny_stream(), **options)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert records(folder) == records(tmp_path / "whole")


class LookOn(TrainerCallback):
    """Walks loaders in every event that there is."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[int] = []

    def look(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        self.seen.append(len(list(train_dataloader)) + len(list(self.trainer.get_train_dataloader())))
        copy.deepcopy(train_dataloader)

    on_train_begin = on_epoch_begin = on_step_end = on_epoch_end = look

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(args, state, control, **kwargs)
        loader = kwargs["train_dataloader"]
        picks = loader.dataset.__getitems__(self.trainer._spice.sampler.run.pending.indices)
        shown = [ids[ids != 0].tolist() for batch in loader for ids in batch["input_ids"]]
        assert shown == [row["input_ids"] for row in picks]


@pytest.mark.parametrize("kind", ["datasets", "without a state"])
def test_looking_on_moves_nothing(kind: str, tmp_path: Path, whole_runs: Any) -> None:
    callback = LookOn()
    trainer = make_trainer(tmp_path, spice={}, train_dataset=STREAMS[kind](), callbacks=[callback], **OPTIONS)
    callback.trainer = trainer
    # Before a run it is a pass of the stream, from its beginning each time.
    loader = trainer.get_train_dataloader()
    assert len(list(loader)) == len(list(loader)) == 6 * 2
    with pytest.raises(TypeError):
        len(loader)
    trainer.train()
    assert same_weights(trainable_weights(trainer.model), whole_runs(kind)[1])
    assert records(tmp_path) == records(whole_runs(kind)[0])
    # Within one it is the step that trains, or was the last to.
    assert set(callback.seen) == {4}


def test_scoring_leaves_no_trace(tmp_path: Path, whole_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the picks fixed beforehand, a run without scoring is the run with it bit for bit."""
    picks = trained_indices(whole_runs("datasets")[0])

    def recorded(self: SelectionRun, epoch: int, step_in_epoch: int) -> StepSelection:
        return StepSelection(step=self.global_step, epoch=epoch, indices=tuple(picks[self.global_step]))

    monkeypatch.setattr(SelectionRun, "_score_step", recorded)
    trainer = make_trainer(tmp_path, spice={}, train_dataset=tiny_stream(), **OPTIONS)
    trainer.train()
    assert same_weights(trainable_weights(trainer.model), whole_runs("datasets")[1])


def test_a_stream_shorter_than_a_pool(tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 3}
    make_trainer(tmp_path, spice={}, train_dataset=tiny_stream(5), **options).train()
    lines = read_records(tmp_path, "pools")
    assert [(line["epoch"], line["candidates"], line["num_selected"]) for line in lines] == [
        (epoch, list(range(5 * epoch, 5 * epoch + 5)), 2) for epoch in range(3)
    ]


def test_the_trainers_own_error_comes_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(tmp_path, spice={}, train_dataset=tiny_stream())


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_without_picks_borrows_a_row_of_the_last_one(step: int, tmp_path: Path) -> None:
    """Also where the run was resumed before it, or after it."""
    rows = tiny_rows(40)
    for row in rows[10:20]:
        row["labels"] = [-100] * len(row["labels"])
    options = OPTIONS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", spice={}, train_dataset=CountedStream(rows), **options)
    whole.train()
    assert [len(picks) for picks in trained_indices(tmp_path / "whole")] == [4, 0, 4, 4]
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", spice={}, train_dataset=CountedStream(rows), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert same_weights(trainable_weights(trainer.model), trainable_weights(whole.model))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


class Unreadable(CountedStream):
    """A file that ends too early."""

    def __iter__(self) -> Iterator[Any]:
        for number, row in enumerate(super().__iter__()):
            if number == 37:
                raise OSError("the connection was closed")
            yield row


def test_a_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, spice={}, train_dataset=Unreadable(), **OPTIONS)
    with pytest.raises(OSError, match="the connection was closed") as caught:
        trainer.train()
    assert "reading row 37 of the training dataset (Unreadable)" in caught.value.__notes__[0]


def test_a_collator_that_takes_rows_apart(tmp_path: Path, whole_runs: Any) -> None:
    def popping(rows: list[dict[str, Any]]) -> Any:
        return collate([{key: row.pop(key) for key in list(row)} for row in rows])

    trainer = make_trainer(tmp_path, spice={}, train_dataset=CountedStream(), data_collator=popping, **OPTIONS)
    trainer.train()
    assert records(tmp_path) == records(whole_runs("without a state")[0])


@pytest.mark.parametrize("overlap_scoring", [False, True])
def test_a_proxy(overlap_scoring: bool, tmp_path: Path) -> None:
    """Scoring ahead reads ahead, over the end of a pass too; on resume rows are those of the uninterrupted run."""
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 1}

    def train(folder: Path, stream: Any, **resume: Any) -> Any:
        trainer = make_trainer(folder, train_dataset=stream, **options)
        proxy = ProxyModel(tiny_lora_model(seed=1))
        attach_spice(trainer, SpiceConfig(**SETTINGS, overlap_scoring=overlap_scoring), proxy=proxy, verify=False)
        trainer.train(**resume)
        return trainable_weights(trainer.model)

    stream = CountedStream()
    whole = train(tmp_path / "whole", stream)
    assert epochs(tmp_path / "whole") == [0] * 6 + [1] * 3
    for step in (5, 6, 7):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"run{step}"))
        checkpoint = str(folder / f"checkpoint-{step}")
        assert same_weights(train(folder, CountedStream(), resume_from_checkpoint=checkpoint), whole)
        assert records(folder) == records(tmp_path / "whole")


def streamed_texts() -> IterableDataset:
    """The tiny rows as texts, with ids."""
    rows = [
        {"id": f"row {number}", "text": " ".join(f"w{token}" for token in row["input_ids"])}
        for number, row in enumerate(tiny_rows())
    ]
    return Dataset.from_list(rows).to_iterable_dataset()


def check_ids(output_dir: Path) -> None:
    lines = read_records(output_dir, "selections")
    assert [line["id"] for line in lines] == [f"row {line['index'] % 55}" for line in lines]


def test_sft_trainer_on_streamed_texts(tmp_path: Path) -> None:
    """Prepared row by row as they are read; the id column stays."""
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 5}
    whole = make_sft_trainer(tmp_path / "whole", spice={}, train_dataset=streamed_texts(), **options)
    whole.train()
    check_ids(tmp_path / "whole")
    assert epochs(tmp_path / "whole") == [0] * 6 + [1] * 3
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    resumed = make_sft_trainer(tmp_path / "run", spice={}, train_dataset=streamed_texts(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert same_weights(trainable_weights(resumed.model), trainable_weights(whole.model))
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_proxy_with_another_tokenizer_reads_the_texts(tmp_path: Path) -> None:
    """The same words under other ids: the proxy scores its own tokens, and the records refer to the stream's rows."""
    tokenizer = tiny_tokenizer()
    words = {word: 2 + VOCAB_SIZE - id if id > 2 else id for word, id in tokenizer.get_vocab().items()}
    tokenizer.backend_tokenizer.model = WordLevel(words, unk_token="<pad>")
    assert tokenizer.get_vocab() == words
    trainer = make_sft_trainer(tmp_path, train_dataset=streamed_texts(), **OPTIONS)
    proxy = ProxyModel(tiny_lora_model(), processing_class=tokenizer)
    attach_spice(trainer, SpiceConfig(**SETTINGS), proxy=proxy, verify=False)
    trainer.train()
    check_ids(tmp_path)
    first = read_records(tmp_path, "selections")[0]
    ids = [2 + VOCAB_SIZE - token for token in tiny_rows()[first["index"]]["input_ids"]]
    assert first["token_hash"] in (hash_tokens(ids), hash_tokens([*ids, tokenizer.eos_token_id]))


def test_validation_rows_may_be_a_stream(tmp_path: Path) -> None:
    """They are held, as every step compares with them; the trainer's own evaluation reads the stream."""
    picks = []
    for name, rows in (("rows", tiny_dataset(6, seed=1)), ("stream", tiny_dataset(6, seed=1).to_iterable_dataset())):
        options = {"eval_dataset": rows, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 3}
        trainer = make_trainer(tmp_path / name, spice={"strategy": "less", "validation_rows": 6}, **options)
        trainer.train()
        picks.append(trained_indices(tmp_path / name))
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert losses
    assert picks[0] == picks[1]
