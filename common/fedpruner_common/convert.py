"""Domain objects <-> protobuf messages. Nothing else knows both.

Reading a message checks it: what comes back satisfies the invariants of the domain classes.
"""

import re

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.errors import FedPrunerError
from fedpruner_common.manifest import FileInfo, TensorInfo
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.submodel import Submodel
from fedpruner_common.task import LoraSettings, Task, TrainingSettings, UpdateMetrics

_HASH = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def task_to_pb(task: Task) -> pb.Task:
    return pb.Task(
        task_id=task.task_id,
        round=task.round,
        num_layers=task.submodel.num_layers,
        components=[
            pb.Component(layer=c.layer, kind=c.kind.value) for c in task.submodel.components
        ],
        tensors=[
            pb.TensorInfo(
                name=t.name, dtype=t.dtype, shape=t.shape, num_bytes=t.num_bytes, hash=t.hash
            )
            for t in task.tensors
        ],
        files=[pb.FileInfo(name=f.name, num_bytes=f.num_bytes, hash=f.hash) for f in task.files],
        lora=pb.LoraSettings(
            r=task.lora.r,
            lora_alpha=task.lora.lora_alpha,
            lora_dropout=task.lora.lora_dropout,
            target_modules=task.lora.target_modules,
        ),
        training=pb.TrainingSettings(
            per_device_train_batch_size=task.training.per_device_train_batch_size,
            gradient_accumulation_steps=task.training.gradient_accumulation_steps,
            max_steps=task.training.max_steps,
            max_seq_length=task.training.max_seq_length,
            learning_rate=task.training.learning_rate,
            weight_decay=task.training.weight_decay,
            max_grad_norm=task.training.max_grad_norm,
            gradient_checkpointing=task.training.gradient_checkpointing,
            dtype=task.training.dtype,
            seed=task.training.seed,
        ),
        predicted_peak_bytes=task.predicted_peak_bytes,
    )


def task_from_pb(message: pb.Task) -> Task:
    """The task in a message.

    Raises:
        FedPrunerError: a name, hash, kind or size in it is not what the protocol allows.
    """
    try:
        return Task(
            task_id=message.task_id,
            round=message.round,
            submodel=Submodel.of(
                message.num_layers, (ComponentId(c.layer, Kind(c.kind)) for c in message.components)
            ),
            tensors=tuple(_tensor_from_pb(t) for t in message.tensors),
            files=tuple(_file_from_pb(f) for f in message.files),
            lora=LoraSettings(
                r=message.lora.r,
                lora_alpha=message.lora.lora_alpha,
                lora_dropout=message.lora.lora_dropout,
                target_modules=tuple(message.lora.target_modules),
            ),
            training=_training_from_pb(message.training),
            predicted_peak_bytes=message.predicted_peak_bytes,
        )
    except ValueError as error:
        raise FedPrunerError(f"the coordinator sent a task that makes no sense: {error}") from error


def _training_from_pb(message: pb.TrainingSettings) -> TrainingSettings:
    return TrainingSettings(
        per_device_train_batch_size=message.per_device_train_batch_size,
        gradient_accumulation_steps=message.gradient_accumulation_steps,
        max_steps=message.max_steps,
        max_seq_length=message.max_seq_length,
        learning_rate=message.learning_rate,
        weight_decay=message.weight_decay,
        max_grad_norm=message.max_grad_norm,
        gradient_checkpointing=message.gradient_checkpointing,
        dtype=message.dtype,
        seed=message.seed,
    )


def _checked_hash(text: str) -> str:
    if not _HASH.fullmatch(text):
        raise ValueError(f"{text!r} is not a content hash")
    return text


def _tensor_from_pb(message: pb.TensorInfo) -> TensorInfo:
    return TensorInfo(
        name=message.name,
        dtype=message.dtype,
        shape=tuple(message.shape),
        num_bytes=message.num_bytes,
        hash=_checked_hash(message.hash),
    )


def _file_from_pb(message: pb.FileInfo) -> FileInfo:
    # The name becomes a path on the device: no separators, no leading dot.
    if not _FILE_NAME.fullmatch(message.name):
        raise ValueError(f"{message.name!r} is not a plain file name")
    return FileInfo(message.name, message.num_bytes, _checked_hash(message.hash))


def metrics_to_header(header: pb.UpdateHeader, metrics: UpdateMetrics) -> None:
    """Write the metrics into an update's header."""
    header.num_examples = metrics.num_examples
    header.num_tokens = metrics.num_tokens
    header.train_loss_first = metrics.train_loss_first
    header.train_loss_last = metrics.train_loss_last
    header.measured_peak_bytes = metrics.measured_peak_bytes
    header.train_s = metrics.train_s


def metrics_from_header(header: pb.UpdateHeader) -> UpdateMetrics:
    """The metrics in an update's header; `core.validation` judges them."""
    return UpdateMetrics(
        num_examples=header.num_examples,
        num_tokens=header.num_tokens,
        train_loss_first=header.train_loss_first,
        train_loss_last=header.train_loss_last,
        measured_peak_bytes=header.measured_peak_bytes,
        train_s=header.train_s,
    )
