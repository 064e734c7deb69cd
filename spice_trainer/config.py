"""The settings of SPICE: one flat dataclass that checks itself.

Per pool of N = `pool_size` candidates, greedy selection takes K = `num_selected` samples, each maximising

    s(x|S) = Δ(x|S) - λ c(x|S),    Δ(x|S) = F(S ∪ {x}) - F(S),    F(S) = log det(I + α Σ_{i∈S} g_i g_iᵀ)

with α = `fisher_alpha` and λ = `conflict_penalty`. T = `pools_per_step` pools feed one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from spice_trainer.proxy_options import ProxyOptions
from spice_trainer.scoring_options import DEFAULT_SKETCH_DIM, MIN_SKETCH_DIM, ScoringOptions
from spice_trainer.strategy_options import BY_INFORMATION, ConflictReference, StrategyOptions
from spice_trainer.utils.fields import one_of, real_number, whole_number

AlphaScaling = Literal["fixed", "pool"]
Information = Literal["exact", "diagonal", "adafisher"]
GradientNormalization = Literal["none", "sqrt_tokens", "tokens", "unit"]

__all__ = ["DEFAULT_SKETCH_DIM", "MIN_SKETCH_DIM", "SpiceConfig"]


@dataclass
class SpiceConfig(StrategyOptions, ScoringOptions, ProxyOptions):
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
        stop_ratio (`float`, *optional*):
            Adaptive stopping [ω]: a pool is done at the first pick whose gain is at most this share of the pool's
            first gain. Between 0 and 1.
        min_gain (`float`, *optional*):
            Adaptive stopping: a pool is done at the first pick whose gain is below this. At least 0.
        selection_epochs (`int`, *optional*):
            Number of epochs that select; later epochs replay the picks of the last of them. If `None`, every epoch
            selects anew. The paper uses 1.
        tie_tolerance (`float`, *optional*, defaults to `1e-6`):
            Scores this close to the best one, relative to it, are tied and go to the earlier candidate. 0 is strict.

        > Parameters that choose the rule are those of [`StrategyOptions`], those that control the scoring are of
        [`ScoringOptions`], and a proxy's of [`ProxyOptions`].
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
    tie_tolerance: float = field(
        default=1e-6,
        metadata={"help": "Scores this close to the best one, relative to it, go to the earlier candidate."},
    )

    def __post_init__(self) -> None:
        """Check every field, and store whole numbers as `int`, real numbers as `float`, `sketch_dim=None` as 0."""
        self._check_integer("pool_size", 2, "a pool needs at least two candidates to choose between")
        self._check_integer("num_selected", 1, "every pool must give at least one sample")
        if self.num_selected > self.pool_size:
            raise ValueError(
                f"SpiceConfig: num_selected={self.num_selected} is more than pool_size={self.pool_size}: a pool "
                "cannot give more samples than it has candidates. Fix: lower num_selected to at most "
                f"{self.pool_size}, or raise pool_size to at least {self.num_selected}."
            )
        if self.pools_per_step is not None:
            self._check_integer("pools_per_step", 1, "every optimizer step needs at least one pool")
        if self.pool_seed is not None:
            self._check_integer("pool_seed", 0, "seeds are counted from 0")

        self._check_real("fisher_alpha", "above 0", "an alpha of 0 would make every gain 0", lambda x: x > 0)
        self._check_real(
            "conflict_penalty", "at least 0", "a negative penalty would reward conflict", lambda x: x >= 0
        )
        if self.stop_ratio is not None:
            self._check_real(
                "stop_ratio", "between 0 and 1, both excluded", "it is a share of the first gain", lambda x: 0 < x < 1
            )
        if self.min_gain is not None:
            self._check_real("min_gain", "at least 0", "gains are never negative", lambda x: x >= 0)
        if self.selection_epochs is not None:
            self._check_integer("selection_epochs", 1, "the first epoch has no earlier picks to replay")
        self._check_real(
            "tie_tolerance", "at least 0 and below 1", "it is a share of the best score", lambda x: 0 <= x < 1
        )
        one_of("SpiceConfig", "alpha_scaling", self.alpha_scaling, get_args(AlphaScaling))
        one_of("SpiceConfig", "conflict_reference", self.conflict_reference, get_args(ConflictReference))
        one_of("SpiceConfig", "information", self.information, get_args(Information))
        one_of("SpiceConfig", "gradient_normalization", self.gradient_normalization, get_args(GradientNormalization))
        self.check_scoring_options(self.information)
        self.check_proxy_options()
        self.check_strategy_options(vars(self))
        self._check_prefilter()

        if self.is_adaptive and self.pools_per_step is None:
            given = [f"{n}={getattr(self, n)}" for n in ("stop_ratio", "min_gain") if getattr(self, n) is not None]
            raise ValueError(
                f"SpiceConfig: {' and '.join(given)} with pools_per_step=None: under adaptive stopping num_selected "
                "is only a cap, so the number of pools of a step cannot follow from the batch size. Fix: set "
                "pools_per_step (the paper uses 10), or leave the adaptive stopping out."
            )

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
    def takes_momentum(self) -> bool:
        """Whether candidates are held against the optimizer's momentum."""
        return self.conflict_reference == "momentum" and self.strategy in BY_INFORMATION

    def resolve_sketch_dim(self) -> int:
        """Return how many numbers of each sample gradient are kept.

        Returns:
            `int`: `sketch_dim` itself if given, else the default for this `information`. 0 means the exact gradient,
            and so does any number that is at least the gradient's own. The smallest where the `strategy` asks for
            norms alone, which are exact whatever is kept.
        """
        if not self.takes_gram and self.strategy != "less":
            return MIN_SKETCH_DIM
        if self.sketch_dim is not None and self.sketch_dim >= 0:
            return self.sketch_dim
        return DEFAULT_SKETCH_DIM if self.information == "exact" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON; `SpiceConfig(**config.to_dict()) == config`."""
        return asdict(self)

    def _check_integer(self, name: str, minimum: int, reason: str) -> None:
        setattr(self, name, whole_number("SpiceConfig", name, getattr(self, name), minimum, reason))

    def _check_real(self, name: str, legal: str, reason: str, is_legal: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        number = real_number("SpiceConfig", name, value, legal=legal, reason=reason, is_legal=is_legal)
        setattr(self, name, number)

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
