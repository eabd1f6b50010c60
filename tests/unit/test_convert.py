import pytest

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.convert import (
    metrics_from_header,
    metrics_to_header,
    task_from_pb,
    task_to_pb,
)
from fedpruner_common.errors import FedPrunerError
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, Task, TrainingSettings, UpdateMetrics

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
