"""Every rule by its name, with what has to be computed for it.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from spice_trainer.config import NEEDS, ConflictReference, StrategyName
from spice_trainer.selection.checks import check_alpha, check_choice, check_rules
from spice_trainer.selection.greedy import greedy
from spice_trainer.selection.information import ExactInformation, InformationMeasure
from spice_trainer.selection.results import Selection
from spice_trainer.selection.strategies.coverage import pick_dpp, pick_facility_location
from spice_trainer.selection.strategies.inputs import Picks, StrategyInputs, describe_picks
from spice_trainer.selection.strategies.matching import pick_matching
from spice_trainer.selection.strategies.ranking import (
    pick_ifd,
    pick_less,
    pick_loss,
    pick_perplexity,
    pick_random,
    pick_top_norm,
)

_WHAT = {
    "gram": "the Gram matrix of the candidates' gradients",
    "gradient_norms": "the norms of the candidates' raw gradients",
    "losses": "the candidates' mean losses",
    "losses_without_instruction": "the losses of the answers without what precedes them",
    "label_tokens": "the number of label tokens of each candidate",
    "alignment": "the products of the candidates' gradients with a validation set's mean gradient",
    "reference_norm": "the norm of the validation set's mean gradient",
    "seed": "the run's seed",
    "step": "the optimizer step",
    "pool": "the number of the pool in its step",
}


@dataclass(frozen=True)
class Strategy:
    """A rule and what it needs.

    Args:
        name (`str`): Its name.
        needs (`tuple[str, ...]`): Fields of [`StrategyInputs`] that it reads beside `sound`.
        pick (`Callable`, *optional*): Picks from inputs, K and tie tolerance; `None` for those that maximise the
            Fisher information, which [`greedy`] does.
    """

    name: StrategyName
    needs: tuple[str, ...]
    pick: Callable[[StrategyInputs, int, float], Picks] | None = None

    @property
    def needs_gram(self) -> bool:
        """Whether it needs all inner products of gradients, and not only their norms or products with one other."""
        return "gram" in self.needs

    @property
    def needs_gradients(self) -> bool:
        """Whether it needs a backward through the model."""
        return bool({"gram", "gradient_norms", "alignment"} & set(self.needs))

    @property
    def needs_losses(self) -> bool:
        """Whether it needs a forward through the model for the losses."""
        return "losses" in self.needs

    @property
    def needs_losses_without_instruction(self) -> bool:
        """Whether it needs a second forward, over the answers alone."""
        return "losses_without_instruction" in self.needs

    @property
    def needs_reference_gradient(self) -> bool:
        """Whether it needs the mean gradient of a validation set."""
        return "alignment" in self.needs

    @property
    def needs_scoring(self) -> bool:
        """Whether it needs the model at all."""
        return self.needs_gradients or self.needs_losses


# Those without a function maximise the Fisher information.
_PICK: dict[StrategyName, Callable[[StrategyInputs, int, float], Picks]] = {
    "random": pick_random,
    "top_norm": pick_top_norm,
    "dpp": pick_dpp,
    "matching": pick_matching,
    "facility_location": pick_facility_location,
    "loss": pick_loss,
    "perplexity": pick_perplexity,
    "ifd": pick_ifd,
    "less": pick_less,
}
STRATEGIES: dict[StrategyName, Strategy] = {
    name: Strategy(name, needs, _PICK.get(name)) for name, needs in NEEDS.items()
}


def select_by_strategy(
    name: StrategyName,
    inputs: StrategyInputs,
    num_selected: int,
    *,
    fisher_alpha: float = 1.0,
    conflict_penalty: float = 0.1,
    conflict_reference: ConflictReference = "selected",
    stop_ratio: float | None = None,
    min_gain: float | None = None,
    tie_tolerance: float = 1e-6,
    measure: InformationMeasure | None = None,
) -> Selection:
    """Picks from a pool by the rule of that name.

    Args:
        name (`str`): One of [`STRATEGIES`].
        inputs ([`StrategyInputs`]): What is known of the pool.
        num_selected (`int`): K, the most samples to pick. Fewer are picked only where fewer rows are sound, or a
            stopping rule fires. A row for which a number that the rule needs is not finite is not sound.
        fisher_alpha (`float`, *optional*, defaults to 1.0): α, for the picks of "spice" and "fisher", and for the
            information of everyone's.
        conflict_penalty (`float`, *optional*, defaults to 0.1): λ of "spice". The others have none.
        conflict_reference (`str`, *optional*, defaults to "selected"): See [`select`]; or
            "momentum", the optimizer's. For "spice" and "fisher".
        stop_ratio (`float`, *optional*): See [`select`]; for "spice" and "fisher" alone.
        min_gain (`float`, *optional*): Likewise.
        tie_tolerance (`float`, *optional*, defaults to 1e-6): How near scores are that go by pool position; relative
            to what each rule's docstring says.
        measure ([`InformationMeasure`], *optional*): What "spice" and "fisher" maximise, with
            nothing added; by default the exact information of the Gram matrix.

    Returns:
        [`Selection`]: Gains in the rule's own units; scores the same, less λ times the
        conflict for "spice". Information is log det(I + α Σ_S g gᵀ) (or `measure`'s) and conflicts are against the
        picks so far, whatever the rule; both nan where the rule needs no Gram matrix and `inputs` has none.

    Raises:
        ValueError: If the name is unknown, an argument is out of range, or something that the rule needs is missing.
    """
    check_choice("strategy", name, StrategyName)
    check_rules(num_selected, conflict_penalty, stop_ratio, min_gain, tie_tolerance)
    check_choice("conflict_reference", conflict_reference, ConflictReference)
    check_alpha(fisher_alpha)
    strategy = STRATEGIES[name]
    for field in strategy.needs:
        if getattr(inputs, field) is None:
            raise ValueError(
                f'strategy="{name}" needs {_WHAT[field]}, but {field} is None. Pass StrategyInputs({field}=...).'
            )
    if strategy.pick is None:
        gram = inputs.sound_gram()
        with_momentum = conflict_reference == "momentum"
        if with_momentum and inputs.momentum_cosines is None:
            raise ValueError(
                "conflict_reference=\"momentum\" needs the cosines of the candidates' gradients with the optimizer's "
                "momentum, but momentum_cosines is None. Pass StrategyInputs(momentum_cosines=...)."
            )
        return greedy(
            measure or ExactInformation(gram, fisher_alpha=fisher_alpha),
            gram,
            num_selected,
            conflict_penalty=conflict_penalty if name == "spice" else 0.0,
            conflict_reference="selected" if conflict_reference == "momentum" else conflict_reference,
            reference_cosines=inputs.momentum_cosines if with_momentum else None,
            stop_ratio=stop_ratio,
            min_gain=min_gain,
            tie_tolerance=tie_tolerance,
        )
    for option, value in (("stop_ratio", stop_ratio), ("min_gain", min_gain), ("measure", measure)):
        if value is not None:
            raise ValueError(
                f'{option} is about gains of Fisher information, which strategy="{name}" does not maximise. Set '
                f'{option}=None, or use strategy="spice" or "fisher".'
            )
    return describe_picks(inputs, strategy.pick(inputs, num_selected, tie_tolerance), fisher_alpha=fisher_alpha)
