"""Settings of how candidates are scored: what of a gradient is computed, on what of a row, and what of it is kept.

Scoring all rows in full is the floor of the exact method. What goes below it computes less: the last layers alone,
some of the modules, the first label tokens, the rows of largest loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from spice_trainer.utils.fields import name_list, real_number, whole_number

DEFAULT_SKETCH_DIM = 32_768
"""Numbers kept of each sample gradient when `sketch_dim=-1`, measured by `tests/benchmarks/sketch_fidelity.py`."""

MIN_SKETCH_DIM = 16


@dataclass(kw_only=True)
class ScoringOptions:
    r"""The part of [`SpiceConfig`] that controls the scoring.

    Parameters:
        sketch_dim (`int`, *optional*, defaults to `-1`):
            Numbers kept of each sample gradient by a random projection: `-1` keeps 32,768 (all of them for
            `"diagonal"` and `"adafisher"` information), 0 or `None` keeps the exact gradient, else at least 16.
        scoring_tokens_per_batch (`int`, *optional*, defaults to `2048`):
            Number of tokens, padding included, of one forward and backward pass of the scoring. Lower it to save
            memory; it changes no pick beyond rounding.
        scoring_layers (`int`, *optional*):
            Scores by the LoRA modules of the last so many layers alone, and stops the backward there. `None`, or at
            least as many as the model has: all of them.
        scoring_target_modules (`list[str]`, *optional*):
            Scores by the LoRA modules of these names alone, such as `q_proj`: full names or the ends of names, as in
            `LoraConfig(target_modules=...)`. `None`: all of them.
        scoring_max_tokens (`int`, *optional*):
            Scores each row by its first so many label tokens; what comes after them is not computed. `None`: by all.
        scoring_prefilter (`float`, *optional*):
            Share of a pool's candidates, above 0 and below 1, whose gradients are computed: those of largest loss
            (times the factor that `gradient_normalization` gives the gradient), after a forward of all of them. A
            forward is half of the work, so a half saves nothing, and where lengths are divided out the loss says
            little of the gradient. `None`: all of them.
    """

    sketch_dim: int | None = field(
        default=-1,
        metadata={"help": "Numbers kept of each sample gradient. -1: 32,768; 0 or None: exact."},
    )
    scoring_tokens_per_batch: int = field(
        default=2048, metadata={"help": "Number of tokens, padding included, of one scoring pass."}
    )
    scoring_layers: int | None = field(
        default=None, metadata={"help": "Score by the LoRA modules of the last so many layers. None: all layers."}
    )
    scoring_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Score by the LoRA modules of these names, such as q_proj. None: all."}
    )
    scoring_max_tokens: int | None = field(
        default=None, metadata={"help": "Score each row by its first so many label tokens. None: by all."}
    )
    scoring_prefilter: float | None = field(
        default=None,
        metadata={"help": "Share of a pool, those of largest loss, whose gradients are computed. None: all."},
    )

    @property
    def scores_in_part(self) -> bool:
        """Whether candidates are scored by less than their whole gradients."""
        return any(
            option is not None
            for option in (
                self.scoring_layers,
                self.scoring_target_modules,
                self.scoring_max_tokens,
                self.scoring_prefilter,
            )
        )

    def check_scoring_options(self, information: str) -> None:
        """Checks each of these fields, and stores `sketch_dim=None` as 0.

        Args:
            information (`str`): The measure of information.

        Raises:
            ValueError: If one is out of range, or does not go with another.
        """
        owner = "SpiceConfig"
        self.scoring_tokens_per_batch = whole_number(
            owner,
            "scoring_tokens_per_batch",
            self.scoring_tokens_per_batch,
            1,
            "a scoring pass needs at least one token",
        )
        if self.scoring_layers is not None:
            self.scoring_layers = whole_number(
                owner, "scoring_layers", self.scoring_layers, 1, "scoring needs at least one layer"
            )
        self.scoring_target_modules = name_list(owner, "scoring_target_modules", self.scoring_target_modules)
        if self.scoring_max_tokens is not None:
            self.scoring_max_tokens = whole_number(
                owner, "scoring_max_tokens", self.scoring_max_tokens, 1, "a row without label tokens has no gradient"
            )
        if self.scoring_prefilter is not None:
            self.scoring_prefilter = real_number(
                owner,
                "scoring_prefilter",
                self.scoring_prefilter,
                legal="between 0 and 1, both excluded",
                reason="it is a share of the pool, and None takes all of it",
                is_legal=lambda share: 0 < share < 1,
            )
        self._check_sketch(information)

    def _check_sketch(self, information: str) -> None:
        if self.sketch_dim is None:
            self.sketch_dim = 0
        self.sketch_dim = whole_number(
            "SpiceConfig",
            "sketch_dim",
            self.sketch_dim,
            -1,
            "-1 chooses the default, 0 is exact, more is a sketch of that many",
        )
        if 0 < self.sketch_dim < MIN_SKETCH_DIM:
            raise ValueError(
                f"SpiceConfig: sketch_dim={self.sketch_dim} is below {MIN_SKETCH_DIM}: so few numbers cannot tell the "
                f"gradients of a pool apart. Fix: set sketch_dim to at least {MIN_SKETCH_DIM}, to 0 for exact "
                "gradients, or to -1 for the default."
            )
        if self.sketch_dim > 0 and information != "exact":
            raise ValueError(
                f"SpiceConfig: sketch_dim={self.sketch_dim} with information={information!r}: this measure sums "
                "over single gradient coordinates, and a sketch mixes them, so the result would mean nothing. Fix: "
                "set sketch_dim=0 (or -1), or information='exact'."
            )
