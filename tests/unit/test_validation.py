from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from fedpruner_common.errors import InvalidUpdate
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.statistics import (
    Family,
    FamilyStatistics,
    Granularity,
    ProbeCost,
    Statistics,
)
from fedpruner_common.task import UpdateMetrics
from fedpruner_server.core.validation import (
    check_metrics,
    check_statistics,
    check_tensors,
    check_values,
    max_update_bytes,
)

METRICS = UpdateMetrics(10, 1000, 3.0, 2.0, 1 << 30, 5.0)
EXPECTED = {"m.lora_A": (2, 4), "m.lora_B": (6, 2)}
FOUND = {
    "m.lora_A": TensorInfo("m.lora_A", "F32", (2, 4), 32, ""),
    "m.lora_B": TensorInfo("m.lora_B", "F32", (6, 2), 48, ""),
}


def test_an_update_with_exactly_its_tensors_is_accepted():
    check_tensors(EXPECTED, FOUND)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"evil": TensorInfo("evil", "F32", (), 4, "")}, "'evil' is not part of this task"),
        ({"m.lora_A": TensorInfo("m.lora_A", "F32", (4, 2), 32, "")}, r"shape \[4, 2\]"),
        ({"m.lora_A": TensorInfo("m.lora_A", "F32", (8,), 32, "")}, r"expected \[2, 4\]"),
        ({"m.lora_B": TensorInfo("m.lora_B", "F16", (6, 2), 24, "")}, "m.lora_B is F16"),
        ({"m.lora_B": TensorInfo("m.lora_B", "F64", (6, 2), 96, "")}, "m.lora_B is F64"),
    ],
)
def test_an_unknown_name_another_shape_or_another_dtype_is_refused(change, reason):
    with pytest.raises(InvalidUpdate, match=reason):
        check_tensors(EXPECTED, {**FOUND, **change})


def test_a_missing_tensor_is_refused():
    with pytest.raises(InvalidUpdate, match=r"tensor m\.lora_B is missing"):
        check_tensors(EXPECTED, {"m.lora_A": FOUND["m.lora_A"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value):
    good = np.ones((2, 2), dtype=np.float32)
    bad = good.copy()
    bad[1, 1] = value
    check_values({"x": good})
    with pytest.raises(InvalidUpdate, match="tensor y"):
        check_values({"x": good, "y": bad})


def test_honest_metrics_are_accepted():
    check_metrics(METRICS)
    check_metrics(replace(METRICS, num_examples=1))


@pytest.mark.parametrize("count", [0, 2**41, 2**64 - 1])
def test_a_weight_that_would_vanish_or_drown_the_others_is_refused(count):
    with pytest.raises(InvalidUpdate, match="num_examples"):
        check_metrics(replace(METRICS, num_examples=count))


@pytest.mark.parametrize("name", ["train_loss_first", "train_loss_last", "train_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_that_are_not_finite_are_refused(name, value):
    with pytest.raises(InvalidUpdate, match=name):
        check_metrics(replace(METRICS, **{name: value}))


def test_the_largest_update_is_its_data_and_room_for_the_header():
    # 8 + 12 floats of 4 bytes, and 512 for each of two tensors and the rest
    assert max_update_bytes(EXPECTED) == 80 + 3 * 512


def test_a_real_update_is_within_the_largest():
    shapes = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{factor}.weight": (8, 64)
        for layer in range(40)
        for factor in "AB"
    }
    file = save({name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()})
    assert len(file) <= max_update_bytes(shapes)


SIMILARITY = np.array([[1.0, 0.0], [0.0, 1.0]])


def check_layers(similarity=SIMILARITY, importance=(1.0, -2.0), **cost):
    """Check statistics of two whole layers, which may use 100 tokens."""
    values = {"loss_full": 3.0, "num_tokens": 100, "seconds": 1.0, "bytes_read": 0, **cost}
    families = {Family.LAYER: FamilyStatistics(np.array(similarity), importance)}
    statistics = Statistics(families, "device", "", ProbeCost(**values))
    check_statistics(statistics, Granularity.LAYER.families, 2, max_tokens=100)


def test_statistics_at_the_edge_of_what_makes_sense_are_accepted():
    check_layers()
    check_layers([[1.0, 1.0], [1.0, 1.0]], num_tokens=1)
    check_layers([[1.0005, -0.0005], [-0.0005, 1.0]])  # float32 on the way
    check_layers(importance=(-1e30, 1e30))


@pytest.mark.parametrize("granularity", Granularity)
def test_statistics_of_other_families_than_asked_for_are_refused(granularity):
    item = FamilyStatistics(SIMILARITY, (1.0, 2.0))
    for families in ((), (Family.ATTENTION,), tuple(Family)):
        statistics = Statistics(dict.fromkeys(families, item), "device", "")
        with pytest.raises(InvalidUpdate, match="not of the families"):
            check_statistics(statistics, granularity.families, 2, max_tokens=100)
    good = Statistics(dict.fromkeys(granularity.families, item), "device", "")
    check_statistics(good, granularity.families, 2, max_tokens=100)


@pytest.mark.parametrize(
    ("similarity", "importance"),
    [
        ([[1.0]], (1.0,)),
        (np.eye(3), (1.0, 2.0, 3.0)),
        (np.eye(2), (1.0, 2.0, 3.0)),
        (np.eye(3), (1.0, 2.0)),
        (np.zeros((0, 0)), ()),
    ],
)
def test_statistics_of_another_number_of_layers_are_refused(similarity, importance):
    with pytest.raises(InvalidUpdate, match="not of 2 layers"):
        check_layers(similarity, importance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_statistics_that_are_not_finite_are_refused(value):
    with pytest.raises(InvalidUpdate, match="not finite"):
        check_layers([[1.0, value], [value, 1.0]])
    with pytest.raises(InvalidUpdate, match="not finite"):
        check_layers(importance=(1.0, value))


@pytest.mark.parametrize("value", [1.01, -0.01, -0.5, 2.0, -1e30])
def test_a_similarity_outside_0_to_1_is_refused(value):
    with pytest.raises(InvalidUpdate, match=r"a layer similarity lies outside \[0, 1\]"):
        check_layers([[1.0, value], [value, 1.0]])


@pytest.mark.parametrize("count", [0, 101, 2**64 - 1])
def test_more_tokens_than_were_asked_for_would_drown_the_other_devices(count):
    with pytest.raises(InvalidUpdate, match="expected 1 to 100"):
        check_layers(num_tokens=count)


@pytest.mark.parametrize("name", ["loss_full", "seconds"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_is_refused(name, value):
    with pytest.raises(InvalidUpdate, match=name):
        check_layers(**{name: value})
