"""The greedy pass written out on gradient vectors, slowly and obviously, as an oracle."""

import mpmath
import torch


def log_det_gain(gradients, picks, candidate, alpha):
    """F(S + x) − F(S) with F(S) = log det(I + α Σ g gᵀ) in D dimensions."""

    def information(indices):
        picked = gradients[indices]
        return float(torch.linalg.slogdet(torch.eye(gradients.shape[1]).double() + alpha * picked.T @ picked)[1])

    return information([*picks, candidate]) - information(picks)


def mpmath_gain(gradients, picks, candidate, alpha):
    """The same from K-dimensional determinants with 400 digits."""

    def information(indices):
        rows = [[mpmath.mpf(value) for value in gradients[index].tolist()] for index in indices]
        matrix = mpmath.eye(len(rows)) if rows else mpmath.eye(1)
        for first, row in enumerate(rows):
            for second, other in enumerate(rows):
                matrix[first, second] += alpha * mpmath.fdot(row, other)
        return mpmath.log(mpmath.det(matrix))

    with mpmath.workdps(400):
        return float(information([*picks, candidate]) - information(picks))


def diagonal_gain(gradients, picks, candidate, alpha):
    seen = gradients[picks].square().sum(dim=0)
    return float(torch.log1p(alpha * gradients[candidate].square() / (1 + alpha * seen)).sum())


def adafisher_gain(gradients, picks, candidate, alpha):
    denominators = 1 + alpha * gradients[picks].pow(4).sum(dim=0)
    return float(torch.log1p(alpha * (gradients[candidate].square() / denominators).sum()))


def conflict(gradients, reference, candidate):
    """max(0, −cos(g, ḡ)), ḡ the mean of the reference rows."""
    if not reference:
        return 0.0
    mean = gradients[reference].mean(dim=0)
    gradient = gradients[candidate]
    return max(0.0, -float(gradient @ mean / (gradient.norm() * mean.norm() + 1e-8)))


def greedy_oracle(
    gradients,
    num_selected,
    *,
    gain_of=log_det_gain,
    fisher_alpha=1.0,
    conflict_penalty=0.1,
    conflict_reference="selected",
    stop_ratio=None,
    min_gain=None,
    tie_tolerance=1e-6,
):
    """Returns the picks as (index, gain, conflict, score), and whether a stopping rule fired."""
    remaining = [i for i, row in enumerate(gradients) if bool(row.isfinite().all()) and bool(row.any())]
    picked = []
    while remaining and len(picked) < num_selected:
        indices = [index for index, *_ in picked]
        reference = indices if conflict_reference == "selected" else remaining
        options = []
        for index in remaining:
            gain = gain_of(gradients, indices, index, fisher_alpha)
            opposed = conflict(gradients, reference, index)
            options.append((index, gain, opposed, gain - conflict_penalty * opposed))
        best = max(options, key=lambda option: option[3])
        first_gain = picked[0][1] if picked else best[1]
        lowest = best[3] - tie_tolerance * max(abs(best[3]), first_gain)
        chosen = next(option for option in options if option[3] >= lowest)
        if min_gain is not None and chosen[1] < min_gain:
            return picked, True
        if stop_ratio is not None and picked and chosen[1] <= stop_ratio * first_gain:
            return picked, True
        picked.append(chosen)
        remaining.remove(chosen[0])
    return picked, False
