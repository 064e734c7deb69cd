"""Gram matrices of any set of LoRA modules from gradients that were computed once.

    ⟨g_i, g_j⟩ over a set of modules = Σ_{modules in the set} ⟨g_i, g_j⟩ over the module

Gradients of a part of the modules are columns of the whole gradients, so one full scoring gives them all; a row cut to
its first label tokens has other gradients and is scored again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tests.benchmarks.fidelity import normalized, pick
from tests.benchmarks.option_specs import ScoringOption, kept_modules
from tests.benchmarks.workload import Workload


@dataclass(frozen=True)
class ModuleGrams:
    """One pool's raw Gram matrices `(modules, N, N)` in float64, and what else is known of its candidates."""

    names: tuple[str, ...]
    grams: np.ndarray
    losses: np.ndarray
    label_tokens: np.ndarray

    def gram(self, option: ScoringOption) -> np.ndarray:
        """⟨g_i, g_j⟩ over the modules that the option keeps.

        Raises:
            ValueError: If it keeps none.
        """
        kept = kept_modules(self.names, option)
        if not any(kept):
            raise ValueError(f"No LoRA module is left by {option.name!r} of {len(self.names)}.")
        return self.grams[np.array(kept)].sum(axis=0)


def measure_module_grams(
    workload: Workload, model: torch.nn.Module, pool: Sequence[int], *, max_tokens: int | None = None
) -> ModuleGrams:
    """Scores a pool exactly, and multiplies its gradients module by module.

    With `max_tokens` each row's loss is of its first so many label tokens.
    """
    # Diagonal information is what needs, and hands out, the gradients themselves.
    scorer = workload.make_scorer(model, rows=workload.rows(max(pool) + 1), information="diagonal",
                                  scoring_max_tokens=max_tokens)  # fmt: skip
    (scores,) = scorer.score([pool])
    assert scores.gradients is not None and scores.row_weights is not None
    weights = scores.row_weights.to(scores.gradients.device)
    names, sizes = tuple(scorer.modules), [module.weight.numel() for module in scorer.modules.values()]
    grams = np.zeros((len(names), len(pool), len(pool)))
    for index, part in enumerate(scores.gradients.split(sizes, dim=1)):
        rows = part.double() * weights[:, None]
        grams[index] = (rows @ rows.T).cpu().numpy()
    return ModuleGrams(names, grams, scores.losses.double().cpu().numpy(), np.array(scores.label_tokens))


def kept_candidates(losses: np.ndarray, label_tokens: np.ndarray, share: float, normalization: str) -> np.ndarray:
    """Positions of the candidates that the loss lets through, in pool order."""
    factors = {"sqrt_tokens": np.sqrt(label_tokens), "tokens": label_tokens.astype(float)}.get(normalization, 1.0)
    order = np.argsort(-losses * factors, kind="stable")
    return np.sort(order[: math.ceil(share * len(losses))])


def picks_under(option: ScoringOption, found: ModuleGrams, num_selected: int, normalization: str) -> np.ndarray:
    """What is picked under an option. `found`: gradients of the rows as the option reads them.

    The filter goes by the losses of the rows as the option reads them.
    """
    gram = normalized(found.gram(option), found.label_tokens, normalization)
    if option.prefilter is None:
        return pick(gram, num_selected)
    kept = kept_candidates(found.losses, found.label_tokens, option.prefilter, normalization)
    return kept[pick(gram[np.ix_(kept, kept)], min(num_selected, len(kept)))]
