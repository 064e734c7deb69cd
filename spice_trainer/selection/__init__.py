"""What to pick from numbers: pure functions of tensors, which know nothing of models and trainers.

Importing it registers the package's own rules.
"""

from spice_trainer.selection.gram import centred_gram, normalization_weights, normalized_gram, scaled_alpha
from spice_trainer.selection.greedy import PickOptions, select, select_from_gradients
from spice_trainer.selection.results import Selection, StepSelection
from spice_trainer.selection.scores import PoolScores
from spice_trainer.selection.strategies.matching import WeightedSelection, match_with_weights
from spice_trainer.selection.strategies.registry import register_strategy, select_by_strategy
from spice_trainer.selection.strategies.strategy import Picks, Strategy, lowest_tied, pick_largest

__all__ = [
    "PickOptions",
    "Picks",
    "PoolScores",
    "Selection",
    "StepSelection",
    "Strategy",
    "WeightedSelection",
    "centred_gram",
    "lowest_tied",
    "match_with_weights",
    "normalization_weights",
    "normalized_gram",
    "pick_largest",
    "register_strategy",
    "scaled_alpha",
    "select",
    "select_by_strategy",
    "select_from_gradients",
]
