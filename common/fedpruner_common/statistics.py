"""What planning knows about a model's layers: how alike they are, and what each one is worth.

numpy is loaded where it is needed: an agent's own process does without until it measures layers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from fedpruner_common.components import ComponentId, Kind

if TYPE_CHECKING:
    from fedpruner_common.similarity import Matrix

Json = dict[str, Any]


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


def statistics_to_json(statistics: Statistics) -> Json:
    """Statistics as JSON values."""
    families = {
        family.value: {
            "similarity": item.similarity.tolist(),
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
    import numpy as np

    families = {
        Family(name): FamilyStatistics(np.array(item["similarity"]), tuple(item["importance"]))
        for name, item in data["families"].items()
    }
    cost = ProbeCost(**data["cost"]) if data.get("cost") else None
    return Statistics(families, data["source"], data["score"], cost)
