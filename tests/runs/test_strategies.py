"""Every strategy in a Trainer's run: the picks of a slow oracle on autograd's numbers, and no work more."""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.config import STRATEGIES
from spice_trainer.data.references import hash_tokens
from spice_trainer.gradients.per_sample import SampleGradients
from spice_trainer.scoring.features import FeatureBuffer
from tests.subset.test_select import picks as subset_picks
from tests.subset.test_select import select
from tests.support import field_oracles
from tests.support import strategy_oracles as oracle
from tests.support.gradient_loop import looped_gradients
from tests.support.greedy_oracle import greedy_oracle
from tests.support.models import tiny_lora_model
from tests.support.subsets import read_jsonl
from tests.support.trainers import (
    POOL_SIZE,
    make_trainer,
    read_records,
    same_weights,
    tiny_rows,
    trainable_weights,
    trained_indices,
)

NAMES = tuple(STRATEGIES)
WITHOUT_MODEL = ("random", "length_matched")
ON_HIDDEN_STATES = ("targeted_matching", "rds", "tsds")
AIMED = (*ON_HIDDEN_STATES, "greats", "opus")
BOS = 1
NUM_VALIDATION = 5
# Of the first step of a trainer of `make_trainer`.
LEARNING_RATE = 1e-2


def rows_with_bos() -> list[dict[str, list[int]]]:
    """Half of the rows begin with bos; one has no label, one a single label without bos, one nothing but labels."""
    rows = tiny_rows()
    for number, row in enumerate(rows):
        if number % 2:
            row["input_ids"][0] = BOS
    for number in range(0, len(rows), 9):
        rows[number]["labels"] = [-100] * len(rows[number]["labels"])
    for number in range(2, len(rows), 10):
        rows[number]["labels"] = [-100] * (len(rows[number]["labels"]) - 1) + rows[number]["input_ids"][-1:]
    for number in range(5, len(rows), 10):
        rows[number]["labels"] = list(rows[number]["input_ids"])
    return rows


ROWS = rows_with_bos()
VALIDATION = tiny_rows(9, seed=5)


def build(folder: Path, strategy: str, **options: Any) -> Any:
    spice = {"strategy": strategy, "validation_rows": NUM_VALIDATION} | options.pop("spice", {})
    return make_trainer(
        folder,
        spice=spice,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(VALIDATION) if strategy == "less" else None,
        validation_dataset=VALIDATION if strategy in AIMED else None,
        **options,
    )


# The slow oracles


def gradients_of(model: Any, rows: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor]:
    """Losses and gradients by autograd; nan and zeros for rows without labels."""
    labelled = [place for place, row in enumerate(rows) if any(label != -100 for label in row["labels"][1:])]
    found, parts = looped_gradients(model, [(rows[place]["input_ids"], rows[place]["labels"]) for place in labelled])
    flat = torch.cat(parts, dim=1).double()
    losses, gradients = torch.full((len(rows),), math.nan).double(), torch.zeros(len(rows), flat.shape[1]).double()
    losses[labelled], gradients[labelled] = found.double(), flat
    return losses, gradients


def answer_losses(model: Any, row: dict[str, list[int]]) -> tuple[float, float]:
    """Loss of an answer's tokens with and without what precedes it, over the tokens that both can predict."""
    ids, labels = row["input_ids"], row["labels"]
    start = next(place for place, label in enumerate(labels) if label != -100)
    prefix = [BOS] if ids[0] == BOS and start > 0 else []
    answer = ids[start:]
    predicted = [place for place in range(len(answer)) if labels[start + place] != -100 and len(prefix) + place > 0]
    if not predicted:
        return math.nan, math.nan

    def mean_loss(tokens: list[int], offset: int) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        return -sum(float(logits[offset + place - 1, answer[place]]) for place in predicted) / len(predicted)

    return mean_loss(ids, start), mean_loss(prefix + answer, len(prefix))


def hidden_state(model: Any, row: dict[str, list[int]], layer: int = 1) -> Tensor:
    """The mean of what the second of two layers takes of a row, or another, the k-th token k times."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer][0]
    weights = torch.arange(1, len(states) + 1).double()
    return (weights[:, None] * states.double()).sum(dim=0) / weights.sum()


def dual_gain(gradients: Tensor, picks: list[int], candidate: int, alpha: float) -> float:
    """The gain from determinants of as many rows as there are picks."""

    def information(indices: list[int]) -> float:
        rows = gradients[indices]
        return float(torch.linalg.slogdet(torch.eye(len(indices)).double() + alpha * rows @ rows.T)[1])

    return information([*picks, candidate]) - information(picks)


def random_order(sound: list[int], *, seed: int, step: int, pool: int) -> list[int]:
    def key(place: int) -> bytes:
        return hashlib.sha256(f"spice_trainer/random/{seed}/{step}/{pool}/{place}".encode()).digest()

    return sorted(sound, key=key)


def expected_picks(strategy: str, pool: list[int], num_selected: int, **spice: Any) -> tuple[list[int], Any]:
    """Positions in the first pool of a run, and gains; at step 0 the weights are those of a fresh model."""
    model = tiny_lora_model().eval()
    rows = [ROWS[index] for index in pool]
    counts = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in rows])
    losses, gradients = gradients_of(model, rows)
    sound = [place for place in range(len(pool)) if counts[place] > 0]
    weighted = gradients * counts[:, None].double().sqrt()
    if spice.get("gradient_centering"):
        weighted = torch.where(counts[:, None] > 0, weighted - weighted[sound].mean(dim=0), 0.0)
    if strategy in ("spice", "fisher"):
        penalty = spice.get("conflict_penalty", 0.1) if strategy == "spice" else 0.0
        if spice.get("conflict_reference") == "pool":
            found = oracle.against_reference(
                weighted,
                weighted[sound].mean(dim=0),
                num_selected,
                fisher_alpha=1.0,
                conflict_penalty=penalty,
                gain_of=dual_gain,
            )
        else:
            found, _ = greedy_oracle(weighted, num_selected, gain_of=dual_gain, conflict_penalty=penalty)
        return [one[0] for one in found], [one[1] for one in found]
    if strategy == "random":
        return random_order(sound, seed=42, step=0, pool=0)[:num_selected], None
    if strategy == "length_matched":
        bins, sizes = oracle.pool_bins(counts.tolist(), sound, num_selected)
        found = []
        for place in random_order(sound, seed=42, step=0, pool=0):
            if sizes[bins[place]] > 0:
                sizes[bins[place]] -= 1
                found.append(place)
        return found, None
    if strategy == "targeted_matching":
        if spice.get("matching_features") == "gradients":
            units, targets = gradients, gradients_of(model, VALIDATION[:NUM_VALIDATION])[1]
        else:
            labelled = [hidden_state(model, rows[place]) for place in sound]
            targets = torch.stack([hidden_state(model, row) for row in VALIDATION[:NUM_VALIDATION]])
            mean = torch.stack([*labelled, *targets]).mean(dim=0)
            units, targets = torch.zeros(len(rows), len(mean)).double(), targets - mean
            units[sound] = torch.stack(labelled) - mean
        target_counts = [sum(label != -100 for label in row["labels"][1:]) for row in VALIDATION[:NUM_VALIDATION]]
        units, targets, seed = oracle.unit(units), oracle.unit(targets), oracle.seed_of(42, 0, 0)
        return oracle.targeted(units, targets, counts.tolist(), target_counts, sound, num_selected, seed)
    if strategy == "uds":
        norms = [float(torch.linalg.svdvals(field_oracles.label_logits(model, rows[place])).sum()) for place in sound]
        values = dict(zip(sound, norms, strict=True))
        return oracle.ranked([values.get(place, 0.0) for place in range(len(rows))], sound, num_selected)
    if strategy == "rds":
        units = torch.stack([hidden_state(model, row, -1) for row in rows])
        targets = torch.stack([hidden_state(model, row, -1) for row in VALIDATION[:NUM_VALIDATION]])
        names = [hash_tokens(torch.tensor(row["input_ids"])) for row in VALIDATION[:NUM_VALIDATION]]
        units, targets = oracle.unit(units), oracle.unit(targets)
        return field_oracles.rds(units, targets, sound, num_selected, (42, 0, 0), names=names)
    if strategy == "tsds":
        states = torch.stack([hidden_state(model, row) for row in [*rows, *VALIDATION[:NUM_VALIDATION]]])
        mean = states[[*sound, *range(len(rows), len(states))]].mean(dim=0)
        units = oracle.unit(states - mean)
        return field_oracles.tsds(units[: len(rows)], units[len(rows) :], sound, num_selected, (42, 0, 0))
    if strategy in ("greats", "opus"):
        reference = gradients_of(model, VALIDATION[:NUM_VALIDATION])[1].mean(dim=0)
        if strategy == "greats":
            return field_oracles.greats(gradients, reference, sound, num_selected, LEARNING_RATE)
        if spice.get("gradient_preconditioning") == "adam":
            # Before the first update Adam would step by each coordinate's sign.
            gradients = gradients / (gradients.abs() + 1e-8)
        return field_oracles.opus(gradients, reference, sound, num_selected, LEARNING_RATE, (42, 0, 0))
    if strategy in ("dpp", "matching", "facility_location"):
        return getattr(oracle, strategy)(weighted, num_selected)
    if strategy == "top_norm":
        return oracle.ranked(gradients.norm(dim=1).tolist(), sound, num_selected)
    if strategy == "loss":
        return oracle.ranked((losses * counts).tolist(), sound, num_selected)
    if strategy == "perplexity":
        return oracle.ranked(losses.exp().tolist(), sound, num_selected)
    if strategy == "ifd":
        pairs = [answer_losses(model, row) if place in sound else (math.nan,) * 2 for place, row in enumerate(rows)]
        sound = [place for place in sound if math.isfinite(pairs[place][0])]
        return oracle.ifd([one for one, _ in pairs], [other for _, other in pairs], sound, num_selected)
    assert strategy == "less"
    of_validation = gradients_of(model, VALIDATION[:NUM_VALIDATION])[1]
    mean = (of_validation / of_validation.norm(dim=1, keepdim=True)).mean(dim=0)
    cosines = gradients @ mean / (gradients.norm(dim=1) * mean.norm())
    return oracle.ranked(cosines.tolist(), sound, num_selected, smallest_scale=1.0)


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("spice", {"conflict_reference": "pool", "conflict_penalty": 2.0}),
    ("spice", {"gradient_centering": True}),
    ("fisher", {"gradient_centering": True}),
    ("targeted_matching", {"matching_features": "gradients"}),
    ("opus", {"gradient_preconditioning": "adam"}),
]


@pytest.mark.parametrize(("strategy", "spice"), CASES)
def test_first_picks_are_the_oracles(strategy: str, spice: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path, strategy, spice=spice, max_steps=1).train()
    (pool,) = read_records(tmp_path, "pools")
    picks = read_records(tmp_path, "selections")
    assert any(sum(label != -100 for label in ROWS[index]["labels"]) == 0 for index in pool["candidates"])
    if strategy == "ifd":
        rows = [ROWS[index] for index in pool["candidates"]]
        kinds = {(row["input_ids"][0] == BOS, row["labels"][0] == -100) for row in rows}
        assert {(True, True), (False, True)} < kinds and len(pool["zero"]) > 1
    places, gains = expected_picks(strategy, pool["candidates"], 4, **spice)
    assert [pick["index"] for pick in picks] == [pool["candidates"][place] for place in places]
    if strategy in WITHOUT_MODEL:
        assert [pick["gain"] for pick in picks] == [pick["score"] for pick in picks] == [None] * 4
    else:
        assert [pick["gain"] for pick in picks] == pytest.approx(list(gains), rel=1e-4, abs=1e-6)
    assert set(pool["zero"]) >= {index for index in pool["candidates"] if set(ROWS[index]["labels"]) == {-100}}


def test_random_picks_follow_seed_step_and_pool(tmp_path: Path) -> None:
    """Of each pool of a step, with the trainer's data seed or the pools' own."""
    for seed, settings in ((42, {}), (7, {"pool_seed": 7})):
        folder = tmp_path / str(seed)
        build(folder, "random", spice={"num_selected": 2, **settings}, max_steps=2).train()
        picks = read_records(folder, "selections")
        lines = read_records(folder, "pools")
        assert [(line["step"], line["pool"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for line in lines:
            where = {name: line[name] for name in ("step", "pool")}
            pool = line["candidates"]
            sound = [place for place, index in enumerate(pool) if set(ROWS[index]["labels"][1:]) != {-100}]
            found = [pick["index"] for pick in picks if where.items() <= pick.items()]
            assert found == [pool[place] for place in random_order(sound, seed=seed, **where)[:2]]


def test_strategies_pick_otherwise(tmp_path: Path) -> None:
    """So that the oracles' agreement says something."""
    cases = [(name, {}) for name in NAMES if name != "fisher"]
    cases += [("spice", {"conflict_penalty": 30.0}), ("spice", {"gradient_centering": True})]
    cases += [("targeted_matching", {"matching_features": "gradients"})]
    found = {}
    for number, (strategy, spice) in enumerate(cases):
        build(tmp_path / str(number), strategy, spice=spice, max_steps=5).train()
        found[strategy, *spice.values()] = str(trained_indices(tmp_path / str(number)))
    # Of gradients this long the volume is the information.
    assert found.pop(("dpp",)) == found["spice",]
    assert len(set(found.values())) == len(found), found


# What is not known is null


@pytest.mark.parametrize("strategy", NAMES)
def test_records_hold_what_the_strategy_knows(strategy: str, tmp_path: Path, caplog: Any) -> None:
    trainer = build(tmp_path, strategy)
    with caplog.at_level("INFO"):
        trainer.train()
    first = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("SPICE: 55"))
    assert f'strategy="{strategy}"' in first
    assert (" scores, with " in first) == (strategy not in WITHOUT_MODEL)
    has_gram, has_gradients = (
        "gram" in STRATEGIES[strategy].needs,
        strategy not in (*WITHOUT_MODEL, "loss", "perplexity", "ifd", "uds", *ON_HIDDEN_STATES),
    )
    by_information = strategy in ("spice", "fisher")
    for line in read_records(tmp_path, "selections"):
        known = {name for name, value in line.items() if value is not None}
        # The rows have no id, and no text is asked for.
        unknown = {"id", "text"} | (set() if has_gram else {"conflict"})
        unknown |= set() if has_gradients else {"gradient_norm"}
        unknown |= {"gain", "score"} if strategy in WITHOUT_MODEL else set()
        assert known == line.keys() - unknown
    for line in read_records(tmp_path, "pools"):
        unknown = set() if has_gram else {"information", "information_top_norm", "alpha"}
        unknown |= set() if has_gradients else {"overlap_top_norm"}
        unknown |= set() if by_information else {"changed_by_conflict"}
        unknown |= {"gain_first", "gain_last"} if strategy in WITHOUT_MODEL else set()
        assert {name for name, value in line.items() if value is None} == unknown
    logged = {key for row in trainer.state.log_history for key in row if key.startswith("spice/")}
    assert ("spice/information" in logged, "spice/conflict" in logged) == (has_gram, has_gram)
    assert ("spice/gain_first" in logged) == (strategy not in WITHOUT_MODEL) and "spice/tokens_ratio" in logged
    assert all(math.isfinite(value) for row in trainer.state.log_history for value in row.values())
    scored = [line["tokens_scored"] for line in read_records(tmp_path, "costs")]
    assert all(count == 0 for count in scored) if strategy in WITHOUT_MODEL else min(scored) > 0


def test_records_of_a_strategy_open_as_datasets(tmp_path: Path) -> None:
    for strategy in ("random", "loss"):
        build(tmp_path / strategy, strategy, max_steps=2).train()
        for name in ("selections", "pools", "trained", "costs"):
            path = tmp_path / strategy / "spice" / f"{name}.jsonl"
            table = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
            assert table.to_list() == read_records(tmp_path / strategy, name)


def test_the_summary_leaves_out_what_nobody_knows(tmp_path: Path, capsys: Any) -> None:
    shown = {}
    for strategy in ("spice", "top_norm", "random"):
        build(tmp_path / strategy, strategy, max_steps=2).train()
        shown[strategy] = capsys.readouterr().out
    names = ("not of the largest norms", "changed by the conflict", "Information, picks")
    assert [[name in shown[strategy] for name in names] for strategy in shown] == [
        [True, True, True], [True, False, False], [False, False, False],
    ]  # fmt: skip


# What is not needed is not computed


@pytest.mark.parametrize("strategy", NAMES)
def test_nothing_is_computed_that_is_not_needed(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path, strategy, max_steps=1)
    counts = {"forward": 0, "backward": 0, "widest": 0}
    losses, compute, begin = SampleGradients.losses, SampleGradients.compute, FeatureBuffer.begin

    def count_forward(self: Any, *args: Any) -> Any:
        counts["forward"] += len(args[1])
        return losses(self, *args)

    def count_backward(self: Any, *args: Any) -> Any:
        counts["backward"] += len(args[1])
        return compute(self, *args)

    def watch_width(self: Any, rows: Any) -> None:
        counts["widest"] = max(counts["widest"], self.features.shape[1])
        begin(self, rows)

    monkeypatch.setattr(SampleGradients, "losses", count_forward)
    monkeypatch.setattr(SampleGradients, "compute", count_backward)
    monkeypatch.setattr(FeatureBuffer, "begin", watch_width)
    trainer.train()
    (pool,) = read_records(tmp_path, "pools")
    labelled = sum(set(ROWS[index]["labels"][1:]) != {-100} for index in pool["candidates"])
    dimension = trainer._spice.sampler.scorer.dimension
    assert labelled < POOL_SIZE < dimension
    expected = {"random": (0, 0, 0), "loss": (labelled, 0, 0), "perplexity": (labelled, 0, 0)}
    expected |= {"length_matched": (0, 0, 0), **dict.fromkeys(ON_HIDDEN_STATES, (0, 0, 0))}
    expected |= {"uds": (0, 0, 0)}
    expected |= {"ifd": (2 * labelled, 0, 0), "top_norm": (0, labelled, 16)}
    expected |= dict.fromkeys(("less", "greats", "opus"), (0, labelled + NUM_VALIDATION, dimension))
    assert tuple(counts.values()) == expected.get(strategy, (0, labelled, dimension))


# Resume, processes, proxies, subsets


@pytest.mark.parametrize("strategy", ["random", "loss", "matching", "less", "uds", *AIMED])
def test_resume_is_bit_identical(strategy: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.3}
    whole = build(tmp_path / "whole", strategy, **options)
    whole.train()
    resumed = build(tmp_path / "resumed", strategy, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same_weights(trainable_weights(whole.model), trainable_weights(resumed.model))
    for name in ("pools", "selections", "trained"):
        files = [tmp_path / run / "spice" / f"{name}.jsonl" for run in ("whole", "resumed")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_equal_micro_batches_keep_the_information_of_the_picks(tmp_path: Path) -> None:
    """A pick that is dropped for equal micro-batches takes its own information with it, not its gain."""
    from spice_trainer.selection.pool import round_down_picks

    trainer = build(tmp_path, "matching", max_steps=1)
    heard: list[Any] = []
    trainer._spice.sampler.add_listener(heard.append)
    trainer.train()
    (pool,) = heard[0].pools
    (rounded,) = round_down_picks([pool], 3, step=0)
    assert len(rounded.indices) == 3 and rounded.indices == pool.indices[:3]
    build(tmp_path / "three", "matching", max_steps=1, per_device_train_batch_size=3).train()
    (line,) = read_records(tmp_path / "three", "pools")
    assert rounded.information == pytest.approx(line["information"], rel=1e-12)
    assert rounded.information != pytest.approx(sum(rounded.selection.gains), rel=1e-3)


@pytest.mark.parametrize("strategy", ["matching", "less", "loss", "uds", *AIMED])
def test_a_proxy_picks_by_the_strategy(strategy: str, tmp_path: Path) -> None:
    """With the target's own weights, and learning rate where that counts, its first picks are the target's."""
    build(tmp_path / "alone", strategy, max_steps=1).train()
    proxy = ProxyModel(tiny_lora_model(), learning_rate=LEARNING_RATE if strategy in ("greats", "opus") else 0.0)
    trainer = make_trainer(
        tmp_path / "proxy",
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(VALIDATION),
        max_steps=1,
    )
    checks = {"proxy_check_pools": 1} if strategy == "matching" else {}
    settings = {"pool_size": 10, "num_selected": 4, "gradient_normalization": "sqrt_tokens"}
    config = SpiceConfig(**settings, strategy=strategy, validation_rows=NUM_VALIDATION, **checks)
    aim = {"validation_dataset": VALIDATION} if strategy in AIMED else {}
    attach_spice(trainer, config, proxy=proxy, verify=False, **aim)
    trainer.train()
    assert trained_indices(tmp_path / "proxy") == trained_indices(tmp_path / "alone")
    if checks:
        (line,) = read_records(tmp_path / "proxy", "transfer")
        assert line["overlap"] == 1.0


def test_select_subset_by_strategy(tmp_path: Path) -> None:
    for strategy in ("random", "matching", "uds"):
        subset = select(tmp_path / strategy, spice={"strategy": strategy}, dataset=Dataset.from_list(ROWS))
        found = list(itertools.chain(*subset_picks(tmp_path / strategy)))
        assert [row["input_ids"] for row in subset.dataset] == [ROWS[index]["input_ids"] for index in found]
        read_jsonl(tmp_path / strategy / "manifest.jsonl", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"strategy='less' compares .* there is none.*validation_dataset="):
        select(tmp_path / "none", spice={"strategy": "less"})
    options = {"validation_dataset": Dataset.from_list(VALIDATION), "dataset": Dataset.from_list(ROWS)}
    select(tmp_path / "less", spice={"strategy": "less", "validation_rows": NUM_VALIDATION}, **options)
    candidates = read_records(tmp_path / "less", "pools")[0]["candidates"]
    places, _ = expected_picks("less", candidates, 4)
    assert subset_picks(tmp_path / "less")[0] == [candidates[place] for place in places]
    aim = {"strategy": "rds", "validation_rows": NUM_VALIDATION}
    select(tmp_path / "rds", spice=aim, **options)
    candidates = read_records(tmp_path / "rds", "pools")[0]["candidates"]
    places, _ = expected_picks("rds", candidates, 4)
    assert subset_picks(tmp_path / "rds")[0] == [candidates[place] for place in places]
    # Finished, it stays what it is: with another validation set it would be another subset.
    config = {"strategy": "less", "validation_rows": NUM_VALIDATION}
    select(tmp_path / "less", spice=config, **options)
    options["validation_dataset"] = Dataset.from_list(VALIDATION[1:])
    with pytest.raises(FileExistsError, match=r"a subset of another selection \(other validation_fingerprint\)"):
        select(tmp_path / "less", spice=config, **options)


@pytest.mark.parametrize("features", ["hidden_states", "gradients"])
def test_a_subset_can_aim(features: str, tmp_path: Path) -> None:
    spice = {"strategy": "targeted_matching", "matching_features": features, "validation_rows": NUM_VALIDATION}
    select(tmp_path, spice=spice, validation_dataset=VALIDATION, dataset=Dataset.from_list(ROWS))
    candidates = read_records(tmp_path, "pools")[0]["candidates"]
    places, _ = expected_picks("targeted_matching", candidates, 4, matching_features=features)
    assert subset_picks(tmp_path)[0] == [candidates[place] for place in places]


def test_random_learns_nothing_for_a_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lora_model()
    before = trainable_weights(model)
    select(tmp_path, model=model, spice={"strategy": "random"})
    assert same_weights(before, trainable_weights(model))
