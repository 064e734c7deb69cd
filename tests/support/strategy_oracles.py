"""Every selection strategy written out slowly and obviously, on explicit gradients or plain lists of numbers."""

import hashlib
import math
from fractions import Fraction
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


def unit(rows):
    """Rows of length 1; zeros for those that are zero or not finite."""
    found = torch.zeros_like(rows)
    for index, row in enumerate(rows):
        if bool(row.isfinite().all()) and bool(row.any()):
            found[index] = row / row.norm()
    return found


def shift(candidates, targets, row_weights, set_rows, seed, num_shuffles=499):
    """p-value, ρ and c of unit candidates and targets, from the vectors themselves; `set_rows` are each set's rows."""
    num_candidates = len(candidates)
    rows = torch.cat([candidates, targets])
    mean_of_pool = candidates.mean(dim=0)
    mean_of_target = sum(weight * row for weight, row in zip(row_weights, targets, strict=True))
    difference = mean_of_target - mean_of_pool
    weights = torch.tensor([-1.0 / num_candidates] * num_candidates + list(row_weights), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: float(rows[index] @ difference))
    generator = torch.Generator().manual_seed(seed)
    shuffles = torch.rand(num_shuffles, len(rows), generator=generator, dtype=torch.float64).argsort(dim=1)
    as_large = 1
    for shuffle in shuffles.tolist():
        # Place i of the order gets the weight of the row that stands at place shuffle[i].
        shuffled = sum(float(weights[order[place]]) * rows[order[i]] for i, place in enumerate(shuffle))
        as_large += float(shuffled.square().sum()) >= float(difference.square().sum()) * (1 - 1e-9) - 1e-12
    p_value = as_large / (num_shuffles + 1)
    by_chance = float((candidates - mean_of_pool).square().sum()) / (num_candidates - 1) / num_candidates
    for members in set_rows:
        some = targets[members]
        spread = float((some - some.mean(dim=0)).square().sum()) / (len(some) - 1)
        by_chance += sum(row_weights[row] for row in members) ** 2 * spread / len(some)
    squared = float(difference.square().sum())
    shrinkage = max(0.0, 1 - by_chance / squared) if p_value <= 0.01 else 0.0
    return p_value, shrinkage, mean_of_pool + shrinkage * difference


def herding(candidates, target, eligible, num_selected, bins=None, sizes=(), tie_tolerance=1e-6):
    """Greedy matching of a target vector within quotas, from the vectors themselves."""
    picks, gains, left = [], [], list(sizes)
    scale = float(target.square().sum())
    before = scale
    while len(picks) < min(num_selected, len(eligible)):
        remaining = [index for index in eligible if index not in picks]
        among = [index for index in remaining if bins is None or left[bins[index]] > 0] or remaining
        distances = {}
        for index in among:
            mean = candidates[[*picks, index]].mean(dim=0)
            distances[index] = float((mean - target).square().sum())
        best = min(distances.values())
        chosen = min(index for index in among if distances[index] <= best + tie_tolerance * max(scale, best))
        picks.append(chosen)
        gains.append(before - distances[chosen])
        before = distances[chosen]
        if bins is not None:
            left[bins[chosen]] -= 1
    return picks, gains


def seed_of(*parts):
    """The seed of a pool's shuffles."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def targeted(units, targets, lengths, target_lengths, sound, num_selected, seed, tie_tolerance=1e-6):
    """Shrunken matching within four quotas, from unit vectors."""
    number = len(targets)
    if number:
        _, shrinkage, centre = shift(units[sound], targets, [1 / number] * number, [list(range(number))], seed)
    else:
        shrinkage, centre = 0.0, units[sound].mean(dim=0)
    if shrinkage > 0:
        bins, sizes = target_bins(lengths, target_lengths, num_selected)
    else:
        bins, sizes = pool_bins(lengths, sound, num_selected)
    return herding(units, centre, list(sound), num_selected, bins, sizes, tie_tolerance)


def target_bins(lengths, target_lengths, num_selected):
    """Bins at the target rows' quartiles, and picks of each."""
    number = len(target_lengths)
    edges = [sorted(target_lengths)[math.ceil(number * share / 4) - 1] for share in (1, 2, 3)]
    bins = [sum(edge < length for edge in edges) for length in lengths]
    of_target = [sum(edge < length for edge in edges) for length in target_lengths]
    return bins, apportion([of_target.count(number) for number in range(4)], num_selected)


def pool_bins(lengths, sound, num_selected):
    """Four strata of the pool's sound rows, and picks of each."""
    ranked = sorted(sound, key=lambda index: (lengths[index], index))
    bins = [0] * len(lengths)
    for place, index in enumerate(ranked):
        bins[index] = place * 4 // len(ranked)
    return bins, apportion([sum(bins[i] == n for i in sound) for n in range(4)], num_selected)


def apportion(shares, total):
    """Largest remainders, in exact fractions."""
    shares = [Fraction(share).limit_denominator(10**6) for share in shares]
    exact = [share * total / sum(shares) for share in shares]
    sizes = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda index: (sizes[index] - exact[index], index))
    for index in order[: total - sum(sizes)]:
        sizes[index] += 1
    return sizes
