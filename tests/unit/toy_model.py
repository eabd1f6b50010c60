"""A model that exists only as numbers, small enough to plan by hand."""

import numpy as np

from fedpruner_common.adapters import LoraTarget
from fedpruner_common.budget import MemoryProfile
from fedpruner_common.components import ComponentId, Kind, all_components
from fedpruner_common.spec import ModelSpec
from fedpruner_common.statistics import Family, FamilyStatistics, Granularity, Statistics

MIB = 1 << 20


def toy_memory(num_layers: int, **changes: object) -> MemoryProfile:
    """Attention weighs 1 MiB, ffn 2 MiB, everything else nothing.

    So a submodel costs floor + 12 MiB of text + its weights.
    """
    components = all_components(num_layers)
    values: dict[str, object] = {
        "weight_bytes": {c: MIB if c.kind is Kind.ATTENTION else 2 * MIB for c in components},
        "shared_weight_bytes": 0,
        "disk_ratio": 0.0,
        "lora_parameters": dict.fromkeys(components, 0),
        "saved_bytes": dict.fromkeys(components, 0),
        "shared_saved_bytes": 0,
        "layer_input_bytes": 0,
        "temporary_bytes": dict.fromkeys(components, 0),
        "loss_bytes": 0,
        "gradient_checkpointing": False,
    }
    return MemoryProfile(**{**values, **changes})  # type: ignore[arg-type]


def toy_spec(num_layers: int, memory: MemoryProfile | None = None) -> ModelSpec:
    """One base tensor and one LoRA module per component, one shared tensor."""
    components = all_components(num_layers)
    return ModelSpec(
        num_layers=num_layers,
        shared_tensors=("embed",),
        component_tensors={c: (f"{c}.weight",) for c in components},
        lora_targets={
            c: (LoraTarget(f"{c}.proj", in_features=4, out_features=6),) for c in components
        },
        fan_in_fan_out=False,
        memory=memory or toy_memory(num_layers),
    )


def toy_statistics(
    importance: tuple[float, ...],
    *,
    granularity: Granularity = Granularity.LAYER,
    similarity: np.ndarray | None = None,
    ffn_importance: tuple[float, ...] | None = None,
) -> Statistics:
    """The same similarity (all different by default) and importance for every family."""
    n = len(importance)
    if similarity is None:
        distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
        similarity = np.exp(-distance * (1 + np.arange(n).mean() / 10))
    families = {family: FamilyStatistics(similarity, importance) for family in granularity.families}
    if ffn_importance is not None:
        families[Family.FFN] = FamilyStatistics(similarity, ffn_importance)
    return Statistics(families, source="public", score="loo")


def component(text: str) -> ComponentId:
    return ComponentId.parse(text)
