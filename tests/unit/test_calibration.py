"""What past tasks say of a device's memory."""

import pytest

from fedpruner_common.task import UpdateMetrics
from fedpruner_server.core.calibration import (
    UNCALIBRATED,
    Calibration,
    Observation,
    calibrate,
)
from fedpruner_server.core.round import Round
from fedpruner_server.history import ClientRecord, RoundRecord, calibration_of
from fedpruner_server.method import TaskPlan

FLOOR = 400


def took(measured, predicted=1000):
    return Observation(FLOOR, predicted, measured)


@pytest.mark.parametrize("measured", [970, 1000, 1030])
def test_a_prediction_within_three_per_cent_is_left_alone(measured):
    assert calibrate([took(measured)] * 9) == UNCALIBRATED


def test_a_device_that_needs_more_is_believed_at_once():
    # 700 above the floor instead of 600: 1.1666, rounded up to a 32nd.
    assert calibrate([took(1100)]) == Calibration(38 / 32)


def test_a_device_that_needs_less_is_believed_after_five_tasks():
    less = took(700)  # half of what was predicted above the floor
    assert calibrate([less] * 4) == UNCALIBRATED
    assert calibrate([less] * 5) == Calibration(0.5)


def test_of_recent_tasks_the_worst_counts_and_old_ones_are_forgotten():
    assert calibrate([took(1100), *[took(1000)] * 4]).ratio == 38 / 32
    assert calibrate([took(1100), *[took(1000)] * 5]).ratio == 1.0
    assert calibrate([took(1100), took(1300)]).ratio == 1.5


@pytest.mark.parametrize(("measured", "ratio"), [(100_000, 4.0), (401, 0.5)])
def test_one_wild_measurement_does_not_rule_everything(measured, ratio):
    assert calibrate([took(measured)] * 5).ratio == ratio


def test_what_ran_out_of_memory_is_never_forgotten():
    killed = [Observation(FLOOR, 1000, None), Observation(FLOOR, 900, None)]
    assert calibrate([*killed, *[took(1000)] * 9]) == Calibration(1.0, too_much_bytes=500)


def test_the_same_size_is_never_planned_again():
    calibration = Calibration(1.0, too_much_bytes=500)
    assert calibration.usable_bytes(1 << 40, FLOOR) == FLOOR + 450
    assert calibration.usable_bytes(600, FLOOR) == 600


def test_of_what_no_submodel_can_do_without_nothing_is_saved():
    calibration = Calibration(1.0, too_much_bytes=500)
    assert calibration.usable_bytes(1 << 40, FLOOR, fixed_bytes=300) == FLOOR + 300 + 180
    assert calibration.usable_bytes(1 << 40, FLOOR, fixed_bytes=496) == FLOOR + 499
    assert calibration.usable_bytes(1 << 40, FLOOR, fixed_bytes=800) == FLOOR + 499


def test_a_corrected_prediction_fits_where_its_size_was_planned():
    calibration = Calibration(1.25)
    for usable in range(FLOOR, 2000, 7):
        model_peak = calibration.usable_bytes(usable, FLOOR)
        assert usable - 2 <= calibration.peak_bytes(model_peak, FLOOR) <= usable


# From the journal


def client(*, measured=0, rungs=(), too_large=()):
    plan = TaskPlan((), 1000, model_peak_bytes=1000, floor_bytes=FLOOR)
    metrics = UpdateMetrics(1, 1, 2.0, 1.0, measured, 1.0, rungs) if measured else None
    return ClientRecord("a", plan, too_large=list(too_large), metrics=metrics)


def of(*clients):
    history = {
        number: RoundRecord(Round(number), 0.0, {"a": record})
        for number, record in enumerate(clients, 1)
    }
    return calibration_of("a", history)


def test_a_device_that_never_trained_is_taken_at_its_word():
    assert of() == of(client()) == calibration_of("b", {}) == UNCALIBRATED


def test_a_task_that_ran_out_of_memory_counts_and_a_refused_one_does_not():
    large = TaskPlan((), 1200, model_peak_bytes=1200, floor_bytes=FLOOR)
    assert of(client(measured=1000, too_large=[(large, False)])) == Calibration(1.0, 800)
    assert of(client(measured=1000, too_large=[(large, True)])) == UNCALIBRATED


def test_a_task_that_only_went_with_less_was_too_large():
    rungs = ("micro-batch 8 -> 4",)
    assert of(client(measured=700, rungs=rungs)) == Calibration(1.0, too_much_bytes=600)
