"""Cohort averages and moving averages of layer statistics, by hand."""

import numpy as np
import pytest

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.statistics import (
    Family,
    FamilyStatistics,
    Granularity,
    ProbeCost,
    Statistics,
)
from fedpruner_server.core.pooling import average, smoothed


def report(
    similarity: float, *importance: float, score: str = "bi", cost: ProbeCost | None = None
) -> Statistics:
    """Two layers, `similarity` alike."""
    matrix = np.array([[1.0, similarity], [similarity, 1.0]])
    families = {Family.LAYER: FamilyStatistics(matrix, importance)}
    return Statistics(families, "device", score, cost)


def importance(statistics: Statistics) -> tuple[float, ...]:
    return statistics.families[Family.LAYER].importance


def similarity(statistics: Statistics) -> np.ndarray:
    return statistics.families[Family.LAYER].similarity


def test_an_item_of_a_family_is_its_halves_of_a_layer():
    attention, ffn = ComponentId(3, Kind.ATTENTION), ComponentId(3, Kind.FFN)
    assert Family.LAYER.components(3) == (attention, ffn)
    assert Family.ATTENTION.components(3) == (attention,)
    assert Family.FFN.components(3) == (ffn,)
    assert Granularity.COMPONENT.families == (Family.ATTENTION, Family.FFN)


def test_a_small_cohort_is_averaged_by_weight():
    found = average([report(0.2, 1.0, 4.0), report(0.6, 5.0, 0.0)], [3, 1])
    assert importance(found) == pytest.approx((2.0, 3.0))  # (3*1 + 5) / 4, 3*4 / 4
    assert similarity(found) == pytest.approx(np.array([[1, 0.3], [0.3, 1]]))
    assert found.source == "cohort"
    assert found.score == "bi"


def test_from_five_reports_on_each_entry_loses_its_extremes():
    first = (1.0, 2.0, 3.0, 4.0, 1000.0)
    second = (9.0, 7.0, -50.0, 8.0, 6.0)
    reports = [report(0.5, a, b) for a, b in zip(first, second, strict=True)]
    weights = [1, 1, 2, 1, 5]
    found = average(reports, weights)
    # Left: 2, 3, 4 of weights 1, 2, 1; and 6, 7, 8 of weights 5, 1, 1.
    assert importance(found) == pytest.approx((12 / 4, 45 / 7))
    four = average(reports[1:], weights[1:])
    assert importance(four)[0] == pytest.approx((2 + 6 + 4 + 5000) / 9)
    untrimmed = average(reports, weights, trim=0.0)
    assert importance(untrimmed)[0] == pytest.approx((1 + 2 + 6 + 4 + 5000) / 10)


@pytest.mark.parametrize(("trim", "kept"), [(0.1, range(2, 19)), (0.49, [10])])
def test_a_tenth_of_21_reports_on_each_side_is_three_and_at_least_one_stays(trim, kept):
    reports = [report(0.5, float(value), 0.0) for value in range(21)]
    found = average(reports, [1.0] * 21, trim=trim)
    assert importance(found)[0] == pytest.approx(10.0)
    shifted = [*reports[:-1], report(0.5, 1e9, 0.0)]
    assert importance(average(shifted, [1.0] * 21, trim=trim))[0] == pytest.approx(np.mean(kept))


def test_a_similarity_is_symmetric_and_within_bounds():
    odd = np.array([[1.2, 0.4], [0.8, 1.0]])
    statistics = Statistics({Family.FFN: FamilyStatistics(odd, (1.0, 1.0))}, "device", "bi")
    found = average([statistics], [1]).families[Family.FFN].similarity
    assert found == pytest.approx(np.array([[1.0, 0.6], [0.6, 1.0]]))
    negative = Statistics({Family.FFN: FamilyStatistics(-odd, (1.0, 1.0))}, "device", "bi")
    assert average([negative], [1]).families[Family.FFN].similarity.max() == 0


def test_costs_add_up_and_the_loss_is_averaged():
    a = report(0.5, 1.0, 1.0, cost=ProbeCost(2.0, 100, 1.5, 7))
    b = report(0.5, 1.0, 1.0, cost=ProbeCost(4.0, 300, 0.5, 5))
    assert average([a, b], [100, 300]).cost == ProbeCost(3.5, 400, 2.0, 12)
    assert average([a, report(0.5, 1.0, 1.0)], [1, 1]).cost is None


def test_the_average_does_not_depend_on_the_order_of_distinct_reports():
    reports = [report(0.1 * i, float(i * i), 7.0 - i) for i in range(7)]
    weights = [1.0, 5.0, 2.0, 2.0, 9.0, 1.0, 3.0]
    a, b = average(reports, weights), average(reports[::-1], weights[::-1])
    assert importance(a) == importance(b)
    assert np.array_equal(similarity(a), similarity(b))


@pytest.mark.parametrize(
    ("reports", "weights", "message"),
    [
        ([], [], "a weight per report"),
        ([report(0.5, 1.0, 1.0)], [1, 2], "a weight per report"),
        ([report(0.5, 1.0, 1.0)], [0], "positive"),
        ([report(0.5, 1.0, 1.0)], [float("nan")], "positive"),
        ([report(0.5, 1.0, float("inf"))], [1], "not finite"),
        ([report(float("nan"), 1.0, 1.0)], [1], "not finite"),
        ([report(0.5, 1.0, 1.0), report(0.5, 1.0, 1.0, score="loo")], [1, 1], "not describe the"),
        ([report(0.5, 1.0, 1.0), report(0.5, 1.0)], [1, 1], "expected 2 items"),
        ([report(0.5, 1.0)], [1], "expected 1 items"),
    ],
)
def test_reports_that_cannot_be_averaged_are_refused(reports, weights, message):
    with pytest.raises(ValueError, match=message):
        average(reports, weights)


def test_a_trim_of_half_or_more_is_refused():
    with pytest.raises(ValueError, match="trim"):
        average([report(0.5, 1.0, 1.0)], [1], trim=0.5)


def test_smoothing_keeps_seven_tenths_of_what_was():
    cost = ProbeCost(1.0, 2, 3.0, 4)
    found = smoothed(report(0.2, 10.0, 0.0), report(0.6, 20.0, 1.0, cost=cost))
    assert importance(found) == pytest.approx((13.0, 0.3))  # 0.7 * 10 + 0.3 * 20, 0.3 * 1
    assert similarity(found)[0, 1] == pytest.approx(0.32)
    assert found.cost == cost
    assert importance(smoothed(report(0.2, 10.0, 0.0), report(0.6, 20.0, 1.0), 0.0)) == (20.0, 1.0)
    with pytest.raises(ValueError, match="not describe the same"):
        smoothed(report(0.2, 1.0, 1.0), report(0.2, 1.0, 1.0, score="loo"))
