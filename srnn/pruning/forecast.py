"""The forecast of a schedule: the sparsity that a threshold leads to, if weights are normally distributed.

Trained weights are nearly so, with longer tails; ``plan`` shows the forecast before training starts. Only ratios of
thresholds matter here: the standard deviation of the weights, which nobody knows beforehand, cancels out.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from srnn.pruning.scores import Score


def expected_sparsity(epsilon_over_q: float, sparsity: float, block: int = 1, score: Score = "max") -> float:
    """Share of units under a threshold, if ``sparsity`` of the units lie under q.

    Args:
        epsilon_over_q: the threshold, in multiples of q; below 0 counts as 0.
        sparsity: the share under q, between 0 and 1.
        block: weights of a unit.
        score: what stands for a block.

    Returns:
        A share from 0 to 1.

    Example:
        >>> round(expected_sparsity(1.0, 0.9), 4)
        0.9
        >>> round(expected_sparsity(0.5, 0.9), 4)
        0.5892
    """
    unit = NormalDist()
    if block == 1 or score == "max":  # P(all of a block's |w| < x) = erf(x / sqrt 2)^block
        q = unit.inv_cdf((1 + sparsity ** (1 / block)) / 2)
        return float(math.erf(max(0.0, epsilon_over_q) * q / math.sqrt(2)) ** block)
    # Means of N magnitudes: nearly normal, by the central limit theorem, with the moments of a half-normal.
    if score == "mean":
        mean = math.sqrt(2 / math.pi)
        blocks = NormalDist(mean, math.sqrt((1 - mean**2) / block))
        return blocks.cdf(epsilon_over_q * blocks.inv_cdf(sparsity))
    # Energies: a mean of squares is a chi-square over N, whose cube root is nearly normal (Wilson and Hilferty, 1931).
    variance = 2 / (9 * block)
    roots = NormalDist(1 - variance, math.sqrt(variance))
    return roots.cdf(max(0.0, epsilon_over_q) ** (2 / 3) * roots.inv_cdf(sparsity))


def expected_n_of_m(epsilon_over_q: float, keep: int, of: int, runs: int | None = None) -> float:
    """Share of weights under a threshold and not among the ``keep`` largest of their run of ``of``.

    Args:
        epsilon_over_q: the threshold, in multiples of q; below 0 counts as 0.
        keep: weights that stay of each run.
        of: weights of a run.
        runs: None if ``q`` is what the share 1 - keep / of of all single weights lies under; else it is the largest
            weight that may go in so many runs, which is what ``q="auto"`` estimates.

    Returns:
        A share from 0 to 1 - keep / of.

    Example:
        >>> round(expected_n_of_m(2.0, 2, 4), 2)
        0.49
    """
    if runs is None:
        q = NormalDist().inv_cdf(1 - keep / of / 2)
    else:
        # The median of the largest over all runs: runs * P(a run's largest that may go exceeds q) = log 2. Found by
        # bisection from 40 standard deviations, beyond which fp64 cannot tell a probability from 0.
        low, q = 0.0, 40.0
        while q - low > 1e-6:
            middle = (low + q) / 2
            more = runs * sum(
                _binomial(of, math.erfc(middle / math.sqrt(2)), above) for above in range(keep + 1, of + 1)
            )
            low, q = (middle, q) if more > math.log(2) else (low, middle)
    # Of the weights of a run under the threshold, at most of - keep may go.
    under = math.erf(max(0.0, epsilon_over_q) * q / math.sqrt(2))
    return sum(_binomial(of, under, count) * min(count, of - keep) for count in range(of + 1)) / of


def _binomial(n: int, share: float, count: int) -> float:
    """The probability of ``count`` among ``n``."""
    return math.comb(n, count) * share**count * (1 - share) ** (n - count)
