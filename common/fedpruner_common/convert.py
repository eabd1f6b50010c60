"""Domain objects <-> protobuf messages. Nothing else knows both.

Reading a message checks it: what comes back satisfies the invariants of the domain classes.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.errors import FedPrunerError
from fedpruner_common.manifest import FileInfo, TensorInfo, is_content_hash
from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.statistics import Granularity, Score
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

_MAX_LAYERS = 1 << 14
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def task_to_pb(task: Task) -> pb.Task:
    return pb.Task(
        task_id=task.task_id,
        round=task.round,
        num_layers=task.submodel.num_layers,
        components=[
            pb.Component(layer=c.layer, kind=c.kind.value) for c in task.submodel.components
        ],
        tensors=map(_tensor_to_pb, task.tensors),
        files=map(_file_to_pb, task.files),
        lora=pb.LoraSettings(**asdict(task.lora)),
        training=pb.TrainingSettings(**asdict(task.training)),
        predicted_peak_bytes=task.predicted_peak_bytes,
        bridge=pb.BridgeSettings(
            kind=task.bridge.kind.value,
            rank=task.bridge.rank,
            local=task.bridge.local,
            corrected=task.bridge.corrected,
        ),
        other_tensors=map(_tensor_to_pb, task.other_tensors),
        bridge_file=_file_to_pb(task.bridge_file) if task.bridge_file else None,
        streamed=task.streamed,
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
            lora=_lora_from_pb(message.lora),
            training=_training_from_pb(message.training),
            predicted_peak_bytes=message.predicted_peak_bytes,
            bridge=BridgeSettings(
                kind=BridgeKind(message.bridge.kind),
                rank=message.bridge.rank,
                local=message.bridge.local,
                corrected=message.bridge.corrected,
            ),
            other_tensors=tuple(_tensor_from_pb(t) for t in message.other_tensors),
            bridge_file=(
                _file_from_pb(message.bridge_file) if message.HasField("bridge_file") else None
            ),
            streamed=_layers(message.streamed, message.num_layers),
        )
    except ValueError as error:
        raise FedPrunerError(f"the coordinator sent a task that makes no sense: {error}") from error


def probe_to_pb(probe: ProbeTask) -> pb.ProbeTask:
    return pb.ProbeTask(
        task_id=probe.task_id,
        num_layers=probe.num_layers,
        tensors=map(_tensor_to_pb, probe.tensors),
        files=map(_file_to_pb, probe.files),
        lora=pb.LoraSettings(**asdict(probe.lora)),
        granularity=probe.granularity,
        score=probe.score,
        num_sequences=probe.num_sequences,
        max_seq_length=probe.max_seq_length,
        dtype=probe.dtype,
        seed=probe.seed,
        rms_rows=probe.rms_rows,
    )


def probe_from_pb(message: pb.ProbeTask) -> ProbeTask:
    """The probe in a message.

    Raises:
        FedPrunerError: a name, hash or option in it is not what the protocol allows.
    """
    try:
        return ProbeTask(
            task_id=message.task_id,
            num_layers=message.num_layers,
            tensors=tuple(_tensor_from_pb(t) for t in message.tensors),
            files=tuple(_file_from_pb(f) for f in message.files),
            lora=_lora_from_pb(message.lora),
            granularity=Granularity(message.granularity).value,
            score=Score(message.score).value,
            num_sequences=message.num_sequences,
            max_seq_length=message.max_seq_length,
            dtype=message.dtype,
            seed=message.seed,
            rms_rows=message.rms_rows,
        )
    except ValueError as error:
        raise FedPrunerError(
            f"the coordinator sent a probe that makes no sense: {error}"
        ) from error


def _layers(indices: Iterable[int], num_layers: int) -> tuple[int, ...]:
    layers = tuple(indices)
    if any(layer >= num_layers for layer in layers):
        raise ValueError(f"a layer lies outside the model's {num_layers} layers")
    return layers


def _lora_from_pb(message: pb.LoraSettings) -> LoraSettings:
    return LoraSettings(
        r=message.r,
        lora_alpha=message.lora_alpha,
        lora_dropout=message.lora_dropout,
        target_modules=tuple(message.target_modules),
    )


def _training_from_pb(message: pb.TrainingSettings) -> TrainingSettings:
    training = TrainingSettings(**_named_alike(message, TrainingSettings))
    _check_one_of(training.train_factor, ("both", "A", "B"))
    _check_one_of(training.optim, ("adamw", "adamw_8bit"))
    return training


def _check_one_of(text: str, allowed: tuple[str, ...]) -> None:
    if text not in allowed:
        raise ValueError(f"{text!r} is none of {', '.join(allowed)}")


def _named_alike(message: Any, target: type[Any]) -> dict[str, Any]:
    """The values of a message's fields that a dataclass has by the same names: all of its own."""
    return {field.name: getattr(message, field.name) for field in fields(target)}


def _checked_hash(text: str) -> str:
    if not is_content_hash(text):
        raise ValueError(f"{text!r} is not a content hash")
    return text


def _tensor_to_pb(info: TensorInfo) -> pb.TensorInfo:
    return pb.TensorInfo(
        name=info.name,
        dtype=info.dtype,
        shape=info.shape,
        num_bytes=info.num_bytes,
        hash=info.hash,
    )


def _file_to_pb(info: FileInfo) -> pb.FileInfo:
    return pb.FileInfo(name=info.name, num_bytes=info.num_bytes, hash=info.hash)


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
    header.MergeFrom(pb.UpdateHeader(**asdict(metrics)))


def metrics_from_header(header: pb.UpdateHeader) -> UpdateMetrics:
    """The metrics in an update's header; `core.validation` judges them."""
    values = _named_alike(header, UpdateMetrics)
    return UpdateMetrics(**{**values, "rungs": tuple(header.rungs)})
