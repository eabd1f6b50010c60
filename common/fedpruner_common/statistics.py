"""What planning knows about a model's layers: how alike they are, and what each one is worth."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpruner_common.components import ComponentId, Kind
from fedpruner_common.similarity import Matrix

Json = dict[str, Any]

_FEWEST_TO_TRIM = 5


class Family(str, Enum):
    """Items that are grouped together; item i of a family belongs to layer i."""

    LAYER = "layer"
    ATTENTION = "attention"
    FFN = "ffn"

    def components(self, layer: int) -> tuple[ComponentId, ...]:
        """The components that live and die together as this family's item of a layer."""
        return tuple(ComponentId(layer, kind) for kind in Kind if kind in self.kinds)

    @property
    def kinds(self) -> frozenset[Kind]:
        """The halves of a layer that make up one item."""
        return frozenset(Kind) if self is Family.LAYER else frozenset({Kind(self.value)})


class Granularity(str, Enum):
    """What is pruned as a whole: layers (FedPruner) or halves of layers (FedPruner+)."""

    LAYER = "layer"
    COMPONENT = "component"

    @property
    def families(self) -> tuple[Family, ...]:
        return (Family.LAYER,) if self is Granularity.LAYER else (Family.ATTENTION, Family.FFN)


class Score(str, Enum):
    """What makes an item important; greater is more important in each.

    Source: METHOD.md 2.2 of the project's notes; `bi` ShortGPT (Men et al. 2024), `angular` Gromov
    et al. 2024, `sleb` Song et al. 2024, `fisher` Fed-HeLLo (Zhang et al. 2025).
    """

    BI = "bi"  # one minus the cosine of the residual stream before and after the item
    ANGULAR = "angular"  # the angle between the two at each sequence's last token, over pi
    LOO = "loo"  # rise of the loss without the item
    SLEB = "sleb"  # when the item goes if the least missed one is removed again and again
    GATE_TAYLOR = "gate_taylor"  # |dLoss/dalpha| of x + alpha f(x) at alpha = 1
    FISHER = "fisher"  # norm of the diagonal Fisher information of the item's LoRA
    WNORM = "wnorm"  # Frobenius norm of the item's weight matrices
    RANDOM = "random"
    DEPTH = "depth"  # earlier is more important


@dataclass(frozen=True)
class FamilyStatistics:
    """Of one family.

    Attributes:
        similarity: (num_layers, num_layers) CKA of the outputs.
        importance: of each layer's item; only the order and the ratios matter.
    """

    similarity: Matrix
    importance: tuple[float, ...]


@dataclass(frozen=True)
class ProbeCost:
    """What a probe measured along the way and what it took.

    Attributes:
        loss_full: loss of the model with all items, nats per token.
        num_tokens: tokens with loss.
        seconds: wall clock time.
        bytes_read: of streamed weights; 0 where the model is resident.
    """

    loss_full: float
    num_tokens: int
    seconds: float
    bytes_read: int


@dataclass(frozen=True)
class Statistics:
    """Of a model.

    Attributes:
        families: every family.
        source: where they come from, e.g. `public`: the coordinator, on calibration text.
        score: which importance it is, e.g. `loo`.
        cost: of the probe; None where nobody measured it.
    """

    families: dict[Family, FamilyStatistics]
    source: str
    score: str
    cost: ProbeCost | None = None


def average(
    reports: Sequence[Statistics], weights: Sequence[float], *, trim: float = 0.1
) -> Statistics:
    """The cohort's statistics: weighted mean of the devices' reports, entry by entry.

    From 5 reports on, the highest and the lowest values of each entry are left out, so that a few
    odd devices decide nothing. Of `cost`, the loss is averaged and the rest is summed.

    Args:
        reports: one per device.
        weights: positive, as many; tokens a report is based on.
        trim: share of the reports to leave out on each side, rounded up.

    Raises:
        ValueError: no reports, they do not describe the same items by the same score, a number is
            not finite, or a weight is not positive.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if not reports or shares.shape != (len(reports),):
        raise ValueError(f"expected a weight per report, got {len(reports)} and {len(weights)}")
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be at least 0 and below 0.5, got {trim}")

    def mean(values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return _trimmed_mean(np.stack(values), shares, trim)

    return Statistics(
        _combined(reports, mean), "cohort", reports[0].score, _total_cost(reports, shares)
    )


def smoothed(old: Statistics, new: Statistics, beta: float = 0.7) -> Statistics:
    """Exponential moving average over probes; the old ones weigh `beta`.

    Raises:
        ValueError: the two do not describe the same items by the same score.
    """

    def mix(values: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        before, now = values
        return beta * before + (1 - beta) * now

    return Statistics(_combined([old, new], mix), new.source, new.score, new.cost)


def _combined(
    reports: Sequence[Statistics],
    combine: Callable[[list[NDArray[np.float64]]], NDArray[np.float64]],
) -> dict[Family, FamilyStatistics]:
    """Every family's matrices and scores, made one; similarities symmetric and within [0, 1]."""
    first = reports[0]
    families = {}
    for family in first.families:
        matrices, scores = [], []
        for report in reports:
            if report.score != first.score or set(report.families) != set(first.families):
                raise ValueError(
                    f"reports do not describe the same: {report.score} of "
                    f"{sorted(report.families)}, {first.score} of {sorted(first.families)}"
                )
            matrices.append(np.asarray(report.families[family].similarity, dtype=np.float64))
            scores.append(np.asarray(report.families[family].importance, dtype=np.float64))
        size = len(scores[0])
        for matrix, score in zip(matrices, scores, strict=True):
            if matrix.shape != (size, size) or score.shape != (size,):
                raise ValueError(f"expected {size} items, got {matrix.shape} and {score.shape}")
            if not (np.isfinite(matrix).all() and np.isfinite(score).all()):
                raise ValueError(f"the {family.value} statistics of a report are not finite")
        similarity = combine(matrices)
        similarity = np.clip((similarity + similarity.T) / 2, 0.0, 1.0)
        families[family] = FamilyStatistics(similarity, tuple(combine(scores).tolist()))
    return families


def _trimmed_mean(
    values: NDArray[np.float64], weights: NDArray[np.float64], trim: float
) -> NDArray[np.float64]:
    """Weighted mean over the first axis, without each entry's extremes."""
    count = len(values)
    cut = min(math.ceil(trim * count), (count - 1) // 2) if count >= _FEWEST_TO_TRIM else 0
    order = np.argsort(values, axis=0, kind="stable")[cut : count - cut]
    kept, shares = np.take_along_axis(values, order, axis=0), weights[order]
    result: NDArray[np.float64] = (kept * shares).sum(axis=0) / shares.sum(axis=0)
    return result


def _total_cost(reports: Sequence[Statistics], weights: NDArray[np.float64]) -> ProbeCost | None:
    costs = [report.cost for report in reports if report.cost is not None]
    if len(costs) < len(reports):
        return None
    return ProbeCost(
        loss_full=float(np.average([cost.loss_full for cost in costs], weights=weights)),
        num_tokens=sum(cost.num_tokens for cost in costs),
        seconds=sum(cost.seconds for cost in costs),
        bytes_read=sum(cost.bytes_read for cost in costs),
    )


def statistics_to_json(statistics: Statistics) -> Json:
    """Statistics as JSON values."""
    families = {
        family.value: {
            "similarity": np.asarray(item.similarity).tolist(),
            "importance": list(item.importance),
        }
        for family, item in statistics.families.items()
    }
    return {
        "families": families,
        "source": statistics.source,
        "score": statistics.score,
        "cost": asdict(statistics.cost) if statistics.cost else None,
    }


def statistics_from_json(data: Json) -> Statistics:
    """The statistics that `statistics_to_json` wrote."""
    families = {
        Family(name): FamilyStatistics(np.array(item["similarity"]), tuple(item["importance"]))
        for name, item in data["families"].items()
    }
    cost = ProbeCost(**data["cost"]) if data.get("cost") else None
    return Statistics(families, data["source"], data["score"], cost)
