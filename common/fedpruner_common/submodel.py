"""A submodel: the components one client keeps in one round, under their global indices.

Nothing is ever renumbered: layer 7 of the global model is layer 7 of every submodel, so that a
tensor has one name everywhere (base checkpoint, wire, adapter, export).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpruner_common.components import ComponentId, Kind, all_components


@dataclass(frozen=True)
class Submodel:
    """Ordered subset of the components of a model; the shared tensors belong to every submodel.

    Attributes:
        num_layers: of the global model.
        components: kept components, in the order of the forward pass, without duplicates.
    """

    num_layers: int
    components: tuple[ComponentId, ...]

    def __post_init__(self) -> None:
        if list(self.components) != sorted(set(self.components)):
            raise ValueError("components must be sorted and unique; build with Submodel.of")
        if (
            self.components
            and not 0 <= self.components[0].layer <= self.last.layer < self.num_layers
        ):
            raise ValueError(f"a component lies outside the model's {self.num_layers} layers")

    @classmethod
    def of(cls, num_layers: int, components: Iterable[ComponentId]) -> "Submodel":
        """The submodel that keeps exactly these components, in any order given."""
        return cls(num_layers, tuple(sorted(set(components))))

    @classmethod
    def full(cls, num_layers: int) -> "Submodel":
        """The submodel that is the whole model."""
        return cls(num_layers, all_components(num_layers))

    @property
    def last(self) -> ComponentId:
        return self.components[-1]

    @property
    def is_full(self) -> bool:
        return len(self.components) == 2 * self.num_layers

    def skipped(self) -> dict[int, frozenset[Kind]]:
        """What is dropped: layer -> kinds, layers that lose nothing left out."""
        kept = set(self.components)
        dropped: dict[int, frozenset[Kind]] = {}
        for layer in range(self.num_layers):
            kinds = frozenset(kind for kind in Kind if ComponentId(layer, kind) not in kept)
            if kinds:
                dropped[layer] = kinds
        return dropped

    def layers(self) -> tuple[int, ...]:
        """Layers of which at least one half is kept, ascending."""
        return tuple(sorted({component.layer for component in self.components}))

    def dropped_runs(self) -> tuple[tuple[ComponentId, ...], ...]:
        """Stretches of dropped components that one bridge can stand for, in forward order.

        Maximal, except that a layer's dropped attention is on its own where its ffn is kept: with
        parallel halves that ffn reads what comes into the layer, which must be right by then.
        """
        kept = set(self.components)
        runs: list[list[ComponentId]] = [[]]
        for layer in range(self.num_layers):
            attention, ffn = ComponentId(layer, Kind.ATTENTION), ComponentId(layer, Kind.FFN)
            if attention in kept or ffn in kept:
                runs.append([])
            runs[-1] += [component for component in (attention, ffn) if component not in kept]
            if ffn in kept:
                runs.append([])
        return tuple(tuple(run) for run in runs if run)

    def picture(self) -> str:
        """One character a layer, for people: both halves ■, attention ▀, ffn ▄, none ·."""
        dropped = self.skipped()
        symbols = {
            frozenset[Kind](): "■",
            frozenset({Kind.FFN}): "▀",
            frozenset({Kind.ATTENTION}): "▄",
            frozenset(Kind): "·",
        }
        return "".join(symbols[dropped.get(layer, frozenset())] for layer in range(self.num_layers))
