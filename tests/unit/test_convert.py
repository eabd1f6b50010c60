from dataclasses import replace

import numpy as np
import pytest

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.convert import (
    metrics_from_header,
    metrics_to_header,
    probe_from_pb,
    probe_to_pb,
    task_from_pb,
    task_to_pb,
)
from fedpruner_common.convert_statistics import statistics_from_pb, statistics_to_pb
from fedpruner_common.errors import FedPrunerError
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.statistics import Family, FamilyStatistics, ProbeCost, Statistics
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import (
    BridgeKind,
    BridgeSettings,
    LoraSettings,
    ProbeTask,
    Task,
    TrainingSettings,
    UpdateMetrics,
)

HASH = "0123456789abcdef" * 4

TASK = Task(
    task_id="r3-a",
    round=3,
    submodel=Submodel.of(4, [ComponentId(0, Kind.ATTENTION), ComponentId(3, Kind.FFN)]),
    tensors=(TensorInfo("embed", "BF16", (5, 3), 30, HASH), TensorInfo("s", "F32", (), 4, HASH)),
    files=(FileInfo("tokenizer_config.json", 77, HASH),),
    lora=LoraSettings(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=("model.layers.0.q",)),
    training=TrainingSettings(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=10,
        max_seq_length=128,
        learning_rate=2e-4,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=True,
        dtype="bfloat16",
        seed=2**63,
    ),
    predicted_peak_bytes=6 << 30,
)


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


def test_a_task_arrives_as_it_was_sent():
    assert task_from_pb(over_the_wire(task_to_pb(TASK))) == TASK


def test_metrics_arrive_as_they_were_sent():
    metrics = UpdateMetrics(100, 51_200, 3.25, 1.5, 5 << 30, 12.75)
    header = pb.UpdateHeader()
    metrics_to_header(header, metrics)
    assert metrics_from_header(over_the_wire(header)) == metrics


def hostile(change):
    message = task_to_pb(TASK)
    change(message)
    return over_the_wire(message)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "",
        ".",
        "..",
        ".bashrc",
        "config.json\n",
        "con\0fig",
        "-rf",
        "x" * 200,
    ],
)
def test_a_file_name_that_is_more_than_a_plain_name_is_refused(name):
    with pytest.raises(FedPrunerError, match="not a plain file name"):
        task_from_pb(hostile(lambda m: setattr(m.files[0], "name", name)))


@pytest.mark.parametrize(
    "text", ["", "../../x", HASH[:-1], HASH + "0", HASH.upper(), HASH[:-1] + "g"]
)
@pytest.mark.parametrize("field", ["tensors", "files"])
def test_a_hash_that_is_not_64_lower_case_hex_digits_is_refused(field, text):
    with pytest.raises(FedPrunerError, match="not a content hash"):
        task_from_pb(hostile(lambda m: setattr(getattr(m, field)[0], "hash", text)))


@pytest.mark.parametrize("kind", ["", "mlp", "Attention"])
def test_an_unknown_kind_of_component_is_refused(kind):
    with pytest.raises(FedPrunerError, match="makes no sense"):
        task_from_pb(hostile(lambda m: setattr(m.components[0], "kind", kind)))


@pytest.mark.parametrize("layer", [4, 2**32 - 1])
def test_a_layer_outside_the_model_is_refused(layer):
    with pytest.raises(FedPrunerError, match="outside the model's 4 layers"):
        task_from_pb(hostile(lambda m: setattr(m.components[0], "layer", layer)))


def test_a_tensor_whose_size_does_not_follow_from_its_shape_is_refused():
    with pytest.raises(FedPrunerError, match="embed"):
        task_from_pb(hostile(lambda m: setattr(m.tensors[0], "num_bytes", 1 << 60)))


def test_a_tensor_of_unknown_dtype_is_refused():
    with pytest.raises(FedPrunerError, match="unknown dtype"):
        task_from_pb(hostile(lambda m: setattr(m.tensors[0], "dtype", "object")))


FULL_TASK = replace(
    TASK,
    training=replace(TASK.training, proximal_mu=0.25, train_factor="B"),
    bridge=BridgeSettings(BridgeKind.LOWRANK, rank=32, local=True, corrected=True),
    other_tensors=(TensorInfo("other", "U8", (2,), 2, HASH[::-1]),),
    bridge_file=FileInfo("bridges.safetensors", 9, HASH[::-1]),
    streamed=(0, 3),
)


def test_a_task_with_everything_in_it_arrives_as_it_was_sent():
    assert task_from_pb(over_the_wire(task_to_pb(FULL_TASK))) == FULL_TASK


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.bridge, "kind", "magic"), "magic"),
        (lambda m: m.ClearField("bridge"), "BridgeKind"),
        (lambda m: setattr(m.training, "train_factor", "C"), "'C' is none of both, A, B"),
        (lambda m: setattr(m.other_tensors[0], "hash", "../../x"), "not a content hash"),
        (lambda m: setattr(m.bridge_file, "hash", "../../x"), "not a content hash"),
        (lambda m: setattr(m.bridge_file, "name", "../x"), "not a plain file name"),
        (lambda m: m.streamed.append(4), "outside the model's 4 layers"),
        (lambda m: setattr(m, "num_layers", 3), "outside the model's 3 layers"),
    ],
)
def test_a_part_of_a_full_task_that_makes_no_sense_is_refused(change, reason):
    message = task_to_pb(FULL_TASK)
    change(message)
    with pytest.raises(FedPrunerError, match=reason):
        task_from_pb(over_the_wire(message))


PROBE = ProbeTask(
    task_id="probe-1-a",
    num_layers=4,
    tensors=TASK.tensors,
    files=TASK.files,
    lora=TASK.lora,
    granularity="component",
    score="loo",
    num_sequences=8,
    max_seq_length=128,
    dtype="auto",
    seed=2**63,
    rms_rows=False,
)


def test_a_probe_arrives_as_it_was_sent():
    assert probe_from_pb(over_the_wire(probe_to_pb(PROBE))) == PROBE


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "granularity", "head"),
        lambda m: setattr(m, "score", "luck"),
        lambda m: setattr(m.tensors[0], "hash", "x"),
        lambda m: setattr(m.files[0], "name", "a/b"),
    ],
)
def test_a_probe_that_makes_no_sense_is_refused(change):
    message = probe_to_pb(PROBE)
    change(message)
    with pytest.raises(FedPrunerError, match="a probe that makes no sense"):
        probe_from_pb(over_the_wire(message))


# Statistics, in numbers that float32 holds exactly

LAYERS = FamilyStatistics(
    np.array([[1.0, 0.5, 0.25], [0.5, 1.0, 0.125], [0.25, 0.125, 1.0]]), (3.0, -0.5, 0.0)
)
STATISTICS = Statistics(
    {Family.ATTENTION: LAYERS, Family.FFN: replace(LAYERS, importance=(1.0, 2.0, 3.0))},
    "device",
    "",
    ProbeCost(2.5, 77, 1.5, 4096),
)


def statistics_message(statistics=STATISTICS):
    request = pb.PushStatisticsRequest()
    statistics_to_pb(statistics, request)
    return over_the_wire(request)


def test_statistics_travel_as_their_upper_triangle_and_arrive_as_they_were():
    message = statistics_message()
    assert list(message.families[0].similarity) == [1.0, 0.5, 0.25, 1.0, 0.125, 1.0]
    again = statistics_from_pb(message)
    assert again.families.keys() == STATISTICS.families.keys()
    for family, item in STATISTICS.families.items():
        np.testing.assert_array_equal(again.families[family].similarity, item.similarity)
        assert again.families[family].importance == item.importance
    assert (again.source, again.cost) == ("device", STATISTICS.cost)


def test_nothing_that_was_said_of_a_pair_is_covered_up():
    for value in (-0.5, -2.0, float("nan"), float("-inf")):
        message = statistics_message()
        message.families[0].similarity[1] = value
        found = statistics_from_pb(message).families[Family.ATTENTION].similarity
        np.testing.assert_array_equal([found[0, 1], found[1, 0]], [value, value])


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_triangle_that_is_not_one_is_refused(size):
    message = statistics_message()
    del message.families[0].importance[:]
    message.families[0].importance.extend([1.0] * size)
    with pytest.raises(ValueError, match=f"6 similarities of {size} items"):
        statistics_from_pb(message)


def test_a_size_whose_square_would_fill_the_memory_is_refused_first():
    message = pb.PushStatisticsRequest()
    message.families.append(pb.FamilyStatistics(family="layer", importance=[0.0] * 1_000_000))
    with pytest.raises(ValueError, match="0 similarities of 1000000 items"):
        statistics_from_pb(message)


def test_an_unknown_family_is_refused():
    message = statistics_message()
    message.families[0].family = "head"
    with pytest.raises(ValueError, match="head"):
        statistics_from_pb(message)
