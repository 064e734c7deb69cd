"""Settings: values of `SpiceConfig`, their combinations, and settings against the trainer's own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from spice_trainer import SpiceConfig, SpiceSampler, attach_spice, detach_spice
from tests.bad_input.scene import ATTACHING, CALLING, CREATING, SETTINGS, STARTING, TRAINING, BadInput, Scene
from tests.support.models import tiny_lora_model

ADAPTIVE = {"stop_ratio": 0.5, "pools_per_step": 1}


class OwnLoss(Trainer):
    """A trainer whose loss is a mean per micro-batch, whatever it is told to divide by."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs)


def mean_loss_model() -> nn.Module:
    model = tiny_lora_model()
    model.get_base_model().accepts_loss_kwargs = False
    return model


def _value(name: str, wrong: str, *says: str, **settings: Any) -> BadInput:
    return BadInput(name, wrong, CREATING, ValueError, says, lambda scene: lambda: SpiceConfig(**settings))


def _set_later(**values: Any) -> Callable[[Scene], Callable[[], Any]]:
    """Sets fields of the configuration after attaching."""

    def prepare(scene: Scene) -> Callable[[], Any]:
        train = scene.train()
        for name, value in values.items():
            setattr(scene.trainer._spice.sampler.config, name, value)
        return train

    return prepare


def _attach(config: Any, **options: Any) -> Callable[[Scene], Callable[[], Any]]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        trainer = scene.make()
        return lambda: attach_spice(trainer, config, **options)

    return prepare


def _attach_twice(scene: Scene) -> Callable[[], Any]:
    scene.attach()()
    return lambda: attach_spice(scene.trainer, SpiceConfig(**SETTINGS | {"fisher_alpha": 2.0}))


def _attach_a_used_sampler(scene: Scene) -> Callable[[], Any]:
    sampler = SpiceSampler(SpiceConfig(**SETTINGS))
    attach_spice(scene.make(), sampler)
    trainer = scene.make()
    return lambda: attach_spice(trainer, sampler)


def _detach(scene: Scene) -> Callable[[], Any]:
    trainer = scene.make()
    return lambda: detach_spice(trainer)


class _OnTrainBegin(TrainerCallback):
    def __init__(self, do: Callable[[], Any]) -> None:
        self.do = do

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.do()


def _attach_in_a_run(scene: Scene) -> Callable[[], Any]:
    trainer = scene.make()
    trainer.add_callback(_OnTrainBegin(lambda: attach_spice(trainer, SpiceConfig(**SETTINGS))))
    return trainer.train


def _detach_in_a_run(scene: Scene) -> Callable[[], Any]:
    train = scene.train()
    scene.trainer.add_callback(_OnTrainBegin(lambda: detach_spice(scene.trainer)))
    return train


def _bound_loss(scene: Scene) -> Callable[[], Any]:
    attach = scene.attach(ADAPTIVE)
    own = scene.trainer.compute_loss
    scene.trainer.compute_loss = lambda model, inputs, num_items_in_batch=None: own(model, inputs)
    return attach


def _more_accumulation(scene: Scene) -> Callable[[], Any]:
    train = scene.train({"pools_per_step": 1})
    scene.trainer.args.gradient_accumulation_steps = 8
    return train


ROWS = (
    _value("pool_of_one", "`pool_size=1`", "pool_size=1 is below 2", "Fix: set pool_size to at least 2", pool_size=1),
    _value(
        "number_as_text", '`pool_size="120"`', "is of type str", "a whole number", "without quotes", pool_size="120"
    ),
    _value("fraction", "`num_selected=2.5`", "num_selected=2.5 is of type float", num_selected=2.5),
    _value("truth_as_number", "`num_selected=True`", "num_selected=True is of type bool", num_selected=True),
    _value(
        "more_picks_than_candidates",
        "`num_selected` above `pool_size`",
        "num_selected=40 is more than pool_size=10",
        "lower num_selected to at most 10, or raise pool_size to at least 40",
        num_selected=40,
        pool_size=10,
    ),
    _value("no_pools", "`pools_per_step=0`", "pools_per_step=0 is below 1", "at least one pool", pools_per_step=0),
    _value("negative_seed", "`pool_seed=-1`", "pool_seed=-1 is below 0", pool_seed=-1),
    _value("no_alpha", "`fisher_alpha=0`", "fisher_alpha=0 is not above 0", "every gain 0", fisher_alpha=0),
    _value(
        "yaml_exponent", "`fisher_alpha: 1e-6` in YAML", "of type str", "YAML reads 1e-6 as text", fisher_alpha="1e-6"
    ),
    _value("alpha_nan", "`fisher_alpha` NaN", "fisher_alpha=nan is not finite", fisher_alpha=float("nan")),
    _value("endless_penalty", "`conflict_penalty` infinite", "=inf is not finite", conflict_penalty=float("inf")),
    _value("negative_penalty", "`conflict_penalty=-0.1`", "a negative penalty would reward", conflict_penalty=-0.1),
    _value(
        "unknown_reference",
        '`conflict_reference="all"`',
        "conflict_reference='all' is unknown",
        "'selected', 'candidates', 'pool', 'momentum'",
        conflict_reference="all",
    ),
    _value(
        "unknown_information",
        '`information="logdet"`',
        "information='logdet' is unknown",
        "'exact', 'diagonal', 'adafisher'",
        information="logdet",
    ),
    _value(
        "unknown_normalization",
        '`gradient_normalization="l2"`',
        "'l2' is unknown",
        "'sqrt_tokens'",
        gradient_normalization="l2",
    ),
    _value(
        "unknown_preconditioning",
        '`gradient_preconditioning="adagrad"`',
        "gradient_preconditioning='adagrad' is unknown",
        "'none', 'adam'",
        gradient_preconditioning="adagrad",
    ),
    _value(
        "preconditioned_losses",
        '`gradient_preconditioning="adam"` with a strategy that compares no gradients',
        "with strategy='loss'",
        "compares no gradients with each other",
        "Fix: leave gradient_preconditioning out",
        gradient_preconditioning="adam",
        strategy="loss",
    ),
    BadInput(
        "preconditioned_without_adam",
        '`gradient_preconditioning="adam"` with another optimizer',
        ATTACHING,
        ValueError,
        ("gradient_preconditioning='adam'", "has optim='sgd'", "Fix: set optim='adamw_torch_fused'"),
        lambda scene: scene.attach({"gradient_preconditioning": "adam"}, optim="sgd"),
    ),
    BadInput(
        "momentum_without_momentum",
        '`conflict_reference="momentum"` with an optimizer that keeps none',
        ATTACHING,
        ValueError,
        ("conflict_reference='momentum'", "has optim='sgd'", "Fix: set optim='adamw_torch_fused'"),
        lambda scene: scene.attach({"conflict_reference": "momentum"}, optim="sgd"),
    ),
    _value(
        "memory_scored_once",
        '`score_once_after` with `strategy="uds"`',
        "score_once_after=2 with strategy='uds': its memory of past picks changes with every step",
        "Fix: leave one of the two out",
        score_once_after=2,
        strategy="uds",
    ),
    BadInput(
        "aiming_at_nothing",
        '`strategy="rds"`, `"tsds"`, `"greats"` or `"opus"` without a `validation_dataset`',
        ATTACHING,
        ValueError,
        (
            "strategy='rds' compares candidates with a validation set, and there is none",
            "Fix: pass `validation_dataset=`",
        ),
        lambda scene: scene.attach({"strategy": "rds"}),
    ),
    BadInput(
        "layer_too_high",
        "a `hidden_layer` that the model does not have",
        ATTACHING,
        ValueError,
        ("hidden_layer=9, and the model has the layers 0 to 1", "Fix: set hidden_layer to at most 2"),
        lambda scene: scene.attach({"strategy": "targeted_matching", "hidden_layer": 9}),
    ),
    BadInput(
        "alpha_beyond_float64",
        'a `fisher_alpha` of 1e308 with `information="diagonal"` or `"adafisher"`',
        TRAINING,
        ValueError,
        ("fisher_alpha=1e+308 with gradients of squared norms up to", "beyond float64", 'set alpha_scaling="pool"'),
        lambda scene: scene.train({"fisher_alpha": 1e308, "information": "adafisher"}),
    ),
    _value("ratio_of_one", "`stop_ratio=1`", "is not between 0 and 1", stop_ratio=1, pools_per_step=1),
    _value(
        "adaptive_without_pools",
        "`stop_ratio` without `pools_per_step`",
        "stop_ratio=0.5 with pools_per_step=None",
        "Fix: set pools_per_step",
        stop_ratio=0.5,
    ),
    _value("negative_gain", "`min_gain=-1`", "gains are never negative", min_gain=-1, pools_per_step=1),
    _value("no_selecting_epoch", "`selection_epochs=0`", "selection_epochs=0 is below 1", selection_epochs=0),
    _value("wide_ties", "`tie_tolerance=1`", "tie_tolerance=1 is not at least 0 and below 1", tie_tolerance=1),
    _value(
        "tiny_sketch", "`sketch_dim=3`", "sketch_dim=3 is below 16", "Fix: set sketch_dim to at least", sketch_dim=3
    ),
    _value(
        "sketched_diagonal",
        '`sketch_dim` with `information="diagonal"`',
        "a sketch mixes them",
        "Fix: set sketch_dim=0",
        sketch_dim=64,
        information="diagonal",
    ),
    _value("no_scoring_tokens", "`scoring_tokens_per_batch=0`", "is below 1", scoring_tokens_per_batch=0),
    _value("overlap_as_text", '`overlap_scoring="yes"`', "is neither True nor False", overlap_scoring="yes"),
    BadInput(
        "no_config",
        "a dict, a YAML file's name or the class in place of a `SpiceConfig`",
        ATTACHING,
        TypeError,
        ("attach_spice needs a SpiceConfig or a SpiceSampler, got dict", "SpiceConfig(pool_size=..."),
        _attach({"pool_size": 10}),
    ),
    BadInput(
        "no_trainer",
        "something else than a `Trainer`",
        ATTACHING,
        TypeError,
        ("attach_spice needs a transformers.Trainer", "got SimpleNamespace", "SpiceSampler(config).bind"),
        lambda scene: lambda: attach_spice(SimpleNamespace(), SpiceConfig()),
    ),
    BadInput(
        "attached_twice",
        "attaching twice with different settings",
        ATTACHING,
        ValueError,
        ("attached to this trainer already", "fisher_alpha is 1.0 and would be 2.0", "Call detach_spice(trainer)"),
        _attach_twice,
    ),
    BadInput(
        "attached_in_a_run",
        "attaching while the trainer trains",
        STARTING,
        RuntimeError,
        ("attach_spice was called while the trainer trains", "on_train_begin", "before `train()`"),
        _attach_in_a_run,
    ),
    BadInput(
        "detached_in_a_run",
        "detaching while the trainer trains",
        TRAINING,
        RuntimeError,
        ("cannot be detached while the trainer trains", "`control.should_training_stop = True`"),
        _detach_in_a_run,
    ),
    BadInput(
        "sampler_of_another",
        "one `SpiceSampler` for two trainers",
        ATTACHING,
        ValueError,
        ("attached to another trainer", "Build a SpiceSampler for each trainer"),
        _attach_a_used_sampler,
    ),
    BadInput(
        "not_attached",
        "detaching where nothing is attached",
        CALLING,
        ValueError,
        ("SPICE is not attached to this trainer",),
        _detach,
    ),
    BadInput(
        "too_many_picks",
        "`pools_per_step` × `num_selected` above the samples of a step",
        ATTACHING,
        ValueError,
        (
            "3 × 4 = 12 samples, more than the 4",
            "raise per_device_train_batch_size to 12, or lower pools_per_step to 1",
        ),
        lambda scene: scene.attach({"pools_per_step": 3}),
    ),
    BadInput(
        "fewer_picks_than_slots",
        "fewer picks of a step than its micro-batches",
        ATTACHING,
        ValueError,
        ("1 × 2 = 2 samples, fewer than the 4 micro-batches", "raise pools_per_step to 2, or raise num_selected to 4"),
        lambda scene: scene.attach({"pools_per_step": 1, "num_selected": 2}, gradient_accumulation_steps=4),
    ),
    BadInput(
        "adaptive_mean_loss",
        "adaptive stopping with a model whose loss is a mean per micro-batch",
        ATTACHING,
        ValueError,
        ("Adaptive stopping", "cannot be used here", "not normalised by num_items_in_batch", "Use a fixed"),
        lambda scene: scene.attach(ADAPTIVE, model=mean_loss_model()),
    ),
    BadInput(
        "packed_mean_loss",
        "`pack_picks` with such a model",
        ATTACHING,
        ValueError,
        ("pack_picks=True makes micro-batches of about equally many tokens", "Fix: set pack_picks=False"),
        lambda scene: scene.attach({"pack_picks": True}, model=mean_loss_model()),
    ),
    BadInput(
        "adaptive_own_loss",
        "adaptive stopping with a `compute_loss` of a subclass that is a mean per micro-batch",
        ATTACHING,
        ValueError,
        ("Adaptive stopping", "cannot be used here"),
        lambda scene: scene.attach(ADAPTIVE, trainer_class=OwnLoss),
    ),
    BadInput(
        "adaptive_bound_loss",
        "adaptive stopping with such a `compute_loss` set on the trainer",
        ATTACHING,
        ValueError,
        ("Adaptive stopping", "cannot be used here"),
        _bound_loss,
    ),
    BadInput(
        "dropped_epoch",
        "`dataloader_drop_last` with pools larger than the dataset",
        ATTACHING,
        ValueError,
        ("55 rows, but a step draws 1 full pools of 60", "Set dataloader_drop_last=False, or lower pool_size"),
        lambda scene: scene.attach({"pool_size": 60}, dataloader_drop_last=True),
    ),
    BadInput(
        "picks_raised_later",
        "`num_selected` set above `pool_size` after attaching",
        STARTING,
        ValueError,
        ("num_selected=400 is more than pool_size=10",),
        _set_later(num_selected=400),
    ),
    BadInput(
        "text_set_later",
        "a number set as text after attaching",
        STARTING,
        ValueError,
        ("fisher_alpha='1' is of type str",),
        _set_later(fisher_alpha="1"),
    ),
    BadInput(
        "adaptive_set_later",
        "`stop_ratio` set after attaching, without `pools_per_step`",
        STARTING,
        ValueError,
        ("stop_ratio=0.5 with pools_per_step=None",),
        _set_later(stop_ratio=0.5),
    ),
    BadInput(
        "accumulation_later",
        "a batch setting changed after attaching that no longer fits",
        STARTING,
        ValueError,
        ("1 × 4 = 4 samples, fewer than the 8 micro-batches",),
        _more_accumulation,
    ),
)
