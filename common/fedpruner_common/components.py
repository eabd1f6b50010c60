"""A component: one half of a transformer layer, the smallest thing that can be pruned."""

from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """Which half of a layer: attention (MHA) or feed-forward network, each with its norm."""

    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True, order=True)
class ComponentId:
    """One half of one layer of the global model; orders by depth, attention before ffn.

    Attributes:
        layer: index in the global model, from 0.
        kind: attention or ffn.
    """

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind.value}"

    @classmethod
    def parse(cls, text: str) -> "ComponentId":
        """The component that `str` wrote.

        Raises:
            ValueError: not of the form `3.attention` or `3.ffn`.
        """
        layer, _, kind = text.partition(".")
        return cls(int(layer), Kind(kind))


def all_components(num_layers: int) -> tuple[ComponentId, ...]:
    """Every component of a model, in the order of its forward pass."""
    return tuple(ComponentId(layer, kind) for layer in range(num_layers) for kind in Kind)
