"""Settings of the rule that picks from a pool: its name, what has to be computed for it, and its variants.

Nothing here needs more than Python, so that a command line can be read without loading what the rules compute with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from spice_trainer.utils.fields import one_of, truth_value, whole_number

StrategyName = Literal[
    "spice",
    "fisher",
    "random",
    "top_norm",
    "dpp",
    "matching",
    "facility_location",
    "loss",
    "perplexity",
    "ifd",
    "less",
]

GradientPreconditioning = Literal["none", "adam"]

ConflictReference = Literal["selected", "candidates", "pool", "momentum"]

NEEDS: dict[StrategyName, tuple[str, ...]] = {
    "spice": ("gram",),
    "fisher": ("gram",),
    "random": ("seed", "step", "pool"),
    "top_norm": ("gradient_norms",),
    "dpp": ("gram",),
    "matching": ("gram",),
    "facility_location": ("gram",),
    "loss": ("losses", "label_tokens"),
    "perplexity": ("losses",),
    "ifd": ("losses", "losses_without_instruction"),
    "less": ("gradient_norms", "alignment", "reference_norm"),
}
"""What each rule reads of a pool, fields of [`StrategyInputs`] beside `sound`."""

BY_INFORMATION: tuple[StrategyName, ...] = ("spice", "fisher")
"""Rules that maximise the Fisher information."""

WITH_GRAM = tuple(name for name, needs in NEEDS.items() if "gram" in needs)
"""Rules that compare all candidates' gradients with each other."""

WITH_GRADIENTS = tuple(name for name, needs in NEEDS.items() if {"gram", "gradient_norms", "alignment"} & set(needs))
"""Rules that need a backward through the model."""

WITH_FEATURES = tuple(name for name, needs in NEEDS.items() if {"gram", "alignment"} & set(needs))
"""Rules that compare gradients with something, and not only their norms."""

WITH_MODEL = tuple(name for name in NEEDS if name != "random")
"""Rules that need the model at all."""

# Settings that mean something to some rules only: when they are set, the rules, and why not the others.
_LIMITED = (
    ("stop_ratio", None, BY_INFORMATION, "it is a share of a gain of information, which this strategy has none of"),
    ("min_gain", None, BY_INFORMATION, "it is a gain of information, which this strategy has none of"),
    ("information", "exact", BY_INFORMATION, "this strategy picks by something else than information"),
    ("gradient_centering", False, BY_INFORMATION, "this strategy picks by something else than information"),
    ("gradient_preconditioning", "none", WITH_FEATURES, "this strategy compares no gradients with each other"),
    ("scoring_prefilter", None, WITH_GRADIENTS, "this strategy takes no gradients, which the filter would save"),
    ("proxy_check_pools", 0, WITH_GRAM, "the comparison is of gains that come from a pool's Gram matrix"),
    ("overlap_scoring", False, WITH_GRAM, "beside the training nothing but the Gram matrix's gradients is computed"),
    ("proxy_model_name_or_path", None, WITH_MODEL, "this strategy scores nothing, so a proxy would have no work"),
)


@dataclass(kw_only=True)
class StrategyOptions:
    r"""The part of [`SpiceConfig`] that chooses the rule.

    Parameters:
        strategy (`str`, *optional*, defaults to `"spice"`):
            The rule that picks from a pool: most information and least conflict (`"spice"`), information alone
            (`"fisher"`), `"random"` rows, the largest gradients (`"top_norm"`), the largest volume (`"dpp"`), the mean
            gradient nearest the pool's (`"matching"`), a pick near every candidate (`"facility_location"`), the
            largest total loss (`"loss"`), the largest loss per token (`"perplexity"`), the largest loss with over
            loss without the instruction, below 1 (`"ifd"`), or the gradient most like that of the validation set
            (`"less"`). What a rule does not read is not computed: `"random"` runs no forward, `"loss"`,
            `"perplexity"` and `"ifd"` no backward. Only `"spice"` has a conflict penalty and, with `"fisher"`, a
            `conflict_reference`; only rules with a Gram matrix read `gradient_normalization`; settings of gradients
            are ignored where none are taken.
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
            With `"less"` the validation set's gradients stay as they are.
        validation_rows (`int`, *optional*, defaults to `32`):
            Number of first rows of the Trainer's `eval_dataset` whose mean gradient `"less"` compares with, taken
            anew at every step.
    """

    strategy: StrategyName = field(default="spice", metadata={"help": "Rule that picks from a pool."})
    gradient_centering: bool = field(
        default=False, metadata={"help": "Take the pool's mean gradient off each gradient, for spice and fisher."}
    )
    gradient_preconditioning: GradientPreconditioning = field(
        default="none", metadata={"help": "'adam' divides gradients by the root of the optimizer's second moment."}
    )
    validation_rows: int = field(
        default=32, metadata={"help": "Number of first rows of eval_dataset that the strategy less compares with."}
    )

    @property
    def takes_gradients(self) -> bool:
        """Whether the strategy needs a backward through the model."""
        return self.strategy in WITH_GRADIENTS

    @property
    def takes_gram(self) -> bool:
        """Whether the strategy needs the Gram matrix of a pool's gradients."""
        return self.strategy in WITH_GRAM

    def check_strategy_options(self, settings: Mapping[str, Any]) -> None:
        """Checks each of these fields, and that the other settings mean something to the strategy.

        Args:
            settings (`Mapping[str, Any]`): All settings by name, each checked by itself.

        Raises:
            ValueError: If one is out of range, or does not go with another.
        """
        owner = "SpiceConfig"
        one_of(owner, "strategy", self.strategy, get_args(StrategyName))
        truth_value(owner, "gradient_centering", self.gradient_centering)
        one_of(owner, "gradient_preconditioning", self.gradient_preconditioning, get_args(GradientPreconditioning))
        self.validation_rows = whole_number(
            owner, "validation_rows", self.validation_rows, 1, "a mean gradient needs at least one row"
        )
        for name, unset, strategies, reason in _LIMITED:
            if settings[name] != unset and self.strategy not in strategies:
                listed = ", ".join(repr(strategy) for strategy in strategies)
                raise ValueError(
                    f"{owner}: {name}={settings[name]!r} with strategy={self.strategy!r}: {reason}. Fix: leave {name} "
                    f"out, or set strategy to one of {listed}."
                )
        if self.gradient_centering and settings["information"] != "exact":
            raise ValueError(
                f"{owner}: gradient_centering=True with information={settings['information']!r}: gradients are "
                "centred in their Gram matrix, and this measure sums over their coordinates. Fix: leave "
                "gradient_centering out, or set information='exact'."
            )
