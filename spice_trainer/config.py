"""The settings of SPICE: one flat dataclass that checks itself.

Per pool of N = `pool_size` candidates, greedy selection takes K = `num_selected` samples, each maximising

    s(x|S) = Δ(x|S) - λ c(x|S),    Δ(x|S) = F(S ∪ {x}) - F(S),    F(S) = log det(I + α Σ_{i∈S} g_i g_iᵀ)

with α = `fisher_alpha` and λ = `conflict_penalty`. T = `pools_per_step` pools feed one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from typing import Any, Literal, Protocol, get_args

from spice_trainer.utils.fields import (
    Check,
    OneOf,
    RealNumber,
    WholeNumber,
    column_name,
    model_name,
    name_list,
    truth_value,
)

AlphaScaling = Literal["fixed", "pool"]
ConflictReference = Literal["selected", "candidates", "pool", "momentum"]
GradientNormalization = Literal["none", "sqrt_tokens", "tokens", "unit"]
GradientPreconditioning = Literal["none", "adam"]
Information = Literal["exact", "diagonal", "adafisher"]
LengthQuotas = Literal["auto", "none", "pool", "validation"]
MatchingFeatures = Literal["hidden_states", "gradients"]
ScoringParameters = Literal["all", "lora"]

DEFAULT_SKETCH_DIM = 32_768
"""Numbers kept of each sample gradient when `sketch_dim=-1`, measured by `tests/benchmarks/sketch_fidelity.py`."""

MIN_SKETCH_DIM = 16


class StrategyTraits(Protocol):
    """What settings ask of a rule. The rules themselves are above this layer, in `selection.strategies`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What it reads of a pool: fields of [`PoolScores`] beside `sound`."""

    @property
    def num_forwards(self) -> int:
        """Forwards through the model that a candidate costs."""

    @property
    def num_backwards(self) -> int:
        """Backwards through the model that a candidate costs."""

    @property
    def compares_gradients(self) -> bool:
        """Whether it compares gradients with something, and not only their norms."""

    @property
    def reads_whole_gram(self) -> bool:
        """Whether it reads a Gram matrix as a whole."""

    @property
    def reads_target(self) -> bool:
        """Whether it reads the validation rows where there are any."""

    @property
    def target_is_raw(self) -> bool:
        """Whether validation rows' gradients are never preconditioned."""

    @property
    def on_hidden_states(self) -> StrategyTraits | None:
        """The same rule on hidden states, where it has both."""

    @property
    def maximizes_information(self) -> bool:
        """Whether its gains are of Fisher information."""

    @property
    def has_conflict_penalty(self) -> bool:
        """Whether λ means something to it."""


STRATEGIES: dict[str, StrategyTraits] = {}
"""Every rule by its name. [`register_strategy`] fills it; importing `spice_trainer` adds the package's own."""


def _maximizes_information(rule: StrategyTraits) -> bool:
    return rule.maximizes_information


def _takes_gram(rule: StrategyTraits) -> bool:
    return "gram" in rule.needs


# Settings that mean something to some rules only: when they are set, to which, and why not to the others.
_LIMITED: tuple[tuple[str, object, Callable[[StrategyTraits], bool], str], ...] = (
    (
        "stop_ratio",
        None,
        _maximizes_information,
        "it is a share of a gain of information, which this strategy has none of",
    ),
    ("min_gain", None, _maximizes_information, "it is a gain of information, which this strategy has none of"),
    ("information", "exact", _maximizes_information, "this strategy picks by something else than information"),
    ("gradient_centering", False, _maximizes_information, "this strategy picks by something else than information"),
    (
        "gradient_preconditioning",
        "none",
        lambda rule: rule.compares_gradients,
        "this strategy compares no gradients with each other",
    ),
    (
        "scoring_prefilter",
        None,
        lambda rule: rule.num_backwards > 0,
        "this strategy takes no gradients, which the filter would save",
    ),
    ("proxy_check_pools", 0, _takes_gram, "the comparison is of gains that come from a pool's Gram matrix"),
    ("overlap_scoring", False, _takes_gram, "beside the training nothing but the Gram matrix's gradients is computed"),
    (
        "proxy_model_name_or_path",
        None,
        lambda rule: rule.num_forwards > 0,
        "this strategy scores nothing, so a proxy would have no work",
    ),
)


def _registered(owner: str, name: str, value: object) -> Any:
    """A rule's name. Those that a user registered count, so the legal ones are looked up when they are asked for."""
    return OneOf(tuple(STRATEGIES))(owner, name, value)


def _weights(owner: str, name: str, value: object) -> Any:
    """One weight of each validation set."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{owner}: {name} must be a list of numbers above 0, one of each set, got {value!r}.")
    return [RealNumber("above 0", "a set of no weight says nothing", lambda x: x > 0)(owner, name, x) for x in value]


# What each setting must be, whatever the others are. None is legal where it is the default.
_CHECKS: dict[str, Check] = {
    "pool_size": WholeNumber(2, "a pool needs at least two candidates to choose between"),
    "num_selected": WholeNumber(1, "every pool must give at least one sample"),
    "pools_per_step": WholeNumber(1, "every optimizer step needs at least one pool"),
    "pool_seed": WholeNumber(0, "seeds are counted from 0"),
    "fisher_alpha": RealNumber("above 0", "an alpha of 0 would make every gain 0", lambda x: x > 0),
    "alpha_scaling": OneOf(get_args(AlphaScaling)),
    "conflict_penalty": RealNumber("at least 0", "a negative penalty would reward conflict", lambda x: x >= 0),
    "conflict_reference": OneOf(get_args(ConflictReference)),
    "information": OneOf(get_args(Information)),
    "gradient_normalization": OneOf(get_args(GradientNormalization)),
    "stop_ratio": RealNumber("between 0 and 1, both excluded", "it is a share of the first gain", lambda x: 0 < x < 1),
    "min_gain": RealNumber("at least 0", "gains are never negative", lambda x: x >= 0),
    "selection_epochs": WholeNumber(1, "the first epoch has no earlier picks to replay"),
    "max_repeats": WholeNumber(0, "it counts the picks of a row after its first, and None does not limit them"),
    "tie_tolerance": RealNumber("at least 0 and below 1", "it is a share of the best score", lambda x: 0 <= x < 1),
    "strategy": _registered,
    "gradient_centering": truth_value,
    "gradient_preconditioning": OneOf(get_args(GradientPreconditioning)),
    "matching_features": OneOf(get_args(MatchingFeatures)),
    "hidden_layer": WholeNumber(0, "layers are counted from 0, the embedding's output"),
    "length_quotas": OneOf(get_args(LengthQuotas)),
    "length_bins": WholeNumber(1, "quotas need at least one range of lengths"),
    "validation_rows": WholeNumber(1, "a mean needs at least one row"),
    "validation_weights": _weights,
    "score_once_after": WholeNumber(0, "it counts steps on random rows"),
    "validation_every": WholeNumber(1, "it counts steps from one look at the validation rows to the next"),
    "sketch_dim": WholeNumber(-1, "-1 chooses the default, 0 is exact, more is a sketch of that many"),
    "scoring_tokens_per_batch": WholeNumber(1, "a scoring pass needs at least one token"),
    "scoring_layers": WholeNumber(1, "scoring needs at least one layer"),
    "scoring_parameters": OneOf(get_args(ScoringParameters)),
    "scoring_target_modules": name_list,
    "scoring_max_tokens": WholeNumber(1, "a row without label tokens has no gradient"),
    "scoring_prefilter": RealNumber(
        "between 0 and 1, both excluded", "it is a share of the pool, and None takes all of it", lambda x: 0 < x < 1
    ),
    "proxy_model_name_or_path": model_name,
    "proxy_learning_rate": RealNumber("at least 0", "a negative rate would unlearn the picks", lambda x: x >= 0),
    "proxy_update_every": WholeNumber(1, "it counts cycles from one update of the proxy to the next"),
    "proxy_check_pools": WholeNumber(0, "it counts pools"),
    "overlap_scoring": truth_value,
    "pack_picks": truth_value,
    "record_id_column": column_name,
    "record_text_length": WholeNumber(0, "it counts letters, and 0 records none"),
}


@dataclass
class SpiceConfig:
    r"""Configuration class for SPICE, the selection of training samples by Fisher information and gradient conflict.

    Using [`~transformers.HfArgumentParser`] or [`~trl.TrlParser`] we can turn this class into command line arguments
    beside `SFTConfig`, `ModelConfig` and `ScriptArguments`; no name is shared with them. Every value is checked on
    creation. The paper's symbol stands in brackets. [`SpiceConfig.paper`] gives the published settings.

    Parameters:
        > Parameters that control the pools

        pool_size (`int`, *optional*, defaults to `120`):
            Number of candidates in a pool [N]. At least 2.
        num_selected (`int`, *optional*, defaults to `12`):
            Number of samples picked from a pool [K], at most `pool_size`. With `pools_per_step=None` only the share
            `num_selected / pool_size` is taken from it; with adaptive stopping it is a cap.
        pools_per_step (`int`, *optional*):
            Number of pools that feed one optimizer step [T]. If `None`, it follows from the batch size, which is then
            always filled. Required with `stop_ratio` or `min_gain`.
        pool_seed (`int`, *optional*):
            Seed of the pools' shuffling. If `None`, the Trainer's data seed.

        > Parameters that control the selection

        fisher_alpha (`float`, *optional*, defaults to `1.0`):
            Scale of the gradients' outer products in the Fisher information [α]. Above 0.
        alpha_scaling (`str`, *optional*, defaults to `"fixed"`):
            `"fixed"` uses `fisher_alpha` as it is, as in the paper. `"pool"` divides it by the mean squared gradient
            norm of the pool, so that a `stop_ratio` means the same on any model.
        conflict_penalty (`float`, *optional*, defaults to `0.1`):
            Weight of the conflict in the score [λ]. 0 selects by Fisher information alone.
        conflict_reference (`str`, *optional*, defaults to `"selected"`):
            The mean gradient that a candidate may oppose [ḡ]: of the samples already picked from the pool
            (`"selected"`), of the candidates not yet picked (`"candidates"`), of all candidates (`"pool"`), which
            training on the whole pool would follow, or of the last steps (`"momentum"`), so that a pick does not
            undo what they did: the optimizer's own, of PyTorch's Adam, AdamW or SGD with a momentum, whole on every
            process (not FSDP or DeepSpeed; a proxy has its own). Gradients are held against it uncentred.
        information (`str`, *optional*, defaults to `"exact"`):
            Measure of information [F]: the log-determinant (`"exact"`), its diagonal approximation (`"diagonal"`), or
            the gain of the released code (`"adafisher"`), which ranks almost as the gradient norm does.
        gradient_normalization (`str`, *optional*, defaults to `"sqrt_tokens"`):
            Rescaling of each sample gradient [g]: not at all, as in the paper (`"none"`), times the square root of
            its number of label tokens (`"sqrt_tokens"`), times that number (`"tokens"`), or to length 1 (`"unit"`).
            The gradient of a mean over few tokens is long, so without it the shortest answers are picked.
            `strategy="less"` reads directions alone, as if this were `"unit"`.
        stop_ratio (`float`, *optional*):
            Adaptive stopping [ω]: a pool is done at the first pick whose gain is at most this share of the pool's
            first gain. Between 0 and 1.
        min_gain (`float`, *optional*):
            Adaptive stopping: a pool is done at the first pick whose gain is below this. At least 0.
        selection_epochs (`int`, *optional*):
            Number of epochs that select; later epochs replay the picks of the last of them. If `None`, every epoch
            selects anew. The paper uses 1.
        max_repeats (`int`, *optional*):
            Number of times that a row may be picked again after it was picked once, in later epochs or where the
            dataset holds it several times: rows of the same tokens count as one, whatever their images. `None`: as
            often as the rule likes. Replayed epochs (`selection_epochs`) do not count.
        tie_tolerance (`float`, *optional*, defaults to `1e-6`):
            Scores this close to the best one, relative to it, are tied and go to the earlier candidate. 0 is strict.

        > Parameters that choose the rule

        strategy (`str`, *optional*, defaults to `"spice"`):
            The rule that picks from a pool: most information and least conflict (`"spice"`), information alone
            (`"fisher"`), `"random"` rows, the largest gradients (`"top_norm"`), the largest volume (`"dpp"`), the mean
            gradient nearest the pool's (`"matching"`), a pick near every candidate (`"facility_location"`), the
            largest total loss (`"loss"`), the largest loss per token (`"perplexity"`), the largest loss with over
            loss without the instruction, below 1 (`"ifd"`), the gradient most like that of the validation set
            (`"less"`), the mean nearest a target between the pool and the validation rows
            (`"targeted_matching"`), random rows of their answer lengths (`"length_matched"`), what takes most off the
            validation rows' loss by its Taylor expansion (`"greats"`), the same drawn at a temperature (`"opus"`),
            each validation row's most similar one in turn (`"rds"`), draws from their optimal transport to the pool
            (`"tsds"`), or the largest logits farthest from earlier picks (`"uds"`). What a rule does not read is not
            computed: `"random"` and `"length_matched"` run no forward, `"loss"`, `"perplexity"`, `"ifd"`, `"rds"`,
            `"tsds"`, `"uds"` and, on hidden states, `"targeted_matching"` no backward. Only `"spice"` has a conflict
            penalty and, with `"fisher"`, a `conflict_reference`; only rules with a Gram matrix read
            `gradient_normalization`; settings of gradients are ignored where none are taken.
        gradient_centering (`bool`, *optional*, defaults to `False`):
            Whether `"spice"` and `"fisher"` take the mean gradient of a pool off each of its gradients, as far as
            anything is left. For exact information.
        gradient_preconditioning (`str`, *optional*, defaults to `"none"`):
            `"adam"` takes gradients as Adam would apply them: divided by the root of its second moment, each
            candidate's own square included, before they are normalised and compared, so that samples are told apart
            by what they would do to the weights. For strategies that compare gradients, with PyTorch's Adam or AdamW
            whole on every process (not FSDP or DeepSpeed; a proxy has its own). Preconditioned gradients are long, up
            to the root of their dimension: set `alpha_scaling="pool"` with it, or `gradient_normalization="unit"`
            (where it was measured, `"none"` picked the shortest answers of a pool and `"sqrt_tokens"` the longest).
            With `"less"`, `"greats"` and `"opus"` the validation set's gradients stay as they are.

        > Parameters that aim the selection

        validation_rows (`int`, *optional*, defaults to `32`):
            Number of first rows of each validation set (`validation_dataset`; for `"less"` also the Trainer's
            `eval_dataset`) that rules compare candidates with.
        validation_weights (`list[float]`, *optional*):
            Weight of each of several validation sets, in their order. `None`: all weigh the same.
        validation_every (`int`, *optional*, defaults to `1`):
            Number of optimizer steps from one computation of the validation rows' gradients to the next.
        matching_features (`str`, *optional*, defaults to `"hidden_states"`):
            What `"targeted_matching"` compares rows by: the mean of their tokens' `"hidden_states"`, later tokens
            weighing more (a forward up to one layer), or their `"gradients"` (a forward and a backward).
        hidden_layer (`int`, *optional*):
            The layer whose input these hidden states are, from 0. `None`: the lowest that trains, if at least half of
            the layers lie below it, so that they stay the same while training; else the one that seven eighths lie
            below, and for `"rds"` what the head reads, which is the number of layers and one.
        length_quotas (`str`, *optional*, defaults to `"auto"`):
            Whether each range of answer lengths gets a number of picks of its own: its share of the `"pool"`, in
            strata of equal size, or of the `"validation"` rows. `"none"`: the rule alone decides. `"auto"`: as the
            rule has it, which is none but for `"targeted_matching"` and `"length_matched"`.
        length_bins (`int`, *optional*, defaults to `4`):
            Number of these ranges.

        > Parameters that control the scoring

        sketch_dim (`int`, *optional*, defaults to `-1`):
            Numbers kept of each sample gradient by a random projection: `-1` keeps 32,768 (all of them for
            `"diagonal"` and `"adafisher"` information), 0 or `None` keeps the exact gradient, else at least 16.
        scoring_tokens_per_batch (`int`, *optional*, defaults to `2048`):
            Number of tokens, padding included, of one forward and backward pass of the scoring. Lower it to save
            memory; it changes no pick beyond rounding.
        scoring_layers (`int`, *optional*):
            Scores by the modules of the last so many layers alone, and stops the backward there. `None`, or at
            least as many as the model has: all of them.
        scoring_parameters (`str`, *optional*, defaults to `"all"`):
            Scores by everything that trains (`"all"`), or by the LoRA weights alone (`"lora"`), where norms,
            embeddings, `modules_to_save` or others train beside them.
        scoring_target_modules (`list[str]`, *optional*):
            Scores by the modules of these names alone, such as `q_proj`: full names or the ends of names, as in
            `LoraConfig(target_modules=...)`. `None`: all of them.
        scoring_max_tokens (`int`, *optional*):
            Scores each row by its first so many label tokens; what comes after them is not computed. `None`: by all.
        scoring_prefilter (`float`, *optional*):
            Share of a pool's candidates, above 0 and below 1, whose gradients are computed: those of largest loss
            (times the factor that `gradient_normalization` gives the gradient), after a forward of all of them. A
            forward is half of the work, so a half saves nothing, and where lengths are divided out the loss says
            little of the gradient. `None`: all of them.

        score_once_after (`int`, *optional*):
            Scores every row of the dataset once, after so many steps on random rows, and picks all later steps from
            these scores, which lie under `spice/scores` in the output directory: 2 bytes for each number of
            `sketch_dim`, a row. `None`: each step's candidates are scored at the weights of the moment.

        > Parameters that control a proxy

        proxy_model_name_or_path (`str`, *optional*):
            A small causal language model, on the hub or in a folder, that scores instead of the one that trains and
            learns from what it picked. It gets LoRA r 16 on all linear layers; for another adapter or tokenised rows
            of its own pass a [`ProxyModel`] to [`attach_spice`].
        proxy_learning_rate (`float`, *optional*, defaults to `0.0002`):
            Constant learning rate of the proxy's own AdamW. 0 keeps the proxy as it is. For
            `proxy_model_name_or_path`; a [`ProxyModel`] has its own.
        proxy_update_every (`int`, *optional*, defaults to `1`):
            Number of optimizer steps from one update of the proxy to the next. For `proxy_model_name_or_path`.
        proxy_check_pools (`int`, *optional*, defaults to `0`):
            Number of first pools that the target scores too. How well the proxy's gains and picks agree with the
            target's is logged.
        overlap_scoring (`bool`, *optional*, defaults to `False`):
            Whether the proxy scores the next step's pools while the target trains on this one's. Changes no pick.

        > Parameters that control the micro-batches

        pack_picks (`bool`, *optional*, defaults to `False`):
            Whether a step's picks are dealt to its micro-batches by their tokens, so that each holds about as many,
            and not by their number: for collators that pack a micro-batch's rows without padding
            (`SFTConfig(padding_free=True)`). Changes no pick.

        > Parameters that control the records

        record_id_column (`str`, *optional*):
            Column of the training dataset whose values name the picked rows in the records. `None`: the first of `id`,
            `_id`, `uuid`, `idx`, `row_id`, `sample_id` and `example_id` that it has, or none.
        record_text_length (`int`, *optional*, defaults to `0`):
            Number of letters that the records hold of the text that a picked row trains.
    """

    pool_size: int = field(default=120, metadata={"help": "Number of candidates in a pool [N]."})
    num_selected: int = field(
        default=12,
        metadata={"help": "Number of samples picked from a pool [K]; a cap with adaptive stopping."},
    )
    pools_per_step: int | None = field(
        default=None,
        metadata={"help": "Number of pools that feed one optimizer step [T]. None: follows from the batch size."},
    )
    pool_seed: int | None = field(
        default=None, metadata={"help": "Seed of the pools' shuffling. None: the Trainer's data seed."}
    )
    fisher_alpha: float = field(
        default=1.0, metadata={"help": "Scale of the gradients' outer products in the Fisher information [alpha]."}
    )
    alpha_scaling: AlphaScaling = field(
        default="fixed",
        metadata={"help": "'pool' divides fisher_alpha by the pool's mean squared gradient norm; 'fixed' does not."},
    )
    conflict_penalty: float = field(default=0.1, metadata={"help": "Weight of the conflict in the score [lambda]."})
    conflict_reference: ConflictReference = field(
        default="selected",
        metadata={
            "help": "Mean gradient a candidate may oppose: of picked samples, open candidates, the pool, or the "
            "optimizer's momentum."
        },
    )
    information: Information = field(default="exact", metadata={"help": "Measure of information [F]."})
    gradient_normalization: GradientNormalization = field(
        default="sqrt_tokens", metadata={"help": "Rescaling of each sample gradient before anything else."}
    )
    stop_ratio: float | None = field(
        default=None,
        metadata={"help": "Stop a pool at the first gain of at most this share of its first gain [omega]."},
    )
    min_gain: float | None = field(default=None, metadata={"help": "Stop a pool at the first gain below this."})
    selection_epochs: int | None = field(
        default=None,
        metadata={"help": "Number of epochs that select; later ones replay the last picks. None: all select."},
    )
    max_repeats: int | None = field(
        default=None, metadata={"help": "Times that a row may be picked again after its first. None: no limit."}
    )
    tie_tolerance: float = field(
        default=1e-6,
        metadata={"help": "Scores this close to the best one, relative to it, go to the earlier candidate."},
    )

    _: KW_ONLY

    strategy: str = field(
        default="spice",
        metadata={
            "help": "Rule that picks from a pool: spice, fisher, random, top_norm, dpp, matching, facility_location, "
            "loss, perplexity, ifd, less, targeted_matching, length_matched, greats, opus, rds, tsds, uds, "
            "or one that you registered."
        },
    )
    gradient_centering: bool = field(
        default=False, metadata={"help": "Take the pool's mean gradient off each gradient, for spice and fisher."}
    )
    gradient_preconditioning: GradientPreconditioning = field(
        default="none", metadata={"help": "'adam' divides gradients by the root of the optimizer's second moment."}
    )
    validation_rows: int = field(
        default=32, metadata={"help": "Number of first rows of each validation set that rules compare with."}
    )
    validation_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each of several validation sets. None: equal weights."}
    )
    validation_every: int = field(
        default=1, metadata={"help": "Steps from one computation of the validation rows' gradients to the next."}
    )
    matching_features: MatchingFeatures = field(
        default="hidden_states", metadata={"help": "What targeted_matching compares rows by."}
    )
    hidden_layer: int | None = field(
        default=None, metadata={"help": "Layer whose input the hidden states are. None: chosen by what trains."}
    )
    length_quotas: LengthQuotas = field(
        default="auto",
        metadata={
            "help": "Give each range of answer lengths its share of the pool's, or the validation rows', picks."
        },
    )
    length_bins: int = field(default=4, metadata={"help": "Number of ranges of answer lengths for quotas."})

    sketch_dim: int | None = field(
        default=-1,
        metadata={"help": "Numbers kept of each sample gradient. -1: 32,768; 0 or None: exact."},
    )
    scoring_tokens_per_batch: int = field(
        default=2048, metadata={"help": "Number of tokens, padding included, of one scoring pass."}
    )
    scoring_layers: int | None = field(
        default=None, metadata={"help": "Score by the modules of the last so many layers. None: all layers."}
    )
    scoring_parameters: ScoringParameters = field(
        default="all", metadata={"help": "Score by everything that trains, or by the weights of LoRA alone."}
    )
    scoring_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Score by the modules of these names, such as q_proj. None: all."}
    )
    scoring_max_tokens: int | None = field(
        default=None, metadata={"help": "Score each row by its first so many label tokens. None: by all."}
    )
    scoring_prefilter: float | None = field(
        default=None,
        metadata={"help": "Share of a pool, those of largest loss, whose gradients are computed. None: all."},
    )

    score_once_after: int | None = field(
        default=None,
        metadata={"help": "Score every row once, after so many steps on random rows. None: score at every step."},
    )

    proxy_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A small model that scores instead of the one that trains. None: none does."}
    )
    proxy_learning_rate: float = field(
        default=2e-4, metadata={"help": "Learning rate of the proxy's own updates on what it picked. 0: none."}
    )
    proxy_update_every: int = field(
        default=1, metadata={"help": "Number of optimizer steps from one update of the proxy to the next."}
    )
    proxy_check_pools: int = field(
        default=0, metadata={"help": "Number of first pools that the target scores too, to compare the proxy with it."}
    )
    overlap_scoring: bool = field(
        default=False,
        metadata={"help": "Let the proxy score the next step's pools while the target trains on this one's."},
    )

    pack_picks: bool = field(
        default=False,
        metadata={"help": "Deal a step's picks to its micro-batches by their tokens, for padding-free training."},
    )

    record_id_column: str | None = field(
        default=None,
        metadata={"help": "Column of ids that name picked rows in the records. None: id, uuid and alike."},
    )
    record_text_length: int = field(
        default=0, metadata={"help": "Letters of a picked row's trained text that the records hold."}
    )

    def __post_init__(self) -> None:
        """Check every field, and store whole numbers as `int`, real numbers as `float`, `sketch_dim=None` as 0."""
        if self.sketch_dim is None:
            self.sketch_dim = 0
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value is not None or setting.default is not None:
                setattr(self, setting.name, _CHECKS[setting.name]("SpiceConfig", setting.name, value))
        self._check_picks()
        self._check_sketch()
        self._check_strategy()
        self._check_prefilter()
        self._check_stopping()
        self._check_once()

    @classmethod
    def paper(cls, *, adaptive: bool = False) -> SpiceConfig:
        """Return the settings published in the paper.

        Args:
            adaptive (`bool`, *optional*, defaults to `False`):
                `False` gives SPICE: 10 pools of 120 with 12 picks each, 120 samples a step. `True` gives SPICE+: at
                most 60 picks a pool, 600 samples a step, stopped at half of the first gain.

        Returns:
            `SpiceConfig`: A new configuration with every published setting written out.
        """
        return cls(
            pool_size=120,
            num_selected=60 if adaptive else 12,
            pools_per_step=10,
            fisher_alpha=1.0,
            alpha_scaling="fixed",
            conflict_penalty=0.1,
            conflict_reference="selected",
            information="exact",
            gradient_normalization="none",
            stop_ratio=0.5 if adaptive else None,
            selection_epochs=1,
            strategy="spice",
            gradient_centering=False,
            gradient_preconditioning="none",
            sketch_dim=0,
        )

    @property
    def is_adaptive(self) -> bool:
        """Whether a pool may stop before `num_selected` picks."""
        return self.stop_ratio is not None or self.min_gain is not None

    @property
    def rule(self) -> StrategyTraits:
        """What the strategy needs and costs."""
        rule = STRATEGIES[self.strategy]
        return (self.matching_features == "hidden_states" and rule.on_hidden_states) or rule

    @property
    def takes_momentum(self) -> bool:
        """Whether candidates are held against the optimizer's momentum."""
        return self.conflict_reference == "momentum" and self.rule.maximizes_information

    @property
    def takes_gradients(self) -> bool:
        """Whether the strategy needs a backward through the model."""
        return self.rule.num_backwards > 0

    @property
    def takes_gram(self) -> bool:
        """Whether the strategy needs the Gram matrix of a pool's gradients."""
        return "gram" in self.rule.needs

    @property
    def reads_gram_by_rows(self) -> bool:
        """Whether picks need no more of a Gram matrix than what a greedy pass reads."""
        return not (self.rule.reads_whole_gram or self.gradient_centering) and self.information == "exact"

    @property
    def takes_model(self) -> bool:
        """Whether the strategy needs the model at all."""
        return self.rule.num_forwards > 0

    @property
    def takes_answers_alone(self) -> bool:
        """Whether the strategy needs the losses of answers without what precedes them."""
        return "losses_without_instruction" in self.rule.needs

    @property
    def takes_alignment(self) -> bool:
        """Whether the strategy compares candidates with the mean gradient of a validation set."""
        return bool({"alignment", "reference_norm"} & set(self.rule.needs))

    @property
    def takes_gradient_cosines(self) -> bool:
        """Whether the strategy compares gradients of candidates and validation rows, all with each other."""
        return "gradient_cosines" in self.rule.needs

    @property
    def takes_hidden_states(self) -> bool:
        """Whether the strategy compares hidden states."""
        return "hidden_cosines" in self.rule.needs or self.takes_last_hidden_states

    @property
    def takes_last_hidden_states(self) -> bool:
        """Whether these are the ones that the head reads, as they are."""
        return "last_hidden_cosines" in self.rule.needs

    @property
    def takes_logits(self) -> bool:
        """Whether the strategy reads what logits tell, or what they told of earlier picks."""
        return bool({"logit_norms", "logit_features", "past_features"} & set(self.rule.needs))

    @property
    def takes_learning_rate(self) -> bool:
        """Whether the strategy reads the optimizer's learning rate."""
        return "learning_rate" in self.rule.needs

    @property
    def takes_validation(self) -> bool:
        """Whether a validation set is read, if there is one."""
        return self.rule.reads_target or self.needs_validation

    @property
    def needs_validation(self) -> bool:
        """Whether there must be a validation set."""
        return self.takes_alignment or "target" in self.rule.needs or self.length_quotas == "validation"

    def resolve_sketch_dim(self) -> int:
        """Return how many numbers of each sample gradient are kept.

        Returns:
            `int`: `sketch_dim` itself if given, else the default for this `information`. 0 means the exact gradient,
            and so does any number that is at least the gradient's own. The smallest where the `strategy` asks for
            norms alone, which are exact whatever is kept.
        """
        if not self.rule.compares_gradients:
            return MIN_SKETCH_DIM
        if self.sketch_dim is not None and self.sketch_dim >= 0:
            return self.sketch_dim
        return DEFAULT_SKETCH_DIM if self.information == "exact" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON; `SpiceConfig(**config.to_dict()) == config`."""
        return asdict(self)

    def _check_picks(self) -> None:
        if self.num_selected > self.pool_size:
            raise ValueError(
                f"SpiceConfig: num_selected={self.num_selected} is more than pool_size={self.pool_size}: a pool "
                "cannot give more samples than it has candidates. Fix: lower num_selected to at most "
                f"{self.pool_size}, or raise pool_size to at least {self.num_selected}."
            )

    def _check_sketch(self) -> None:
        sketch_dim = self.sketch_dim or 0
        if 0 < sketch_dim < MIN_SKETCH_DIM:
            raise ValueError(
                f"SpiceConfig: sketch_dim={sketch_dim} is below {MIN_SKETCH_DIM}: so few numbers cannot tell the "
                f"gradients of a pool apart. Fix: set sketch_dim to at least {MIN_SKETCH_DIM}, to 0 for exact "
                "gradients, or to -1 for the default."
            )
        if sketch_dim > 0 and self.information != "exact":
            raise ValueError(
                f"SpiceConfig: sketch_dim={sketch_dim} with information={self.information!r}: this measure sums "
                "over single gradient coordinates, and a sketch mixes them, so the result would mean nothing. Fix: "
                "set sketch_dim=0 (or -1), or information='exact'."
            )

    def _check_strategy(self) -> None:
        for name, unset, is_meant, reason in _LIMITED:
            value = getattr(self, name)
            if value != unset and not is_meant(self.rule):
                listed = ", ".join(repr(strategy) for strategy, rule in STRATEGIES.items() if is_meant(rule))
                other = f"set strategy to one of {listed}"
                if is_meant(STRATEGIES[self.strategy]):
                    other = "set matching_features='gradients'"
                raise ValueError(
                    f"SpiceConfig: {name}={value!r} with strategy={self.strategy!r}: {reason}. Fix: leave {name} out, "
                    f"or {other}."
                )
        if self.gradient_centering and self.information != "exact":
            raise ValueError(
                f"SpiceConfig: gradient_centering=True with information={self.information!r}: gradients are "
                "centred in their Gram matrix, and this measure sums over their coordinates. Fix: leave "
                "gradient_centering out, or set information='exact'."
            )

    def _check_prefilter(self) -> None:
        if self.scoring_prefilter is None:
            return
        given = f"SpiceConfig: scoring_prefilter={self.scoring_prefilter}"
        if self.overlap_scoring:
            raise ValueError(
                f"{given} with overlap_scoring=True: the filter needs the losses of every process, which cannot talk "
                "to each other while the step before trains. Fix: leave one of the two out."
            )
        if self.proxy_check_pools:
            raise ValueError(
                f"{given} with proxy_check_pools={self.proxy_check_pools}: the proxy and the target would each drop "
                "other candidates, so their scores could not be compared. Fix: leave one of the two out."
            )
        if math.ceil(self.scoring_prefilter * self.pool_size) < self.num_selected:
            raise ValueError(
                f"{given} of pool_size={self.pool_size} is fewer candidates than num_selected={self.num_selected}. "
                f"Fix: set scoring_prefilter to at least {self.num_selected / self.pool_size:.3g}."
            )

    def _check_once(self) -> None:
        clashing = {
            "overlap_scoring": (self.overlap_scoring, "there is nothing to score beside the training"),
            "proxy_check_pools": (self.proxy_check_pools > 0, "the target would score at other weights"),
            "scoring_prefilter": (self.scoring_prefilter is not None, "it compares the losses of a pool's rows"),
            "conflict_reference": (self.takes_momentum, "the momentum changes with every step"),
            "strategy": (self.takes_logits, "its memory of past picks changes with every step"),
        }
        for name, (is_set, reason) in clashing.items():
            if self.score_once_after is not None and is_set:
                raise ValueError(
                    f"SpiceConfig: score_once_after={self.score_once_after} with {name}={getattr(self, name)!r}: "
                    f"{reason}. Fix: leave one of the two out."
                )
        if self.score_once_after is not None and not self.takes_model:
            raise ValueError(
                f"SpiceConfig: score_once_after={self.score_once_after} with strategy={self.strategy!r}: this "
                "strategy scores nothing. Fix: leave it out, or choose another strategy."
            )

    def _check_stopping(self) -> None:
        if self.is_adaptive and self.pools_per_step is None:
            given = [f"{n}={getattr(self, n)}" for n in ("stop_ratio", "min_gain") if getattr(self, n) is not None]
            raise ValueError(
                f"SpiceConfig: {' and '.join(given)} with pools_per_step=None: under adaptive stopping num_selected "
                "is only a cap, so the number of pools of a step cannot follow from the batch size. Fix: set "
                "pools_per_step (the paper uses 10), or leave the adaptive stopping out."
            )
