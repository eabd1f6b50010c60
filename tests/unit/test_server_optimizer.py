import math

import numpy as np
import pytest

from fedpruner_server.core.server_optimizer import (
    Moments,
    ServerOptimizer,
    ServerOptimizerSettings,
    server_step,
)


def array(*values):
    return np.array(values, dtype=np.float32)


FEDAVG = ServerOptimizerSettings()
MOMENTUM = ServerOptimizerSettings(ServerOptimizer.MOMENTUM, learning_rate=0.5, momentum=0.5)
# tau is a power of two, so that the numbers below are short.
FEDADAM = ServerOptimizerSettings(
    ServerOptimizer.FEDADAM, learning_rate=0.5, beta1=0.5, beta2=0.75, tau=0.5
)


def test_a_whole_step_takes_the_aggregated_values_bit_for_bit():
    rng = np.random.default_rng(0)
    current, aggregated = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    aggregated *= np.float32(1e-12)  # current + (aggregated - current) would round these away
    values, moments = server_step(current, aggregated, Moments(), settings=FEDAVG)
    np.testing.assert_array_equal(values, aggregated)
    assert moments == Moments()


def test_a_part_of_a_step_goes_that_part_of_the_way():
    quarter = ServerOptimizerSettings(learning_rate=0.5)
    values, _ = server_step(array(1, 8), array(9, 0), Moments(), settings=quarter, scale=0.5)
    assert values.tolist() == [3, 6]  # a quarter of +8 and of -8
    assert values.dtype == np.float32


def test_momentum_adds_the_kept_share_of_the_last_step():
    values, moments = server_step(array(0), array(4), Moments(), settings=MOMENTUM)
    # v = 0.5 * 0 + 4 = 4; 0 + 0.5 * 4 = 2
    assert (values.tolist(), moments.first.tolist(), moments.second) == ([2], [4], None)
    values, moments = server_step(values, array(3), moments, settings=MOMENTUM)
    # v = 0.5 * 4 + (3 - 2) = 3; 2 + 0.5 * 3 = 3.5
    assert (values.tolist(), moments.first.tolist()) == ([3.5], [3])


def test_fedadam_divides_the_first_moment_by_the_root_of_the_second():
    values, moments = server_step(array(0), array(3), Moments(), settings=FEDADAM)
    # m = 0.5 * 0 + 0.5 * 3 = 1.5; v = 0.75 * 0.25 + 0.25 * 9 = 2.4375, for v starts at tau^2
    assert (moments.first.tolist(), moments.second.tolist()) == ([1.5], [2.4375])
    # 0.5 * 1.5 / (sqrt(2.4375) + 0.5) = 0.75 / 2.06125
    assert values[0] == pytest.approx(0.75 / (math.sqrt(2.4375) + 0.5), rel=1e-6)
    before = float(values[0])
    values, moments = server_step(values, array(before + 1), moments, settings=FEDADAM)
    # m = 0.5 * 1.5 + 0.5 * 1 = 1.25; v = 0.75 * 2.4375 + 0.25 * 1 = 2.078125
    assert moments.first[0] == pytest.approx(1.25, rel=1e-6)
    assert moments.second[0] == pytest.approx(2.078125, rel=1e-6)
    expected = before + 0.5 * 1.25 / (math.sqrt(2.078125) + 0.5)
    assert values[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("settings", [MOMENTUM, FEDADAM])
def test_the_scale_multiplies_the_step_and_not_the_memory(settings):
    whole, remembered = server_step(array(1), array(3), Moments(), settings=settings)
    half, same = server_step(array(1), array(3), Moments(), settings=settings, scale=0.5)
    assert half[0] - 1 == pytest.approx((whole[0] - 1) / 2, rel=1e-6)
    assert same.first.tolist() == remembered.first.tolist()


@pytest.mark.parametrize("settings", [FEDAVG, MOMENTUM, FEDADAM])
def test_nothing_given_is_changed(settings):
    current, aggregated = array(1), array(3)
    moments = Moments(np.array([2.0]), np.array([5.0]))
    server_step(current, aggregated, moments, settings=settings)
    assert (current.tolist(), aggregated.tolist()) == ([1], [3])
    assert (moments.first.tolist(), moments.second.tolist()) == ([2], [5])


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"tau": -1.0}, "tau is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"beta1": -0.1}, "beta1 is -0.1"),
        ({"beta2": 1.5}, "beta2 is 1.5"),
        ({"optimizer": "sgd"}, "sgd"),
    ],
)
def test_numbers_out_of_range_are_refused(changed, reason):
    with pytest.raises(ValueError, match=reason):
        ServerOptimizerSettings(**changed)
