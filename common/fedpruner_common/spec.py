"""What the coordinator must know of a base model to plan with it: facts, no weights.

Made once per model and training shape by the server's `describe` (with torch, on the meta device);
from then on plain numbers and names.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fedpruner_common.adapters import LoraTarget, adapter_shapes
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import ComponentId, all_components
from fedpruner_common.submodel import Submodel


@dataclass(frozen=True)
class ModelSpec:
    """A base model as the planner sees it.

    Attributes:
        num_layers: transformer layers.
        shared_tensors: names every submodel needs (embeddings, final norm, head).
        component_tensors: component -> names it needs besides. A tensor that two components use
            (a norm in front of parallel halves) is named by both.
        lora_targets: component -> its linear modules that carry LoRA.
        fan_in_fan_out: the linear modules store (in, out), as GPT-2's Conv1D does.
        memory: bytes of everything, for the training shape the spec was made for.
    """

    num_layers: int
    shared_tensors: tuple[str, ...]
    component_tensors: dict[ComponentId, tuple[str, ...]]
    lora_targets: dict[ComponentId, tuple[LoraTarget, ...]]
    fan_in_fan_out: bool
    memory: MemoryProfile

    def full(self) -> Submodel:
        return Submodel.full(self.num_layers)

    def tensor_names(self, submodel: Submodel) -> tuple[str, ...]:
        """Base tensors a submodel needs, sorted."""
        names = set(self.shared_tensors)
        for component in submodel.components:
            names.update(self.component_tensors[component])
        return tuple(sorted(names))

    def targets(self, components: Iterable[ComponentId]) -> tuple[LoraTarget, ...]:
        """LoRA modules of these components, in their order."""
        return tuple(t for component in components for t in self.lora_targets[component])

    def adapter_shapes(
        self, r: int, components: Iterable[ComponentId] | None = None
    ) -> dict[str, tuple[int, int]]:
        """Canonical name -> shape of the adapter tensors, of all components if none are given."""
        if components is None:
            components = all_components(self.num_layers)
        return adapter_shapes(self.targets(components), r)
