"""Is this update acceptable?"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fedpruner_common.errors import InvalidUpdate
from fedpruner_common.manifest import TensorInfo
from fedpruner_common.statistics import Family, ProbeCost, Statistics
from fedpruner_common.task import UpdateMetrics
from fedpruner_server.core.aggregation import Adapter

# A safetensors file is its data plus a JSON header: names, shapes and offsets, padded.
_HEADER_BYTES_PER_TENSOR = 512
_MAX_RUNGS, _MAX_RUNG = 32, 100
_MAX_EXAMPLES = 1 << 40
_CKA_NOISE = 1e-3


def max_update_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    """The largest file in which an update with these tensors can arrive."""
    data = 4 * sum(math.prod(shape) for shape in shapes.values())
    return data + _HEADER_BYTES_PER_TENSOR * (len(shapes) + 1)


def check_metrics(metrics: UpdateMetrics) -> None:
    """Refuse metrics that would poison the averages.

    Raises:
        InvalidUpdate: which number is wrong.
    """
    if not 0 < metrics.num_examples <= _MAX_EXAMPLES:
        raise InvalidUpdate(f"num_examples is {metrics.num_examples}, expected a positive count")
    _check_finite(metrics, "train_loss_first", "train_loss_last", "train_s")
    if len(metrics.rungs) > _MAX_RUNGS or any(len(rung) > _MAX_RUNG for rung in metrics.rungs):
        raise InvalidUpdate(f"at most {_MAX_RUNGS} rungs of {_MAX_RUNG} characters")


def check_tensors(expected: Mapping[str, tuple[int, int]], found: Mapping[str, TensorInfo]) -> None:
    """Refuse an update that does not have exactly the tensors of its task, in float32.

    Args:
        expected: canonical name -> shape.
        found: canonical name -> what the update's header says of it.

    Raises:
        InvalidUpdate: the first name that is unknown, missing, or of another shape or dtype.
    """
    for name in sorted(found.keys() - expected.keys()):
        raise InvalidUpdate(f"tensor {name[:200]!r} is not part of this task")
    for name, shape in expected.items():
        if name not in found:
            raise InvalidUpdate(f"tensor {name} is missing")
        info = found[name]
        if info.shape != shape:
            raise InvalidUpdate(
                f"tensor {name} has shape {list(info.shape)}, expected {list(shape)}"
            )
        if info.dtype != "F32":
            raise InvalidUpdate(f"tensor {name} is {info.dtype}, expected F32")


def check_values(tensors: Adapter) -> None:
    """Refuse values that are not finite.

    Raises:
        InvalidUpdate: the first tensor at fault.
    """
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise InvalidUpdate(f"tensor {name} has values that are not finite")


def check_statistics(
    statistics: Statistics, families: Sequence[Family], num_layers: int, *, max_tokens: int
) -> None:
    """Refuse statistics of a device that are not of the asked families, or make no sense.

    Args:
        statistics: of the device.
        families: that were asked for.
        num_layers: of the model.
        max_tokens: of text that the probe may have used; its tokens weigh it in the cohort's mean.

    Raises:
        InvalidUpdate: what is wrong.
    """
    if set(statistics.families) != set(families):
        raise InvalidUpdate("the statistics are not of the families that were asked for")
    for family, found in statistics.families.items():
        similarity, importance = found.similarity, np.asarray(found.importance)
        if similarity.shape != (num_layers, num_layers) or importance.shape != (num_layers,):
            raise InvalidUpdate(f"the {family.value} statistics are not of {num_layers} layers")
        if not (np.isfinite(similarity).all() and np.isfinite(importance).all()):
            raise InvalidUpdate(f"the {family.value} statistics are not finite")
        if similarity.min() < -_CKA_NOISE or similarity.max() > 1 + _CKA_NOISE:
            raise InvalidUpdate(f"a {family.value} similarity lies outside [0, 1]")
    cost = statistics.cost
    if cost is None:
        return
    if not 0 < cost.num_tokens <= max_tokens:
        raise InvalidUpdate(f"num_tokens is {cost.num_tokens}, expected 1 to {max_tokens}")
    _check_finite(cost, "loss_full", "seconds")


def _check_finite(measured: UpdateMetrics | ProbeCost, *names: str) -> None:
    for name in names:
        if not math.isfinite(getattr(measured, name)):
            raise InvalidUpdate(f"{name} is {getattr(measured, name)}, expected a finite number")
