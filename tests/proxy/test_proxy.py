"""A proxy scores instead of the target, learns from what it picked, and changes nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from spice_trainer import ProxyModel, SpiceConfig, SpiceSampler, attach_spice
from spice_trainer.data.rows import collate_row
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import UnsupportedModelError
from spice_trainer.proxy.learner import AdapterLearner
from spice_trainer.scoring.scorer import GradientScorer
from tests.runs.test_side_effects import random_state
from tests.support.models import add_lora, tiny_lora_model, tiny_model
from tests.support.scorers import make_learner
from tests.support.trainers import (
    SETTINGS,
    collate,
    make_sft_trainer,
    make_trainer,
    read_records,
    same_weights,
    tiny_dataset,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

pytestmark = pytest.mark.oldest

LEARNING_RATE = 1e-2
# AdamW as the proxy's own, at a constant rate: what makes target and proxy take the same steps.
SAME_OPTIMIZER = {"lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0}


def make_proxied(output_dir: Path, proxy: ProxyModel, *, spice: dict[str, Any] | None = None, **options: Any) -> Any:
    trainer = make_trainer(output_dir, **options)
    attach_spice(trainer, SpiceConfig(**(SETTINGS | (spice or {}))), proxy=proxy)
    return trainer


@pytest.mark.parametrize("loss", [{}, {"label_smoothing_factor": 0.3}], ids=["plain", "smoothed"])
def test_a_copy_of_the_target_picks_what_the_target_picks(loss: dict[str, float], tmp_path: Path) -> None:
    # Both take the same optimizer steps, so the picks agree in every step, not only in the first.
    alone = make_trainer(tmp_path / "alone", spice={}, **SAME_OPTIMIZER, **loss)
    proxy = ProxyModel(copy.deepcopy(alone.model), learning_rate=LEARNING_RATE)
    alone.train()
    trainer = make_proxied(tmp_path / "proxied", proxy, **SAME_OPTIMIZER, **loss)
    trainer.train()
    picks = trained_indices(tmp_path / "alone")
    assert trained_indices(tmp_path / "proxied") == picks and len(picks) == 6
    # The learner's step is the Trainer's own, to rounding.
    learned, trained = trainable_weights(proxy.model), trainable_weights(trainer.model)
    assert learned.keys() == trained.keys()
    for name in learned:
        torch.testing.assert_close(learned[name], trained[name], rtol=1e-4, atol=1e-6)
    assert not same_weights(learned, trainable_weights(tiny_lora_model())), "the proxy learned nothing"


@pytest.mark.parametrize("update_every", [1, 2, 5, 50])
def test_updates_come_every_so_many_cycles(tmp_path: Path, update_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[list[int]] = []
    learn = AdapterLearner.learn

    def watched(self: AdapterLearner, rows: Any) -> Any:
        learned.append([row.index for row in rows])
        return learn(self, rows)

    monkeypatch.setattr(AdapterLearner, "learn", watched)
    proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE, update_every=update_every)
    before = trainable_weights(proxy.model)
    make_proxied(tmp_path, proxy).train()
    picks = trained_indices(tmp_path)
    assert learned == picks[update_every - 1 :: update_every]
    assert same_weights(before, trainable_weights(proxy.model)) == (not learned)


def test_replayed_epochs_neither_score_nor_learn(tmp_path: Path) -> None:
    proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)
    trainer = make_proxied(tmp_path, proxy, spice={"selection_epochs": 1}, num_train_epochs=2)
    trainer.train()
    assert trainer._spice.sampler.selector.scorer.learner.num_updates == 6
    assert len(trained_indices(tmp_path)) == 12


def test_a_learning_rate_of_zero_keeps_the_proxy(tmp_path: Path) -> None:
    proxy = ProxyModel(tiny_lora_model(), learning_rate=0.0)
    before = trainable_weights(proxy.model)
    make_proxied(tmp_path, proxy, max_steps=2).train()
    assert same_weights(before, trainable_weights(proxy.model))


def test_training_is_untouched_by_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout in target and proxy; the target trains bit for bit as on the same picks without any scoring."""
    from tests.support.replays import train_and_replay

    proxies: list[ProxyModel] = []

    def make(output_dir: Path) -> Any:
        proxies.append(ProxyModel(tiny_lora_model("qwen2", lora_dropout=0.5), learning_rate=LEARNING_RATE))
        proxies[-1].model.train()
        return make_proxied(output_dir, proxies[-1], lora_dropout=0.3, gradient_accumulation_steps=2)

    train_and_replay(make, tmp_path, monkeypatch, num_steps=3)
    learned, untouched = (trainable_weights(proxy.model) for proxy in proxies)
    assert not same_weights(learned, untouched)
    for module in proxies[0].model.modules():
        assert module.training and not module._forward_hooks
    assert all(parameter.grad is None for parameter in proxies[0].model.parameters())


def test_the_target_needs_no_adapter(tmp_path: Path) -> None:
    model = tiny_model()
    proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)
    trainer = make_proxied(tmp_path, proxy, model=model, max_steps=2, learning_rate=1e-4)
    trainer.train()
    assert len(trained_indices(tmp_path)) == 2


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_resume_is_bit_identical(tmp_path: Path, step: int) -> None:
    def build(output_dir: Path) -> tuple[Any, ProxyModel]:
        proxy = ProxyModel(tiny_lora_model(lora_dropout=0.5), learning_rate=LEARNING_RATE, update_every=2)
        options = {"save_strategy": "steps", "save_steps": 1, "lora_dropout": 0.3}
        return make_proxied(output_dir, proxy, spice={"proxy_check_pools": 3}, **options), proxy

    whole, whole_proxy = build(tmp_path / "whole")
    whole.train()
    resumed, proxy = build(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert same_weights(trainable_weights(resumed.model), trainable_weights(whole.model))
    assert same_weights(trainable_weights(proxy.model), trainable_weights(whole_proxy.model))
    for name in ("selections", "pools", "trained"):
        assert read_records(tmp_path / "resumed", name) == read_records(tmp_path / "whole", name)
    learners = [trainer._spice.sampler.selector.scorer.learner for trainer in (resumed, whole)]
    ours, theirs = (learner.state_dict() for learner in learners)
    assert same_weights(ours, theirs) and int(ours["num_updates"]) == 3


def test_resuming_with_another_proxy_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_proxied(tmp_path, ProxyModel(tiny_lora_model()), **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")

    other = make_proxied(tmp_path, ProxyModel(tiny_lora_model(r=2)), **options)
    with pytest.raises(ValueError, match=r"adapter of another proxy: 28 of its 28 weights .*Resume with the proxy"):
        other.train(resume_from_checkpoint=checkpoint)
    without = make_trainer(tmp_path, spice={}, **options)
    with pytest.raises(ValueError, match=r"selected with a proxy, .*Resume with the same `proxy`, or start a new"):
        without.train(resume_from_checkpoint=checkpoint)
    make_trainer(tmp_path / "plain", spice={}, **options).train()
    proxied = make_proxied(tmp_path / "plain", ProxyModel(tiny_lora_model()), **options)
    with pytest.raises(ValueError, match=r"selected without a proxy, .*Resume without `proxy`, or start a new"):
        proxied.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


def test_a_learning_step_equals_plain_autograd() -> None:
    """One AdamW step on the token-mean loss of all rows at once, clipped; whatever the micro-batches."""
    rows = [collate_row(index, row, collate) for index, row in enumerate(tiny_rows(7))]
    ours, theirs = tiny_lora_model(), tiny_lora_model()
    learner = make_learner(ours, tokens_per_batch=24, max_grad_norm=0.5)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    for _ in range(3):
        batch = collate(tiny_rows(7))
        logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], 0.5)
        assert norm > 0.5, "nothing was clipped"
        optimizer.step()
        optimizer.zero_grad()
        assert learner.learn(rows) == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, value in trainable_weights(theirs).items():
        torch.testing.assert_close(trainable_weights(ours)[name], value, rtol=1e-4, atol=1e-6)


def test_learning_leaves_no_trace() -> None:
    model = tiny_lora_model(lora_dropout=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    learner = make_learner(model, tokens_per_batch=64)
    before = random_state()
    rows = [collate_row(index, row, collate) for index, row in enumerate(tiny_rows(4))]
    learner.learn(rows)
    assert random_state() == before
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_not_learned(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_lora_model()
    learner = make_learner(model, tokens_per_batch=64)
    rows = [collate_row(index, row, collate) for index, row in enumerate(tiny_rows(2))]
    weight = model.base_model.model.lm_head.weight
    original = weight.detach().clone()
    weight.data.fill_(float("nan"))
    before = trainable_weights(model)
    assert learner.learn(rows) is None and learner.num_updates == 0
    assert same_weights(before, trainable_weights(model))
    assert "the proxy's gradient is not finite" in caplog.text
    weight.data.copy_(original)
    assert learner.learn(rows) is not None and learner.num_updates == 1
    assert learner.learn([]) is None


# Rows of the proxy's own


def test_rows_of_the_proxys_own_dataset_are_scored(tmp_path: Path) -> None:
    # The proxy's rows are others than the target's, so its picks are those of a run on its rows.
    others = tiny_dataset(seed=9)
    settings = {"gradient_normalization": "sqrt_tokens"}
    trainer = make_proxied(tmp_path / "one", ProxyModel(tiny_lora_model(), dataset=others), spice=settings)
    trainer.train()
    same = make_trainer(tmp_path / "two", spice=settings, train_dataset=others, max_steps=1)
    same.train()
    assert trained_indices(tmp_path / "one")[0] == trained_indices(tmp_path / "two")[0]
    plain = make_trainer(tmp_path / "three", spice=settings, max_steps=1)
    plain.train()
    assert trained_indices(tmp_path / "one")[0] != trained_indices(tmp_path / "three")[0]


def test_a_proxys_dataset_without_labels_is_refused(tmp_path: Path) -> None:
    rows = tiny_dataset().remove_columns("labels")
    words = (
        r"proxy's dataset has rows of \['attention_mask', 'input_ids'\], without labels\. Fix: .*data_collator=\.\.\."
    )
    with pytest.raises(ValueError, match=words):
        make_proxied(tmp_path, ProxyModel(tiny_lora_model(), dataset=rows))

    def copy_ids(rows: list[Any]) -> dict[str, Any]:
        return collate([row | {"labels": row["input_ids"]} for row in rows])

    make_proxied(tmp_path, ProxyModel(tiny_lora_model(), dataset=rows, data_collator=copy_ids), max_steps=1).train()


def test_a_proxy_larger_than_its_target_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_proxied(tmp_path, ProxyModel(add_lora(tiny_model(num_hidden_layers=3))))
    assert "SPICE: the proxy has 32,736 parameters, more than the 23,136" in caplog.text
    caplog.clear()
    make_proxied(tmp_path, ProxyModel(tiny_lora_model()))
    assert "more than" not in caplog.text


# What a ProxyModel refuses


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"This proxy cannot score\. .*get_peft_model\(model, LoraConfig"):
        ProxyModel(tiny_model().requires_grad_(False))
    frozen = tiny_lora_model()
    frozen.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"has no trainable parameter"):
        ProxyModel(frozen)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1e-4}, r"ProxyModel: learning_rate=-0\.0001 is not at least 0"),
        ({"learning_rate": "2e-4"}, r"ProxyModel: learning_rate='2e-4' is of type str"),
        ({"weight_decay": float("nan")}, r"ProxyModel: weight_decay=nan is not finite"),
        ({"max_grad_norm": -1}, r"ProxyModel: max_grad_norm=-1 is not at least 0"),
        ({"update_every": 0}, r"ProxyModel: update_every=0 is below 1: it counts cycles"),
        ({"update_every": 1.5}, r"ProxyModel: update_every=1\.5 is of type float"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyModel(tiny_lora_model(), **values)


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"ProxyModel needs a model, got str\. .*from_pretrained"):
        ProxyModel("org/model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"proxy must be a ProxyModel, got PeftModelForCausalLM"):
        SpiceSampler(SpiceConfig(), tiny_lora_model())  # type: ignore[arg-type]


def test_a_sampler_brings_its_own_proxy(tmp_path: Path) -> None:
    proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)
    sampler = SpiceSampler(SpiceConfig(**SETTINGS), proxy)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"brings its own proxy: pass it there"):
        attach_spice(trainer, sampler, proxy=proxy)
    attach_spice(trainer, sampler)
    trainer.train()
    assert trainer._spice.sampler.selector.scorer.learner.num_updates == 6


# Loaded by name


def test_a_proxy_is_loaded_by_name(tmp_path: Path) -> None:
    from tests.support.trainers import tiny_tokenizer

    tiny_model(hidden_size=16, intermediate_size=24).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    trainer = make_trainer(tmp_path / "one", model=tiny_lora_model())
    before = random_state()
    settings = SETTINGS | {
        "proxy_model_name_or_path": str(tmp_path / "small"),
        "proxy_learning_rate": 1e-3,
        "proxy_update_every": 2,
    }
    attach_spice(trainer, SpiceConfig(**settings))
    assert random_state() == before, "loading the proxy changed the run's random state"
    proxy = trainer._spice.sampler.proxy
    assert (proxy.learning_rate, proxy.update_every) == (1e-3, 2)
    adapter = proxy.model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (16, 32, 0.0)
    assert next(proxy.model.parameters()).shape[-1] == 16
    trainer.train()
    assert trainer._spice.sampler.selector.scorer.learner.num_updates == 3

    # The fresh adapter follows from the run's seed, as every process needs it.
    loaded = []
    for name in ("two", "three"):
        torch.manual_seed(len(loaded))
        again = make_trainer(tmp_path / name, model=tiny_lora_model())
        attach_spice(again, SpiceConfig(**settings))
        loaded.append(trainable_weights(again._spice.sampler.proxy.model))
    assert same_weights(loaded[0], loaded[1])
    assert not same_weights(loaded[0], trainable_weights(proxy.model)), "the first one has not learned"


def test_a_sampler_loads_the_proxy_that_its_settings_name(tmp_path: Path) -> None:
    from tests.support.trainers import tiny_tokenizer

    tiny_model().save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    config = SpiceConfig(**SETTINGS, proxy_model_name_or_path=str(tmp_path / "small"))
    sampler = SpiceSampler(config)
    attach_spice(make_trainer(tmp_path / "run"), sampler)
    assert isinstance(sampler.proxy, ProxyModel)
    bound = SpiceSampler(config)
    bound.bind(tiny_model(), tiny_dataset(), data_collator=collate, per_device_train_batch_size=4)
    assert isinstance(bound.proxy, ProxyModel)


def test_other_adapters_can_be_loaded(tmp_path: Path) -> None:
    from tests.support.trainers import tiny_tokenizer

    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    proxy = ProxyModel.from_pretrained(
        str(tmp_path),
        lora_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        model_kwargs={"dtype": torch.bfloat16},
        learning_rate=1e-5,
    )
    assert len(proxy.modules) == 4 and proxy.learning_rate == 1e-5
    assert proxy.model.get_base_model().dtype == torch.bfloat16
    assert len(proxy.processing_class) == 61


def test_scoring_with_a_proxy_needs_no_lockstep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded target's forwards are collectives; its proxy's are not."""
    monkeypatch.setattr(Processes, "of", classmethod(lambda cls, accelerator: cls(lockstep=True)))
    trainer = make_proxied(tmp_path, ProxyModel(tiny_lora_model()), spice={"proxy_check_pools": 1})
    trainer._spice.begin_run()
    selector = trainer._spice.sampler.selector
    assert not selector.scorer.processes.lockstep and not selector.scorer.learner.processes.lockstep
    assert (
        isinstance(selector.scorer.target_scorer, GradientScorer) and selector.scorer.target_scorer.processes.lockstep
    )


def test_a_proxy_that_trains_more_than_lora_is_refused() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedModelError, match=r"1 modules beside LoRA, such as '.*lm_head\..*modules_to_save"):
        ProxyModel(model)


# Compared with the target


def test_the_first_pools_are_compared_with_the_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="spice_trainer")
    alone = make_trainer(tmp_path / "alone", spice={})
    twin = ProxyModel(copy.deepcopy(alone.model), learning_rate=LEARNING_RATE)
    settings = {"proxy_check_pools": 2}
    trainer = make_proxied(tmp_path / "twin", twin, spice=settings, **SAME_OPTIMIZER)
    trainer.train()
    # A twin that takes the target's steps agrees in both pools.
    lines = read_records(tmp_path / "twin", "transfer")
    assert [(line["step"], line["pool"]) for line in lines] == [(0, 0), (1, 0)]
    for line in lines:
        assert line["overlap"] == 1.0 and line["num_shared"] == 4
        assert line["rank_correlation"] == pytest.approx(1.0) and line["retained"] == pytest.approx(1.0)
    assert (
        caplog.text.count("SPICE: on 2 pools the proxy's gains rank as the target's with a correlation of 1.00") == 1
    )
    logged = [entry for entry in trainer.state.log_history if "spice/proxy_overlap" in entry]
    assert len(logged) == 2 and all(entry["spice/proxy_retained"] == pytest.approx(1.0) for entry in logged)
    costs = read_records(tmp_path / "twin", "costs")
    assert [line["seconds_checking"] > 0 for line in costs] == [True, True, False, False, False, False]

    other = ProxyModel(tiny_lora_model(seed=5), learning_rate=LEARNING_RATE)
    make_proxied(tmp_path / "other", other, spice=settings, max_steps=2).train()
    assert any(line["overlap"] < 1 for line in read_records(tmp_path / "other", "transfer"))


def test_comparing_changes_no_pick(tmp_path: Path) -> None:
    picks, weights = [], []
    for name, number in (("without", 0), ("with", 3)):
        proxy = ProxyModel(tiny_lora_model(seed=5, lora_dropout=0.3), learning_rate=LEARNING_RATE)
        trainer = make_proxied(tmp_path / name, proxy, spice={"proxy_check_pools": number}, lora_dropout=0.3)
        trainer.train()
        picks.append(trained_indices(tmp_path / name))
        weights.append(trainable_weights(trainer.model) | trainable_weights(proxy.model))
    assert picks[0] == picks[1] and same_weights(*weights)


def test_the_log_says_who_scores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="spice_trainer")
    make_proxied(tmp_path, ProxyModel(tiny_lora_model()), max_steps=1).train()
    assert "A proxy of 23,136 parameters scores, with all 3,712 gradient numbers a sample (exact)" in caplog.text


# Another tokenizer


def other_tokenizer() -> Any:
    """The tiny tokenizer's words under other ids, and more of them."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1} | {f"w{number}": 99 - number for number in range(3, 61)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


@pytest.mark.parametrize("own_dataset", [False, True], ids=["raw_columns", "dataset"])
def test_a_proxy_of_another_tokenizer_reads_its_own_rows(tmp_path: Path, own_dataset: bool) -> None:
    from datasets import Dataset

    from spice_trainer.data.tokenized_rows import TokenizedRows

    rows = [
        {
            "prompt": " ".join(f"w{token}" for token in row["input_ids"][: row["labels"].count(-100)]),
            "completion": " " + " ".join(f"w{token}" for token in row["input_ids"][row["labels"].count(-100) :]),
        }
        for row in tiny_rows()
    ]
    raw = Dataset.from_list(rows)
    tokenizer, model = other_tokenizer(), add_lora(tiny_model(vocab_size=100))
    tokenized = TokenizedRows(raw, tokenizer)
    assert max(max(row["input_ids"]) for row in (tokenized[index] for index in range(55))) > 61
    extra: dict[str, Any] = {"dataset": [tokenized[index] for index in range(55)]} if own_dataset else {}
    proxy = ProxyModel(model, processing_class=tokenizer, learning_rate=LEARNING_RATE, **extra)
    trainer = make_sft_trainer(tmp_path, train_dataset=raw, max_steps=3)
    attach_spice(trainer, SpiceConfig(**SETTINGS), proxy=proxy)
    trainer.train()
    scorer = trainer._spice.sampler.scorer
    for index in (0, 17, 54):
        read = collate_row(index, scorer.rows.dataset[index], scorer.rows.collate)
        assert read.inputs["input_ids"][0].tolist() == tokenized[index]["input_ids"]
        assert read.labels[0].tolist() == tokenized[index]["labels"]
    first = trained_indices(tmp_path)[0]
    # The first picks are those of a run whose target is the proxy on the proxy's rows.
    same = make_trainer(
        tmp_path / "same",
        model=add_lora(tiny_model(vocab_size=100)),
        train_dataset=Dataset.from_list(
            [{**tokenized[index], "attention_mask": [1] * len(tokenized[index]["labels"])} for index in range(55)]
        ),
        spice={},
        max_steps=1,
    )
    same.train()
    assert first == trained_indices(tmp_path / "same")[0]


def test_another_tokenizer_without_raw_rows_is_refused(tmp_path: Path) -> None:
    proxy = ProxyModel(add_lora(tiny_model(vocab_size=100)), processing_class=other_tokenizer())
    trainer = make_sft_trainer(tmp_path)
    with pytest.raises(
        ValueError, match=r"no raw rows that the proxy's tokenizer could read, .*ProxyModel\(\.\.\., dataset"
    ):
        attach_spice(trainer, SpiceConfig(**SETTINGS), proxy=proxy)


def test_the_same_vocabulary_reads_the_targets_rows(tmp_path: Path) -> None:
    from tests.support.trainers import tiny_tokenizer

    proxy = ProxyModel(tiny_lora_model(), processing_class=tiny_tokenizer())
    trainer = make_sft_trainer(tmp_path)
    attach_spice(trainer, SpiceConfig(**SETTINGS), proxy=proxy)
    trainer._spice.begin_run()
    scorer = trainer._spice.sampler.scorer
    assert scorer.rows.dataset[3]["input_ids"] == tiny_rows()[3]["input_ids"]


# Elsewhere than in a Trainer, and in other precisions


def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)
    sampler = SpiceSampler(SpiceConfig(**SETTINGS), proxy)
    heard: list[tuple[int, ...]] = []
    sampler.add_listener(lambda selection: heard.append(selection.indices))
    loader = sampler.bind(tiny_model(), tiny_dataset(), data_collator=collate, per_device_train_batch_size=4)
    assert sum(1 for _ in loader) == 6
    make_proxied(tmp_path, ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE)).train()
    assert [list(indices) for indices in heard] == trained_indices(tmp_path)


def test_a_proxy_in_bf16(tmp_path: Path) -> None:
    model = add_lora(tiny_model().to(torch.bfloat16))
    assert {value.dtype for value in trainable_weights(model).values()} == {torch.float32}
    proxy = ProxyModel(model, learning_rate=LEARNING_RATE)
    before = trainable_weights(model)
    make_proxied(tmp_path, proxy, max_steps=3).train()
    assert len(trained_indices(tmp_path)) == 3 and not same_weights(before, trainable_weights(model))


def test_a_proxy_on_a_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, dtype="float32")
    model = add_lora(base)
    before = trainable_weights(model)
    make_proxied(tmp_path, ProxyModel(model, learning_rate=LEARNING_RATE), max_steps=3).train()
    assert len(trained_indices(tmp_path)) == 3 and not same_weights(before, trainable_weights(model))
