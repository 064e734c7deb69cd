"""Rules that pick from a pool, behind one name each, so that they can be compared under one schedule.

    name               picks greedily                                             needs beside the mask of sound rows
    spice              most information, least conflict                           Gram matrix
    fisher             most information (λ = 0)                                   Gram matrix
    dpp                largest det K_S                                            Gram matrix
    matching           mean gradient nearest the pool's mean                      Gram matrix
    facility_location  every candidate near some pick (CRAIG)                     Gram matrix
    less               gradient most like that of a validation set                gradient norms, products with it
    top_norm           largest gradient norm                                      gradient norms
    loss               largest total loss of the row                              losses, label tokens
    perplexity         largest perplexity                                         losses
    ifd                largest loss with over loss without instruction, below 1   both losses
    random             whatever comes                                             seed, step and pool

Each is a pure function of these, so picks are the same on any number of processes and after a resume. What a rule does
not need is not computed: `random` scores nothing, `loss`, `perplexity` and `ifd` need no backward.

Three published rules are not here:

- SelectIT ("SelectIT: Selective Instruction Tuning for LLMs via Uncertainty-Aware Self-Reflection", 2024) asks several
  models, with several rating prompts a row, for the probability of each score from 1 to 5, and ranks the dataset once.
  The scores come from the text and a prompt in its language, not from a row's loss or gradient, do not follow the
  training, and would cost a forward for each prompt and model. Rank once with it and train on the result.
- TSDS ("TSDS: Data Selection for Task-Specific Model Finetuning", 2024) draws with repetition from the optimal
  transport between the whole candidate set and single target examples, with a kernel density of near-duplicates. It
  reads embeddings of all candidates at once, while a pool is too small to hold a target example's neighbours, and a
  candidate can be picked once only. `less` has its target, `facility_location` its distances.
- LEAD ("LEAD: Iterative Data Selection for Efficient LLM Instruction Tuning", 2025) estimates each row's loss from its
  loss when it was last trained on, smoothed, so that no forward is needed, and a bandit chooses the cluster whose
  largest values are trained on next. A pool's losses are measured at the current weights, so its estimate would be
  of what is known: `loss` and `perplexity`. The bandit replaces the schedule, and its clusters are made beforehand.

Variants of the objective are settings beside the rule: what gradients are multiplied with (module `gram`), Adam's
second moment (module `preconditioning`), centred gradients (module `variants`), and what conflicts are with: means of
candidates (module `selection`) or the optimizer's momentum (module `momentum`).

Axes: N candidates of a pool, K picked.
"""

from spice_trainer.config import StrategyName
from spice_trainer.selection.strategies.inputs import StrategyInputs
from spice_trainer.selection.strategies.matching import WeightedSelection, match_with_weights
from spice_trainer.selection.strategies.registry import STRATEGIES, Strategy, select_by_strategy
from spice_trainer.selection.strategies.variants import centred_gram

__all__ = [
    "STRATEGIES",
    "Strategy",
    "StrategyInputs",
    "StrategyName",
    "WeightedSelection",
    "centred_gram",
    "match_with_weights",
    "select_by_strategy",
]
