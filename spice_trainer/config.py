"""The settings of SPICE: one flat dataclass that checks itself.

Per pool of N = `pool_size` candidates, greedy selection takes K = `num_selected` samples, each maximising

    s(x|S) = Δ(x|S) - λ c(x|S),    Δ(x|S) = F(S ∪ {x}) - F(S),    F(S) = log det(I + α Σ_{i∈S} g_i g_iᵀ)

with α = `fisher_alpha` and λ = `conflict_penalty`. T = `pools_per_step` pools feed one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from spice_trainer.field_checks import model_name, one_of, real_number, truth_value, whole_number

AlphaScaling = Literal["fixed", "pool"]
ConflictReference = Literal["selected", "candidates"]
Information = Literal["exact", "diagonal", "adafisher"]
GradientNormalization = Literal["none", "sqrt_tokens", "tokens", "unit"]

DEFAULT_SKETCH_DIM = 32_768
"""Numbers kept of each sample gradient when `sketch_dim=-1`, measured by `tests/benchmarks/sketch_fidelity.py`."""

MIN_SKETCH_DIM = 16


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
            (`"selected"`), or of the candidates not yet picked (`"candidates"`).
        information (`str`, *optional*, defaults to `"exact"`):
            Measure of information [F]: the log-determinant (`"exact"`), its diagonal approximation (`"diagonal"`), or
            the gain of the released code (`"adafisher"`), which ranks almost as the gradient norm does.
        gradient_normalization (`str`, *optional*, defaults to `"none"`):
            Rescaling of each sample gradient [g]: not at all, as in the paper (`"none"`), times the square root of
            its number of label tokens (`"sqrt_tokens"`), times that number (`"tokens"`), or to length 1 (`"unit"`).
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

        > Parameters that control the scoring

        sketch_dim (`int`, *optional*, defaults to `-1`):
            Numbers kept of each sample gradient by a random projection: `-1` keeps 32,768 (all of them for
            `"diagonal"` and `"adafisher"` information), 0 or `None` keeps the exact gradient, else at least 16.
        scoring_tokens_per_batch (`int`, *optional*, defaults to `2048`):
            Number of tokens, padding included, of one forward and backward pass of the scoring. Lower it to save
            memory; it changes no pick beyond rounding.

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
        metadata={"help": "Mean gradient a candidate may oppose: of the picked samples or of the open candidates."},
    )
    information: Information = field(default="exact", metadata={"help": "Measure of information [F]."})
    gradient_normalization: GradientNormalization = field(
        default="none", metadata={"help": "Rescaling of each sample gradient before anything else."}
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
    sketch_dim: int | None = field(
        default=-1,
        metadata={"help": "Numbers kept of each sample gradient. -1: 32,768; 0 or None: exact."},
    )
    scoring_tokens_per_batch: int = field(
        default=2048, metadata={"help": "Number of tokens, padding included, of one scoring pass."}
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
        self._check_integer("scoring_tokens_per_batch", 1, "a scoring pass needs at least one token")
        one_of("SpiceConfig", "alpha_scaling", self.alpha_scaling, get_args(AlphaScaling))
        one_of("SpiceConfig", "conflict_reference", self.conflict_reference, get_args(ConflictReference))
        one_of("SpiceConfig", "information", self.information, get_args(Information))
        one_of("SpiceConfig", "gradient_normalization", self.gradient_normalization, get_args(GradientNormalization))
        self._check_real(
            "proxy_learning_rate", "at least 0", "a negative rate would unlearn the picks", lambda x: x >= 0
        )
        name = self.proxy_model_name_or_path
        self.proxy_model_name_or_path = model_name("SpiceConfig", "proxy_model_name_or_path", name)
        truth_value("SpiceConfig", "overlap_scoring", self.overlap_scoring)
        self._check_integer("proxy_update_every", 1, "it counts cycles from one update of the proxy to the next")
        self._check_integer("proxy_check_pools", 0, "it counts pools")
        self._check_sketch()

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
            sketch_dim=0,
        )

    @property
    def is_adaptive(self) -> bool:
        """Whether a pool may stop before `num_selected` picks."""
        return self.stop_ratio is not None or self.min_gain is not None

    def resolve_sketch_dim(self) -> int:
        """Return how many numbers of each sample gradient are kept.

        Returns:
            `int`: `sketch_dim` itself if given, else the default for this `information`. 0 means the exact gradient,
            and so does any number that is at least the gradient's own.
        """
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

    def _check_sketch(self) -> None:
        if self.sketch_dim is None:
            self.sketch_dim = 0
        self._check_integer("sketch_dim", -1, "-1 chooses the default, 0 is exact, more is a sketch of that many")
        if 0 < self.sketch_dim < MIN_SKETCH_DIM:
            raise ValueError(
                f"SpiceConfig: sketch_dim={self.sketch_dim} is below {MIN_SKETCH_DIM}: so few numbers cannot tell the "
                f"gradients of a pool apart. Fix: set sketch_dim to at least {MIN_SKETCH_DIM}, to 0 for exact "
                "gradients, or to -1 for the default."
            )
        if self.sketch_dim > 0 and self.information != "exact":
            raise ValueError(
                f"SpiceConfig: sketch_dim={self.sketch_dim} with information={self.information!r}: this measure sums "
                "over single gradient coordinates, and a sketch mixes them, so the result would mean nothing. Fix: "
                "set sketch_dim=0 (or -1), or information='exact'."
            )
