"""What planning knows about a model's layers: how alike they are, and what each one is worth."""

from dataclasses import dataclass
from enum import Enum

from fedpruner_common.components import ComponentId, Kind
from fedpruner_server.core.similarity import Matrix


class Family(str, Enum):
    """Items that are grouped together; item i of a family belongs to layer i."""

    LAYER = "layer"
    ATTENTION = "attention"
    FFN = "ffn"

    def components(self, layer: int) -> tuple[ComponentId, ...]:
        """The components that live and die together as this family's item of a layer."""
        if self is Family.LAYER:
            return tuple(ComponentId(layer, kind) for kind in Kind)
        return (ComponentId(layer, Kind(self.value)),)


class Granularity(str, Enum):
    """What is pruned as a whole: layers (FedPruner) or halves of layers (FedPruner+)."""

    LAYER = "layer"
    COMPONENT = "component"

    @property
    def families(self) -> tuple[Family, ...]:
        return (Family.LAYER,) if self is Granularity.LAYER else (Family.ATTENTION, Family.FFN)


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
class Statistics:
    """Of a model.

    Attributes:
        families: every family.
        source: where they come from, e.g. `public`: the coordinator, on calibration text.
        score: which importance it is, e.g. `loo`.
    """

    families: dict[Family, FamilyStatistics]
    source: str
    score: str
