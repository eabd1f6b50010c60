"""Statistics of paired runs: an interval, an exact test, and a correction for many comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

_MOST_DIFFERENCES = 20  # 2^20 sign patterns take 8 MB


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: NaN without values.
        low: end of the interval; NaN with fewer than two values.
        high: its other end.
        num: how many values.
    """

    mean: float
    low: float
    high: float
    num: int

    @property
    def excludes_zero(self) -> bool:
        """False as well where there is no interval."""
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of the values, with Student's t-interval.

    Args:
        values: one per seed; for a paired interval, differences.
        confidence: that the interval holds the true mean, if the values are normal.
    """
    num = len(values)
    if num == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = sum(values) / num
    if num == 1:
        return Interval(mean, math.nan, math.nan, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (num - 1))
    half = float(stdtrit(num - 1, (1 + confidence) / 2)) * deviation / math.sqrt(num)
    return Interval(mean, mean - half, mean + half, num)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the exact sign-flip permutation test of a zero mean.

    Share of all sign patterns whose absolute sum is at least the one found. One where there is
    nothing to test: no differences, or one that is not finite.

    Args:
        differences: paired, one per seed.

    Raises:
        ValueError: there are too many to go through all patterns.
    """
    if len(differences) > _MOST_DIFFERENCES:
        raise ValueError(f"at most {_MOST_DIFFERENCES} differences, not {len(differences)}")
    if not all(map(math.isfinite, differences)):
        return 1.0
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])  # (2 ** num_done,)
    found = abs(sum(differences))
    # Sums of the same numbers in another order differ in their last bits.
    slack = 1e-12 * sum(map(abs, differences))
    return float(np.mean(np.abs(sums) >= found - slack))


def smallest_p(num: int) -> float:
    """The smallest two-sided p that the sign-flip test of so many differences can give."""
    return min(1.0, 2.0 ** (1 - num))


def holm(p_values: Sequence[float], *, num_comparisons: int | None = None) -> list[float]:
    """Adjusted p-values, in the order given, that keep the chance of any false claim at its level.

    Args:
        p_values: of the comparisons that were made.
        num_comparisons: that were listed before. Those not made yet count as if their p were the
            largest, so an adjusted p cannot be too small while some are missing.

    Raises:
        ValueError: more p-values than comparisons listed.

    Source: Holm 1979, the step-down procedure.
    """
    num = len(p_values) if num_comparisons is None else num_comparisons
    if len(p_values) > num:
        raise ValueError(f"{len(p_values)} p-values of {num} comparisons")
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (num - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
