"""A device's layer statistics <-> their message; apart from `convert`, which needs no numpy."""

import numpy as np

from fedpruner_common.pb import federation_pb2 as pb
from fedpruner_common.statistics import Family, FamilyStatistics, ProbeCost, Statistics

_MAX_LAYERS = 1 << 14


def statistics_to_pb(statistics: Statistics, request: pb.PushStatisticsRequest) -> None:
    """Write a device's statistics into a request; similarities as their upper triangle."""
    for family, found in statistics.families.items():
        upper = np.triu_indices(len(found.importance))
        request.families.append(
            pb.FamilyStatistics(
                family=family.value,
                similarity=found.similarity[upper].tolist(),
                importance=found.importance,
            )
        )
    if statistics.cost is not None:
        request.num_tokens = statistics.cost.num_tokens
        request.seconds = statistics.cost.seconds
        request.bytes_read = statistics.cost.bytes_read
        request.loss = statistics.cost.loss_full


def statistics_from_pb(message: pb.PushStatisticsRequest) -> Statistics:
    """The statistics in a message; `core.validation` judges their values.

    Raises:
        ValueError: a family is unknown, or a triangle is not one.
    """
    families = {}
    for item in message.families:
        size = len(item.importance)
        if size > _MAX_LAYERS or len(item.similarity) != size * (size + 1) // 2:
            raise ValueError(f"{len(item.similarity)} similarities of {size} items")
        similarity = np.zeros((size, size))
        similarity[np.triu_indices(size)] = item.similarity
        similarity += np.triu(similarity, 1).T
        families[Family(item.family)] = FamilyStatistics(similarity, tuple(item.importance))
    cost = ProbeCost(
        loss_full=message.loss,
        num_tokens=max(1, message.num_tokens),
        seconds=message.seconds,
        bytes_read=message.bytes_read,
    )
    return Statistics(families, "device", "", cost)
