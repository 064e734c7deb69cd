"""Every selection strategy written out slowly and obviously, on explicit gradients or plain lists of numbers."""

import math
from itertools import combinations

import torch


def greedy(gain_of, candidates, num_selected, tolerance):
    """Picks greedily by `gain_of(picks, candidate)`; `tolerance(options, gains so far)` says what is tied."""
    remaining, picks, gains = sorted(candidates), [], []
    while remaining and len(picks) < num_selected:
        options = {candidate: gain_of(picks, candidate) for candidate in remaining}
        lowest = max(options.values()) - tolerance(options, gains)
        chosen = min(candidate for candidate, gain in options.items() if gain >= lowest)
        gains.append(options[chosen])
        picks.append(chosen)
        remaining.remove(chosen)
    return picks, gains


def sound_rows(gradients):
    return [i for i, row in enumerate(gradients) if bool(row.isfinite().all()) and bool(row.any())]


def dpp(gradients, num_selected, tie_tolerance=1e-6):
    def log_det(indices):
        rows = gradients[indices]
        return float(torch.linalg.slogdet(rows @ rows.T)[1]) if indices else 0.0

    def gain_of(picks, candidate):
        independent = []
        for pick in picks:
            if gain_beside(independent, pick)[1]:
                independent.append(pick)
        return gain_beside(independent, candidate)[0]

    def gain_beside(independent, candidate):
        gain = log_det([*independent, candidate]) - log_det(independent)
        floor = math.log(1e-6 * float(gradients[candidate] @ gradients[candidate]))
        return max(gain, floor), gain > floor

    return greedy(gain_of, sound_rows(gradients), num_selected, lambda options, gains: tie_tolerance)


def matching(gradients, num_selected, tie_tolerance=1e-6):
    sound = sound_rows(gradients)
    mean = gradients[sound].mean(dim=0)

    def objective(indices):
        picked = gradients[indices].mean(dim=0) if indices else torch.zeros_like(mean)
        return float((picked - mean).square().sum())

    def tolerance(options, gains):
        smallest = objective([]) - sum(gains) - max(options.values())
        return tie_tolerance * max(objective([]), smallest)

    return greedy(lambda picks, x: objective(picks) - objective([*picks, x]), sound, num_selected, tolerance)


def facility_location(gradients, num_selected, tie_tolerance=1e-6):
    sound = sound_rows(gradients)
    distance = {(i, j): float((gradients[i] - gradients[j]).norm()) for i in sound for j in sound}
    largest = max(distance.values(), default=0.0)

    def covered(indices):
        return sum(max(largest - distance[i, s] for s in indices) for i in sound) if indices else 0.0

    def tolerance(options, gains):
        return tie_tolerance * (gains[0] if gains else max(options.values()))

    return greedy(lambda picks, x: covered([*picks, x]) - covered(picks), sound, num_selected, tolerance)


def nonnegative_least_squares(rows, target):
    """The best w >= 0 for ‖Σ w_i rows_i − target‖², by trying every set of rows that may have weight."""
    best, best_objective = torch.zeros(len(rows)).double(), float(target.square().sum())
    for size in range(1, len(rows) + 1):
        for support in combinations(range(len(rows)), size):
            chosen = rows[list(support)]
            solved = torch.linalg.lstsq(chosen.T, target, driver="gelsd").solution
            objective = float((solved @ chosen - target).square().sum())
            if bool((solved >= -1e-12).all()) and objective < best_objective - 1e-12:
                best = torch.zeros(len(rows)).double()
                best[list(support)] = solved.clamp_min(0.0)
                best_objective = objective
    return best, best_objective


def match_with_weights(gradients, num_selected, tie_tolerance=1e-6):
    sound = sound_rows(gradients)
    mean = gradients[sound].mean(dim=0)
    remaining, picks, gains = list(sound), [], []
    weights, objective = torch.zeros(0).double(), float(mean.square().sum())
    while remaining and len(picks) < num_selected:
        residual = mean - weights @ gradients[picks]
        slopes = {i: float(gradients[i] @ residual / gradients[i].norm()) for i in remaining}
        lowest = max(slopes.values()) - tie_tolerance * float(mean.norm())
        chosen = min(i for i in remaining if slopes[i] >= lowest)
        picks.append(chosen)
        remaining.remove(chosen)
        weights, refitted = nonnegative_least_squares(gradients[picks], mean)
        gains.append(objective - refitted)
        objective = refitted
    return picks, gains, weights.tolist()


def ranked(values, sound, num_selected, tie_tolerance=1e-6, smallest_scale=0.0):
    """The largest values first."""

    def tolerance(options, gains):
        return tie_tolerance * max(smallest_scale, abs(max(options.values())))

    return greedy(lambda picks, x: values[x], sound, num_selected, tolerance)


def ifd(losses, alone, sound, num_selected, tie_tolerance=1e-6):
    ratios = [loss / other for loss, other in zip(losses, alone, strict=True)]
    picks, gains = ranked(ratios, [i for i in sound if ratios[i] < 1], num_selected, tie_tolerance)
    opposite = [-ratio for ratio in ratios]
    others = ranked(opposite, [i for i in sound if ratios[i] >= 1], num_selected - len(picks), tie_tolerance)
    return picks + others[0], gains + [-gain for gain in others[1]]


def against_reference(gradients, reference, num_selected, *, fisher_alpha, conflict_penalty, gain_of):
    """SPICE's score with the conflict against `reference`, as (index, gain, conflict)."""
    remaining, picked = sound_rows(gradients), []
    while remaining and len(picked) < num_selected:
        options = []
        for index in remaining:
            gain = gain_of(gradients, [option[0] for option in picked], index, fisher_alpha)
            cosine = float(gradients[index] @ reference / (gradients[index].norm() * reference.norm() + 1e-8))
            options.append((index, gain, max(0.0, -cosine), gain - conflict_penalty * max(0.0, -cosine)))
        chosen = max(options, key=lambda option: option[3])
        picked.append(chosen)
        remaining.remove(chosen[0])
    return picked
