"""Several statistics of the same model -> one."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpruner_common.statistics import Family, FamilyStatistics, ProbeCost, Statistics

_FEWEST_TO_TRIM = 5


def average(
    reports: Sequence[Statistics], weights: Sequence[float], *, trim: float = 0.1
) -> Statistics:
    """The cohort's statistics: weighted mean of the devices' reports, entry by entry.

    From 5 reports on, the highest and the lowest values of each entry are left out, so that a few
    odd devices decide nothing. Of `cost`, the loss is averaged and the rest is summed.

    Args:
        reports: one per device.
        weights: positive, as many; tokens a report is based on.
        trim: share of the reports to leave out on each side, rounded up.

    Raises:
        ValueError: no reports, they do not describe the same items by the same score, a number is
            not finite, or a weight is not positive.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not reports or shares.shape != (len(reports),):
        raise ValueError(f"expected a weight per report, got {len(reports)} and {len(weights)}")
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be at least 0 and below 0.5, got {trim}")

    def mean(values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return _trimmed_mean(np.stack(values), shares, trim)

    return Statistics(
        _combined(reports, mean), "cohort", reports[0].score, _total_cost(reports, shares)
    )


def smoothed(old: Statistics, new: Statistics, beta: float = 0.7) -> Statistics:
    """Exponential moving average over probes; the old ones weigh `beta`.

    Raises:
        ValueError: the two do not describe the same items by the same score.
    """

    def mix(values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        before, now = values
        return beta * before + (1 - beta) * now

    return Statistics(_combined([old, new], mix), new.source, new.score, new.cost)


def _combined(
    reports: Sequence[Statistics],
    combine: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]],
) -> dict[Family, FamilyStatistics]:
    """Every family's matrices and scores, made one; similarities symmetric and within [0, 1]."""
    first = reports[0]
    families = {}
    for family in first.families:
        matrices, scores = [], []
        for report in reports:
            if report.score != first.score or set(report.families) != set(first.families):
                raise ValueError(
                    f"reports do not describe the same: {report.score} of "
                    f"{sorted(report.families)}, {first.score} of {sorted(first.families)}"
                )
            matrices.append(np.asarray(report.families[family].similarity, dtype=np.float64))
            scores.append(np.asarray(report.families[family].importance, dtype=np.float64))
        size = len(scores[0])
        for matrix, score in zip(matrices, scores, strict=True):
            if matrix.shape != (size, size) or score.shape != (size,):
                raise ValueError(f"expected {size} items, got {matrix.shape} and {score.shape}")
            if not (np.isfinite(matrix).all() and np.isfinite(score).all()):
                raise ValueError(f"the {family.value} statistics of a report are not finite")
        similarity = combine(matrices)
        similarity = np.clip((similarity + similarity.T) / 2, 0.0, 1.0)
        families[family] = FamilyStatistics(similarity, tuple(combine(scores).tolist()))
    return families


def _trimmed_mean(
    values: NDArray[np.float64], weights: NDArray[np.float64], trim: float
) -> NDArray[np.float64]:
    """Weighted mean over the first axis, without each entry's extremes."""
    count = len(values)
    cut = min(math.ceil(trim * count), (count - 1) // 2) if count >= _FEWEST_TO_TRIM else 0
    order = np.argsort(values, axis=0, kind="stable")[cut : count - cut]
    kept, shares = np.take_along_axis(values, order, axis=0), weights[order]
    result: NDArray[np.float64] = (kept * shares).sum(axis=0) / shares.sum(axis=0)
    return result


def _total_cost(reports: Sequence[Statistics], weights: NDArray[np.float64]) -> ProbeCost | None:
    costs = [report.cost for report in reports if report.cost is not None]
    if len(costs) < len(reports):
        return None
    return ProbeCost(
        loss_full=float(np.average([cost.loss_full for cost in costs], weights=weights)),
        num_tokens=sum(cost.num_tokens for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        bytes_read=sum(cost.bytes_read for cost in costs),
    )
