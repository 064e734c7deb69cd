"""The field's rules written out slowly on explicit vectors."""

import hashlib
import math

import numpy as np
import torch
from scipy.optimize import linprog

from tests.support.strategy_oracles import greedy, ranked


def uniform(*parts):
    """The number between 0 and 1 that a hash of the parts gives."""
    return (int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "little") + 0.5) / 2**48


def rds(units, targets, sound, num_selected, key, tie_tolerance=1e-6, weights=None, names=None):
    """Rows of `targets` take turns by their clocks; each takes its most similar free candidate."""
    weights = [1.0 / len(targets)] * len(targets) if weights is None else weights
    names = list(range(len(targets))) if names is None else names
    clocks = [uniform("turn", *key, names[row]) / weights[row] for row in range(len(targets))]
    picks, gains, free = [], [], list(sound)
    while free and len(picks) < num_selected:
        row = clocks.index(min(clocks))
        clocks[row] += 1.0 / weights[row]
        similar = {index: float(units[index] @ targets[row]) for index in free}
        best = max(similar.values())
        chosen = min(index for index in free if similar[index] >= best - tie_tolerance)
        picks.append(chosen)
        gains.append(similar[chosen])
        free.remove(chosen)
    return picks, gains


def greats(rows, reference, sound, num_selected, learning_rate, tie_tolerance=1e-6):
    """What a step on the picks and one more takes off a loss of gradient `reference` and Hessian 1, per step size."""

    def gain_of(picks, candidate):
        moved = learning_rate * sum((rows[pick] for pick in picks), torch.zeros_like(reference))
        return float(rows[candidate] @ (reference - moved))

    scale = max((abs(float(rows[index] @ reference)) for index in sound), default=0.0)
    return greedy(gain_of, sound, num_selected, lambda options, gains: tie_tolerance * scale)


def opus(rows, reference, sound, num_selected, learning_rate, key, temperature=0.9):
    """Draws by inverse temperature, each from its own Gumbel numbers."""
    first = np.array([float(rows[index] @ reference) for index in sound])
    scale = temperature * float(first.std()) if len(first) else 0.0
    picks, gains, free = [], [], list(sound)
    while free and len(picks) < num_selected:
        moved = learning_rate * sum((rows[pick] for pick in picks), torch.zeros_like(reference))
        utilities, order = {index: float(rows[index] @ (reference - moved)) for index in free}, len(picks)

        def noisy(index, order=order, utilities=utilities):
            return utilities[index] / scale - math.log(-math.log(uniform("opus", *key, order, index)))

        chosen = max(free, key=noisy)
        picks.append(chosen)
        gains.append(utilities[chosen])
        free.remove(chosen)
    return picks, gains


def transport_plan(units, targets, sound, weights=None):
    """Where the targets' weight goes, as a linear program."""
    members, number = units[sound], len(targets)
    weights = [1.0 / number] * number if weights is None else weights
    distance = torch.cdist(targets, members, compute_mode="donot_use_mm_for_euclid_dist")
    among = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
    density = (1 - among.square() / 0.75**2).clamp_min(0).sum(dim=1)
    size = len(sound)
    # The plan by rows, and the largest share.
    cost = [0.5 / 5.0 * float(value) for value in distance.flatten()] + [0.5]
    equal = np.zeros((number, number * size + 1))
    bounds = np.zeros((number * size, number * size + 1))
    for row in range(number):
        equal[row, row * size : (row + 1) * size] = 1.0
        for place in range(size):
            bounds[row * size + place, row * size + place] = float(density[place]) / weights[row]
            bounds[row * size + place, -1] = -1.0
    found = linprog(cost, A_ub=bounds, b_ub=np.zeros(len(bounds)), A_eq=equal, b_eq=weights, method="highs")
    chances = [0.0] * len(units)
    for place, index in enumerate(sound):
        chances[index] = float(found.x[:-1].reshape(number, size)[:, place].sum())
    return [chance if chance > 1e-12 else 0.0 for chance in chances]


def tsds(units, targets, sound, num_selected, key):
    """Draws by the plan without repetition; then by the distance to the nearest target."""
    chances = transport_plan(units, targets, sound)

    def place(index):
        if chances[index] > 0:
            return 0, -math.log(uniform("tsds", *key, index)) / chances[index]
        return 1, min(float((units[index] - target).norm()) for target in targets)

    picks = sorted(sound, key=place)[:num_selected]
    return picks, [chances[index] for index in picks]


def uds(norms, features, past, sound, num_selected, tie_tolerance=1e-6):
    """The largest norms and eleven times the mean distance from the past, if there is one."""
    values = [float(norm) for norm in norms]
    for index, feature in enumerate(features):
        distances = [float((feature - one).norm()) for one in past]
        values[index] += 11.0 * sum(distances) / len(distances) if distances else 0.0
    return ranked(values, sound, num_selected, tie_tolerance)


def label_logits(model, row):
    """A row's logits at its label positions."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    places = [place for place, label in enumerate(row["labels"][1:]) if label != -100]
    return logits[places]
