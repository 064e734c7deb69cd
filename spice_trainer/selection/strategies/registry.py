"""Every rule by its name, and picking by a name.

A rule of the package is a file of this folder and a line here; a user's own is registered from outside.

Axes: N candidates of a pool, K picked.
"""

from __future__ import annotations

from typing import cast

from spice_trainer.config import STRATEGIES
from spice_trainer.selection.greedy import PickOptions, check_options
from spice_trainer.selection.results import Selection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.coverage import DPP, FACILITY_LOCATION
from spice_trainer.selection.strategies.information import FISHER, SPICE
from spice_trainer.selection.strategies.logits import UDS
from spice_trainer.selection.strategies.matching import MATCHING
from spice_trainer.selection.strategies.ranking import IFD, LESS, LOSS, PERPLEXITY, RANDOM, TOP_NORM
from spice_trainer.selection.strategies.round_robin import RDS
from spice_trainer.selection.strategies.strategy import Strategy
from spice_trainer.selection.strategies.targeted import LENGTH_MATCHED, TARGETED_MATCHING
from spice_trainer.selection.strategies.taylor import GREATS, OPUS
from spice_trainer.selection.strategies.transport import TSDS

# In the order in which messages list them.
_OF_THE_PACKAGE = (
    SPICE,
    FISHER,
    RANDOM,
    LENGTH_MATCHED,
    TARGETED_MATCHING,
    TOP_NORM,
    DPP,
    MATCHING,
    FACILITY_LOCATION,
    LOSS,
    PERPLEXITY,
    IFD,
    LESS,
    RDS,
    GREATS,
    OPUS,
    TSDS,
    UDS,
)


def register_strategy(strategy: Strategy) -> Strategy:
    """Makes a rule a legal `SpiceConfig(strategy=...)`, with schedule, records, resume and processes like any other.

    Call it wherever the configuration is made: in every process, and again when a run is resumed.

    Args:
        strategy ([`Strategy`]): The rule. One that was registered before under its name is replaced.

    Returns:
        [`Strategy`]: The same.

    Raises:
        TypeError: If it is no [`Strategy`].
        ValueError: If its name is that of a rule of the package.
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"register_strategy needs a Strategy, got {type(strategy).__name__}. Write `register_strategy(Strategy("
            "name, needs, pick))`."
        )
    if any(strategy.name == own.name for own in _OF_THE_PACKAGE):
        raise ValueError(
            f"register_strategy: {strategy.name!r} is the name of one of the package's own rules. Fix: give yours "
            "another name."
        )
    STRATEGIES[strategy.name] = strategy
    return strategy


STRATEGIES.update({strategy.name: strategy for strategy in _OF_THE_PACKAGE})


def find_strategy(name: str) -> Strategy:
    """Returns the rule of that name; raises a `ValueError` if there is none."""
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, STRATEGIES))}, got {name!r}.")
    return cast(Strategy, STRATEGIES[name])


def select_by_strategy(
    name: str, scores: PoolScores, num_selected: int, options: PickOptions | None = None
) -> Selection:
    """Picks from a pool by the rule of that name, on hidden states where there are only these.

    Args:
        name (`str`): One of the registered rules.
        scores ([`PoolScores`]): What is known of the pool.
        num_selected (`int`): K, the most samples to pick.
        options ([`PickOptions`], *optional*): The settings; by default those of [`select`].

    Returns:
        [`Selection`]

    Raises:
        ValueError: If the name is unknown, an argument is out of range, or something that the rule needs is missing.
    """
    options = PickOptions() if options is None else options
    strategy = find_strategy(name)
    if scores.gradient_cosines is None and scores.hidden_cosines is not None:
        strategy = strategy.on_hidden_states or strategy
    check_options(num_selected, options)
    return strategy.select(scores, num_selected, options)
