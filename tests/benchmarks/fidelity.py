"""How good are the picks of an approximate Gram matrix? Overlap with the exact picks, and information retained.

    retained = (F(S') − mean F(random)) / (F(S) − mean F(random)),      F(S) = log det(I + K_SS) on exact gradients

1 is as good as exact, 0 as good as chance. The plain ratio F(S')/F(S) would say nothing: random picks reach 0.999 of
the exact information when gradients have unit norm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spice_trainer.selection.greedy import select

NORMALIZATIONS = ("none", "sqrt_tokens", "tokens", "unit")
NUM_RANDOM_SUBSETS = 200


def normalized(gram: np.ndarray, label_tokens: np.ndarray, normalization: str) -> np.ndarray:
    """The Gram matrix of the normalised gradients."""
    factors = {
        "none": np.ones(len(gram)),
        "sqrt_tokens": np.sqrt(label_tokens),
        "tokens": label_tokens.astype(float),
        "unit": 1 / np.sqrt(np.diag(gram)),
    }[normalization]
    return gram * factors[:, None] * factors[None, :]


def with_norms_of(sketch: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The sketch's cosines with the exact norms."""
    factors = np.sqrt(np.diag(exact) / np.maximum(np.diag(sketch), np.finfo(float).tiny))
    return sketch * factors[:, None] * factors[None, :]


def information(gram: np.ndarray, subset: np.ndarray) -> float:
    """F(S) = log det(I + K_SS), fisher_alpha = 1."""
    return float(np.linalg.slogdet(np.eye(len(subset)) + gram[np.ix_(subset, subset)])[1])


def pick(gram: np.ndarray, num_selected: int) -> np.ndarray:
    """What SPICE picks with the paper's settings (α = 1, λ = 0.1)."""
    selection = select(torch.from_numpy(gram.copy()), num_selected, fisher_alpha=1.0, conflict_penalty=0.1)
    return np.array([int(index) for index in selection.indices])


def random_subsets(size: int, num_selected: int, seed: int) -> list[np.ndarray]:
    """Subsets that tell what chance reaches."""
    generator = np.random.default_rng(seed)
    return [generator.choice(size, num_selected, replace=False) for _ in range(NUM_RANDOM_SUBSETS)]


def retained(reference: np.ndarray, picks: np.ndarray, best: np.ndarray, subsets: list[np.ndarray]) -> float:
    """Share of the information beyond chance; `reference` is the exact normalised Gram, `best` what it picks.

    1 where the best picks add nothing to chance, as a single one under unit norm: there is nothing to lose.
    """
    chance = float(np.mean([information(reference, subset) for subset in subsets]))
    most = information(reference, best)
    if abs(most - chance) <= 1e-9 * abs(most):
        return 1.0
    return (information(reference, picks) - chance) / (most - chance)


def compare_pool(pool: dict[str, np.ndarray], num_selected: int, seed: int) -> list[dict[str, Any]]:
    """One record per normalization and sketch."""
    exact, size = pool["exact"], len(pool["exact"])
    subsets = random_subsets(size, num_selected, seed)
    norms = np.sqrt(np.diag(exact))
    off_diagonal = ~np.eye(size, dtype=bool)
    records = []
    for normalization in NORMALIZATIONS:
        reference = normalized(exact, pool["label_tokens"], normalization)
        best = pick(reference, num_selected)
        for key in pool:
            kind, _, dim = key.partition("_")
            if kind not in ("folded", "onesided"):
                continue
            sketched = with_norms_of(pool[key], exact)
            picks = pick(normalized(sketched, pool["label_tokens"], normalization), num_selected)
            errors = ((sketched - exact) / norms[:, None] / norms[None, :])[off_diagonal]
            records.append(
                {
                    "normalization": normalization,
                    "sketch": kind,
                    "dim": int(dim),
                    "overlap": len(set(picks.tolist()) & set(best.tolist())),
                    "retained": retained(reference, picks, best, subsets),
                    "cosine_error": float(np.sqrt(np.mean(errors**2))),
                    "mean_tokens_of_picks": float(pool["label_tokens"][best].mean()),
                }
            )
    return records


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and minimum over the pools of one moment, and of both."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        for moment in (record["moment"], "both"):
            key = (record["normalization"], record["sketch"], record["dim"], moment)
            groups.setdefault(key, []).append(record)
    rows = []
    for (normalization, sketch, dim, moment), group in groups.items():
        row: dict[str, Any] = {
            "normalization": normalization, "sketch": sketch, "dim": dim, "moment": moment, "pools": len(group),
        }  # fmt: skip
        for name in ("overlap", "retained", "cosine_error"):
            values = [record[name] for record in group]
            row |= {f"{name}_mean": float(np.mean(values)), f"{name}_min": float(np.min(values))}
        rows.append(row)
    return sorted(rows, key=lambda row: (NORMALIZATIONS.index(row["normalization"]), row["sketch"], row["dim"]))
