"""What trains is looked at in each step: frozen and unfrozen layers are followed, another adapter ends the run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

import spice_trainer.gradients.trained
from spice_trainer import ProxyModel, SpiceConfig, attach_spice
from spice_trainer.data.rows import TargetRows
from spice_trainer.distributed import Processes
from spice_trainer.gradients.lora import find_trained_modules
from spice_trainer.gradients.trained import TrainedLayers
from spice_trainer.scoring.scorer import GradientScorer
from spice_trainer.scoring.validation import ValidationRows
from tests.support.gradient_loop import looped_gradients
from tests.support.models import tiny_lora_model, tiny_model
from tests.support.scorers import make_scorer
from tests.support.trainers import collate, make_trainer, read_records, tiny_rows

pytestmark = pytest.mark.oldest

ROWS = tiny_rows(32)
POOL = [3, 17, 5, 20, 9]


def _set(model: nn.Module, part: str, trains: bool) -> None:
    for name, parameter in model.named_parameters():
        if part in name and "lora_" in name:
            parameter.requires_grad_(trains)


def _trained_a_step(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of all LoRA weights, which has moments of each."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for row in ROWS[:2]:
        model(**collate([row])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _scorer(model: nn.Module, optimizer: Any, **settings: Any) -> GradientScorer:
    config = SpiceConfig(**({"sketch_dim": 0} | settings))
    validation = ValidationRows({"validation": TargetRows(ROWS[:6], collate)}, 6) if config.takes_validation else None
    return make_scorer(
        model, config, rows=ROWS, collate=collate, get_optimizer=lambda: optimizer, validation=validation
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sketch_dim": 256},
        {"information": "diagonal"},
        {"gradient_preconditioning": "adam"},
        {"conflict_reference": "momentum"},
        {"strategy": "less"},
        {"scoring_layers": 1},
        {"scoring_target_modules": ["q_proj", "gate_proj"]},
    ],
    ids=str,
)
def test_scores_follow_what_trains(settings: dict[str, Any]) -> None:
    """Frozen and unfrozen again, they are those of a scorer that was made only then."""
    model = tiny_lora_model()
    optimizer = _trained_a_step(model)
    followed = _scorer(model, optimizer, **settings)
    whole = next(followed.score([POOL]))
    for part, trains in (("layers.1.", False), ("lora_A", False), ("layers.1.", True), ("lora_A", True)):
        _set(model, part, trains)
        found, expected = next(followed.score([POOL])), next(_scorer(model, optimizer, **settings).score([POOL]))
        assert torch.equal(found.gradient_norms, expected.gradient_norms)
        for name in ("gram", "alignment", "gradients", "momentum_products"):
            ours, theirs = getattr(found, name, None), getattr(expected, name, None)
            assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
        if trains is False:
            assert not torch.equal(found.gradient_norms, whole.gradient_norms)
    assert torch.equal(found.gradient_norms, whole.gradient_norms)


def test_scores_after_a_freeze_are_autograds(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, None)
    next(scorer.score([POOL]))
    _set(model, "layers.0.", False)
    with caplog.at_level(logging.INFO, logger="spice_trainer"):
        found = [next(scorer.score([POOL])) for _ in range(2)][-1]
    _, modules = looped_gradients(model, [(ROWS[index]["input_ids"], ROWS[index]["labels"]) for index in POOL])
    gradients = torch.cat(modules, dim=1).double()
    torch.testing.assert_close(found.gradient_norms, gradients.norm(dim=1), rtol=1e-5, atol=0)
    assert scorer.dimension == gradients.shape[1]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "SPICE: 14 layers were frozen and 0 unfrozen: candidates are scored by 14 from here on, whose gradients "
        f"have {gradients.shape[1]:,} numbers."
    ]


class At(TrainerCallback):
    """Does something to the model before a step."""

    def __init__(self, change: Callable[[Any], Any], step: int = 2) -> None:
        self.change, self.step = change, step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.change(model)


def test_a_run_frozen_halfway_scores_like_one_frozen_from_the_start(tmp_path: Path) -> None:
    def norms(folder: str, **options: Any) -> dict[tuple[int, int], float]:
        make_trainer(tmp_path / folder, spice={}, learning_rate=0.0, **options).train()
        lines = read_records(tmp_path / folder, "selections")
        return {(line["step"], line["index"]): line["gradient_norm"] for line in lines if line["step"] >= 2}

    frozen = tiny_lora_model()
    _set(frozen, "layers.1.", False)
    late = norms("late", callbacks=[At(lambda model: _set(model, "layers.1.", False))])
    assert len(late) == 4 * 4 - 2 and late == pytest.approx(norms("early", model=frozen), rel=1e-5)
    assert late != pytest.approx(norms("whole"), rel=1e-2)


def test_what_is_unfrozen_too_late_does_not_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The Trainer's optimizer has what required a gradient when it was made, and nothing else trains."""
    model = tiny_lora_model()
    _set(model, "layers.1.", False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(
        tmp_path, model=model, spice={}, callbacks=[At(lambda model: _set(model, "layers.1.", True))]
    )
    trainer.train()
    assert len(trainer._spice.sampler.scorer.modules) == 14
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if "layers.1." in name)
    (warned,) = [record.getMessage() for record in caplog.records if "in the optimizer" in record.getMessage()]
    assert "14 layers have parameters that require a gradient but are not in the optimizer" in warned
    assert "so they neither train nor score" in warned
    assert "Fix: freeze layers in on_train_begin and unfreeze them later, or use optimizer.add_param_group" in warned


def test_what_is_given_to_the_optimizer_scores() -> None:
    model = tiny_lora_model()
    _set(model, "layers.1.", False)
    optimizer = Accelerator(cpu=True).prepare(_trained_a_step(model))
    scorer = _scorer(model, optimizer)
    assert len(find_trained_modules(model)) == len(scorer.modules) == 14
    _set(model, "layers.1.", True)
    next(scorer.score([POOL]))
    assert len(scorer.modules) == 14
    optimizer.add_param_group(
        {"params": [w for n, w in model.named_parameters() if "lora_" in n and "layers.1." in n]}
    )
    next(scorer.score([POOL]))
    assert len(scorer.modules) == 28


def _put_others(model: nn.Module, part: str) -> None:
    """New parameters of the same values in the place of LoRA's."""
    for name, module in model.named_modules():
        if part in name and ".lora_" in name and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())


def test_parameters_that_others_replaced_end_the_run_by_name() -> None:
    """The optimizer goes on with the old ones, which nobody uses."""
    model = tiny_lora_model()
    scorer = _scorer(model, _trained_a_step(model))
    next(scorer.score([POOL]))
    _put_others(model, "")
    with pytest.raises(RuntimeError, match=r"no step changes them.*Fix: let it write into those that are there"):
        next(scorer.score([POOL]))


def test_some_parameters_that_others_replaced_do_not_score(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, _trained_a_step(model))
    next(scorer.score([POOL]))
    _put_others(model, "layers.1.")
    found = next(scorer.score([POOL]))
    assert len(scorer.modules) == 14 and "14 layers have parameters that require a gradient" in caplog.text
    _set(model, "layers.1.", False)
    assert torch.equal(found.gram, next(_scorer(model, None).score([POOL])).gram)


def test_parameters_that_the_optimizer_takes_over_score() -> None:
    model = tiny_lora_model()
    optimizer = _trained_a_step(model)
    scorer = _scorer(model, optimizer)
    next(scorer.score([POOL]))
    _put_others(model, "")
    optimizer.param_groups[0]["params"] = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for module in scorer.modules.values():
            module.weight.mul_(1.5)
    assert torch.equal(next(scorer.score([POOL])).gram, next(_scorer(model, None).score([POOL])).gram)


@pytest.mark.parametrize("held", ["bias", "weight"])
def test_of_a_layer_only_what_the_optimizer_has_scores(held: str) -> None:
    model = tiny_lora_model("gpt_neox", lora_bias=True)

    def only_held() -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.requires_grad_(name.endswith(held))

    only_held()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    scorer = _scorer(model, optimizer)
    expected = next(scorer.score([POOL])).gram
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(True)
    assert torch.equal(next(scorer.score([POOL])).gram, expected)
    optimizer.add_param_group({"params": [w for n, w in model.named_parameters() if "lora_B" in n and held not in n]})
    assert not torch.equal(next(scorer.score([POOL])).gram, expected)


def test_a_bias_that_is_frozen_is_followed() -> None:
    model = tiny_lora_model("gpt_neox", lora_bias=True)
    scorer = _scorer(model, None)
    next(scorer.score([POOL]))
    dimension = scorer.dimension
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith(".bias"):
            parameter.requires_grad_(False)
    found = next(scorer.score([POOL]))
    assert scorer.dimension < dimension
    assert torch.equal(found.gram, next(_scorer(model, None).score([POOL])).gram)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(name.endswith(".bias"))
    assert torch.equal(next(scorer.score([POOL])).gram, next(_scorer(model, None).score([POOL])).gram)


def _second(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])


def _switch(model: Any) -> None:
    _second(model)
    model.set_adapter("second")


def _norm(model: Any) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "switched": (_switch, "'default' was replaced by 'second' in mid-run: .*call `model.set_adapter\\('default'\\)`"),
    "merged": (lambda model: model.merge_adapter(), "was merged into the base weights .*call `model.unmerge_adapter"),
    "merged for good": (lambda model: model.merge_and_unload(), "was (merged into|taken out)"),
    "unloaded": (lambda model: model.unload(), "was taken out of the model in mid-run.*keep the adapter"),
    "deleted": (lambda model: model.delete_adapter("default"), "was deleted in mid-run"),
    "off": (lambda model: model.base_model.disable_adapter_layers(), "was switched off .*enable_adapter_layers"),
    "all frozen": (lambda model: _set(model, "", False), "Every layer was frozen .*should_training_stop = True"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_adapter_ends_the_run_by_name(change: str) -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, None)
    next(scorer.score([POOL]))
    CHANGES[change][0](model)
    with pytest.raises(RuntimeError, match=CHANGES[change][1]):
        next(scorer.score([POOL]))


def test_a_layer_that_is_replaced_ends_the_run_by_name() -> None:
    model = tiny_model()
    scorer = _scorer(model, None)
    next(scorer.score([POOL]))
    model.model.norm = nn.LayerNorm(32)
    with pytest.raises(RuntimeError, match=r"The layer 'model\.norm' was taken out .*Fix: have it keep the layer"):
        next(scorer.score([POOL]))


@pytest.mark.parametrize(
    "change",
    [
        _second,
        lambda model: (model.merge_adapter(), model.unmerge_adapter()),
        lambda model: (_switch(model), model.set_adapter("default")),
        lambda model: (_second(model), model.delete_adapter("second")),
        lambda model: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()),
    ],
    ids=["added", "unmerged", "switched back", "added and deleted", "off and on"],
)
def test_what_is_undone_or_does_not_work_ends_nothing(change: Callable[[Any], Any]) -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, None)
    before = next(scorer.score([POOL]))
    change(model)
    torch.testing.assert_close(next(scorer.score([POOL])).gram, before.gram, rtol=1e-4, atol=1e-5)


def test_a_norm_that_is_unfrozen_scores_too() -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, None)
    before = scorer.dimension
    _norm(model)
    assert torch.equal(next(scorer.score([POOL])).gram, next(_scorer(model, None).score([POOL])).gram)
    assert scorer.dimension == before + 32
    # One that the optimizer does not have stays as it is.
    model = tiny_lora_model()
    scorer = _scorer(model, _trained_a_step(model))
    _norm(model)
    next(scorer.score([POOL]))


def test_settings_that_name_frozen_layers() -> None:
    model = tiny_lora_model()
    scorer = _scorer(model, None, scoring_target_modules=["q_proj", "v_proj"])
    next(scorer.score([POOL]))
    _set(model, "q_proj", False)
    next(scorer.score([POOL]))
    assert len(scorer.modules) == 4 and all("v_proj" in name for name in scorer.modules)
    _set(model, "v_proj", False)
    with pytest.raises(
        ValueError, match=r"scoring_target_modules=\['q_proj', 'v_proj'\].* no module of these .* trains"
    ):
        next(scorer.score([POOL]))


def test_a_proxy_scores_by_its_own_adapter_whatever_happens_to_the_target(tmp_path: Path) -> None:
    proxy = ProxyModel(tiny_lora_model(seed=1), learning_rate=0.0)
    runs = []
    for name, callbacks in (("plain", []), ("frozen", [At(lambda model: _set(model, "layers.1.", False))])):
        trainer = make_trainer(tmp_path / name, callbacks=callbacks)
        attach_spice(trainer, SpiceConfig(pool_size=10, num_selected=4), proxy=proxy, verify=False)
        trainer.train()
        runs.append([line["gradient_norm"] for line in read_records(tmp_path / name, "selections")])
    assert runs[0] == runs[1]


def test_a_look_that_finds_nothing_new_reads_flags_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.7 ms for 504 layers, where finding them takes 40."""
    model = tiny_lora_model()
    optimizer = _trained_a_step(model)
    layers = TrainedLayers(model, find_trained_modules(model), lambda: optimizer)
    # Only now it is known what the optimizer has.
    assert not layers.follow(Processes())
    finds = Mock(side_effect=find_trained_modules)
    monkeypatch.setattr(spice_trainer.gradients.trained, "find_trained_modules", finds)
    assert not layers.follow(Processes()) and not finds.called
    _set(model, "layers.1.", False)
    assert layers.follow(Processes()) and finds.call_count == 1
