"""An honest test of whether one set of times is shorter than another, which outliers cannot decide."""

import functools
import math
import statistics
from collections.abc import Sequence


def chance_of(faster: Sequence[float], slower: Sequence[float]) -> float:
    """The probability that chance alone makes `faster` look so much shorter than `slower`.

    One-sided exact rank test of Mann and Whitney (Annals of Mathematical Statistics 18, 1947); a tie counts against
    `faster`. It asks nothing of the distribution, and an outlier is no more than one high rank. 1.0 where a side is
    empty.
    """
    wins = sum(a < b for a in faster for b in slower)
    counts = _counts(len(faster), len(slower))
    return sum(counts[wins:]) / math.comb(len(faster) + len(slower), len(faster))


def quartiles(times: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile; of a single time, that time twice."""
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


@functools.cache
def _counts(left: int, right: int) -> tuple[int, ...]:
    """By number of wins, how many orders of `left` and `right` times have it: the Gaussian binomial's coefficients."""
    counts = [1] + [0] * (left * right)
    for i in range(1, left + 1):
        counts = _divided(_multiplied(counts, right + i), i)
    return tuple(counts)


def _multiplied(counts: list[int], power: int) -> list[int]:
    """Times 1 - q^power; higher powers than the result's are cut off."""
    return [count - (counts[at - power] if at >= power else 0) for at, count in enumerate(counts)]


def _divided(counts: list[int], power: int) -> list[int]:
    """Divided by 1 - q^power."""
    result = list(counts)
    for at in range(power, len(result)):
        result[at] += result[at - power]
    return result
