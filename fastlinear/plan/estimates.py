"""What a few noisy samples say, and how far that is to be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence

PRIOR_NOISE, PRIOR_WEIGHT = 0.03, 2  # spread of a paired log ratio assumed beforehand, and the observations it is worth

Score = tuple[float, ...]  # log seconds, cold and hot or one of them; or the difference of two such, a log ratio
Estimate = tuple[float, float]  # center and standard error, widened as Student's t widens for few observations


def minus(a: Score, b: Score) -> Score:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def middle(values: Sequence[float]) -> Estimate:
    """The interquartile mean and its error from the winsorised variance (Tukey and McLaughlin 1963).

    As deaf to spikes as the median, yet useful where a frequency has two modes and the median jumps between them.
    The prior noise keeps two values that agree by chance from passing for certainty.
    """
    n = len(values)
    cut = (n + 1) // 4
    kept = sorted(values)[cut : n - cut]
    center = sum(kept) / len(kept)
    squares = sum((v - center) ** 2 for v in kept) + cut * ((kept[0] - center) ** 2 + (kept[-1] - center) ** 2)
    squares *= (n / len(kept)) ** 2
    variance = (squares + PRIOR_WEIGHT * PRIOR_NOISE**2) / (n - 1 + PRIOR_WEIGHT)
    widening = 1 + 1 / (len(kept) - 1 + PRIOR_WEIGHT)
    return center, widening * math.sqrt(variance / n)


def estimate(scores: Sequence[Score]) -> Estimate:
    """The mean of the middles of hot and cold, each estimated alone so that a spike in one spoils only that one."""
    centers, errors = zip(*(middle(column) for column in zip(*scores, strict=True)), strict=True)
    return sum(centers) / len(centers), math.hypot(*errors) / len(errors)


def share(error: float) -> float:
    """What a standard error of a log ratio makes of the ratio, with 95 % confidence to both sides."""
    return math.expm1(1.96 * error)
